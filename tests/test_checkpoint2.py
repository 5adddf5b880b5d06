"""Checkpoint 2.0, MindFormers' own format, as a source and as a strategy: its own samples, and what may be wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint2_files import SAMPLES, write_checkpoint2
from hypothesis import given
from hypothesis import strategies as st
from recorded import Tensor, random_bits, read_tensors

from mindformers_ckpt.errors import CheckpointError, PlanError, StrategyError
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.planning.build import Slices, build_plan, compare_slices
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_huggingface, find_source
from mindformers_ckpt.sources.source import Kind
from mindformers_ckpt.strategy.files import read_strategy
from mindformers_ckpt.strategy.metadata import parse_metadata
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.transform import transform

SAVED = sorted(path.parent for path in SAMPLES.glob("*/*/latest_checkpointed_iteration.txt"))
FLOAT32, INT32, INT64 = by_name("float32"), by_name("int32"), by_name("int64")
WEIGHT, OUTPUT = "decoder.layers.0.self_attention.linear_qkv.weight", "output_layer.weight"


def name_of(saved: Path) -> str:
    return f"{saved.parent.name}/{saved.name}"


def iteration(saved: Path) -> Path:
    return saved / "iteration_00000007"


def whole(path: Path, out: Path, target: Strategy | None = None, **options: Any) -> dict[str, Tensor]:
    """All tensors of a checkpoint, put together by a plan."""
    checkpoint = open_checkpoint(path, **options)
    transform(build_plan(checkpoint, target or Strategy.complete(), format="safetensors"), out)
    return read_tensors(out / "rank_0/checkpoint_0.safetensors")


def open_checkpoint(path: Path, **options: Any) -> Checkpoint:
    files = find_source(path, **options)
    return Checkpoint(files, files.strategy(Strategy.complete()))


def true_tensors(saved: Path) -> dict[str, Any]:
    with np.load(f"{saved}_full.npz") as content:
        return {name: content[name] for name in content.files}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Any]) -> None:
    assert expected.keys() <= found.keys()
    for name, array in expected.items():
        tensor = found[name]
        if tensor.dtype.name == "bfloat16":
            array = _as_bfloat16(array)
        np.testing.assert_array_equal(tensor.bits, np.ascontiguousarray(array).view(tensor.dtype.carrier), name)


def _as_bfloat16(array: Any) -> Any:
    import ml_dtypes

    return array.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("inner", [True, False], ids=["iteration", "save path"])
@pytest.mark.parametrize("saved", SAVED, ids=name_of)
def test_samples_of_mindformers_are_read_whole(saved: Path, inner: bool, tmp_path: Path) -> None:
    found = whole(iteration(saved) if inner else saved, tmp_path / "out")
    assert_equal(found, true_tensors(saved))
    counters = found.keys() - true_tensors(saved).keys()
    trained = any(name.startswith("adam_m.") for name in found)
    names = {"epoch_num", "step_num", "global_step", "loss_scale", "global_batch_size"}
    assert counters == (names if trained else set())
    if trained:
        assert (found["global_step"].dtype, found["global_step"].bits.tolist()) == (INT32, [7])
        assert (found["step_num"].dtype, found["step_num"].bits.tolist()) == (INT64, 7)


@pytest.mark.parametrize("saved", SAVED, ids=name_of)
def test_weights_only_leaves_the_files_of_the_optimizer_aside(saved: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(saved, tmp_path / "saved"))
    for file in iteration(copy).glob("*-opt-*"):
        file.unlink()
    found = whole(copy, tmp_path / "out", weights_only=True)
    assert found.keys() == {name for name in true_tensors(saved) if not name.startswith("adam_")}


@pytest.mark.parametrize("saved", SAVED[:1], ids=name_of)
def test_files_that_lack_are_named_unless_replicas_hold_everything(saved: Path, tmp_path: Path) -> None:
    copy = iteration(Path(shutil.copytree(saved, tmp_path / "saved")))
    (copy / "tiny-opt-0000003-0000004.safetensors").unlink()
    with pytest.raises(
        PlanError, match=r"(?s)rank_3: tiny-opt-0000003-0000004.safetensors of metadata.json is missing"
    ):
        whole(copy, tmp_path / "out")


def test_without_metadata_the_names_tell_the_ranks_and_the_strategy_is_asked_for(tmp_path: Path) -> None:
    saved = SAMPLES / "mf2.1.0/pp2dp2tp2"
    copy = iteration(Path(shutil.copytree(saved, tmp_path / "saved")))
    strategy = read_strategy(copy)
    (copy / "metadata.json").unlink()
    files = find_source(copy)
    with pytest.raises(PlanError, match="holds the shards of 8 ranks, but no source strategy is given"):
        Checkpoint(files, files.strategy(Strategy.complete()))
    with pytest.raises(PlanError, match=r"has no metadata.json, and files of 8 ranks .* is for 4 ranks"):
        Checkpoint(files, read_strategy(SAMPLES / "mf2.1.0/dp2tp2"))
    plan = build_plan(Checkpoint(files, files.strategy(strategy)), Strategy.complete(), format="safetensors")
    transform(plan, tmp_path / "out")
    assert_equal(read_tensors(tmp_path / "out/rank_0/checkpoint_0.safetensors"), true_tensors(saved))


def test_a_source_that_brings_its_layouts_wants_no_other() -> None:
    files = find_source(SAMPLES / "mf2.1.0/dp2tp2")
    with pytest.raises(PlanError, match=r"brings its own layouts .*; leave the source strategy out"):
        files.strategy(read_strategy(SAMPLES / "mf2.1.0/dp2tp2"))


@pytest.mark.parametrize("path", ["", "iteration_00000007", "iteration_00000007/metadata.json"])
def test_metadata_is_a_strategy(path: str) -> None:
    strategy = read_strategy(SAMPLES / "mf2.1.0/pp2dp2tp2" / path)
    assert (strategy.stage_size, len(strategy.stages)) == (4, 2)
    assert WEIGHT in strategy.stages[0]
    assert OUTPUT not in strategy.stages[0]
    assert strategy.stages[1][f"adam_m.{OUTPUT}"] == Layout((2, 2), ((0, 1), ()))


def test_ranks_hold_what_the_strategy_of_metadata_says() -> None:
    """Two ways to the same boxes: equal slices need no transformation, and those without redundancy are shares."""
    target = read_strategy(SAMPLES / "mf2.1.0/dp2tp2")
    assert compare_slices(open_checkpoint(SAMPLES / "mf2.1.0/dp2tp2"), target) is Slices.SAME
    assert compare_slices(open_checkpoint(SAMPLES / "mf2.1.0/dp2tp2_no_redundancy"), target) is Slices.SHARES
    assert compare_slices(open_checkpoint(SAMPLES / "mf2.1.0/pp2dp2tp2"), target) is Slices.OTHER


# ------------------------------------------------------------------------------------------ save paths


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two iterations of one card; the elements are the number of the iteration."""
    for number in (3, 12):
        tensors = {"w": Tensor(INT32, np.full((4, 2), number, np.uint32))}
        write_checkpoint2(tmp_path / "saved", tensors, Strategy.complete(), iteration=number, described=False)
    return tmp_path / "saved"


