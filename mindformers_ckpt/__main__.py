"""`python -m mindformers_ckpt`: the command line."""

from mindformers_ckpt.cli.main import main

main()
