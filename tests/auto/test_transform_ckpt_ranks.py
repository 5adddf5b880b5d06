"""`TransformCkpt`'s work by the ranks of a job, without MindFormers: what they are told where they do not agree."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from rank_jobs import free_port
from recorded import random_model, write_tensors

from mindformers_ckpt.errors import CheckpointError
from mindformers_ckpt.job.transform_ckpt import Request, transform_checkpoint

RANKS = 2


def test_ranks_with_other_arguments_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main rank's source does not count for the other rank without a word."""
    monkeypatch.setenv("MINDFORMERS_CKPT_MASTER", f"127.0.0.1:{free_port()}")
    sources = [write_tensors(tmp_path / f"{name}.ckpt", random_model({"w": (4,)})) for name in ("base", "other")]
    request = Request(
        source=sources[0],
        source_strategy=None,
        target_strategy=None,
        live_strategies=None,
        parallel_mode="data_parallel",
        destination=tmp_path / "result",
        prefix="checkpoint_",
        rank=0,
        world_size=RANKS,
        first_ranks=(0,),
        by_rank=False,
    )

    def run(rank: int) -> str:
        own = replace(request, rank=rank, source=sources[rank])
        with pytest.raises(CheckpointError) as caught:
            transform_checkpoint(own, rank, RANKS, 60.0)
        return str(caught.value)

    with ThreadPoolExecutor(RANKS) as pool:
        errors = list(pool.map(run, range(RANKS)))
    for error in errors:
        assert f"src_checkpoint: '{sources[0]}' on rank 0, '{sources[1]}' on rank 1" in error
    assert list((tmp_path / "result").iterdir()) == []
