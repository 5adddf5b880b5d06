"""What the contents of healthy checkpoints look like, and what proves that a strategy is not theirs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded import Tensor, read_ranks, write_ranks

from mindformers_ckpt.errors import PlanError, TransferError
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_mindspore
from mindformers_ckpt.sources.plausibility import check_contents
from mindformers_ckpt.sources.sampling import choose
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.transform import transform

Array = np.ndarray[Any, Any]
Values = Mapping[str, Array]
RANKS = 4
MESH = {"dp": 2, "mp": 2}
WHOLE = Strategy.complete()


def values(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def noise(rank: int, *shape: int) -> Array:
    """Values that are a rank's own."""
    return values(*shape, seed=100 + rank)


def tensor(array: Array) -> Tensor:
    dtype = by_name(array.dtype.name)
    return Tensor(dtype, np.ascontiguousarray(array).view(dtype.carrier))


def write(root: Path, held: Callable[[int], Values], ranks: int = RANKS) -> Path:
    return write_ranks(root, {rank: {n: tensor(a) for n, a in held(rank).items()} for rank in range(ranks)})


def strategy(ranks: int = RANKS, **layouts: Layout) -> Strategy:
    assert all(layout.rank_count == ranks for layout in layouts.values())
    return Strategy.of_stages(({name.replace("__", "."): layout for name, layout in layouts.items()},), "given")


def opened(root: Path, given: Strategy) -> Checkpoint:
    return Checkpoint(find_mindspore(root), given)


ROWS, REPLICATED, VECTOR = Layout.on(MESH, "mp", None), Layout.on(MESH, None, None), Layout.on(MESH, None)
# A matrix that is cut as the strategy says.
EMBEDDING = values(64, 16)


def embedding(rank: int) -> Values:
    return {"embedding": EMBEDDING[32 * (rank % 2) :][:32]}


NORM = np.random.default_rng(1).uniform(0.8, 1.2, 64).astype(np.float32)
HEALTHY: dict[str, tuple[dict[str, Any], Callable[[int], Values], str]] = {
    "norms 1 % apart": (
        {"norm": VECTOR},
        lambda rank: {"norm": NORM * np.float32(1 + 0.01 * (rank == 1))},
        r"replicas differ slightly, those of the first rank are taken: norm \(ranks 0 and 1: 0\.01 of",
    ),
    "norms 30 % apart": (
        {"norm": VECTOR},
        lambda rank: {"norm": NORM * np.float32(1 + 0.3 * (rank == 3))},
        r"those of the first rank are taken for all: norm \(ranks 0 and 3: 0\.3 of",
    ),
    "a router that drifted": (
        {"router": REPLICATED},
        lambda rank: {"router": values(8, 16) + 0.1 * noise(rank, 8, 16)},
        r"first rank are taken for all: router \(ranks 0 and \d: ",
    ),
    "statistics of each rank": (
        {"tokens_per_expert": VECTOR},
        lambda rank: {"tokens_per_expert": noise(rank, 64)},
        r"first rank are taken for all: tokens_per_expert \(ranks 0 and \d: ",
    ),
    "random generators": (
        {},
        lambda rank: {"rng_state": np.random.default_rng(rank).integers(0, 255, (2, 624)).astype(np.uint8)},
        r"first rank are taken for all: rng_state \(ranks 0 and \d: (99|100)% of the elements",
    ),
    "counters": (
        {},
        lambda rank: {"global_step": np.array(100 - 10 * (rank == 3), np.int32)},
        r"first rank are taken for all: global_step \(ranks 0 and 3: 100 and 90\)",
    ),
    "gradients that are not summed up": (
        {"w": REPLICATED, "accu_grads__w": REPLICATED},
        lambda rank: {"w": values(8, 16), "accu_grads.w": noise(rank, 8, 16)},
        r"first rank are taken for all: accu_grads\.w \(ranks 0 and \d: ",
    ),
    "a rank that never used a matrix": (
        {"w": REPLICATED},
        lambda rank: {"w": values(8, 16) * (rank != 3)},
        r"first rank are taken for all: w \(ranks 0 and 3: 1 of the largest value apart\)",
    ),
    "infinite values on one rank": (
        {"norm": VECTOR},
        lambda rank: {"norm": np.where((np.arange(64) == 5) & (rank == 2), np.float32("inf"), NORM)},
        r"norm \(ranks 0 and 2: only one of them has infinite or undefined values\)",
    ),
}


@pytest.mark.parametrize("case", HEALTHY)
def test_replicas_that_differ_by_nature(tmp_path: Path, case: str) -> None:
    layouts, own, warning = HEALTHY[case]
    given = strategy(embedding=ROWS, **layouts)
    root = write(tmp_path / "source", lambda rank: {**embedding(rank), **own(rank)})
    plan = build_plan(opened(root, given), WHOLE)
    (found,) = [line for line in plan.warnings if "first rank" in line]
    assert re.search(warning, found)
    transform(plan, tmp_path / "out")
    taken = read_ranks(tmp_path / "out")[0]
    for name, array in {**own(0), "embedding": EMBEDDING}.items():
        assert taken[name].bits.tobytes() == np.ascontiguousarray(array).tobytes(), name