def elements(path: Path, step: str | None = None) -> set[int]:
    (file,) = find_source(path, step).files
    return set(read_tensors(file)["w"].bits.ravel().tolist())


def test_the_tracker_file_chooses_the_iteration(saved: Path) -> None:
    assert elements(saved) == {12}
    assert find_source(saved).warnings == ()
    (saved / "latest_checkpointed_iteration.txt").write_text("3\n")
    assert elements(saved) == {3}
    assert "left aside: iteration_00000012" in find_source(saved).warnings[0]
    assert (
        elements(saved, "12") == elements(saved, "iteration_00000012") == elements(saved / "iteration_00000012") == {12}
    )


def test_a_tracker_that_names_a_missing_iteration_is_an_error(saved: Path) -> None:
    (saved / "latest_checkpointed_iteration.txt").write_text("13")
    words = r"names iteration 13, but there is no folder iteration_00000013 \(iterations there: 3, 12\)"
    for read, error in ((find_source, PlanError), (read_strategy, StrategyError)):
        with pytest.raises(error, match=words):
            read(saved)
    (saved / "latest_checkpointed_iteration.txt").write_text("latest")
    with pytest.raises(PlanError, match="holds 'latest' where the number of an iteration must stand"):
        find_source(saved)
    (saved / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(PlanError, match=r"has no latest_checkpointed_iteration\.txt"):
        find_source(saved)
    assert elements(saved, "3") == {3}


def test_an_unhealthy_checkpoint_is_read_with_a_warning(saved: Path) -> None:
    (saved / "iteration_00000012/common.json").write_text('{"ckpt_status": 1}')
    (warning,) = find_source(saved).warnings
    assert "was saved in an abnormal state" in warning


def test_parts_are_not_taken_for_the_whole(tmp_path: Path) -> None:
    folder = SAMPLES / "mf2.1.0/dp2tp2/iteration_00000007"
    for name in ("tiny-model-0000001-0000004.safetensors", "metadata.json"):
        with pytest.raises(PlanError, match=rf"part of a checkpoint .* give its folder, {folder}"):
            find_source(folder / name)
    with pytest.raises(PlanError, match="--reversed converts from MindSpore"):
        find_huggingface(folder)
    with pytest.raises(PlanError, match="which has no steps; leave '3_1' out"):
        find_source(folder, "3_1")
    shutil.copytree(folder, tmp_path / "both")
    (tmp_path / "both/rank_0").mkdir()
    shutil.copy(folder / "tiny-model-0000001-0000004.safetensors", tmp_path / "both/rank_0/a.safetensors")
    with pytest.raises(PlanError, match=r"holds a checkpoint 2\.0, and rank folders with files"):
        find_source(tmp_path / "both")


def test_a_save_path_of_megatron_is_none_of_mindformers(tmp_path: Path) -> None:
    (tmp_path / "iter_0000005").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    with pytest.raises(PlanError, match="Megatron-LM"):
        find_source(tmp_path)


def test_files_of_several_checkpoints_without_metadata(saved: Path) -> None:
    folder = saved / "iteration_00000012"
    shutil.copy(folder / "l-model-0000000-0000001.safetensors", folder / "m-model-0000000-0000002.safetensors")
    with pytest.raises(PlanError, match=r"(?s)of several checkpoints by their names: 'l', 'm'.*numbers of ranks: 1, 2"):
        find_source(saved)


# -------------------------------------------------------------------------------- metadata that is wrong


def changed(tmp_path: Path, change: Callable[[Any], object], case: str = "dp2tp2") -> Path:
    copy = iteration(Path(shutil.copytree(SAMPLES / "mf2.1.0" / case, tmp_path / "saved")))
    content = json.loads((copy / "metadata.json").read_text())
    change(content)
    (copy / "metadata.json").write_text(json.dumps(content))
    return copy


def of_weight(content: Any) -> Any:
    return content["state_dict_metadata"][WEIGHT]


WRONG: dict[str, Callable[[Any], object]] = {
    "is not a metadata.json of MindFormers": lambda c: c.pop("storage_data"),
    "is not the name of a slice": lambda c: c["storage_data"].update({"w": []}),
    "is not the name of a file in its folder": lambda c: c["storage_data"][str((WEIGHT, (0,)))][0].update(
        file_name="../x.safetensors"
    ),
    "where the number of a rank must stand": lambda c: c["storage_data"][str((WEIGHT, (0,)))][0].update(
        storage_rank=-1
    ),
    "rank 0 wrote its slice 1, but holds slice 0": lambda c: c["storage_data"].update(
        {str((WEIGHT, (1,))): c["storage_data"].pop(str((WEIGHT, (0,))))}
    ),
    "it is stored, but not described": lambda c: c["state_dict_metadata"].pop(WEIGHT),
    "names an axis that the device matrix": lambda c: of_weight(c)["layout"].update(tensor_map=[2, -1]),
    "its slices are interleaved": lambda c: of_weight(c)["layout"].update(interleaved_parallel=True),
    "are not the 4 ranks of a stage in their order": lambda c: of_weight(c)["layout"].update(rank_list=[0, 2, 1, 3]),
    r"its ranks \[\] are not the 4 ranks": lambda c: of_weight(c)["layout"].update(rank_list=[]),
    r"it is cut into \[2, 1\] pieces": lambda c: of_weight(c).update(axis_fragmentations=[2, 1]),
    "cannot be cut evenly": lambda c: of_weight(c).update(global_shape=[18, 4]),
    r"linear_qkv.weight is \[4, 4\], metadata.json says \[8, 4\]": lambda c: of_weight(c).update(global_shape=[32, 4]),
    "no job has more than": lambda c: of_weight(c)["layout"].update(device_matrix=[1 << 40, 2]),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_metadata_is_an_error(words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        open_checkpoint(changed(tmp_path, WRONG[words])).tensors()


@pytest.mark.parametrize(
    "name",
    ["'w'w'", "'w', 'w'", "'w", "'a\\d'", "'\\U00110000'", "'w\nw'", "'w\0'", "'w\ud800'", "'a' 'w'", "f'w'", "w"],
)
def test_names_that_python_would_not_write_are_an_error(name: str, tmp_path: Path) -> None:
    copy = changed(tmp_path, lambda c: c["storage_data"].update({f"({name}, (0,))": []}))
    with pytest.raises(CheckpointError, match=r"is not a metadata.json of MindFormers"):
        open_checkpoint(copy)


def test_every_name_that_python_writes_can_be_read(tmp_path: Path) -> None:
    """Quotes of both kinds, escapes and characters of every length."""
    names = ["it's", 'a"b', 'it\'s "x"', "a\\d", "ä\n\t\x7f", "\u2028", "\U000e0001", "a[0:1]", ""]

    def renamed(content: Any) -> None:
        described, stored = content["state_dict_metadata"], content["storage_data"]
        places = stored[str((WEIGHT, (0,)))]
        described.update(dict.fromkeys(names, described[WEIGHT]))
        stored.update({str((name, (0,))): places for name in names})

    found = parse_metadata(tmp_path, (changed(tmp_path, renamed) / "metadata.json").read_bytes())
    assert {slice.name for slice in found.stored} >= set(names)


def test_a_gap_in_the_cover_is_an_error(tmp_path: Path) -> None:
    """MindFormers fills it with zeros, and trains on."""
    copy = changed(tmp_path, lambda c: c["storage_data"].pop(str((WEIGHT, (2,)))))
    with pytest.raises(PlanError, match=rf"(?s){WEIGHT}.*is held by ranks \[1\], none of whose files is there"):
        build_plan(_without(copy, 1, WEIGHT), Strategy.complete())


def _without(copy: Path, rank: int, name: str) -> Checkpoint:
    """The checkpoint whose rank does not hold a tensor, neither in its file."""
    from recorded import write_tensors

    file = copy / f"tiny-model-{rank:07d}-0000004.safetensors"
    write_tensors(file, {held: tensor for held, tensor in read_tensors(file).items() if held != name})
    return open_checkpoint(copy)


def test_a_file_that_lacks_what_metadata_says_is_an_error(tmp_path: Path) -> None:
    copy = changed(tmp_path, lambda c: None)
    with pytest.raises(PlanError, match=f"tiny-model-0000001-0000004.safetensors lacks {re.escape(WEIGHT)}"):
        _without(copy, 1, WEIGHT).tensors()


def test_states_that_metadata_leaves_out_are_cut_like_their_weight(tmp_path: Path) -> None:
    """MindFormers 1.9 leaves Muon's states out of some stages; they are not whole on every rank."""
    copy = changed(tmp_path, lambda c: _forget(c, f"adam_m.{WEIGHT}"))
    found = whole(copy, tmp_path / "out")
    assert_equal(found, true_tensors(SAMPLES / "mf2.1.0/dp2tp2"))


def _forget(content: Any, name: str) -> None:
    del content["state_dict_metadata"][name]
    for key in [key for key in content["storage_data"] if key.startswith(f"('{name}',")]:
        del content["storage_data"][key]


# ------------------------------------------------------------------------------------------ any layout


def divisors(number: int) -> st.SearchStrategy[int]:
    return st.sampled_from([value for value in range(1, number + 1) if number % value == 0])


@st.composite
def jobs(draw: st.DrawFn) -> tuple[dict[str, Tensor], Strategy]:
    """Whole tensors, and a strategy of one or two stages that cuts them along any axes."""
    matrix = tuple(draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3)))
    stages: list[dict[str, Layout]] = [{} for _ in range(draw(st.integers(1, 2)))]
    generator = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    tensors = {}
    for number in range(draw(st.integers(1, 3))):
        axes = list(draw(st.permutations(range(len(matrix)))))
        map_ = []
        for _ in range(draw(st.integers(0, 2))):
            taken = draw(st.integers(0, len(axes)))
            map_.append(tuple(axes[:taken]))
            axes = axes[taken:]
        layout = Layout(matrix, tuple(map_))
        shape = tuple(cut * draw(st.integers(1, 2)) for cut in layout.cuts)
        for name in (f"w{number}", f"adam_m.w{number}"):
            tensors[name] = random_bits(FLOAT32, shape, generator)
            stages[number % len(stages)][name] = layout
    size = int(np.prod(matrix))
    return tensors, Strategy(tuple(stages), size)


@given(jobs(), st.booleans())
def test_what_was_saved_is_read_whole(
    tmp_path_factory: pytest.TempPathFactory, job: tuple[dict[str, Tensor], Strategy], redundant: bool
) -> None:
    tensors, strategy = job
    root = tmp_path_factory.mktemp("job")

    def writes(name: str, rank: int) -> bool:
        """Where redundancy is removed, the last rank that holds a slice saves it."""
        if redundant:
            return True
        layout = strategy.stages[strategy.stage_of(rank)][name]
        inner = rank % strategy.stage_size
        return inner == max(other for other, cell in enumerate(layout.cells) if cell == layout.cells[inner])

    write_checkpoint2(root / "saved", tensors, strategy, writes=writes)
    found = whole(root / "saved", root / "out")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name].bits, tensor.bits)
    shutil.rmtree(root)


