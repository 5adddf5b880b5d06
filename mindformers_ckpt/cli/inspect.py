"""`mindformers-ckpt inspect`: what is at a path."""

from __future__ import annotations

from pathlib import Path

import click

from mindformers_ckpt.cli.notices import amount, say, say_json, warn
from mindformers_ckpt.cli.options import STEP, AnyPath, StrategyPath, Whole, json_option
from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.look.inspect import Inspection, inspect
from mindformers_ckpt.look.parameters import Parameter
from mindformers_ckpt.look.tree import tree
from mindformers_ckpt.words import counted, short_spans, spans

_BOXES_OF = 4  # parameters of which all boxes are shown
_BOXES = 64


@click.command("inspect")
@click.argument("path", type=AnyPath())
@click.option(
    "--strategy",
    "--src-strategy",
    type=StrategyPath(),
    help="Strategy of rank folders: file, merged file or folder.  [default: a folder `strategy` in or beside them]",
)
@click.option("--name", help="Parameters whose names hold this text, or fit it with * and ?.")
@click.option("--rank", type=Whole(min=0), help="What the file of this rank holds, and where in it.")
@click.option("--flat", is_flag=True, help="A line for each parameter instead of a tree.")
@STEP
@json_option
def command(
    path: Path, strategy: Path | None, name: str | None, rank: int | None, flat: bool, step: str | None, as_json: bool
) -> None:
    """Say what is at PATH: a checkpoint, Hugging Face folder, adapter, strategy, plan or result.

    Headers are read only. Parameters are a tree of their names; layers that are alike are one branch of it. With
    --name their boxes are shown, and the ranks that hold each.
    """
    found = inspect(path, strategy, step=step)
    if name is not None:
        found = found.only(name)
    if as_json:
        say_json(found.as_json() if rank is None else _rank_as_json(found, rank))
    elif rank is not None:
        _say_rank(found, rank)
    else:
        _say(found, flat, with_boxes=name is not None)


def _say(found: Inspection, flat: bool, with_boxes: bool) -> None:
    say(f"{found.path}: {found.what}")
    for label, text in found.facts.items():
        say(f"  {label + ':':<17} {text}")
    for kind, total in found.totals.items():
        say(f"  {kind + ':':<17} {counted(total.tensors, 'tensor')}, {amount(total.nbytes)}")
    for line in found.odd:
        say(f"  note: {line}")
    if not found.parameters:
        return
    say("")
    if flat:
        for parameter in found.parameters:
            say(_line(parameter))
    else:
        for line in tree(found.parameters, amount):
            say(line)
    if with_boxes and len(found.parameters) <= _BOXES_OF and found.strategy is not None:
        for parameter in found.parameters:
            _say_boxes(found, parameter)


def _line(parameter: Parameter) -> str:
    return (
        f"{parameter.name} {parameter.dtype.name} {list(parameter.shape)} {amount(parameter.nbytes)}, {parameter.cut}, "
        f"on ranks {short_spans(parameter.ranks)}"
    )


def _say_boxes(found: Inspection, parameter: Parameter) -> None:
    """The boxes of a parameter with their ranks."""
    if parameter.told is not None:
        boxes = [(shard.box, shard.path.name) for shard in parameter.told.shards]
    else:
        held = parameter.boxes(found.stage_size)
        boxes = [(box, f"{'rank' if len(ranks) == 1 else 'ranks'} {short_spans(ranks)}") for box, ranks in held]
    several = f" of stage {parameter.stages[0]}, as on stages {spans(parameter.stages)}" * (len(parameter.stages) > 1)
    say("")
    say(f"{parameter.name}: {counted(len(boxes), 'box', 'boxes')}{several}")
    for box, holders in boxes[:_BOXES]:
        say(f"  {box!s:<24} {holders}")
    if len(boxes) > _BOXES:
        say(f"  … and {len(boxes) - _BOXES} more (--json with --rank, or mindformers-ckpt show, tells all)")


def _say_rank(found: Inspection, rank: int) -> None:
    held = found.held_by(rank)
    if not held:
        raise PlanError(f"the files of rank {rank} hold none of these parameters")
    if found.strategy is None and "ranks" in found.facts:
        warn(["the strategy of the ranks is not known, so that boxes are those within the shards; give --strategy"])
    for path in dict.fromkeys(one.path for one in held):
        say(f"{path}:")
        for one in held:
            if one.path == path:
                size = one.box.volume * one.dtype.itemsize
                say(f"  {one.name} {one.dtype.name} {one.box}, {amount(size)} at byte {one.offset:,}")


def _rank_as_json(found: Inspection, rank: int) -> dict[str, object]:
    return {
        "path": str(found.path),
        "rank": rank,
        "parameters": [
            {
                "name": one.name,
                "dtype": one.dtype.name,
                "start": list(one.box.start),
                "stop": list(one.box.stop),
                "file": str(one.path),
                "offset": one.offset,
            }
            for one in found.held_by(rank)
        ],
    }
