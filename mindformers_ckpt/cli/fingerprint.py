"""`mindformers-ckpt fingerprint`: a checkpoint's fingerprint, whatever its strategy and format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mindformers_ckpt.checksums.digest import described
from mindformers_ckpt.cli.notices import say, say_json, warn
from mindformers_ckpt.cli.options import CONTENTS, STEP, AnyPath, StrategyPath, json_option
from mindformers_ckpt.cli.progress import show_progress
from mindformers_ckpt.look.fingerprint import Fingerprint, fingerprint

STRATEGY = click.option(
    "--strategy",
    "--src-strategy",
    "strategy",
    type=StrategyPath(),
    help="Strategy of the rank folders; left out for complete weights.",
)


@click.command("fingerprint")
@click.argument("path", type=AnyPath())
@STRATEGY
@STEP
@CONTENTS
@click.option("--tensors", is_flag=True, help="Print the checksum of every tensor, too.")
@json_option
@click.option("--quiet", is_flag=True, help="Print the fingerprint and errors only.")
def command(
    path: Path,
    strategy: Path | None,
    step: str | None,
    contents: str,
    tensors: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Print the fingerprint of the checkpoint at PATH.

    It is the same under every strategy, in every format and for every number of ranks: SHA-256 over names, types,
    shapes, and the CRC-64/NVME of every whole tensor. One of each replica is read; verify compares them.
    """
    with show_progress("fingerprint", quiet=quiet or as_json) as progress:
        found = fingerprint(path, strategy, step=step, contents=contents, progress=progress)
    warn(found.warnings)
    if as_json:
        say_json(_as_json(path, found))
        return
    if tensors:
        for tensor in found.tensors:
            say(f"{tensor.hex}  {tensor.dtype}{list(tensor.shape)}  {tensor.name}")
    say(f"{found.digest}  {path}  ({len(found.tensors)} tensors)")


def _as_json(path: Path, found: Fingerprint) -> dict[str, Any]:
    tensors = described(found.tensors)
    return {"path": str(path), "digest": found.digest, "tensors": tensors, "warnings": list(found.warnings)}
