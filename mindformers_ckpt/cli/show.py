"""`mindformers-ckpt show`: a tensor as it is cut before and after, and the whole plan as a page."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from mindformers_ckpt.cli.notices import Piece, amount, draws_unicode, say, say_drawn, say_json, warn
from mindformers_ckpt.cli.options import LocalPath, json_option, planned, request_of, request_options
from mindformers_ckpt.look.picture import Drawn, Picture, grid, picture
from mindformers_ckpt.words import counted, short_spans

_ROWS, _COLUMNS = 8, 4
_CELL = 13
_FLOWS = 12
# Okabe and Ito's colours, which all kinds of eyes tell apart; the ranks stand in every box as well.
_COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (213, 94, 0),
    (204, 121, 167),
    (153, 153, 153),
)


@click.command("show")
@click.argument("name", required=False)
@request_options
@click.option("--plan", "plan_file", type=LocalPath(), help="Show a plan that `mindformers-ckpt plan --out` wrote.")
@click.option("--html", type=LocalPath(), help="Write the whole plan as one page, to look at in a browser.")
@json_option
def command(name: str | None, plan_file: Path | None, html: Path | None, as_json: bool, **asked: Any) -> None:
    """Draw the tensor NAME: how it is cut in the source and in the target, on which ranks, and what goes where.

    Other parameters are those of plan; without --dst-strategy the target is complete weights. With --html the whole
    plan is written as one self-contained page, and NAME may be left out.
    """
    if name is None and html is None:
        raise click.UsageError("Give the NAME of a tensor (mindformers-ckpt inspect lists them), or --html FILE.")
    stages = None
    if plan_file is None:
        prepared = request_of(asked).prepare()
        job, stages = prepared.job, (prepared.source.stage_size, prepared.target.stage_size)
    else:
        job = planned(plan_file, {"destination", "processes"})
    warn(job.plan.warnings)
    if name is not None:
        drawn = picture(job.plan, name)
        if as_json:
            say_json(_as_json(drawn))
        else:
            _say(drawn)
    if html is not None:
        from mindformers_ckpt.look.page import write_page

        write_page(job, html, stages)
        if not as_json:
            say(f"{html}: open it in a browser")


def _say(drawn: Picture) -> None:
    say(f"{drawn.name}: {drawn.dtype} {list(drawn.shape)}, {amount(drawn.nbytes)}")
    down, across = drawn.axes
    if down is not None and len(drawn.shape) > 1:
        say(f"down is axis {down}, across is axis {across}")
    left, right = _side("source", drawn.source, drawn), _side("target", drawn.target, drawn)
    if _width(left) + _width(right) + 3 <= shutil.get_terminal_size((160, 24)).columns:
        height = max(len(left), len(right))
        for number in range(height):
            first = left[number] if number < len(left) else []
            second = right[number] if number < len(right) else []
            say_drawn([*first, Piece(" " * (_width(left) - _length(first) + 3)), *second])
    else:
        for line in (*left, [], *right):
            say_drawn(line)
    say("")
    written = sum(flow.nbytes for flow in drawn.flows)
    say(f"{amount(written)} are written, {amount(drawn.moved)} of them on another rank than they come from")
    for flow in sorted(drawn.flows, key=lambda flow: (-flow.nbytes, flow.source, flow.target))[:_FLOWS]:
        say(f"  rank {flow.source:>4} -> rank {flow.target:>4}  {amount(flow.nbytes)}")
    if len(drawn.flows) > _FLOWS:
        say(f"  … and {len(drawn.flows) - _FLOWS} more pairs of ranks (--json has all)")


def _side(title: str, boxes: Sequence[Drawn], drawn: Picture) -> list[list[Piece]]:
    """One side as lines: a heading, and a grid of cells with ranks; target cells say where they come from."""
    found = grid([one.box for one in boxes], drawn.axes, (_ROWS, _COLUMNS))
    margin = max((len(label) for label in found.rows), default=0)
    bars = "│─┼" if draws_unicode() else "|-+"
    rule = [Piece(" " * margin + " " + bars[2] + (bars[1] * _CELL + bars[2]) * len(found.columns))]
    holders = counted(len({rank for one in boxes for rank in one.ranks}), "rank")
    lines = [[Piece(f"{title}: {counted(len(boxes), 'box', 'boxes')} on {holders}")]]
    lines.append([Piece(" " * (margin + 2) + " ".join(f"{label:^{_CELL}}" for label in found.columns))])
    lines.append(rule)
    colour = partial(_colour, title=title, drawn=drawn)
    texts = [lambda number: short_spans(boxes[number].ranks, 2)]
    if title == "target":
        texts.append(lambda number: _origin(drawn, number))
    for label, row in zip(found.rows, found.cells):
        for text, head in zip(texts, (label, "")):
            lines.append(_row(f"{head:>{margin}} {bars[0]}", row, bars[0], text, colour))
        lines.append(rule)
    if found.more:
        lines.append([Piece(" " * (margin + 1) + found.more)])
    return lines


def _row(
    label: str,
    row: Sequence[tuple[int, ...]],
    bar: str,
    text: Callable[[int], str],
    colour: Callable[[Sequence[int]], tuple[int, int, int] | None],
) -> list[Piece]:
    """A line of cells: of each the text of its first box, and how many more there are."""
    pieces = [Piece(label)]
    for numbers in row:
        words = text(numbers[0])[:_CELL] if numbers else ""
        more = f" +{len(numbers) - 1}" if len(numbers) > 1 else ""
        pieces += [Piece(f"{words[: _CELL - len(more)] + more:^{_CELL}}", colour(numbers)), Piece(bar)]
    return pieces


def _origin(drawn: Picture, number: int) -> str:
    ranks = sorted({drawn.source[origin].ranks[0] for origin in drawn.origins[number]})
    return f"from {short_spans(ranks, 2)}"


def _colour(numbers: Sequence[int], title: str, drawn: Picture) -> tuple[int, int, int] | None:
    """The colour of a source box; of a target box that of the first one that it is made of."""
    if not numbers:
        return None
    source = numbers[0] if title == "source" else next(iter(drawn.origins[numbers[0]]), 0)
    return _COLOURS[source % len(_COLOURS)]


def _length(line: Sequence[Piece]) -> int:
    return sum(len(piece.text) for piece in line)


def _width(lines: Sequence[Sequence[Piece]]) -> int:
    return max(map(_length, lines), default=0)


def _as_json(drawn: Picture) -> dict[str, Any]:
    def side(boxes: Sequence[Drawn]) -> list[dict[str, Any]]:
        return [{"start": one.box.start, "stop": one.box.stop, "ranks": one.ranks} for one in boxes]

    return {
        "name": drawn.name,
        "dtype": drawn.dtype,
        "shape": drawn.shape,
        "nbytes": drawn.nbytes,
        "source": side(drawn.source),
        "target": [{**one, "from": list(origin)} for one, origin in zip(side(drawn.target), drawn.origins)],
        "flows": [flow._asdict() for flow in drawn.flows],
        "moved": drawn.moved,
    }