EXPERT = values(16, 32)
EP4 = {"ep": 4}
EP2MP2 = {"ep": 2, "mp": 2}
UPCYCLED: dict[str, tuple[Layout, Callable[[int], Array]]] = {
    "several on every rank": (Layout.on(EP4, "ep", None, None), lambda rank: np.repeat(EXPERT[None], 2, 0)),
    "three on every rank": (Layout.on(EP4, "ep", None, None), lambda rank: np.repeat(EXPERT[None], 3, 0)),
    "one on every rank": (Layout.on(EP4, "ep", None, None), lambda rank: EXPERT[None]),
    "in one matrix": (Layout.on(EP4, "ep", None), lambda rank: np.tile(EXPERT, (2, 1))),
    "cut by columns too": (
        Layout.on(EP2MP2, "ep", None, "mp"),
        lambda rank: np.repeat(EXPERT[None, :, 16 * (rank % 2) :][..., :16], 2, 0),
    ),
}


@pytest.mark.parametrize("case", UPCYCLED)
def test_experts_that_are_copies(tmp_path: Path, case: str) -> None:
    layout, held = UPCYCLED[case]
    root = write(tmp_path, lambda rank: {"experts": held(rank)})
    (warning,) = build_plan(opened(root, strategy(experts=layout)), WHOLE).warnings
    others = "2" if case == "cut by columns too" else "1, 2"
    assert (
        f"different boxes; right for copies, such as experts that were made of one matrix: experts (ranks 0, {others})"
        in warning
    )


def alike(what: str) -> str:
    return f"{what} hold the same values of all"


