"""`mindformers-ckpt diff`: what differs between two checkpoints, as whole tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from mindformers_ckpt.cli.notices import say, say_json, say_some, warn
from mindformers_ckpt.cli.options import CONTENTS, AnyPath, Number, StrategyPath, json_option
from mindformers_ckpt.cli.progress import show_progress
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.look.diff import Diff, TensorDiff, diff


@click.command("diff")
@click.argument("a", type=AnyPath())
@click.argument("b", type=AnyPath())
@click.option("--strategy-a", "strategy", type=StrategyPath(), help="Strategy of the rank folders of A.")
@click.option("--strategy-b", "right_strategy", type=StrategyPath(), help="Strategy of the rank folders of B.")
@click.option(
    "--step-a", "step", help="Of several files of A: the epoch and step to read, like 3_150, or a file's name."
)
@click.option("--step-b", "right_step", help="The same of B.")
@click.option(
    "--tolerance",
    type=Number(min=0),
    default=0.0,
    show_default=True,
    help="Largest |difference| of an element that is allowed.",
)
@CONTENTS
@json_option
@click.option("--quiet", is_flag=True, help="Print nothing but errors; the exit code is 1 where they differ.")
def command(a: Path, b: Path, as_json: bool, quiet: bool, **asked: Any) -> None:
    """Compare the checkpoints A and B as whole tensors, under any strategies, in any formats.

    Exits with 1 when they differ by more than the tolerance.
    """
    with show_progress("diff", quiet=quiet or as_json) as progress:
        found = diff(a, b, progress=progress, **asked)
    warn(found.warnings)
    if as_json:
        say_json(_as_json(found))
    elif not quiet:
        _report(found)
    if not found.ok:
        click.get_current_context().exit(1)


def _report(found: Diff) -> None:
    for side, names in (("A", found.only_left), ("B", found.only_right)):
        say_some([f"only in {side}: {name}" for name in names])
    say_some([_describe(tensor) for tensor in found.tensors])
    within = len(found.tensors) - len(found.beyond)
    allowed = f", {within} within {found.tolerance:g}" if found.tolerance else ""
    say(
        f"{found.equal} tensors are equal bit for bit{allowed}, {len(found.beyond)} differ; "
        f"{len(found.only_left)} only in A, {len(found.only_right)} only in B"
    )


def _describe(tensor: TensorDiff) -> str:
    left, right = _form(tensor.left), _form(tensor.right)
    form = left if left == right else f"{left} in A, {right} in B"
    if tensor.differing is None:
        return f"{tensor.name}: {form}" + ("; the bits differ" if left == right else "")
    if tensor.where is None or tensor.values is None:
        return f"{tensor.name}: {form}; the values are equal"
    return (
        f"{tensor.name}: {form}; {tensor.differing} of {tensor.left.size} elements differ, by at most "
        f"{tensor.largest:.6g} at {list(tensor.where)} (A {tensor.values[0]:.9g}, B {tensor.values[1]:.9g}), "
        f"‖A - B‖ / ‖A‖ = {tensor.relative:.3g}"
    )


def _form(spec: TensorSpec) -> str:
    return f"{spec.dtype.name}{list(spec.shape)}"


def _as_json(found: Diff) -> dict[str, Any]:
    return {
        "ok": found.ok,
        "equal": found.equal,
        "only_in_a": found.only_left,
        "only_in_b": found.only_right,
        "tolerance": found.tolerance,
        "tensors": [_tensor(tensor, found.tolerance) for tensor in found.tensors],
        "warnings": list(found.warnings),
    }


def _tensor(tensor: TensorDiff, tolerance: float) -> dict[str, Any]:
    values = None if tensor.values is None else [_number(value) for value in tensor.values]
    return {
        "name": tensor.name,
        "dtype": [tensor.left.dtype.name, tensor.right.dtype.name],
        "shape": [tensor.left.shape, tensor.right.shape],
        "within_tolerance": tensor.within(tolerance),
        "differing": tensor.differing,
        "largest": _number(tensor.largest),
        "where": tensor.where,
        "values": values,
        "relative": _number(tensor.relative),
    }


def _number(value: float | None) -> float | str | None:
    """A number as JSON has it: what is infinite, or none, is a word."""
    return value if value is None or math.isfinite(value) else str(value)
