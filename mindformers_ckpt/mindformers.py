"""Our engine under MindFormers' own `TransformCkpt`: `from mindformers_ckpt.mindformers import install`."""

from mindformers_ckpt.integrations.mindformers import MODULE, install, installed, uninstall

__all__ = ["MODULE", "install", "installed", "uninstall"]
