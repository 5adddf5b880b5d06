"""What a conversion learns of its source while it copies: the fingerprint that the source has when it is read alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import huggingface as hf
import numpy as np
import pytest
from dcp_files import split, write_dcp
from test_one_pass import random_strategy
from test_renaming import FAMILIES, Family, cut, in_full

from mindformers_ckpt.checksums.shares import share_of
from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert
from mindformers_ckpt.execution.options import Options
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.axes import runs
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.look.fingerprint import fingerprint
from mindformers_ckpt.planning.model import Place, Plan, SourceFile, Transfer, View
from mindformers_ckpt.planning.shards import in_shard, in_whole
from mindformers_ckpt.publish.source_fingerprint import Origin, describe_source, is_all_of

COUNTED = Options(fingerprints=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and tasks a tensor, as large tensors have."""
    for name, size in (("BLOCK_BYTES", 100), ("TRANSPOSE_BYTES", 150)):
        monkeypatch.setattr(f"mindformers_ckpt.engine.tasks.{name}", size)
    for name, size in (("_SMALLEST_TASK", 400), ("_LARGEST_TASK", 800)):
        monkeypatch.setattr(f"mindformers_ckpt.engine.tasks.{name}", size)


@pytest.mark.parametrize("case", [case for case, (_, _, config) in FAMILIES.items() if config is not None])
def test_of_every_family_there_and_back(case: str, tmp_path: Path) -> None:
    """Values that are cast are counted as they were read, and so are the factors of FP8."""
    name, tensors, config = FAMILIES[case]
    source = hf.write_folder(tmp_path / "source", tensors, config, shards=2)
    there = convert(Request(name, source, dtype="fp16"), tmp_path / "there", options=COUNTED)
    assert there.source_fingerprint == fingerprint(source).digest
    request = Request(name, tmp_path / "there", True, hf_config=source)
    back = convert(request, tmp_path / "back", options=COUNTED)
    assert back.source_fingerprint == fingerprint(tmp_path / "there").digest


@pytest.mark.parametrize(
    ("case", "old", "new", "seeds"),
    [
        ("llama uneven", "legacy+qkv_concat", "mcore+use_contiguous_weight_layout_attention", "abc"),
        ("llama", "legacy", "mcore", "d"),
        ("deepseek", "mcore+mla_qkv_concat", "legacy", "e"),
        ("mixtral", "legacy", "legacy+use_gmm_training", "f"),
    ],
)
def test_of_the_shards_of_ranks(case: str, old: str, new: str, seeds: str, tmp_path: Path) -> None:
    """Rows, columns and boxes of both, of tensors that are rearranged, with their states."""
    family = Family(case, tmp_path)
    whole = family.write(old, tmp_path)
    for number, seed in enumerate(seeds):
        strategy = random_strategy(whole, 1 + number % 2, seed)
        source = cut(whole, strategy, tmp_path / f"source {seed}")
        request = family.request(source, in_full(old), new, src_strategy=strategy)
        report = convert(request, tmp_path / f"result {seed}", options=COUNTED)
        assert report.source_fingerprint == fingerprint(source, strategy).digest == fingerprint(whole).digest


