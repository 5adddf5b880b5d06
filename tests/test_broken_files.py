"""Small broken files from outside: each gives one typed error that says what is wrong, at once and in little memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from make_broken import FILES, FOLDER

from mindformers_ckpt.errors import CheckpointError, FormatError, PlanError, StrategyError
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.planning.file import read_plan
from mindformers_ckpt.sources.index import read_index
from mindformers_ckpt.strategy.files import read_strategy

READERS: dict[str, tuple[Callable[[Path], object], type[CheckpointError]]] = {
    "": (read_header, FormatError),
    "strategy": (read_strategy, StrategyError),
    "plan": (read_plan, PlanError),
    "index": (read_index, PlanError),
}
NO_NUMBER = "a tensor has a dimension, stride or offset that is not a number of elements"
NO_WEIGHTS = "it holds no dictionary of tensors"
NOT_MADE = "the tensors of rank_0/checkpoint_0.ckpt are not those that the plan makes for it"
NO_STAGE = "names a pipeline stage above 65535, which no job has"

# File in tests/data/broken -> a part of its message. The folder tells the reader and the class of the error.
MESSAGES = {
    "overflow.ckpt": "tensor 'w': the shape (4611686018427387904, 4611686018427387904) overflows",
    "overflow_hidden_by_zero.ckpt": "tensor 'w': the shape (4611686018427387904, 4611686018427387904, 0) overflows",
    "dimensions.ckpt": "tensor 'w' has 300 dimensions",
    "negative_dimension.ckpt": "tensor 'w' has a negative dimension",
    "name_not_utf8.ckpt": "a name in a record is not UTF-8",
    "truncated.ckpt": "a record of 79 bytes reaches over the end of the file: it is truncated",
    "length_of_gigabytes.ckpt": "a record of 1099511627776 bytes reaches over the end of the file",
    "number_without_end.ckpt": "a number in a record is longer than 10 bytes",
    "unknown_type.ckpt": "tensor 'w': unknown .ckpt element type 'Float7'",
    "trailer_over_32_bits.ckpt": "the CRC-32 in the trailer is over 32 bits",
    "empty.ckpt": "the file is empty; save or copy it again",
    "strategy_as_checkpoint.ckpt": "it looks like a strategy file",
    "overflow.safetensors": "tensor 'w': the shape (4611686018427387904, 4611686018427387904) overflows",
    "overflow_behind_zero.safetensors": "tensor 'w': the shape (0, 4611686018427387904, 4611686018427387904) overflows",
    "true_as_dimension.safetensors": "the entry of tensor 'w' is not of the form dtype, shape, data_offsets",
    "minus_zero.safetensors": "the entry of tensor 'w' is not of the form dtype, shape, data_offsets",
    "nested.safetensors": "the header is not valid JSON",
    "long_number.safetensors": "the header is not valid JSON",
    "key_twice.safetensors": "the key 'w' appears twice",
    "header_over_the_end.safetensors": "truncated: the header ends at byte 90000008, the file at 10",
    "half_character.safetensors": "the header is not valid JSON",
    "gap.safetensors": "tensor 'w' begins at byte 4 of the contents, not at 0",
    "no_zip.bin": "no PyTorch file that can be read",
    "deflated.bin": "is compressed; save it with torch.save",
    "entry_twice.bin": "a zip archive with two entries of one name",
    "byte_order.bin": "its a/byteorder has 1000 bytes, over 16",
    "bytes_of_gigabytes.bin": "its pickle describes more than 64 MiB",
    "marks.bin": "its pickle is nested deeper than 64 levels",
    "deep_key.bin": NO_WEIGHTS,
    "deep_tuple_in_set.bin": NO_WEIGHTS,
    "shared_key.bin": NO_WEIGHTS,
    "shared_shape.bin": NO_NUMBER,
    "shared_storage.bin": "it refers to something that is not a storage",
    "long_number.bin": "its pickle has a number of 8000 bytes",
    "true_as_dimension.bin": NO_NUMBER,
    "short_strides.bin": "tensor 'w' has the shape (2, 3), but 0 strides",
    "overflow.bin": "tensor 'w': the shape (4611686018427387904, 4611686018427387904, 0) overflows",
    "two_kinds_of_storage.bin": "it describes the storage '0' in two ways",
    "system_call.bin": NO_WEIGHTS,
    "attribute_of_a_name.bin": NO_WEIGHTS,
    "model_in_itself.bin": NO_WEIGHTS,
    "unknown_instruction.bin": r"its pickle has the unknown instruction b'\xff'",
    "wrong_magic_old.bin": "a Python pickle, but not one of torch.save",
    "strategy/ranks.ckpt": "w: the device matrix [268435456] is for 268435456 ranks; no job has more than 1048576",
    "strategy/ranks_of_two_axes.ckpt": "no job has more than 1048576",
    "strategy/axes.ckpt": "w: a device matrix of 65 axes and a tensor map of 1 dimensions",
    "strategy/no_ranks.ckpt": "w: the device matrix [0] has an axis of no ranks",
    "strategy/stage.ckpt": NO_STAGE,
    "strategy/merged_stage.ckpt": NO_STAGE,
    "strategy/merged_stage_of_5000_digits.ckpt": NO_STAGE,
    "strategy/merged_stages_missing.ckpt": "20, …] (59999) are missing (stages [0, 60000] are there)",
    "strategy/name_not_utf8.ckpt": "is not a strategy file (protobuf: ",
    "strategy/optimizer_shard.ckpt": "w: an optimizer shard of 2147483647 pieces on 2 ranks means nothing",
    "strategy/manual_split.ckpt": "w: split manually into uneven pieces (sizes [64, 32], offsets [0, 64])",
    "strategy/truncated.ckpt": "is not a strategy file (protobuf: ",
    "strategy/checkpoint.ckpt": "it looks like a checkpoint; give the strategy instead",
    "strategy/nested.json": "is not a strategy file (JSON: ValueError('it is nested",
    "strategy/infinite.json": "is not a strategy file (JSON: ValueError('the number 1e999",
    "strategy/true.json": "True where a number must stand",
    "strategy/long_number.json": "is not a strategy file (JSON: ValueError('a number",
    "strategy/dimensions.json": "w: a device matrix of 1 axes and a tensor map of 65 dimensions",
    "strategy/shape_of_another_map.json": "w: the tensor map [-1] is not that of the recorded shape [2, 2]",
    "plan/nested.json": "is not a plan file, or damaged (it is nested",
    "plan/no_object.json": "its content does not go with its digest; make it again",
    "plan/outside.json": "the target file 'rank_0/../../x0.ckpt' leads out of the target folder",
    "plan/absolute.json": "the target file '/rank_0/x0.ckpt' leads out of the target folder",
    "plan/rank_twice.json": "two target files of one rank",
    "plan/negative_number.json": "a number must stand where -1 does",
    "plan/file_that_is_not_there.json": "entry 7 of a table of 1",
    "plan/true_as_dimension.json": "a number must stand where True does",
    "plan/overflow.json": "tensor 'w': the shape (4611686018427387904, 4611686018427387904) overflows",
    "plan/box_upside_down.json": "[4:0] is not a box",
    "plan/box_of_two_dimensions.json": "'w': a box of 2 dimensions",
    "plan/tensor_not_made.json": NOT_MADE,
    "plan/tensor_of_another_shape.json": NOT_MADE,
    "plan/tensor_of_another_type.json": NOT_MADE,
    "plan/made_twice.json": "a tensor is made twice",
    "plan/path_with_nul.json": r"a text must stand where '/a\x00b' does",
    "plan/destination.json": "its destination is not an absolute path",
    "plan/about.json": "what it says about source and target is not text",
    "plan/table_missing.json": "a list must stand where None does",
    "index/outside.json": "names files outside of its folder: ['../x.safetensors']",
    "index/numbers.json": "its weight_map does not map tensors to file names",
    "index/nested.json": "nested.json",
    "index/list.json": "its weight_map does not map tensors to file names",
    "index/absent.json": "names files that are not there",
}


def test_the_table_the_script_and_the_folder_name_the_same_files() -> None:
    found = {str(path.relative_to(FOLDER)): path.read_bytes() for path in FOLDER.rglob("*") if path.is_file()}
    assert found.keys() == FILES.keys() == MESSAGES.keys()
    for name, data in found.items():
        assert name == "deflated.bin" or data == FILES[name]  # zlib packs as its version likes
    assert sum(map(len, found.values())) < 200_000


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", MESSAGES)
def test_a_broken_file_gives_its_error(name: str) -> None:
    read, error = READERS[name.rpartition("/")[0]]
    tracemalloc.start()
    try:
        with pytest.raises(error) as caught:
            read(FOLDER / name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert MESSAGES[name] in str(caught.value)
    assert str(FOLDER / name) in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert peak < 32 << 20


def test_the_helpers_of_the_script_make_files_that_are_whole(tmp_path: Path) -> None:
    """Otherwise the broken files could be refused for another reason than they are made for."""
    from make_broken import W, entry, flattened, plan, record, safetensors, strategy, tensor, torch_dict, torch_zip

    for name, data in (
        ("a.ckpt", record(b"w", [2], b"Int8", b"ab")),
        ("a.safetensors", safetensors({"w": entry([2], 0, 8)}, bytes(8))),
        ("a.bin", torch_zip(torch_dict(tensor()))),
    ):
        (tmp_path / name).write_bytes(data)
        assert list(read_header(tmp_path / name).tensors) == ["w"]
    for name, data in (("s.ckpt", strategy(W)), ("s.json", flattened())):
        (tmp_path / name).write_bytes(data)
        assert read_strategy(tmp_path / name).names() == {"w"}
    (tmp_path / "plan.json").write_bytes(plan())
    with pytest.raises(PlanError, match=r"the sources of the plan .* were changed"):
        read_plan(tmp_path / "plan.json")
