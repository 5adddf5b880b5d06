"""`--quiet` and `--verbose`, which every command has."""

from __future__ import annotations

import click

from mindformers_ckpt.cli import notices


def add_verbosity(command: click.Command) -> None:
    """Give a command the two options, where it has not yet; they take effect before it runs."""
    have = {name: parameter for parameter in command.params for name in parameter.opts}
    if "--quiet" in have:
        have["--quiet"].callback = _be_quiet
    else:
        command.params.append(
            click.Option(
                ["--quiet"], is_flag=True, expose_value=False, callback=_be_quiet, help="Print no notices on stderr."
            )
        )
    if "--verbose" not in have:
        command.params.append(
            click.Option(
                ["-v", "--verbose"],
                is_flag=True,
                expose_value=False,
                callback=_be_verbose,
                help="Print what is logged, and of an error where it came from.",
            )
        )


def _be_quiet(context: click.Context, parameter: click.Parameter, value: bool) -> bool:
    notices.is_quiet = value
    return value


def _be_verbose(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    notices.is_verbose = value
    if value:
        import logging

        from mindformers_ckpt.log import log

        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
