"""`--fingerprint`: what a run counts while it copies is what the files have when they are read again."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint2_files import write_checkpoint2
from dcp_files import split, write_dcp
from recorded import Tensor, random_bits, write_ranks, write_tensors

import mindformers_ckpt as mc
from mindformers_ckpt.engine.buffers import BLOCK_BYTES
from mindformers_ckpt.errors import ConfigError, PlanError
from mindformers_ckpt.execution.options import Options, Report
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.look.arrays import numpy_type
from mindformers_ckpt.look.fingerprint import fingerprint
from mindformers_ckpt.look.whole import checkpoint_at
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.transform import transform

_RANDOM = np.random.default_rng(5)
MODEL = {
    "matrix": random_bits(by_name("float32"), (64, 96), _RANDOM),
    "cube": random_bits(by_name("bfloat16"), (8, 24, 40), _RANDOM),
    "norm": random_bits(by_name("float32"), (96,), _RANDOM),
    "step": random_bits(by_name("int32"), (), _RANDOM),
}
_MESH = {"dp": 2, "mp": 4}


def _strategy(matrix: Layout, cube: Layout, norm: Layout) -> Strategy:
    return Strategy.of_stages(({"matrix": matrix, "cube": cube, "norm": norm},), "made here")


STRATEGIES = {
    "complete": Strategy.complete(),
    "rows": _strategy(
        Layout.on(_MESH, "mp", None), Layout.on(_MESH, "mp", None, None), Layout.on(_MESH, None, optimizer_shards=-1)
    ),
    "columns": _strategy(Layout.on(_MESH, None, "mp"), Layout.on(_MESH, None, None, "mp"), Layout.on(_MESH, "mp")),
    "both": _strategy(Layout.on(_MESH, "mp", "dp"), Layout.on(_MESH, "dp", "mp", None), Layout.on(_MESH, None)),
}


def write_cut(root: Path, strategy: Strategy, tensors: dict[str, Tensor] = MODEL, format: str = "ckpt") -> Path:
    """The files of a strategy, cut by its layouts; of complete weights a file."""
    if strategy.is_complete:
        return write_tensors(root / "whole.ckpt", tensors)
    ranks: dict[int, dict[str, Tensor]] = {}
    for rank in range(strategy.rank_count):
        layouts = {name: strategy.stages[0].get(name) for name in tensors}
        ranks[rank] = {
            name: tensors[name] if layout is None else tensors[name].part(layout.box(tensors[name].bits.shape, rank))
            for name, layout in layouts.items()
        }
    return write_ranks(root, ranks, format)


def run(source: str, target: str, folder: Path, **options: Any) -> tuple[Path, Report]:
    path = write_cut(folder / "source", STRATEGIES[source])
    plan = build_plan(checkpoint_at(path, STRATEGIES[source]), STRATEGIES[target])
    return path, transform(plan, folder / "result", Options(fingerprints=True, **options))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and tasks a tensor, as large tensors have."""
    monkeypatch.setattr("mindformers_ckpt.engine.tasks.BLOCK_BYTES", 5000)
    monkeypatch.setattr("mindformers_ckpt.engine.tasks._SMALLEST_TASK", 4000)
    monkeypatch.setattr("mindformers_ckpt.engine.tasks._LARGEST_TASK", 8000)


@pytest.mark.parametrize("source", STRATEGIES)
@pytest.mark.parametrize("target", STRATEGIES)
def test_it_is_that_of_the_source_and_of_the_result(source: str, target: str, tmp_path: Path) -> None:
    path, report = run(source, target, tmp_path, hashes=source == target)
    known = fingerprint(path, STRATEGIES[source], contents="off")
    assert report.fingerprints == {".": known.digest}
    assert report.source_fingerprint == known.digest
    assert fingerprint(tmp_path / "result", STRATEGIES[target], contents="off") == known
    manifest = json.loads((tmp_path / "result/manifest.json").read_bytes())
    (entry,) = manifest["fingerprints"].values()
    assert entry["digest"] == entry["source_digest"] == known.digest
    assert {name: told["crc64nvme"] for name, told in entry["tensors"].items()} == {
        tensor.name: tensor.hex for tensor in known.tensors
    }


