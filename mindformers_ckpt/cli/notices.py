"""Notices to the user on stderr, so that stdout is for results."""

from __future__ import annotations

from collections.abc import Iterable

import click


def warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        click.secho("warning: ", fg="yellow", err=True, nl=False)
        click.echo(warning, err=True)


def amount(size: float) -> str:
    """A number of bytes for people: "1.25 GB"."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    return f"{size:,.2f} GB"
