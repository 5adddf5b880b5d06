"""Distributed checkpoints of PyTorch and hyper-parallel: what PyTorch itself wrote, and boxes of all sizes."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface as hf
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from dcp_files import (
    BOX,
    HOSTILE,
    MODULE,
    SAMPLES,
    SIZES,
    Raw,
    evil,
    made,
    metadata,
    pickled,
    rows,
    split,
    write_dcp,
    write_hyper_parallel,
    write_safetensors,
    write_shards,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import mindformers_ckpt as mc
from mindformers_ckpt.cli.main import cli
from mindformers_ckpt.convert.model import models
from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert
from mindformers_ckpt.errors import CheckpointError, FormatError, PlanError
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.planning.model import Place, View
from mindformers_ckpt.planning.shards import in_shard
from mindformers_ckpt.sources import shards
from mindformers_ckpt.sources.find import find_huggingface, find_source
from mindformers_ckpt.sources.source import Kind
from mindformers_ckpt.strategy.files import write_strategy
from mindformers_ckpt.strategy.model import Strategy

SAVED = sorted(path.parent for path in SAMPLES.glob("*/whole.safetensors"))
W = np.arange(35, dtype=np.float32).reshape(5, 7)
TENSORS = {"w": W, "b": np.arange(5, dtype=np.float32)}


def contents(path: Path, **options: Any) -> dict[str, Any]:
    with mc.open_checkpoint(path, **options) as checkpoint:
        return {tensor: checkpoint[tensor][...] for tensor in checkpoint}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for tensor, array in expected.items():
        assert (found[tensor].dtype, found[tensor].shape) == (array.dtype, array.shape), tensor
        assert found[tensor].tobytes() == array.tobytes(), tensor


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


# ------------------------------------------------------------------------------------------- PyTorch's own


@pytest.mark.parametrize("sample", SAVED, ids=lambda sample: sample.name)
def test_what_pytorch_saved_is_read_whole(sample: Path, tmp_path: Path) -> None:
    wrapped = "model." if sample.name == "fsdp2" else "\0"
    whole = {tensor.removeprefix(wrapped): array for tensor, array in contents(sample / "whole.safetensors").items()}
    assert_same(contents(sample / "checkpoint"), whole)
    done = run("transform", "--src-checkpoint", sample / "checkpoint", "--dst-checkpoint-dir", tmp_path / "out")
    assert done.exit_code == 0, done.output
    in_files = {tensor: array for tensor, array in whole.items() if array.size}  # a .ckpt holds no others
    assert_same(contents(tmp_path / "out/rank_0"), in_files)
    assert mc.verify(tmp_path / "out", against=sample / "checkpoint").ok
    assert mc.diff(tmp_path / "out/rank_0", sample / "checkpoint").ok


def test_a_fingerprint_is_that_of_the_whole_tensors(tmp_path: Path) -> None:
    sample = SAMPLES / "two_dimensions"
    assert mc.fingerprint(sample / "checkpoint").digest == mc.fingerprint(sample / "whole.safetensors").digest


def test_the_shards_of_consolidated_weights_are_read_as_well() -> None:
    sample = SAMPLES / "consolidated"
    assert_same(contents(sample / "checkpoint/sharded"), contents(sample / "whole.safetensors"))
    assert find_source(sample / "checkpoint").kind is Kind.COMPLETE


def test_inspect_tells_boxes_files_and_what_is_left_aside() -> None:
    found = mc.inspect(SAMPLES / "fsdp2/checkpoint")
    assert found.what == "a distributed checkpoint of PyTorch"
    assert {kind: total.tensors for kind, total in found.totals.items()} == {"weights": 4, "optimizer states": 9}
    assert "not tensors: optim.param_groups.0.lr" in "\n".join(found.odd)
    by_name = {parameter.name: parameter for parameter in found.parameters}
    assert by_name["embedding.weight"].cut == "rows / 2"
    assert by_name["optim.state.layer.weight.exp_avg"].cut == "rows / 2"
    said = run("inspect", SAMPLES / "two_dimensions/checkpoint", "--name", "layer.weight").output
    assert "rows / 2, columns / 2" in said
    assert re.search(r"\[2:3, 4:7\] +__3_0.distcp", said)
    with_rank = run("inspect", SAMPLES / "two_dimensions/checkpoint", "--rank", "0", "--json")
    listed = json.loads(with_rank.stdout)["parameters"]
    assert [entry["start"] for entry in listed if entry["name"] == "layer.weight"] == [[0, 0], [2, 0], [0, 4], [2, 4]]
    with open(listed[0]["file"], "rb") as file:
        file.seek(listed[0]["offset"])
        assert np.frombuffer(file.read(4), np.float32)[0] == 1


def test_weights_only_leaves_the_optimizer_aside(tmp_path: Path) -> None:
    sample = SAMPLES / "fsdp2/checkpoint"
    done = run("transform", "--src-checkpoint", sample, "--dst-checkpoint-dir", tmp_path / "out", "--weights-only")
    assert "left aside, as they are not weights of the model: 9 optimizer states (*.step, *.exp_avg" in done.output
    assert set(contents(tmp_path / "out/rank_0")) == {"embedding.weight", "layer.weight", "layer.bias"}


# ------------------------------------------------------------------------------------------- boxes of all sizes


@settings(max_examples=10)
@given(st.randoms(use_true_random=False))
def test_boxes_of_any_sizes_make_whole_tensors(tmp_path_factory: pytest.TempPathFactory, chance: random.Random) -> None:
    folder = tmp_path_factory.mktemp("dcp")
    shapes = {"a": (5, 7), "b": (3,), "c": (2, 3, 4), "d": ()}
    tensors = hf.random_tensors(shapes)
    boxes = {tensor: split(chance, shape) for tensor, shape in shapes.items()}
    assert_same(contents(write_dcp(folder / "dcp", tensors, boxes, ranks=3)), tensors)
    assert_same(contents(write_hyper_parallel(folder / "hyper", tensors, boxes, ranks=3)), tensors)
    assert_same(contents(write_hyper_parallel(folder / "own", tensors, boxes, own_metadata=True)), tensors)
    assert_same(contents(write_shards(folder / "shards", tensors, boxes, ranks=6)), tensors)
    shutil.rmtree(folder)


def test_a_plan_file_of_boxes_and_several_processes(tmp_path: Path) -> None:
    folder = write_dcp(tmp_path / "dcp", TENSORS, rows(TENSORS, 3), ranks=3)
    source = ("--src-checkpoint", folder, "--dst-checkpoint-dir", tmp_path / "out")
    assert run("plan", *source, "--out", tmp_path / "plan.json").exit_code == 0
    done = run("transform", "--plan", tmp_path / "plan.json", "--process-num", "2")
    assert done.exit_code == 0, done.output
    assert_same(contents(tmp_path / "out/rank_0"), TENSORS)


def test_parts_of_tensors_are_read(tmp_path: Path) -> None:
    boxes = {"w": split(random.Random(1), (5, 7)), "b": [Box((0,), (5,))]}
    with mc.open_checkpoint(write_dcp(tmp_path / "dcp", TENSORS, boxes)) as checkpoint:
        np.testing.assert_array_equal(checkpoint["w"][1:4, 2:6], W[1:4, 2:6])
        assert [shard.box for shard in checkpoint["w"].shards] == boxes["w"]
        np.testing.assert_array_equal(checkpoint.shard(0, "b"), TENSORS["b"])


@given(st.randoms(use_true_random=False))
def test_a_place_of_a_tensor_in_boxes_is_made_of_places_in_them(chance: random.Random) -> None:
    """Whatever axes a view cuts the dimensions into, in whatever order, and wherever the boxes begin and end."""
    axes = [[chance.randint(1, 4) for _ in range(chance.randint(1, 3))] for _ in range(chance.randint(1, 2))]
    extents = tuple(extent for dimension in axes for extent in dimension)
    shape = tuple(int(np.prod(dimension)) for dimension in axes)
    view_shape = (*(1 for _ in range(chance.randrange(2))), *extents)
    start = tuple(chance.randrange(extent) for extent in view_shape)
    stop = tuple(chance.randint(first + 1, extent) for first, extent in zip(start, view_shape))
    order = tuple(chance.sample(range(len(view_shape)), len(view_shape)))
    inner = Box(start, stop)
    target_shape = tuple(inner.shape[axis] for axis in order)
    place = Place(0, Box.whole(target_shape), "w", View(view_shape, inner, order))
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    expected = whole.reshape(view_shape)[inner.slices()].transpose(order)
    found = np.full(target_shape, -1)
    for shard in split(chance, shape):
        held = whole[shard.slices()]
        for part in in_shard(place, shape, shard):
            assert part.view is not None
            assert (found[part.box.slices()] == -1).all()
            taken = held.reshape(part.view.shape)[part.view.box.slices()]
            found[part.box.slices()] = taken.transpose(part.view.order)
    np.testing.assert_array_equal(found, expected)


def test_a_view_that_joins_dimensions_is_refused() -> None:
    place = Place(0, Box.whole((12,)), "w", View((12,), Box.whole((12,)), (0,)))
    with pytest.raises(ValueError, match=r"a view \[12\] of \[3, 4\]"):
        list(in_shard(place, (3, 4), Box((0, 0), (2, 4))))


# ------------------------------------------------------------------------------------------- conversion


def llama() -> tuple[dict[str, Any], dict[str, Any]]:
    return hf.random_tensors(hf.llama_shapes()), hf.decoder_config()


CONVERTED: dict[str, Callable[[], tuple[dict[str, Any], dict[str, Any]]]] = {
    "llama": llama,
    "mixtral": lambda: (
        hf.random_tensors(hf.mixtral_shapes(4)),
        hf.decoder_config(num_hidden_layers=1, num_local_experts=4),
    ),
    "bloom": lambda: (hf.random_tensors(hf.bloom_shapes()), {"n_layer": 2, "n_head": 2, "hidden_size": 8}),
}


@pytest.mark.parametrize("case", CONVERTED)
@pytest.mark.parametrize("seed", [1, 2])
def test_conversion_of_boxes_is_that_of_the_whole(case: str, seed: int, tmp_path: Path) -> None:
    tensors, config = CONVERTED[case]()
    chance = random.Random(seed)
    boxes = {tensor: split(chance, array.shape) for tensor, array in tensors.items()}
    whole = hf.write_folder(tmp_path / "hf", tensors, config)
    cut = write_shards(tmp_path / "cut", tensors, boxes, ranks=6)
    for naming in models()[case].namings:
        words, _, fused = naming.partition("+")
        made = []
        for source in (whole, cut):
            request = Request(case, source, naming=words, qkv_concat=bool(fused) or None, hf_config=whole)
            out = tmp_path / f"{source.name}-{naming}.safetensors"
            convert(request, out)
            made.append(out.read_bytes())
        assert made[0] == made[1], naming


def test_a_model_trained_on_gpus_becomes_rank_files_in_one_go(tmp_path: Path) -> None:
    """FSDP's uneven rows, nested beside an optimizer; the files are those of the same weights in a plain folder."""
    tensors, config = llama()
    whole = hf.write_folder(tmp_path / "hf", tensors, config)
    state = {f"optim.state.{tensor}.exp_avg": array for tensor, array in tensors.items()}
    saved = {**{f"model.{tensor}": array for tensor, array in tensors.items()}, **state}
    paths: dict[str, tuple[str | int, ...]] = {f"model.{tensor}": ("model", tensor) for tensor in tensors}
    paths.update((f"optim.state.{tensor}.exp_avg", ("optim", "state", tensor, "exp_avg")) for tensor in tensors)
    cut = write_dcp(tmp_path / "dcp", saved, rows(saved, 5), ranks=5, paths=paths, others=["optim.lr"])
    (cut / "config.json").write_text(json.dumps(config))
    (mesh, names) = {"dp": 2, "mp": 2}, _mindspore_names(whole, tmp_path)
    layouts = {
        tensor: Layout.on(mesh, "mp", None) if len(shape) == 2 else Layout.on(mesh, None)
        for tensor, shape in names.items()
        if len(shape) < 2 or shape[0] % 2 == 0
    }
    for rank in range(4):
        write_strategy(layouts, tmp_path / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt")
    made = {}
    for source in (whole, cut):
        arguments = ("--input_path", source, "--output_path", tmp_path / f"out-{source.name}")
        done = run("convert", *arguments, "--dst_strategy", tmp_path / "strategy", "--hf_config", whole)
        assert done.exit_code == 0, done.output
        files = sorted((tmp_path / f"out-{source.name}").rglob("*.ckpt"))
        made[source.name] = [(file.name, file.read_bytes()) for file in files]
    assert len(made["hf"]) == 4
    assert made["hf"] == made["dcp"]
    assert re.search(r"not weights of the model: \d+ optimizer states", done.output)


def _mindspore_names(whole: Path, scratch: Path) -> dict[str, tuple[int, ...]]:
    convert(Request("llama", whole), scratch / "names.safetensors")
    return {tensor: array.shape for tensor, array in contents(scratch / "names.safetensors").items()}


def test_tied_weights_in_boxes_are_compared(tmp_path: Path) -> None:
    tensors, config = llama()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    config = {**config, "tie_word_embeddings": True}
    cut = write_dcp(tmp_path / "dcp", tensors, rows(tensors, 3), ranks=3)
    (cut / "config.json").write_text(json.dumps(config))
    convert(Request("llama", cut), tmp_path / "a.ckpt")
    tensors["lm_head.weight"][-1, -1] += 1
    write_dcp(cut, tensors, rows(tensors, 3), ranks=3)
    with pytest.raises(PlanError, match=r"lm_head\.weight is not equal to model\.embed_tokens\.weight"):
        convert(Request("llama", cut), tmp_path / "b.ckpt")


def test_a_hyper_parallel_checkpoint_goes_back_to_hugging_face(tmp_path: Path) -> None:
    tensors, config = llama()
    whole = hf.write_folder(tmp_path / "hf", tensors, config)
    convert(Request("llama", whole, naming="mcore"), tmp_path / "ms.safetensors")
    names = contents(tmp_path / "ms.safetensors")
    cut = write_hyper_parallel(tmp_path / "hyper", names, rows(names, 3), ranks=3)
    convert(Request("llama", cut, reverse=True, naming="mcore", hf_config=whole), tmp_path / "back")
    assert_same(contents(tmp_path / "back/model.safetensors"), tensors)


def test_fp8_in_boxes_is_refused(tmp_path: Path) -> None:
    config = {**hf.DEEPSEEK_CONFIG, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    tensors = hf.deepseek_tensors()
    weight = "model.layers.0.self_attn.o_proj.weight"
    tensors[weight] = tensors[weight].astype(ml_dtypes.float8_e4m3fn)
    tensors[f"{weight}_scale_inv"] = np.ones((1, 1), np.float32)
    cut = write_shards(tmp_path / "cut", tensors, rows(tensors), ranks=2)
    whole = hf.write_folder(tmp_path / "hf", {}, config)
    with pytest.raises(PlanError, match="FP8, and cut over several files"):
        convert(Request(None, cut, hf_config=whole), tmp_path / "a.ckpt")


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("paths", "names", "weights"),
    [
        ({}, {"model.w", "step"}, None),
        ({"model.w": ("model", "w"), "step": ("step",)}, {"w", "step"}, {"w"}),
        ({"model.w": ("module", "model.w"), "step": ("step",)}, {"model.w", "step"}, {"model.w"}),
        ({"model.w": ("app", "model", "w"), "step": ("app", "optim", "step")}, {"w", "step"}, {"w"}),
        ({"model.w": ("model", "step"), "step": ("step",)}, {"model.w", "step"}, {"model.w"}),  # they would be one
        ({"model.w": ("model", "w"), "step": ("module", "step")}, {"model.w", "step"}, None),  # which one?
        ({"model.w": ("optim", "w"), "step": ("step",)}, {"model.w", "step"}, {"step"}),
    ],
)
def test_the_names_of_nested_dictionaries(
    paths: dict[str, tuple[str | int, ...]], names: set[str], weights: set[str] | None, tmp_path: Path
) -> None:
    tensors = {"model.w": W, "step": np.array(3, np.int64)}
    source = find_source(write_dcp(tmp_path / "dcp", tensors, paths=paths))
    assert source.tensors is not None
    assert set(source.tensors) == names
    assert source.weights is None if weights is None else (source.weights or set()) >= weights
    if weights is not None:
        alone = find_source(tmp_path / "dcp", weights_only=True)
        assert alone.tensors is not None
        assert set(alone.tensors) == weights


# ------------------------------------------------------------------------------------------- what may be wrong


def break_file(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()


def cut_off(folder: Path) -> None:
    data = (folder / "__1_0.distcp").read_bytes()
    (folder / "__1_0.distcp").write_bytes(data[:-1])


def other_file(folder: Path) -> None:
    first, second = ((folder / f"__{rank}_0.distcp").read_bytes() for rank in (0, 1))
    (folder / "__1_0.distcp").write_bytes(first + bytes(len(second)))


def link_to_nowhere(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()
    (folder / "__1_0.distcp").symlink_to("nowhere")


def without_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_file, r"lacks files that \.metadata names.*__1_0\.distcp is missing"),
        (cut_off, r"lacks files that \.metadata names.*__1_0\.distcp is truncated: it has \d+ bytes of \d+"),
        (link_to_nowhere, r"__1_0\.distcp cannot be read: No such file"),
        (other_file, r"(?s)files and their metadata do not belong together|__1_0\.distcp: damaged"),
        (without_metadata, r"holds no \.metadata, which is written last"),
    ],
)
def test_damaged_folders(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = write_dcp(tmp_path / "dcp", {"b": W[0], "w": W}, {**rows({"w": W}), "b": [Box((0,), (7,))]})
    damage(folder)
    with pytest.raises(CheckpointError, match="(?s)" + message):
        contents(folder)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([Box((0, 0), (3, 7))], "w: 14 of its 35 elements are in no file"),
        ([Box((0, 0), (3, 7)), Box((2, 0), (5, 7))], "w: boxes that files hold of it overlap"),
        ([], "w: 35 of its 35 elements are in no file"),
    ],
)
def test_gaps_and_overlaps_are_errors(boxes: list[Box], message: str, tmp_path: Path) -> None:
    for folder in (
        write_dcp(tmp_path / "dcp", {"w": W}, {"w": boxes}),
        write_hyper_parallel(tmp_path / "hyper", {"w": W}, {"w": boxes}),
    ):
        if boxes:
            with pytest.raises(PlanError, match=message):
                contents(folder)


