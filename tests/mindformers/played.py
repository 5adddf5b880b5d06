"""What a job of MindFormers is played with: a network and an optimizer, and a rank of a compiled network's layouts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint2_files import SAMPLES
from click.testing import CliRunner

from mindformers_ckpt.cli.main import cli
from mindformers_ckpt.strategy.metadata import number_of
from mindformers_ckpt.strategy.model import Strategy


def full(case: str) -> dict[str, Any]:
    with np.load(SAMPLES / f"{case}_full.npz") as content:
        return {name: content[name] for name in content.files}


def transform(source: Path, out: Path, *options: object) -> Path:
    arguments = ["transform", "--src-checkpoint", source, "--dst-checkpoint-dir", out, *options]
    done = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return out


def cells(mindspore: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Any, Any]:
    """A network and an optimizer of zeros, as the loader wants them: the optimizer has the weights, too."""

    class Cell(mindspore.nn.Cell):  # type: ignore[misc]
        def __init__(self, names: list[str]) -> None:
            super().__init__()
            self.update_parameters_name = lambda *arguments, **options: None
            for number, name in enumerate(names):
                start = mindspore.Tensor(np.zeros(shapes[name], np.float32))
                setattr(self, f"p{number}", mindspore.Parameter(start, name=name))

    network = Cell([name for name in shapes if not name.startswith("adam_")])
    optimizer = Cell(list(shapes))
    optimizer.step = mindspore.Parameter(mindspore.Tensor([0], mindspore.int32), name="global_step")
    return network, optimizer


def content(*cells: Any) -> dict[str, Any]:
    return {parameter.name: parameter.asnumpy() for cell in cells for parameter in cell.get_parameters()}


def play(
    monkeypatch: pytest.MonkeyPatch, mindspore: Any, rank: int, strategy: Strategy, held: Mapping[str, Any]
) -> None:
    """Let MindFormers' modules take this process for a rank of the job."""
    from mindformers.checkpoint import checkpoint, reshard, sharded_tensor

    stage, size = strategy.stage_of(rank), strategy.stage_size
    infos = {}
    for name, array in held.items():
        layout = strategy.stages[stage][name]
        names = tuple(f"axis_{number}" for number in range(len(layout.device_matrix)))
        made = mindspore.Layout(layout.device_matrix, names, list(range(stage * size, (stage + 1) * size)))
        rows = [tuple(names[len(names) - 1 - axis] for axis in axes) or "None" for axes in layout.tensor_map]
        infos[name] = [made(*rows), mindspore.float32, array.shape]
    metas = sharded_tensor.get_sharded_tensor_from_strategy_metadata(param_infos=infos, cur_npu_rank=rank)
    mine = {name: (number_of(strategy.stages[stage][name], rank % size),) for name in held}
    assert {name: meta.global_offset for name, meta in metas.items()} == mine
    for module in (checkpoint, reshard, sharded_tensor):
        for name, value in (("get_real_rank", rank), ("get_real_group_size", strategy.rank_count)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda value=value: value)
    monkeypatch.setattr(checkpoint, "get_cur_sharded_tensor", lambda *arguments, **options: dict(metas))
