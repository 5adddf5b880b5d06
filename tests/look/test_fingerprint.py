"""One fingerprint of a checkpoint under every strategy, in every format and for every number of ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from checkpoint2_files import write_checkpoint2
from recorded import CONFIGURATIONS, Tensor, random_bits, random_model, recorded, slices_of, write_ranks, write_tensors

from mindformers_ckpt.checksums.crc64 import crc64
from mindformers_ckpt.checksums.digest import TensorChecksum, digest_of
from mindformers_ckpt.errors import PlanError, StrategyError
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.look.fingerprint import fingerprint
from mindformers_ckpt.strategy.model import Strategy


def _is_whole(name: str) -> bool:
    """Whether the strategy of all stages was recorded."""
    try:
        return recorded(name).strategy.rank_count > 0
    except StrategyError:
        return False


def expected(tensors: dict[str, Tensor]) -> list[TensorChecksum]:
    """The checksums of whole tensors in memory."""
    return sorted(
        TensorChecksum(name, dtype.name, bits.shape, crc64(bits.tobytes())) for name, (dtype, bits) in tensors.items()
    )


# With `aggregated_save` the files hold other boxes than the strategy says.
READABLE = [name for name in CONFIGURATIONS if _is_whole(name) and not name.endswith("aggsave")]


@pytest.mark.parametrize("name", READABLE)
def test_every_recorded_strategy_has_the_fingerprint_of_the_whole_tensors(name: str, tmp_path: Path) -> None:
    config = recorded(name)
    named = config.strategy.names()
    tensors = random_model({key: p.full_shape for key, p in config.parameters.items() if key in named})
    ranks = slices_of(config, tensors)
    known = expected({key: tensor for key, tensor in tensors.items() if any(key in held for held in ranks.values())})
    format = ("ckpt", "safetensors")[READABLE.index(name) % 2]
    found = fingerprint(write_ranks(tmp_path, ranks, format), config.file)
    assert list(found.tensors) == known
    assert found.digest == digest_of(known)


def test_a_strategy_that_lacks_parameters_which_are_cut_is_refused(tmp_path: Path) -> None:
    config = recorded("dp2mp4_frozen")
    tensors = random_model({key: parameter.full_shape for key, parameter in config.parameters.items()})
    with pytest.raises(PlanError, match="only_trainable_params"):
        fingerprint(write_ranks(tmp_path, slices_of(config, tensors)), config.file)


_RANDOM = np.random.default_rng(3)
BIG = {
    "rows": random_bits(by_name("bfloat16"), (48, 48), _RANDOM),
    "cube": random_bits(by_name("float32"), (24, 8, 24), _RANDOM),
    "vector": random_bits(by_name("float32"), (96,), _RANDOM),
    "complex": random_bits(by_name("complex64"), (24, 24), _RANDOM),
    "step": random_bits(by_name("int64"), (), _RANDOM),
}


def strategies() -> list[Strategy]:
    """60 strategies of up to 24 ranks: every way to cut two dimensions over meshes, optimizer shards too."""
    found = []
    for a, b in ((1, 2), (2, 1), (2, 2), (2, 4), (4, 2), (3, 2), (2, 3), (4, 3), (8, 3), (6, 4)):
        mesh = {"a": a, "b": b}
        for row, column, shards in (("a", "b", 0), ("b", "a", 0), (None, ("a", "b"), 0), (("b", "a"), None, 0),
                                    ("a", None, -1), (None, None, -1)):  # fmt: skip
            layouts = {
                "rows": Layout.on(mesh, row, column, optimizer_shards=shards),
                "cube": Layout.on(mesh, row, None, column),
                "vector": Layout.on(mesh, row),
                "complex": Layout.on(mesh, column, row),
            }
            found.append(Strategy.of_stages((layouts,), f"{a}x{b} {row} {column} {shards}"))
    return found


def test_sixty_strategies_in_all_formats_have_one_fingerprint(tmp_path: Path) -> None:
    whole = {fingerprint(write_tensors(tmp_path / f"whole.{kind}", BIG)).digest for kind in ("ckpt", "safetensors")}
    assert whole == {digest_of(expected(BIG))}
    formats = Counter[str]()
    for number, strategy in enumerate(strategies()):
        kind = ("ckpt", "safetensors")[number % 2]
        ranks = {rank: _held(strategy, rank) for rank in range(strategy.rank_count)}
        folders = {kind: write_ranks(tmp_path / str(number), ranks, kind)}
        if not strategy.stages[0]["rows"].optimizer_shards:  # which metadata.json writes in another way
            folders["checkpoint 2.0"] = write_checkpoint2(tmp_path / f"{number}.2", BIG, strategy, common={})
        for format, folder in folders.items():
            given = strategy if format == kind else None  # the other one brings its own
            assert fingerprint(folder, given).digest in whole, (format, strategy.origin)
            formats[format] += 1
    assert formats == {"ckpt": 30, "safetensors": 30, "checkpoint 2.0": 40}


def _held(strategy: Strategy, rank: int) -> dict[str, Tensor]:
    """What a rank holds of the tensors."""
    layouts = {name: strategy.stages[0].get(name) for name in BIG}
    return {
        name: BIG[name] if layout is None else BIG[name].part(layout.box(BIG[name].bits.shape, rank))
        for name, layout in layouts.items()
    }


def test_a_tensor_of_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindformers_ckpt.look.blocks.BLOCK_BYTES", 100)
    assert fingerprint(write_tensors(tmp_path / "whole.ckpt", BIG)).digest == digest_of(expected(BIG))


def test_everything_that_is_not_the_same_changes_it() -> None:
    one = TensorChecksum("a", "float32", (2, 3), 5)
    others = [
        one._replace(name="b"),
        one._replace(dtype="int32"),
        one._replace(shape=(3, 2)),
        one._replace(crc64nvme=6),
    ]
    assert len({digest_of([tensor]) for tensor in (one, *others)}) == 5
    assert digest_of([one, others[0]]) == digest_of([others[0], one])
    assert digest_of([one, TensorChecksum("empty", "float32", (0, 4), 0)]) == digest_of([one])


def test_lost_ranks_are_named(tmp_path: Path) -> None:
    config = recorded("mp8")
    ranks = slices_of(config, random_model({"w": (16, 16)} | {k: p.full_shape for k, p in config.parameters.items()}))
    del ranks[3]
    with pytest.raises(PlanError, match=r"ranks \[3\]"):
        fingerprint(write_ranks(tmp_path / "lost", ranks), config.file)