WRONG: dict[str, tuple[dict[str, Any], Callable[[int], Values], list[str]]] = {
    "one matrix of many is cut": (
        {"router": REPLICATED},
        lambda rank: {**embedding(rank), "router": values(16, 16)[8 * (rank % 2) :][:8]},
        [r"router: ranks 0 and \d should hold the same values, but have nothing to do with each other \(1\.\d of"],
    ),
    "integers that the strategy names": (
        {"weight": REPLICATED},
        lambda rank: {**embedding(rank), "weight": np.random.default_rng(rank % 2).integers(0, 99, (8, 8), np.int8)},
        [r"weight: ranks 0 and \d should hold the same"],
    ),
    "moments are cut further than the strategy says": (
        {"adam_m__embedding": ROWS},
        lambda rank: {
            **embedding(rank),
            "adam_m.embedding": values(64, 16, seed=2)[16 * (2 * (rank % 2) + rank // 2) :][:16],
        },
        [r"adam_m\.embedding: ranks 0 and 2 should hold the same"],
    ),
    "a frozen matrix is cut": (
        {},
        lambda rank: {**embedding(rank), "frozen": values(64, 16, seed=3)[32 * (rank % 2) :][:32]},
        [r"only_trainable_params: False", r"frozen: ranks 0 and \d should hold the same"],
    ),
    "saved whole": (
        {"w": ROWS},
        lambda rank: {"embedding": EMBEDDING, "w": values(64, 16, seed=4)},
        [alike("ranks 0 and 1"), "2 tensors looked at"],
    ),
    "saved whole, with experts that are copies": (
        {"experts": Layout.on(MESH, "mp", None, None)},
        lambda rank: {"embedding": EMBEDDING, "experts": np.repeat(EXPERT[None], 4, 0)},
        [alike("ranks 0 and 1"), r"2 tensors looked at \(embedding, …\)"],
    ),
    "experts saved whole": (
        {"experts": Layout.on(MESH, "mp", None, None)},
        lambda rank: {"embedding": np.zeros((32, 16), np.float32), "experts": values(4, 16, 32)},
        [alike("ranks 0 and 1"), r"1 tensor looked at \(experts, …\)"],
    ),
    "experts of fewer ranks": (
        {"embedding": REPLICATED, "experts": Layout.on({"dp": 1, "ep": 4}, "ep", None, None)},
        lambda rank: {"embedding": EMBEDDING, "experts": noise(rank % 2, 1, 16, 32)},
        [alike("ranks 0 and 2")],
    ),
    "both at once": (
        {"router": REPLICATED, "w": Layout.on(MESH, "dp", None)},
        lambda rank: {"embedding": EMBEDDING, "router": noise(rank, 8, 16), "w": values(32, 16)},
        [r"router: ranks 0 and \d should", alike("ranks 0 and 1"), alike("ranks 0 and 2")],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_contents_that_prove_another_strategy(tmp_path: Path, case: str) -> None:
    layouts, held, messages = WRONG[case]
    given = strategy(**{"embedding": ROWS, **layouts})
    source = opened(write(tmp_path, held), given)
    with pytest.raises(PlanError) as raised:
        build_plan(source, WHOLE)
    for message in ("contradict its strategy", "--contents warn", "check_contents: warn", *messages):
        assert re.search(message, str(raised.value)), message
    warnings = build_plan(source, WHOLE, contents="warn").warnings
    assert any("first rank are taken" in line or "although the strategy says" in line for line in warnings)
    quiet = build_plan(source, WHOLE, contents="off")
    assert not any("first rank are taken" in line or "although the strategy says" in line for line in quiet.warnings)


def test_tensors_of_a_kind_that_differ_are_one_line_of_twenty_names(tmp_path: Path) -> None:
    names = [f"layers.{number}.norm" for number in range(40)]  # no strategy names them: all are looked at
    given = strategy(embedding=ROWS)
    root = write(tmp_path, lambda rank: {**embedding(rank), **dict.fromkeys(names, NORM * np.float32(1 + rank))})
    (warning,) = check_contents(opened(root, given), opened(root, given).tensors())
    assert warning.count(".norm (ranks 0 and 3: ") == 20
    assert warning.endswith(" and 20 more")


def test_the_rank_that_is_named_is_the_one_that_is_read(tmp_path: Path) -> None:
    """Rank 0 is lost; stages of a pipeline share a counter, whose first one is read."""
    layouts = {name: Layout.on({"mp": 2}, None) for name in ("norm.0", "norm.1")}
    given = Strategy.of_stages(({"norm.0": layouts["norm.0"]}, {"norm.1": layouts["norm.1"]}), "pp2mp2")

    def held(rank: int) -> Values:
        return {f"norm.{rank // 2}": NORM * np.float32(1 + rank), "step": np.array(rank, np.int64)}

    root = write_ranks(tmp_path / "source", {r: {n: tensor(a) for n, a in held(r).items()} for r in (1, 2, 3)})
    plan = build_plan(opened(root, given), WHOLE)
    lost, warning = plan.warnings
    assert lost.endswith("ranks 0 of the strategy have no folder; what is needed of theirs is taken from the others")
    assert "norm.1 (ranks 2 and 3: " in warning
    assert "step (ranks 1 and 3: 1 and 3)" in warning or "step (ranks 1 and 2: 1 and 2)" in warning
    assert "norm.0" not in warning
    transform(plan, tmp_path / "out")
    made = read_ranks(tmp_path / "out")[0]
    assert made["norm.1"].bits.tobytes() == held(2)["norm.1"].tobytes()
    assert made["step"].bits.tobytes() == held(1)["step"].tobytes()


def test_a_replica_that_is_lost_does_not_hide_a_cut(tmp_path: Path) -> None:
    held = {r: {n: tensor(a) for n, a in {**embedding(r), "frozen": noise(r % 2, 8, 16)}.items()} for r in (0, 1, 2)}
    source = opened(write_ranks(tmp_path, held), strategy(embedding=ROWS))
    with pytest.raises(PlanError, match="frozen: ranks 0 and 1 should hold the same"):
        build_plan(source, WHOLE)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    source = opened(write(tmp_path, embedding), strategy(embedding=ROWS))
    tensors = source.tensors()
    file = tmp_path / "rank_1" / "checkpoint_1.ckpt"
    file.unlink()
    file.symlink_to("/proc/self/mem")  # the first bytes of memory: EIO
    with pytest.raises(TransferError, match=r"rank_1/checkpoint_1\.ckpt: reading samples .*: Input/output error"):
        check_contents(source, tensors)
    assert check_contents(source, tensors, "off") == []


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    source = opened(write(tmp_path, embedding), strategy(embedding=ROWS))
    tensors = source.tensors()
    (tmp_path / "rank_1" / "checkpoint_1.ckpt").write_bytes(b"")
    with pytest.raises(TransferError, match=r"checkpoint_1\.ckpt has become shorter"):
        check_contents(source, tensors)


def test_few_files_of_many_ranks_are_opened(tmp_path: Path) -> None:
    """Stages of eight ranks, 640 in all, whose tensors are cut in three ways."""
    mesh, stages = {"dp": 2, "mp": 4}, 80
    layouts = {"a": Layout.on(mesh, "mp", None), "b": Layout.on(mesh, None, "mp"), "norm": Layout.on(mesh, None)}
    whole = {"a": values(16, 16), "b": values(16, 16, seed=1), "norm": NORM}
    given = Strategy.of_stages(
        tuple({f"{stage}.{name}": layout for name, layout in layouts.items()} for stage in range(stages)), "pp80"
    )

    def held(rank: int) -> Values:
        stage, own = divmod(rank, 8)
        boxes = {name: layout.box(whole[name].shape, own) for name, layout in layouts.items()}
        parts = {n: whole[n][tuple(map(slice, box.start, box.stop))] for n, box in boxes.items()}
        return {f"{stage}.{name}": part for name, part in parts.items()}

    source = opened(write(tmp_path, held, 8 * stages), given)
    chosen = choose(source, source.tensors())
    assert len({rank for rank, _ in chosen.samples}) <= 256
    # The first stages are looked at from all sides, every layout of them.
    assert {pair.tensor for pair in chosen.replicas} >= {f"{stage}.{name}" for stage in range(30) for name in layouts}
    assert check_contents(source, source.tensors()) == []
