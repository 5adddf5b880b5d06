"""`mindformers-ckpt show`: the picture of a tensor against a count element by element, and the page in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulate_scale
from page_pictures import browse, browser
from recorded import Tensor, random_bits, write_ranks, write_tensors
from toy import command, environment, write_toy

import mindformers_ckpt as mc
from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.look.page import page_data, write_page
from mindformers_ckpt.look.picture import Drawn, Picture, grid, picture, traffic
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.planning.model import Plan, Transfer
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.strategy.model import Strategy


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    return folder


def counted_by_element(plan: Plan, transfer: Transfer) -> dict[tuple[int, int], int]:
    """Bytes by source and target rank, every element looked at."""
    owner = np.full(transfer.shape, -1)
    for place in transfer.sources:
        owner[place.box.slices()] = int(plan.sources[place.file].path.parent.name.removeprefix("rank_"))
    found: Counter[tuple[int, int]] = Counter()
    for place in transfer.targets:
        for rank, count in zip(*np.unique(owner[place.box.slices()], return_counts=True)):
            found[int(rank), plan.targets[place.file].rank] += int(count) * transfer.dtype.itemsize
    return dict(found)


MESH = {"dp": 2, "pp": 2, "mp": 3}
LAYOUTS = {
    "rows": Layout.on(MESH, "mp", None),
    "columns": Layout.on(MESH, None, ("dp", "mp")),
    "both": Layout.on(MESH, ("mp", "pp"), "dp"),
    "optimizer": Layout.on(MESH, "mp", None, optimizer_shards=4),
    "cube": Layout.on(MESH, "mp", "dp", "pp"),
    "whole": Layout.on(MESH, None),
}
SHAPES: dict[str, tuple[int, ...]] = {
    "rows": (12, 5),
    "columns": (4, 12),
    "both": (12, 12),
    "optimizer": (24, 12),
    "cube": (6, 4, 4),
    "whole": (7,),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> mc.Job:
    """12 ranks to 12 ranks, where each tensor takes the layout of another one."""
    folder = tmp_path_factory.mktemp("job")
    random = np.random.default_rng(0)
    model = {
        name: random_bits(by_name("float32" if name != "cube" else "bfloat16"), shape, random)
        for name, shape in SHAPES.items()
    }
    ranks: dict[int, dict[str, Tensor]] = {
        rank: {name: model[name].part(LAYOUTS[name].box(SHAPES[name], rank)) for name in model} for rank in range(12)
    }
    write_ranks(folder, ranks)
    other = {**LAYOUTS, "rows": LAYOUTS["optimizer"], "optimizer": LAYOUTS["both"], "both": LAYOUTS["columns"]}
    other["cube"] = Layout.on(MESH, None, "pp", "dp")
    return mc.plan(
        folder, src_strategy=Strategy((LAYOUTS,), 12, "source"), dst_strategy=Strategy((other,), 12, "target")
    )


def test_flows_are_those_of_the_elements(job: mc.Job) -> None:
    total: Counter[tuple[int, int]] = Counter()
    for transfer in job.plan.transfers:
        drawn = picture(job.plan, transfer.name)
        expected = counted_by_element(job.plan, transfer)
        assert {(flow.source, flow.target): flow.nbytes for flow in drawn.flows} == expected
        assert drawn.moved == sum(size for (first, second), size in expected.items() if first != second)
        for one, origins in zip(drawn.target, drawn.origins):
            assert (
                sum(
                    common.volume
                    for number in origins
                    if (common := drawn.source[number].box.intersect(one.box)) is not None
                )
                == one.box.volume
            )
        total.update(expected)
    assert traffic(job.plan) == dict(total)
    assert sum(total.values()) == job.plan.bytes_written


def test_the_axes_that_are_drawn_are_those_that_are_cut() -> None:
    def axes(shape: tuple[int, ...], *boxes: Box) -> tuple[int | None, int | None]:
        drawn = tuple(Drawn(box, (0,)) for box in boxes)
        return Picture("x", "float32", shape, 0, drawn, (), (), ()).axes

    assert axes(()) == (None, None)
    assert axes((4,), Box((0,), (4,))) == (0, None)
    assert axes((4, 4), Box((0, 0), (4, 4))) == (0, 1)
    assert axes((4, 4, 4), Box((0, 0, 0), (4, 4, 2)), Box((0, 0, 2), (4, 4, 4))) == (0, 2)
    assert axes((4, 4, 4), Box((0, 0, 0), (2, 4, 4)), Box((2, 0, 0), (4, 4, 4))) == (0, 1)


def test_what_does_not_fit_is_counted() -> None:
    boxes = [Box((row, column), (row + 1, column + 1)) for row in range(10) for column in range(6)]
    found = grid(boxes, (0, 1), (8, 4))
    assert (found.more, len(found.rows), len(found.columns)) == ("… 2 rows and 2 columns more", 8, 4)
    assert found.cells[1][3] == (9,)


# ------------------------------------------------------------------------------------------- in a terminal

ASKED = ("--src-checkpoint", "sharded", "--src-strategy", "dp2mp2", "--dst-strategy", "mp2pp2")


def test_source_stands_beside_target(toy: Path) -> None:
    done = command(["show", "layers.0.weight", *ASKED], toy)
    assert done.code == 0, done
    lines = done.out.splitlines()
    assert lines[0] == "layers.0.weight: float32 [8, 6], 192 B"
    assert lines[2] == "source: 2 boxes on 2 ranks          target: 2 boxes on 2 ranks"
    assert re.fullmatch(r"0:8 \S +0 +\S +1 +\S +0:4 \S +0 +\S", lines[5])
    assert "from 0-1" in lines[6]
    assert "192 B are written, 96 B of them on another rank than they come from" in lines
    assert "  rank    1 -> rank    0  48 B" in lines


def test_the_same_for_programs_and_of_a_plan_file(toy: Path) -> None:
    content = json.loads(command(["show", "layers.0.weight", *ASKED, "--json"], toy).out)
    assert content["target"][1] == {"start": [4, 0], "stop": [8, 6], "ranks": [1], "from": [0, 1]}
    assert content["moved"] == 96
    assert command(["plan", *ASKED, "--out", "plan.json"], toy).code == 0
    again = command(["show", "layers.0.weight", "--plan", "plan.json", "--json"], toy)
    assert json.loads(again.out) == content


@pytest.mark.parametrize(("extra", "is_coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_on_a_terminal(toy: Path, extra: dict[str, str], is_coloured: bool) -> None:
    terminal, theirs = os.openpty()
    line = [*("-m", "mindformers_ckpt", "show", "layers.0.weight"), *ASKED]
    done = subprocess.Popen(
        [shutil.which("python", path=environment()["PATH"]) or "python", *line],
        cwd=toy,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment({"TERM": "xterm", **extra}),
    )
    os.close(theirs)
    said = b""
    while chunk := _read(terminal):
        said += chunk
    assert done.wait(60) == 0
    assert b"from 0-1" in said
    assert (b"\x1b[48;2;" in said or b"48;2;230" in said) is is_coloured
    os.close(terminal)
    assert done.stderr is not None
    done.stderr.close()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other side is closed
        return b""


def test_wrong_names_and_no_name(toy: Path) -> None:
    done = command(["show", "layers.0", *ASKED], toy)
    assert (done.code, "Similar are layers.0.weight" in done.err) == (1, True)
    done = command(["show", "layer.0.weight", *ASKED], toy)
    assert (done.code, "Did you mean 'layers.0.weight'" in done.err) == (1, True)
    done = command(["show", *ASKED], toy)
    assert (done.code, "Give the NAME of a tensor" in done.err) == (2, True)


# ------------------------------------------------------------------------------------------- as a page


def test_the_page_is_one_file_that_names_cannot_break(toy: Path, tmp_path: Path) -> None:
    hostile = "</script><script>document.title='broken'</script>"
    write_tensors(
        tmp_path / "hostile.ckpt", {hostile: random_bits(by_name("float32"), (2, 2), np.random.default_rng(0))}
    )
    page = tmp_path / "page.html"
    write_page(mc.plan(tmp_path / "hostile.ckpt"), page)
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 2
    assert not re.search(r"(src|href)=", text)
    assert set(re.findall(r"https?://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}
    write_page(mc.plan(toy / "full.ckpt"), page)
    page.write_text("my notes")
    with pytest.raises(PlanError, match="is not a page and is not replaced"):
        write_page(mc.plan(toy / "full.ckpt"), page)
    data = page_data(mc.plan(tmp_path / "hostile.ckpt"))
    assert data["tensors"][0][0] == hostile


@pytest.mark.slow
def test_the_page_of_thousands_of_ranks_is_small(tmp_path: Path) -> None:
    source, target = (simulate_scale.strategy_of(simulate_scale.mesh_of(*size)) for size in ((256, 4), (128, 8)))
    simulate_scale.write_source(tmp_path / "ckpt", source)
    plan = build_plan(Checkpoint(find_source(tmp_path / "ckpt"), source), target, contents="off")
    write_page(mc.Job(plan, {}, False, None), tmp_path / "page.html", (64, 16))
    assert (tmp_path / "page.html").stat().st_size < 1 << 20


CHROMIUM = browser()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_the_page_in_a_browser(job: mc.Job, tmp_path: Path) -> None:
    """What the page says after its script has run, in both themes, is what the plan says."""
    page = tmp_path / "page.html"
    write_page(job, page, (12, 12))
    shown = browse(page, "tensor=both&rank=7&theme=dark&search=o", dom=True).decode()
    assert 'data-ready="yes"' in shown
    assert '<h2 id="name">both</h2>' in shown
    assert 'data-theme="dark"' in shown
    names = [name for name in SHAPES if "o" in name]
    assert f"{len(names)} of {len(SHAPES)}" in shown
    drawn = picture(job.plan, "both")
    assert f"Source: {len(drawn.source)} boxes on {len(drawn.source)} ranks" in shown
    assert f"{drawn.moved} B of them on another rank than they come from" in shown
    bytes_of_7 = {source: size for (source, target), size in traffic(job.plan).items() if target == 7}
    assert f"rank_7/checkpoint_7.ckpt: {sum(bytes_of_7.values())} B out of {len(bytes_of_7)} files" in shown
    table = re.findall(
        r'<td class="number">(\d+)</td><td class="number">(\d+) B</td><td class="number">\d+</td>', shown
    )
    assert {int(rank): int(size) for rank, size in table} == bytes_of_7
    light, dark = (browse(page, f"theme={theme}") for theme in ("light", "dark"))
    assert light.startswith(b"\x89PNG")
    assert dark.startswith(b"\x89PNG")
    assert light != dark


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_text_can_be_read_in_both_themes() -> None:
    """WCAG AA: 4.5 to 1 for text; black ranks on every colour of a box; a scale that rises in lightness."""
    text = (Path(mc.__file__).parent / "look" / "page.html").read_text(encoding="utf-8")
    themes = [
        dict(re.findall(r"--(\w+): (#\w{6})", rule)) for rule in re.findall(r":root[^{]*\{([^}]*--back[^}]*)\}", text)
    ]
    assert len(themes) == 3
    for theme in themes:
        for colour in ("text", "soft"):
            for back in ("back", "panel"):
                assert contrast(theme[colour], theme[back]) >= 4.5, (theme, colour, back)
    colours = re.search(r"const COLOURS = \[(.*?)\]", text)
    assert colours is not None
    assert all(contrast(colour, "#000000") >= 4.5 for colour in re.findall(r"#\w{6}", colours[1]))
    scale: list[Any] = json.loads(re.search(r"const SCALE = (\[\[.*?\]\]);", text)[1])  # type: ignore[index]
    lights = [luminance("#" + "".join(f"{part:02x}" for part in colour)) for colour in scale]
    assert lights == sorted(lights)
    assert contrast("#000000", "#" + "".join(f"{part:02x}" for part in scale[0])) > 2