@pytest.mark.parametrize("target", ["ckpt", "safetensors", "checkpoint2"])
@pytest.mark.parametrize("kind", ["ckpt", "safetensors", "checkpoint2", "dcp"])
def test_it_is_that_of_the_source_in_every_format(kind: str, target: str, tmp_path: Path) -> None:
    """Counters that a checkpoint 2.0 keeps as text are tensors of the result, and not of the source."""
    model = {**{name: MODEL[name] for name in ("matrix", "cube", "norm")}, "adam_m.matrix": MODEL["matrix"]}
    strategy: Strategy | None = STRATEGIES["columns"]
    assert strategy is not None
    if kind == "checkpoint2":
        path, strategy = write_checkpoint2(tmp_path / "source", model, strategy), None
    elif kind == "dcp":
        arrays = {name: tensor.bits.view(numpy_type(tensor.dtype)) for name, tensor in model.items()}
        boxes = {name: split(random.Random(7), array.shape, 6) for name, array in arrays.items()}
        path, strategy = write_dcp(tmp_path / "source", arrays, boxes, ranks=3), None
    else:
        path = write_cut(tmp_path / "source", strategy, model, kind)
    known = fingerprint(path, strategy, contents="off").digest
    for number, cut in enumerate((None, STRATEGIES["both"])):
        out = tmp_path / f"result {number}"
        report = mc.transform(
            path, out, src_strategy=strategy, dst_strategy=cut, format=target, contents="off", fingerprints=True
        )
        assert report.source_fingerprint == known
        (file,) = out.rglob("manifest.json")
        (entry,) = json.loads(file.read_bytes())["fingerprints"].values()
        assert entry["source_digest"] == known


def test_worker_processes_report_their_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindformers_ckpt.engine.tasks.BLOCK_BYTES", BLOCK_BYTES)  # workers have it so
    _, report = run("columns", "both", tmp_path, processes=2)
    assert report.fingerprints["."] == fingerprint(write_tensors(tmp_path / "whole.ckpt", MODEL)).digest


def test_a_run_that_is_resumed_has_the_shares_of_before(tmp_path: Path) -> None:
    path = write_cut(tmp_path / "source", STRATEGIES["columns"])
    plan = build_plan(checkpoint_at(path, STRATEGIES["columns"]), STRATEGIES["rows"])
    options = Options(fingerprints=True, resume=True)
    tasks = iter(range(100))

    def stop(done: int, total: int) -> None:
        if next(tasks) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transform(plan, tmp_path / "result", options, progress=stop)
    report = transform(plan, tmp_path / "result", options)
    assert 0 < report.resumed_bytes < report.bytes_written
    assert report.fingerprints["."] == fingerprint(write_tensors(tmp_path / "whole.ckpt", MODEL)).digest
    again = transform(plan, tmp_path / "result", options)
    assert again.resumed_bytes == again.bytes_written
    assert again.fingerprints == report.fingerprints


def test_ways_that_see_no_whole_tensors_are_refused(tmp_path: Path) -> None:
    path = write_cut(tmp_path / "source", STRATEGIES["rows"])
    checkpoint = checkpoint_at(path, STRATEGIES["rows"])
    plan = build_plan(checkpoint, STRATEGIES["columns"])
    with pytest.raises(ConfigError, match="--transform-by-rank"):
        transform(plan, tmp_path / "result", Options(fingerprints=True, by_rank=True))
    some = build_plan(checkpoint, STRATEGIES["columns"], ranks=[0, 1])
    with pytest.raises(ConfigError, match="some ranks"):
        transform(some, tmp_path / "result", Options(fingerprints=True, partial=True))
    with pytest.raises(PlanError, match="matrix"):
        transform(some, tmp_path / "result", Options(fingerprints=True))
    assert not (tmp_path / "result").exists()


def test_of_a_part_of_the_source_nothing_is_said_of_all(tmp_path: Path) -> None:
    """Where the states of an optimizer are left aside, the fingerprint of the result is not the source's."""
    source = write_tensors(tmp_path / "whole.ckpt", {**MODEL, "adam_m.matrix": MODEL["matrix"]})
    report = mc.transform(source, tmp_path / "result", fingerprints=True, weights_only=True)
    assert report.source_fingerprint == ""
    manifest = json.loads((tmp_path / "result/manifest.json").read_bytes())
    assert "source_digest" not in manifest["fingerprints"]["."]
    assert manifest["left_aside"] == "states of the optimizer and counters"


def test_without_the_option_nothing_is_recorded(tmp_path: Path) -> None:
    path = write_cut(tmp_path / "source", STRATEGIES["complete"])
    report = transform(build_plan(checkpoint_at(path), STRATEGIES["rows"]), tmp_path / "result")
    assert report.fingerprints == {}
    assert "fingerprints" not in json.loads((tmp_path / "result/manifest.json").read_bytes())
