"""What the command line prints. All of it passes through here, since names from outside are in it.

Results go to stdout, errors and notices to stderr. What cannot be printed stops no work: a notice is lost then, and
a result on stdout is an error once all is done.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import click

from mindformers_ckpt.cli.folding import folded, width_of
from mindformers_ckpt.errors import CheckpointError
from mindformers_ckpt.printable import ascii_json, printable

# What `--quiet` and `--verbose` say; of one command a process.
is_quiet = False
is_verbose = False


class OutputError(CheckpointError, OSError):
    """Stdout cannot be written: a full disk, a closed pipe."""


def say(text: str) -> None:
    """Print a line of a result. Raises OutputError."""
    _to_stdout(folded(printable(text), width_of(sys.stdout)))


def say_some(lines: Sequence[object], tell: Callable[[str], None] = say) -> None:
    """Print the first 20 lines of a list, and how many there are more."""
    for line in lines[:20]:
        tell(str(line))
    if len(lines) > 20:
        tell(f"… and {len(lines) - 20} more (--json lists all)")


class Piece(NamedTuple):
    """A part of a line, on a background of this colour (red, green, blue) where there are colours."""

    text: str
    colour: tuple[int, int, int] | None = None


def say_drawn(line: Iterable[Piece]) -> None:
    """Print a line of a drawing. Raises OutputError."""
    words = []
    for piece in line:
        text = printable(piece.text)
        colour = None if "NO_COLOR" in os.environ else piece.colour
        words.append(text if colour is None else click.style(text, fg=(0, 0, 0), bg=colour))
    _to_stdout("".join(words).rstrip())


def draws_unicode() -> bool:
    """Whether stdout can show lines of boxes."""
    try:
        "│─┼".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def say_fingerprints(digests: Mapping[str, str], source: str, signature: str) -> None:
    """Print the fingerprints of a result by its folders, that of the source, what became of signatures."""
    for folder, digest in digests.items():
        also = ", the same as that of the source" if digest == source else ""
        say(f"fingerprint {digest}{also}" + ("" if folder == "." else f"  {folder}"))
    if len(digests) == 1 and source not in digests.values():
        told = source or "not known, for not all of it went into the result; fingerprint SOURCE counts it"
        say(f"fingerprint of the source {told}")
    if signature:
        say(f"signature {signature}")


def say_json(value: Any) -> None:
    """Print a result for programs: one line of ASCII, whatever the locale. Raises OutputError."""
    _to_stdout(ascii_json(value))


def warn(warnings: Iterable[str]) -> None:
    for warning in () if is_quiet else warnings:
        notice("warning: ", printable(warning), fg="yellow")


def complain(message: str, cause: BaseException | None = None) -> None:
    """Print an error, and where it came from if that is wanted."""
    if is_verbose and cause is not None:
        import traceback

        lines = traceback.format_exception(type(cause), cause, cause.__traceback__)
        notice("", "".join(printable(line.rstrip("\n").replace("\n", "\n  ")) + "\n" for line in lines).rstrip("\n"))
    notice("error: ", printable(message), fg="red", bold=True)


def notice(label: str, text: str, **style: Any) -> None:
    """Print a line on stderr, where that is possible."""
    if "NO_COLOR" in os.environ:
        style = {}
    if label:
        label, whole = label.rstrip(), folded(label + text, width_of(sys.stderr))
        text = whole[len(label) :]
    with contextlib.suppress(OSError):
        click.echo(click.style(label, **style) if style else label, err=True, nl=False)
        click.echo(text, err=True)


def open_closed_streams() -> None:
    """Give stdin, stdout and stderr a place where they are closed, as some daemons have them.

    The first file that is opened would otherwise get the number of stderr, and with it what is printed there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        descriptor = os.open(os.devnull, os.O_RDWR)
        os.set_inheritable(descriptor, True)  # workers print, too
        stream = open(descriptor, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)


def _to_stdout(text: str) -> None:
    try:
        click.echo(text)
    except OSError as error:
        # What is still in the buffer would be an error of its own when the program ends.
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        raise OutputError(
            f"stdout cannot be written: {error.strerror}. The report is lost; what the command did is done"
        ) from error


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