def test_the_plain_writer_writes_what_mindformers_writes(tmp_path: Path) -> None:
    """But for what it does not tell from a strategy: replicas' numbers, ranks that share a slice, names of axes."""
    sample = iteration(SAMPLES / "mf2.1.0/dp2tp2")
    tensors = {name: Tensor(FLOAT32, array.view(np.uint32)) for name, array in true_tensors(sample.parent).items()}
    made = write_checkpoint2(tmp_path, tensors, read_strategy(sample), prefix="tiny-", counters={})
    ours, theirs = (json.loads((folder / "metadata.json").read_text()) for folder in (made, sample))
    assert ours["storage_data"].keys() == theirs["storage_data"].keys()
    for key, places in theirs["storage_data"].items():
        assert [place["file_name"] for place in ours["storage_data"][key]] == [place["file_name"] for place in places]
    for name, entry in theirs["state_dict_metadata"].items():
        own = ours["state_dict_metadata"][name]
        for part in ("global_shape", "axis_fragmentations"):
            assert own[part] == entry[part]
        assert sorted(map(str, own["chunk"])) == sorted(map(str, entry["chunk"]))
    for file in sample.glob("*-model-*"):
        theirs_held = read_tensors(file)
        for name, tensor in read_tensors(made / file.name).items():
            np.testing.assert_array_equal(tensor.bits, theirs_held[name].bits)
    assert find_source(made).kind is Kind.CHECKPOINT2
