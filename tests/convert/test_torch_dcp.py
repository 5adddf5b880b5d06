"""Distributed checkpoints that the installed PyTorch writes: read, converted and re-sliced without it.

Run by tools/test_transformers.sh; with `-s` it prints the table of docs/conversion.md.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface import write_folder

import mindformers_ckpt as mc
from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert
from mindformers_ckpt.formats.dcp_metadata import CLASSES, MODULES
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.strategy.model import Strategy

torch = pytest.importorskip("torch", reason="torch is not installed; bash tools/test_transformers.sh runs these")

from make_dcp_samples import CONFIG, LLAMA, SAMPLES, write_samples  # noqa: E402

pytestmark = pytest.mark.timeout(600)  # processes of torch, each of which takes seconds to start
LLAMAS = [name for name in SAMPLES if name.startswith("llama")]
LAYOUTS = {
    "fsdp2": "FSDP2, rows, uneven; AdamW",
    "two_dimensions": "DTensor on 2 x 2, rows and columns, uneven",
    "types": "twelve element types, nested, beside what is no tensor",
    "safetensors": "HuggingFaceStorageWriter, sharded",
    "consolidated": "HuggingFaceStorageWriter, consolidated",
    "own_metadata": "use_collectives=False: a .metadata of each rank",
    "llama_fsdp2_2": "FSDP2, rows, uneven; AdamW (Llama)",
    "llama_fsdp2_4": "FSDP2, rows, uneven; AdamW (Llama)",
    "llama_two_dimensions": "DTensor on 2 x 2, rows and columns, uneven (Llama)",
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    write_samples(folder, list(SAMPLES))
    return folder


def whole(sample: Path) -> dict[str, Any]:
    """The tensors as PyTorch gathered them, under the names that they have here."""
    wrapped = "" if sample.name in ("types", "two_dimensions", "llama_two_dimensions") else "model."
    with mc.open_checkpoint(sample / "whole.safetensors") as checkpoint:
        return {name.removeprefix(wrapped): checkpoint[name][...] for name in checkpoint}


@pytest.mark.parametrize("name", SAMPLES)
def test_all_tensors_are_those_that_pytorch_gathers(name: str, saved: Path) -> None:
    expected = whole(saved / name)
    with mc.open_checkpoint(saved / name / "checkpoint") as checkpoint:
        found = {tensor: checkpoint[tensor][...] for tensor in checkpoint}
    assert found.keys() == expected.keys()
    for tensor, array in expected.items():
        assert (found[tensor].dtype, found[tensor].shape) == (array.dtype, array.shape), tensor
        assert found[tensor].tobytes() == array.tobytes(), tensor
    count = f"{len(expected)} tensors, all equal"
    ranks = 1 if name == "types" else SAMPLES[name].ranks
    print(f"\n| {torch.__version__.partition('+')[0]} | {LAYOUTS[name]} | {ranks} | {count} |")


def llama_weights(saved: Path, name: str) -> Mapping[str, Any]:
    """The weights of a sample, as a Hugging Face folder has them."""
    return {tensor: array for tensor, array in whole(saved / name).items() if tensor in LLAMA}


@pytest.mark.parametrize("naming", ["legacy", "mcore"])
@pytest.mark.parametrize("name", LLAMAS)
def test_conversion_in_one_go_is_that_of_gathered_weights(name: str, naming: str, saved: Path, tmp_path: Path) -> None:
    """Into the files of four ranks; uneven rows of the source meet even cuts of the target."""
    gathered = write_folder(tmp_path / "hf", llama_weights(saved, name), CONFIG)
    folder = saved / name / "checkpoint"
    convert(Request("llama", gathered, naming=naming), tmp_path / "names.safetensors")
    with mc.open_checkpoint(tmp_path / "names.safetensors") as checkpoint:
        shapes = {tensor: checkpoint[tensor].shape for tensor in checkpoint}
    layouts = {
        tensor: Layout.on({"dp": 2, "mp": 2}, "mp" if shape[0] % 2 == 0 else None, *(None for _ in shape[1:]))
        for tensor, shape in shapes.items()
    }
    target = Strategy((layouts,), 4, "a test")
    made = []
    for source in (gathered, folder):
        out = tmp_path / f"out-{source.name}"
        convert(Request("llama", source, naming=naming, hf_config=gathered), out, target=target)
        files = sorted(path for path in out.rglob("checkpoint_*") if path.suffix in (".ckpt", ".safetensors"))
        made.append({path.relative_to(out): path.read_bytes() for path in files})
    assert len(made[0]) == 4
    assert made[0] == made[1]


def test_what_is_no_tensor_is_said(saved: Path) -> None:
    warnings = "\n".join(find_source(saved / "types/checkpoint").warnings)
    assert "left aside, since they are not tensors: more.1.text, number" in warnings


class _Names(pickle.Unpickler):
    """Notes the names that a pickle needs."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.BytesIO(path.read_bytes()))
        self.found: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.found.add((module, name))
        return super().find_class(module, name)


def test_metadata_needs_no_name_that_is_not_known(saved: Path) -> None:
    """What a newer PyTorch adds shows here; the others are of fields that are not looked at."""
    unused = {"PosixPath", "_get_layout", "_MEM_FORMAT_ENCODING", "StorageMeta"}
    names = set()
    for path in saved.glob("*/checkpoint/*metadata"):
        reader = _Names(path)
        reader.load()
        names |= {(module, name) for module, name in reader.found if name not in unused}
    types = {("torch", str(kind).partition(".")[2]) for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
    classes = {(module, name) for module in MODULES for name in CLASSES}
    assert names
    assert names <= classes | types | {("torch", "Size")}