def test_boxes_that_would_take_for_ever_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_MOST_COMPARISONS", 1000)
    spec = TensorSpec("w", by_name("float32"), (200, 100))
    boxes = [Box((row, row), (row + 100, row + 1)) for row in range(100)]  # side by side, each as long as all others
    with pytest.raises(PlanError, match="its 100 boxes are such that comparing them takes too long"):
        shards.from_boxes(spec, [shards.Shard(0, Path("a"), box) for box in boxes])


def test_boxes_that_ranks_repeat_are_read_once(tmp_path: Path) -> None:
    """As hyper-parallel leaves them where redundancy is not removed."""
    whole = Box.whole(W.shape)
    assert_same(contents(write_hyper_parallel(tmp_path / "hyper", {"w": W}, {"w": [whole, whole]})), {"w": W})


def test_boxes_whose_place_is_not_told(tmp_path: Path) -> None:
    boxes = rows(TENSORS)
    folder = write_dcp(tmp_path / "dcp", TENSORS, boxes, leave_out=[("w", boxes["w"][1]), ("b", boxes["b"][0])])
    with pytest.raises(FormatError, match=r"(?s)w: it is not told where its box \[3:5, 0:7\] is.*b: it is not told"):
        contents(folder)


def test_shards_that_must_be_missing(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", TENSORS, rows(TENSORS, 3), ranks=3)
    files = sorted(folder.iterdir())
    moved = files[1].rename(tmp_path / "moved")
    with pytest.raises(PlanError, match=r"lacks the files of some ranks.*\n.*shard-00002"):
        contents(folder)
    moved.rename(files[1])
    files[0].unlink()
    with pytest.raises(PlanError, match="shard-00001"):
        contents(folder)
    assert (
        "no file says whether there were more"
        in find_source(write_shards(tmp_path / "other", TENSORS, rows(TENSORS))).warnings[0]
    )


@pytest.mark.parametrize("told", ["{}", "[]", '{"w": {"saved_offsets": [0]}}', '{"w": {"saved_offsets": [-1, 0]}}'])
def test_shards_without_their_places(told: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "shard-00001-model-00001-of-00001.safetensors", {"w": W}, {"DCP_SHARDING_INFO": told})
    with pytest.raises(PlanError, match="its header does not say under DCP_SHARDING_INFO where w is"):
        find_source(tmp_path)


@pytest.mark.parametrize("part", ["__0_0.distcp", ".metadata"])
def test_a_part_alone_is_refused(part: str, tmp_path: Path) -> None:
    folder = write_dcp(tmp_path / "dcp", TENSORS)
    for find in (find_source, find_huggingface):
        with pytest.raises(PlanError, match="a part of a distributed checkpoint"):
            find(folder / part)
    with pytest.raises(PlanError, match="has no steps"):
        find_source(folder, "3_1")
    with pytest.raises(PlanError, match=f"give {folder}"):
        find_source(tmp_path)


def test_other_weights_beside_it(tmp_path: Path) -> None:
    folder = write_dcp(tmp_path / "dcp", TENSORS)
    (folder / "__9_0.distcp").write_bytes(b"x")
    write_safetensors(folder / "model.safetensors", TENSORS, {})
    assert "does not name them: __9_0.distcp, model.safetensors" in find_source(folder).warnings[0]
    (folder / "rank_0").mkdir()
    write_safetensors(folder / "rank_0/a.safetensors", TENSORS, {})
    with pytest.raises(PlanError, match=r"holds a distributed checkpoint, and rank folders with files \(rank_0\)"):
        find_source(folder)


def test_a_strategy_is_not_asked_for_and_not_taken(tmp_path: Path) -> None:
    folder = write_dcp(tmp_path / "dcp", TENSORS, rows(TENSORS))
    strategy = Strategy(({"w": Layout.on({"mp": 5}, "mp", None)},), 5, "a test")
    with pytest.raises(PlanError, match="is complete weights, but its strategy"):
        mc.open_checkpoint(folder, strategy)
    other = Strategy(({"v": Layout.on({"mp": 5}, "mp")},), 5, "another test")
    with pytest.raises(PlanError, match=r"have no parameter in common .* is converted: mindformers-ckpt convert"):
        mc.plan(folder, dst_strategy=other)
    job = mc.plan(folder, dst_strategy=strategy)
    assert [target.tensors[0].shape for target in job.plan.targets] == [(1, 7)] * 5


def test_the_result_of_verify_is_not_one(tmp_path: Path) -> None:
    folder = write_dcp(tmp_path / "dcp", TENSORS, rows(TENSORS))
    with pytest.raises(PlanError, match="compare both as whole tensors"):
        mc.verify(folder, against=folder)


def test_metadata_of_older_versions(tmp_path: Path) -> None:
    """Before PyTorch 2.3 the properties were a class of another module."""
    folder = write_dcp(tmp_path / "dcp", TENSORS, rows(TENSORS))
    data = (folder / ".metadata").read_bytes()
    older = data.replace(
        b"ctorch.distributed.checkpoint.metadata\nTensorProperties",
        b"ctorch.distributed._shard.sharded_tensor.metadata\nTensorProperties",
    )
    assert older != data
    (folder / ".metadata").write_bytes(older)
    assert_same(contents(folder), TENSORS)


# ------------------------------------------------------------------------------------------- hostile metadata


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_metadata(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, message = HOSTILE[case]
    (tmp_path / ".metadata").write_bytes(data)
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(FormatError, match="(?s)" + message):
        find_source(tmp_path)
    assert not (tmp_path / "hacked").exists()


ITEMS = {
    "no zip": b"x" * 200,
    "a state dict": None,
    "cut off": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("case", ITEMS)
def test_hostile_items(case: str, tmp_path: Path) -> None:
    from make_broken import tensor, torch_dict, torch_zip

    data = ITEMS[case] or torch_zip(torch_dict(tensor()))
    place = {"relative_path": "__0_0.distcp", "offset": 0, "length": len(data)}
    (tmp_path / ".metadata").write_bytes(metadata(SIZES, {"w": [BOX]}, {("w", BOX): place}))
    (tmp_path / "__0_0.distcp").write_bytes(data)
    with pytest.raises(FormatError, match=r"__0_0\.distcp: damaged, or not the file.*\n.*w: "):
        contents(tmp_path)


def test_a_record_is_never_compared_by_its_state() -> None:
    """Two equal keys of a dictionary are two: a state may take forever to hash."""
    from io import BytesIO

    from mindformers_ckpt.formats.pickled import Foreign, Known, PickleReader, Record

    index = made(MODULE, "MetadataIndex", {"fqn": "w"})
    data = evil(pickled({index: 1, Raw(index): 2}))
    found = PickleReader(BytesIO(data), lambda module, kind: Known(kind), lambda reference: Foreign()).load()
    assert isinstance(found, dict)
    assert len(found) == 1 or all(isinstance(key, Record) for key in found)
