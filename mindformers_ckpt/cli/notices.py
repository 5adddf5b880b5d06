"""What the command line prints. All of it passes through here, since names from outside are in it.

Results go to stdout, errors and notices to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import click

from mindformers_ckpt.printable import ascii_json, printable


def say(text: str) -> None:
    """Print a line of a result."""
    click.echo(printable(text))


def say_json(value: Any) -> None:
    """Print a result for programs: one line of ASCII, whatever the locale."""
    click.echo(ascii_json(value))


def warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        click.secho("warning: ", fg="yellow", err=True, nl=False)
        click.echo(printable(warning), err=True)


def complain(message: str) -> None:
    """Print an error."""
    click.secho("error: ", fg="red", bold=True, err=True, nl=False)
    click.echo(printable(message), err=True)


def escape_what_the_locale_lacks() -> None:
    """Have stdout and stderr print an escape for a character that their encoding does not know."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def amount(size: float) -> str:
    """A number of bytes for people: "1.25 GB"."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    return f"{size:,.2f} GB"
