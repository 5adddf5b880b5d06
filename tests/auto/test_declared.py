"""Layouts that a job declares: those of the weights are enough for the states of its optimizer."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

pytest.importorskip("mindspore")

from mindformers_ckpt import Layout
from mindformers_ckpt.ms.live import LiveFile
from mindformers_ckpt.strategy.files import read_rank_file

MESH = {"mp": 2}
DECLARED = {"up": Layout.on(MESH, "mp", None), "norm": Layout.on(MESH, None)}
OWN = {"up": (4, 8), "norm": (8,), "global_step": (1,), "beta1_power": ()}


def completed(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Layout]:
    """What the strategy file says once the job has told the shapes of its parameters."""
    file = LiveFile(folder, 1)
    file.declare(DECLARED)
    file.complete([], {**OWN, **shapes})
    return dict(read_rank_file(file.path))


def test_states_are_cut_like_their_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Adam's of MindSpore and of MindFormers, and those of CAME, whose words are joined with "_"."""
    caplog.set_level(logging.INFO)
    kinds = ("moment1.", "adam_v.", "exp_avg_insta_row_", "of_its_own.")
    states = {f"{kind}{name}": OWN[name] for kind in kinds for name in DECLARED}
    assert completed(tmp_path, states) == DECLARED | {
        f"{kind}{name}": layout for kind in kinds for name, layout in DECLARED.items()
    }
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("rank 1: added to the strategy, cut like their weights: moment1.up, moment1.norm, ")


def test_states_of_another_shape_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sums over rows and optimizer shards: nobody can tell how they are cut. Counters of one element are whole."""
    states = {"exp_avg_sq_row.up": (4,), "adam_m.up": (2, 8), "moment1.norm": (4,), "stat.up": (1,)}
    assert completed(tmp_path, states) == DECLARED
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.endswith("Declare their layouts if each rank holds a part: exp_avg_sq_row.up[4] of up[4, 8], "
                            "adam_m.up[2, 8] of up[4, 8]")  # fmt: skip


def test_what_is_declared_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = {"moment1.up": Layout.on(MESH, None, "mp")}
    file = LiveFile(tmp_path, 0)
    file.declare({**DECLARED, **own})
    before = file.path.read_bytes()
    file.complete([], {**OWN, "moment1.up": (8, 4)})
    assert file.path.read_bytes() == before
    assert not caplog.records
