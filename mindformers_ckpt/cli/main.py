"""The command `mindformers-ckpt`: finds the subcommand, prints errors, sets the exit code.

Exit codes: 0 done, 1 wrong input or failed, 2 usage.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from mindformers_ckpt import __version__
from mindformers_ckpt.errors import CheckpointError

# command -> (module of the command, one line of help). Modules are imported when their command runs.
_COMMANDS = {
    "transform": ("transform", "Re-slice a checkpoint for another parallel strategy."),
}


class _LazyGroup(click.Group):
    """A group that imports only the command that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"mindformers_ckpt.cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mindformers-ckpt")
def cli() -> None:
    """Re-slice MindSpore checkpoints between parallel strategies."""


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; a known error is one message on stderr and exit code 1."""
    try:
        cli.main(arguments, prog_name="mindformers-ckpt", standalone_mode=True)
    except CheckpointError as error:
        click.secho("error: ", fg="red", bold=True, err=True, nl=False)
        click.echo(str(error), err=True)
        sys.exit(1)