@pytest.mark.parametrize("case", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_of_boxes_of_any_sizes(case: str, dtype: str | None, tmp_path: Path) -> None:
    """The files of PyTorch hold boxes that divide neither heads nor experts."""
    name, tensors, config = FAMILIES[case]
    tensors = {key: array.astype(np.float32) for key, array in tensors.items()}
    folder = hf.write_folder(tmp_path / "settings", tensors, config)
    for seed in range(2):
        chance = random.Random(seed)
        boxes = {key: split(chance, array.shape, 6) for key, array in tensors.items()}
        source = write_dcp(tmp_path / f"dcp {seed}", tensors, boxes, ranks=3)
        request = Request(name, source, hf_config=folder, dtype=dtype)
        report = convert(request, tmp_path / f"result {seed}", options=COUNTED)
        assert report.source_fingerprint == fingerprint(source).digest


def test_several_processes_count_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # workers have blocks of the usual size
    name, tensors, config = FAMILIES["llama"]
    monkeypatch.setattr("mindformers_ckpt.engine.tasks._SMALLEST_TASK", 400)
    monkeypatch.setattr("mindformers_ckpt.engine.tasks._LARGEST_TASK", 800)
    boxes = {key: split(random.Random(key), array.shape, 6) for key, array in tensors.items()}
    source = write_dcp(tmp_path / "dcp", tensors, boxes)
    folder = hf.write_folder(tmp_path / "settings", tensors, config)
    options = Options(fingerprints=True, processes=3)
    report = convert(Request(name, source, hf_config=folder, dtype="bf16"), tmp_path / "result", options=options)
    assert report.source_fingerprint == fingerprint(source).digest


def test_a_box_in_a_view_of_a_shard_is_the_same_in_the_whole() -> None:
    """Its share there is that of the elements, wherever the shard begins."""
    shape, chance = (12, 10), random.Random(3)
    content = np.arange(120, dtype=np.uint16).reshape(shape)
    for view in ((12, 10), (2, 6, 10), (3, 4, 10), (2, 3, 2, 5, 2), (12, 2, 5)):
        for shard in split(chance, shape, 8):
            place = Place(0, Box.whole(view), view=View(view, Box.whole(view), tuple(range(len(view)))))
            total = 0
            for part in in_shard(place, shape, shard):
                assert part.view is not None
                found = in_whole(part.view.box, part.view.shape, shard, shape)
                assert found is not None
                own = np.ascontiguousarray(content[shard.slices()]).reshape(part.view.shape)[part.view.box.slices()]
                assert (own == content.reshape(found[1])[found[0].slices()]).all()
                total ^= share_of(np.ascontiguousarray(own), *found)
            assert total == share_of(np.ascontiguousarray(content[shard.slices()]), shard, shape)


def test_what_has_no_place_in_the_whole() -> None:
    """Rows in pairs of a shard that begins with the second one; axes over both dimensions."""
    assert in_whole(Box((0, 0), (1, 2)), (2, 2), Box((1, 0), (5, 1)), (8, 1)) is None
    assert in_whole(Box((0,), (6,)), (6,), Box((0, 0), (2, 3)), (4, 3)) is None


def test_boxes_of_different_views_are_all_of_a_tensor() -> None:
    pair: Any = (Box((0, 0), (1, 6)), (2, 6))
    assert is_all_of([pair, (Box((2, 0), (4, 3)), (4, 3))], 12)
    assert not is_all_of([pair, (Box((1, 0), (3, 3)), (4, 3))], 12)  # one twice, one not at all
    assert not is_all_of([pair, (Box((3,), (6,)), (6,))], 12)  # less than all
    assert not is_all_of([pair, (Box((1, 0), (2, 6)), (3, 4))], 12)
    rest = [(Box(run.start, run.stop), (2, 2, 3)) for run in runs(5, 12, (2, 2, 3))]
    assert is_all_of([(Box((0,), (5,)), (12,)), *rest], 12)


def test_of_what_was_not_counted_nothing_is_told() -> None:
    """Two source tensors that one target tensor has whole, without a share of either."""
    spec, dtype = TensorSpec("a", by_name("float32"), (2, 3)), by_name("float32")
    path = Path("file")
    places = (Place(0, Box((0, 0), (2, 3)), "a"), Place(0, Box((2, 0), (4, 3)), "b"))
    plan = Plan((SourceFile(path, 100),), (), (Transfer("both", dtype, (4, 3), places, ()),))
    told = describe_source(plan, [Origin(spec, {(path, "a"): Box.whole((2, 3))})], [], [])
    assert told["digest"] is None
    assert list(told["not_counted"].values()) == [["a"]]
    json.dumps(told)
