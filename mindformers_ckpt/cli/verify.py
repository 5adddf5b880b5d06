"""`mindformers-ckpt verify`: is a result what its manifest says, or what its source gives?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mindformers_ckpt.cli.notices import complain, say, say_json, say_some, warn
from mindformers_ckpt.cli.options import CONTENTS, STEP, AnyPath, LocalPath, StrategyPath, json_option, processes_option
from mindformers_ckpt.cli.progress import show_progress
from mindformers_ckpt.look.verify import verify
from mindformers_ckpt.look.verify_model import Difference, Verification
from mindformers_ckpt.words import counted


class Share(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A share of all: "5%" or 0.05."""

    name = "share"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        try:
            share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            self.fail(f"{value!r} is not a share; write it like 5% or 0.05", param, ctx)
        if not 0 < share <= 1:
            self.fail(f"{value!r} is not between 0 and 100%", param, ctx)
        return share


@click.command("verify")
@click.argument("result", type=AnyPath())
@click.option("--strategy", type=StrategyPath(), help="Strategy of the result; left out: what its manifest names.")
@click.option("--against", type=AnyPath(), metavar="SOURCE", help="Compare with what this checkpoint gives.")
@click.option("--src-strategy", type=StrategyPath(), help="Strategy of the source, for --against.")
@STEP
@CONTENTS
@click.option("--sample", type=Share(), default="100%", show_default=True, help="Share of the tensors to read.")
@click.option(
    "--public-key", type=LocalPath(), metavar="KEY", help="Check the signature of the fingerprint, made with --sign."
)
@processes_option(help="Processes that compare, with --against.")
@json_option
@click.option("--quiet", is_flag=True, help="Print differences and errors only.")
def command(result: Path, as_json: bool, quiet: bool, **asked: Any) -> None:
    """Check a RESULT of this program: files, sizes, ranks, hashes, CRC trailers, fingerprints, replicas.

    With --against, compare every rank's file bit by bit with what the source gives under the result's --strategy.
    Exits with 1 when something differs.
    """
    if asked["against"] is None and (asked["src_strategy"] is not None or asked["step"] is not None):
        raise click.UsageError("--src-strategy and --step are of the source; give it with --against.")
    if asked["against"] is not None and asked["public_key"] is not None:
        raise click.UsageError("--public-key checks the result by its manifest; leave --against out.")
    with show_progress("verify", quiet=quiet or as_json) as progress:
        found = verify(result, progress=progress, may_fork=True, **asked)
    warn(found.warnings)
    if as_json:
        say_json(_as_json(result, found))
    else:
        _report(result, found, quiet)
    if not found.ok:
        click.get_current_context().exit(1)


def _report(result: Path, found: Verification, quiet: bool) -> None:
    if not quiet:
        for line in found.checked:
            say(f"checked: {line}")
        for line in found.unchecked:
            say(f"not checked: {line}")
    say_some(found.differences, complain)
    if found.ok and not quiet:
        say(f"{result}: nothing differs")
    elif not found.ok:
        complain(f"{result}: {counted(len(found.differences), 'difference')}")


def _as_json(result: Path, found: Verification) -> dict[str, Any]:
    return {
        "path": str(result),
        "ok": found.ok,
        "checked": found.checked,
        "unchecked": found.unchecked,
        "differences": [_difference(difference) for difference in found.differences],
        "warnings": found.warnings,
    }


def _difference(difference: Difference) -> dict[str, Any]:
    box = difference.box
    return {
        "what": difference.what,
        "file": None if difference.file is None else str(difference.file),
        "tensor": difference.tensor,
        "rank": difference.rank,
        "box": None if box is None else [box.start, box.stop],
        "offset": difference.offset,
    }
