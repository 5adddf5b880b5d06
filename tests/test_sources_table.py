"""Every row of docs/sources.md, through every entrance: the tensors of the reading it names, or its error."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from checkpoint2_files import write_checkpoint2
from dcp_files import rows as rows_of_ranks
from dcp_files import write_dcp, write_hyper_parallel, write_shards
from entrances import ENTRANCES, Given, expected
from recorded import Tensor
from small_llama import (
    halves,
    hugging_face_weights,
    shards,
    weights,
    write_config,
    write_index,
    write_mindspore,
    write_pytorch,
    write_two_ranks_strategy,
)

from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.strategy.files import read_strategy
from mindformers_ckpt.strategy.model import Strategy

FLOAT32 = by_name("float32")
DOCS = Path(__file__).parent.parent / "docs"
ALL = tuple(ENTRANCES)
HOOKS = ("hook", "hook, as it is")


@dataclass(frozen=True)
class Case:
    """An example of a row.

    Attributes:
        row: the first cell of the row.
        build: makes the folder, and says what is given.
        takes: the tag of the checkpoint that is read; None where `refused` says it all.
        refused: entrance -> words of its error, of those that do not read it.
        says: words of the warning of those that do.
        only: the entrances that the row is about.
    """

    row: str
    build: Callable[[Path], Given]
    takes: int | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    says: str = ""
    only: Sequence[str] = ALL


def refused_by_all(row: str, build: Callable[[Path], Given], words: str, only: Sequence[str] = ALL) -> Case:
    return Case(row, build, refused=dict.fromkeys(ALL, words), only=only)


# ------------------------------------------------------------------------------------------- how folders are built


def complete(*paths: str, given: str = "", tags: Sequence[int] = (1,)) -> Callable[[Path], Given]:
    """Files of complete weights; the path that is given, below the folder."""

    def build(root: Path) -> Given:
        for number, path in enumerate(paths):
            write_mindspore(root / path, weights(tags[min(number, len(tags) - 1)]))
        return Given(root / (given or paths[0]))

    return build


def parts(*paths: str, given: str = ".", index: bool = False, tag: int = 1) -> Callable[[Path], Given]:
    """One checkpoint of MindSpore in two files."""

    def build(root: Path) -> Given:
        for path, part in zip(paths, halves(weights(tag))):
            write_mindspore(root / path, part)
        if index:
            write_index(root / "model.safetensors.index.json", dict(zip(paths, halves(weights(tag)))))
        return Given(root / given)

    return build


def ranks(
    files: Mapping[str, int], given: str = "model", step: str | None = None, resume: bool = False
) -> Callable[[Path], Given]:
    """Files of two ranks, by their names below the rank's folder and their tags; `{}` is the rank."""

    def build(root: Path) -> Given:
        for name, tag in files.items():
            for rank, tensors in shards(tag).items():
                write_mindspore(root / "model" / f"rank_{rank}" / name.format(rank), tensors)
        return Given(root / given, write_two_ranks_strategy(root / "strategy"), step, resume)

    return build


def one_rank(files: Mapping[str, int], step: str | None = None, resume: bool = False) -> Callable[[Path], Given]:
    """The files of the only rank, whole: then `convert --reversed` reads them, too, and no strategy is needed."""

    def build(root: Path) -> Given:
        for name, tag in files.items():
            write_mindspore(root / "model" / "rank_0" / name, weights(tag))
        return Given(root / "model", step=step, resume=resume)

    return build


def hugging_face(
    files: Mapping[str, int], given: str = "", config: bool = True, index: Mapping[str, Sequence[str]] = {}
) -> Callable[[Path], Given]:
    """Whole models of transformers by file name and tag."""

    def build(root: Path) -> Given:
        folder = write_config(root / "hf") if config else root / "hf"
        for name, tag in files.items():
            write_pytorch(folder / name, hugging_face_weights(tag))
        for name, held in index.items():
            write_index(folder / name, {file: hugging_face_weights(1) for file in held})
        return Given(folder / given, hugging_face=True)

    return build


def hugging_face_parts(*names: str, given: str = "", index: str = "", tag: int = 1) -> Callable[[Path], Given]:
    """A model of transformers in two files."""

    def build(root: Path) -> Given:
        folder = write_config(root / "hf")
        held = halves(hugging_face_weights(tag))
        for name, part in zip(names, held):
            write_pytorch(folder / name, part)
        if index:
            write_index(folder / index, dict(zip(names, held)))
        return Given(folder / given, hugging_face=True)

    return build


def entries(*names: str, hugging_face: bool = False) -> Callable[[Path], Given]:
    """Files whose contents nobody looks at."""

    def build(root: Path) -> Given:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"contents")
        return Given(root, hugging_face=hugging_face)

    return build


def then(build: Callable[[Path], Given], change: Callable[[Path], object]) -> Callable[[Path], Given]:
    """The same, changed."""

    def both(root: Path) -> Given:
        given = build(root)
        change(root)
        return given

    return both


def at(build: Callable[[Path], Given], step: str) -> Callable[[Path], Given]:
    return lambda root: replace(build(root), step=step)


def given(path: str) -> Callable[[Path], Given]:
    return lambda root: Given(path)


# ---------------------------------------------------------------------------------------------------- the rows

SHARDS = {"convert": "holds the shards of 2 ranks; merge them first", "hook, as it is": "does not fit the network"}
# transform cannot read a Hugging Face model, and the hook does where it may convert.
FOREIGN = {"transform": "is a Hugging Face model", "hook, as it is": "set auto_trans_ckpt: True"}
COMMANDS = ("transform", "convert", "merge-lora")
DISTCP = "a folder of `.distcp` files and `.metadata`"
TWO_STEPS = {"l_rank_{}-1_1.ckpt": 1, "l_rank_{}-1_2.ckpt": 2}


def distributed(
    write: Callable[..., Path], given: str = "saved", *, hugging_face: bool = True
) -> Callable[[Path], Given]:
    """A distributed checkpoint of the model, cut into rows as FSDP does it."""

    def build(root: Path) -> Given:
        tensors = hugging_face_weights(1) if hugging_face else weights(1)
        write(root / "saved", tensors, rows_of_ranks(tensors))
        if hugging_face:
            write_config(root / "saved")
        return Given(root / given, hugging_face=hugging_face)

    return build


def unified(given: str = "saved") -> Callable[[Path], Given]:
    """What unified_safetensors writes of a model of more than 3 GB."""

    def build(root: Path) -> Given:
        places = {}
        for number, tensors in enumerate(halves(weights(1))):
            write_mindspore(root / f"saved/part{number}.safetensors", tensors)
            places.update(dict.fromkeys(tensors, f"part{number}.safetensors"))
        text = json.dumps({"metadata": {"total_size": 0}, "weight_map": places})
        (root / "saved/param_name_map.json").write_text(text)
        return Given(root / given)

    return build


def only_on_rank(rank: int, name: str, tag: int) -> Callable[[Path], object]:
    return lambda root: write_mindspore(root / "model" / f"rank_{rank}" / name, shards(tag)[rank])


def cut_off(path: str) -> Callable[[Path], object]:
    return lambda root: os.truncate(root / path, (root / path).stat().st_size - 3)


def replicas(root: Path) -> Given:
    """Two replicas of two ranks; of the second one a rank has an older file, and the other none."""
    for rank in range(4):
        name = f"l_rank_{rank}-1_{1 if rank == 2 else 2}.ckpt"
        write_mindspore(root / "model" / f"rank_{rank}" / name, shards(1 if rank == 2 else 2)[rank % 2])
    (root / "model/rank_3/l_rank_3-1_2.ckpt").unlink()
    return Given(root / "model", write_two_ranks_strategy(root / "strategy", replicas=2))


def with_meta(root: Path) -> None:
    for rank in range(2):
        meta = json.dumps({"last_epoch": 10, "last_ckpt_file": f"l_rank_{rank}-10_1.ckpt"})
        (root / "model" / f"rank_{rank}" / "meta.json").write_text(meta)


def overlapping(root: Path) -> Given:
    """Three files, of which two repeat a tensor of the third and not of each other."""
    first, second = halves(weights(1))
    write_mindspore(root / "a.ckpt", first)
    write_mindspore(root / "b.ckpt", second)
    write_mindspore(root / "c.ckpt", weights(2))
    return Given(root)


def greedy_index(root: Path) -> Given:
    """Both shards hold everything; the index assigns half of the first to each: of the second it is another model."""
    folder = write_config(root / "hf")
    held = halves(hugging_face_weights(1))
    write_pytorch(folder / "a.safetensors", {**hugging_face_weights(2), **held[0]})
    write_pytorch(folder / "b.safetensors", {**hugging_face_weights(2), **held[1]})
    write_index(folder / "model.safetensors.index.json", {"a.safetensors": held[0], "b.safetensors": held[1]})
    return Given(folder, hugging_face=True)


def greedy_mindspore_index(root: Path) -> Given:
    held = halves(weights(1))
    write_mindspore(root / "a.safetensors", {**weights(2), **held[0]})
    write_mindspore(root / "b.safetensors", {**weights(2), **held[1]})
    write_index(root / "model.safetensors.index.json", {"a.safetensors": held[0], "b.safetensors": held[1]})
    return Given(root)


def damaged_config(root: Path) -> Given:
    built = hugging_face({"model.safetensors": 1})(root)
    (root / "hf/config.json").write_text('{"model_type": ')
    return built


def adapter_folder(root: Path) -> Given:
    folder = root / "adapter"
    one = np.ones((8, 1), np.float32)
    module = "base_model.model.model.layers.0.self_attn.k_proj"
    write_pytorch(
        folder / "adapter_model.safetensors", {f"{module}.lora_A.weight": one.T.copy(), f"{module}.lora_B.weight": one}
    )
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    return Given(folder)


def iterations(tags: Mapping[int, int], given: str = "saved", one_card: bool = False) -> Callable[[Path], Given]:
    """A save path of checkpoint 2.0: iteration -> tag."""

    def build(root: Path) -> Given:
        strategy = read_strategy(write_two_ranks_strategy(root / "strategy"))
        for iteration, tag in tags.items():
            tensors = {name: Tensor(FLOAT32, array.view(np.uint32)) for name, array in weights(tag).items()}
            cut = Strategy.complete() if one_card else strategy
            write_checkpoint2(root / "saved", tensors, cut, iteration=iteration, described=not one_card)
        return Given(root / given)

    return build


def pipe(path: str) -> Callable[[Path], object]:
    return lambda root: os.mkfifo(root / path)


def link(path: str) -> Callable[[Path], object]:
    return lambda root: os.symlink("nowhere", root / path)


def rank_1_is(change: Callable[[Path], object]) -> Callable[[Path], Given]:
    """Rank 1's folder of two replicas is replaced; rank 3 holds the same."""

    def build(root: Path) -> Given:
        for rank in range(4):
            write_mindspore(root / "model" / f"rank_{rank}" / "a.ckpt", shards(1)[rank % 2])
        shutil.rmtree(root / "model/rank_1")
        change(root)
        return Given(root / "model", write_two_ranks_strategy(root / "strategy", replicas=2))

    return build


LOST = {
    "convert": "files of some ranks are missing\n  - rank_1: .*(leads nowhere|no folder)",
    "hook, as it is": "files of some ranks are missing|does not fit the network",
}
NO_STRATEGY = "holds the shards of 1 ranks, but no source strategy is given"

CASES = [
    # Kinds
    Case("a `.ckpt` or `.safetensors` file", complete("m.ckpt"), takes=1),
    Case("a `.ckpt` or `.safetensors` file", complete("m.safetensors"), takes=1),
    Case("a `.ckpt` or `.safetensors` file", complete("a b\n.ckpt"), takes=1),
    Case("a folder of such files", complete("m.ckpt", given="."), takes=1),
    Case("a folder of such files", complete("m.ckpt", given="m.ckpt/../."), takes=1),
    Case("a folder of such files", parts("a.ckpt", "b.safetensors"), takes=1),
    Case(
        "a folder of such files",
        complete("a.ckpt", "b.ckpt", given=".", tags=(1, 2)),
        refused={
            "convert": "holds several weights, name the file to convert",
            "merge-lora": r"holds several checkpoints \(a.ckpt, b.ckpt\); give the file",
            "hook": "both hold .*these are several checkpoints, not one; name the file",
            "hook, as it is": "several checkpoints, .* is in two; name the file|both hold",
        },
        only=("convert", "merge-lora", *HOOKS),
    ),
    Case(
        "a folder of such files",
        overlapping,
        refused={
            "transform": "some of which repeat tensors and some of which do not",
            "convert": "holds several weights, name the file to convert",
            "merge-lora": "some of which repeat tensors and some of which do not",
            "hook": "both hold .*name the file",
            "hook, as it is": "several checkpoints, .* is in two; name the file|both hold",
        },
    ),
    Case(
        "a folder of such files and `model.safetensors.index.json`",
        parts("a.safetensors", "b.safetensors", index=True),
        takes=1,
    ),
    Case(
        "a folder of such files and `model.safetensors.index.json`",
        then(parts("a.safetensors", "b.safetensors", index=True), lambda r: complete("c.ckpt", tags=[2])(r)),
        takes=1,
        says="does not name them: c.ckpt",
    ),
    Case(
        "a folder of such files and `model.safetensors.index.json`",
        greedy_mindspore_index,
        takes=1,
        says="does not assign them there: ",
    ),
    Case(
        "a folder of such files and `model.safetensors.index.json`",
        then(parts("a.safetensors", "b.safetensors", index=True), lambda r: complete("model.safetensors", tags=[2])(r)),
        takes=2,
        says="model.safetensors is read, as transformers does",
    ),
    Case(
        "a folder of such files and `model.safetensors.index.json`",
        parts("a.safetensors", "b.safetensors", index=True, given="b.safetensors"),
        takes=1,
        says="b.safetensors is one of the files of model.safetensors.index.json, all of which are read",
    ),
    *(
        Case("complete weights, with `--step` or `resume_training: NAME`", at(build, step), 1)
        for build, step in (
            (complete("l-1_1.ckpt", "l-1_2.ckpt", given=".", tags=(1, 2)), "1_1"),
            (complete("x.ckpt", "y.ckpt", given=".", tags=(1, 2)), "x.ckpt"),
            (complete("l-1_1.ckpt"), "1_1"),
        )
    ),
    *(
        refused_by_all("complete weights, with `--step` or `resume_training: NAME`", at(build, step), words)
        for build, step, words in (
            (complete("l-1_1.ckpt", "m-1_1.ckpt", given="."), "1_1", "could be l-1_1.ckpt, m-1_1.ckpt"),
            (
                complete("l-1_1.ckpt", given="."),
                "1_2",
                "l-1_1.ckpt is the only file, and not of '(any-)?1_2'; leave the step out",
            ),
            (complete("l-1_1.ckpt"), "1_2", "l-1_1.ckpt is the only file, and not of '(any-)?1_2'; leave the step out"),
            (parts("a.safetensors", "b.safetensors", index=True), "a.safetensors", "which has no steps"),
            (hugging_face({"model.safetensors": 1}), "1_1", "which has no steps"),
        )
    ),
    Case(
        "numbered files (`x-00001-of-00003.ckpt`), or one of them",
        parts("x-00001-of-00002.ckpt", "x-00002-of-00002.ckpt"),
        takes=1,
    ),
    Case(
        "numbered files (`x-00001-of-00003.ckpt`), or one of them",
        parts("x-00001-of-00002.ckpt", "x-00002-of-00002.ckpt", given="x-00002-of-00002.ckpt"),
        takes=1,
        says="one of 2 files of one checkpoint, all of which are read",
    ),
    refused_by_all(
        "numbered files (`x-00001-of-00003.ckpt`), or one of them",
        parts("x-00001-of-00003.ckpt", "x-00002-of-00003.ckpt"),
        "lacks weight files\n  - x-00003-of-00003.ckpt",
    ),
    refused_by_all(
        "numbered files (`x-00001-of-00003.ckpt`), or one of them",
        parts("x-00001-of-00003.ckpt", "x-00002-of-00003.ckpt", given="x-00001-of-00003.ckpt"),
        "lacks weight files\n  - x-00003-of-00003.ckpt",
    ),
    Case("a folder with `rank_<n>` folders", ranks({"a.ckpt": 1}), takes=1, refused=SHARDS),
    Case("a folder with `rank_<n>` folders", ranks({"a.safetensors": 1}), takes=1, refused=SHARDS),
    Case("a folder with `rank_<n>` folders", one_rank({"a.ckpt": 1}), takes=1),
    Case(
        "a folder with `rank_<n>` folders",
        then(one_rank({"a.ckpt": 1}), lambda root: (root / "model").rename(root / "x.ckpt") and one_rank({})(root)),
        refused=dict.fromkeys(ALL, "there is no checkpoint at .*; .* holds x.ckpt"),
    ),
    Case(
        "a folder with a `config.json` that has a `model_type`",
        hugging_face({"model.safetensors": 1}),
        takes=1,
        refused=FOREIGN,
    ),
    Case(
        "a folder with a `config.json` that has a `model_type`",
        then(complete("model.safetensors", given="."), write_config),
        takes=1,
    ),
    Case(
        "a folder with a `config.json` that has a `model_type`",
        then(complete("m.ckpt", given="."), write_config),
        takes=1,
    ),
    Case(
        "a weight file in such a folder",
        hugging_face({"model.safetensors": 1, "other.safetensors": 2}, given="other.safetensors"),
        takes=2,
        refused=FOREIGN,
    ),
    Case(
        "a weight file in such a folder",
        hugging_face_parts(
            "x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors", given="x-00002-of-00002.safetensors"
        ),
        takes=1,
        refused=FOREIGN,
    ),
    Case(
        "a weight file in such a folder",
        then(
            hugging_face_parts(
                "x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors", given="x-00001-of-00002.safetensors"
            ),
            lambda root: write_pytorch(root / "hf/model.safetensors", hugging_face_weights(2)),
        ),
        takes=1,
        refused=FOREIGN,
        says="left aside: model.safetensors",
    ),
    Case(
        "a weight file in such a folder",
        hugging_face_parts(
            "a.safetensors", "b.safetensors", given="a.safetensors", index="model.safetensors.index.json"
        ),
        takes=1,
        refused=FOREIGN,
    ),
    Case(
        "a `.bin`, `.pth` or `.pt` file, or a folder of them",
        hugging_face({"pytorch_model.bin": 1}),
        takes=1,
        refused=FOREIGN,
    ),
    Case(
        "a `.bin`, `.pth` or `.pt` file, or a folder of them",
        hugging_face({"w.pth": 1, "x.pt": 2}, given="x.pt"),
        takes=2,
        refused=FOREIGN,
    ),
    Case(
        "a `.bin`, `.pth` or `.pt` file, or a folder of them",
        then(complete("m.ckpt", given="."), lambda r: write_pytorch(r / "pytorch_model.bin", hugging_face_weights(2))),
        takes=1,
        says="left aside: pytorch_model.bin",
    ),
    Case(
        "the save path of checkpoint 2.0 (MindFormers 1.7 and later)",
        iterations({7: 1, 12: 2}),
        takes=2,
        refused=SHARDS,
    ),
    Case(
        "the save path of checkpoint 2.0 (MindFormers 1.7 and later)",
        then(iterations({7: 1, 12: 2}), lambda r: (r / "saved/latest_checkpointed_iteration.txt").write_text("7")),
        1,
        SHARDS,
        "iteration 7 is read, which the tracker file names; left aside: iteration_00000012",
    ),
    Case(
        "the save path of checkpoint 2.0 (MindFormers 1.7 and later)",
        at(iterations({7: 1, 12: 2}), "7"),
        1,
        SHARDS,
        only=ALL[:3],
    ),
    refused_by_all(
        "the save path of checkpoint 2.0 (MindFormers 1.7 and later)",
        then(iterations({7: 1}), lambda r: (r / "saved/latest_checkpointed_iteration.txt").write_text("9")),
        "names iteration 9, but there is no folder iteration_00000009",
    ),
    Case("the folder of an iteration", iterations({7: 1}, "saved/iteration_00000007"), takes=1, refused=SHARDS),
    Case("the folder of an iteration", iterations({7: 1}, one_card=True), takes=1),
    Case(
        "the folder of an iteration",
        then(iterations({7: 1}), lambda r: (r / "saved/iteration_00000007/metadata.json").unlink()),
        refused={**dict.fromkeys(ALL, "holds the shards of 2 ranks"), "hook, as it is": "does not fit the network"},
    ),
    Case(DISTCP, distributed(write_dcp), takes=1, only=COMMANDS),
    Case(DISTCP, distributed(write_dcp, hugging_face=False), takes=1, only=COMMANDS),
    Case(
        "a folder of `shard-<n>-model-<n>-of-<n>.safetensors` files", distributed(write_shards), takes=1, only=COMMANDS
    ),
    Case(
        "a folder of `_rank<n>_.safetensors` files and `.metadata`",
        distributed(write_hyper_parallel, hugging_face=False),
        takes=1,
        only=COMMANDS,
    ),
    Case("the folder that MindSpore's `unified_safetensors` writes", unified(), takes=1),
    Case("the folder that MindSpore's `unified_safetensors` writes", unified("saved/part1.safetensors"), takes=1),
    refused_by_all(
        "the folder that MindSpore's `unified_safetensors` writes",
        then(unified(), lambda root: (root / "saved/part1.safetensors").unlink()),
        r"names files that are not there.*\n.*part1\.safetensors",
    ),
    Case(
        "the folder that MindSpore's `unified_safetensors` writes",
        then(unified(), lambda root: (root / "saved/param_name_map.json").write_text('{"w": "part0.safetensors"}')),
        takes=1,
    ),
    # Recognised and refused
    refused_by_all(
        "one file of a checkpoint 2.0 of several ranks, or its `metadata.json`",
        iterations({7: 1}, "saved/iteration_00000007/l-model-0000000-0000002.safetensors"),
        "is by its name a part of a checkpoint",
    ),
    refused_by_all(
        "a distributed checkpoint without its `.metadata`, which is written last",
        entries("__0_0.distcp"),
        r"holds no \.metadata, which is written last",
    ),
    refused_by_all(
        "a distributed checkpoint without its `.metadata`, which is written last",
        entries("m_rank0_.safetensors"),
        r"hyper-parallel without its \.metadata; copy that",
    ),
    refused_by_all(
        "one file of a distributed checkpoint",
        distributed(write_dcp, given="saved/__0_0.distcp"),
        "a part of a distributed checkpoint",
    ),
    Case(
        "a distributed checkpoint of PyTorch or hyper-parallel, in a job (`load_checkpoint`)",
        distributed(write_hyper_parallel, hugging_face=False),
        refused=dict.fromkeys(HOOKS, "is a distributed checkpoint of hyper-parallel .*, which a job does not read"),
        only=HOOKS,
    ),
    refused_by_all(
        "Megatron-LM's or DeepSpeed's, without weight files beside it",
        entries("mp_rank_00/model_optim_rng.pt"),
        "Megatron-LM or DeepSpeed",
    ),
    Case(
        "Megatron-LM's or DeepSpeed's, without weight files beside it",
        then(hugging_face({"model.safetensors": 1}), lambda r: (r / "hf/global_step10").mkdir()),
        takes=1,
        refused=FOREIGN,
    ),
    refused_by_all("a GGUF file, without weight files beside it", entries("m.gguf"), "GGUF"),
    Case(
        "a GGUF file, without weight files beside it",
        then(hugging_face({"model.safetensors": 1}), lambda r: (r / "hf/m.gguf").touch()),
        takes=1,
        refused=FOREIGN,
    ),
    refused_by_all("an adapter alone, given as the weights", adapter_folder, "PEFT adapter, without the weights"),
    Case(
        "an adapter alone, given as the weights",
        then(hugging_face({"pytorch_model.bin": 1}), lambda r: (r / "hf/adapter_config.json").write_text("{}")),
        takes=1,
        refused=FOREIGN,
    ),
    refused_by_all(
        "a strategy file, or a folder of them",
        lambda root: Given(write_two_ranks_strategy(root / "strategy")),
        "strategy files, which hold no weights",
    ),
    refused_by_all(
        "a strategy file, or a folder of them",
        lambda root: Given(write_two_ranks_strategy(root / "strategy") / "ckpt_strategy_rank_0.ckpt"),
        "is by its name a strategy file",
    ),
    refused_by_all(
        "weights that MindSpore did not write, beside a `config.json` that cannot be read",
        damaged_config,
        "config.json",
    ),
    refused_by_all("an empty path (a variable that is not set)", given(""), "is a variable not set", only=ALL[:3]),
    refused_by_all(
        "a whole bucket of an object storage",
        given("s3://bucket"),
        "s3://bucket is (a whole bucket|in an object storage)",
        only=ALL[:3],
    ),
    refused_by_all(
        "a folder whose folders hold what was looked for", ranks({"a.ckpt": 1}, given="."), r"give \S+/model$"
    ),
    refused_by_all(
        "a folder whose folders hold what was looked for",
        complete("transformed_checkpoint/llama/rank_0/checkpoint_0.ckpt", given="transformed_checkpoint"),
        r"give \S+/transformed_checkpoint/llama$",
    ),
    # What does not count
    Case(
        "hidden files, macOS' `._` sidecars",
        then(
            one_rank({"a.ckpt": 1}),
            lambda r: entries("model/rank_0/._z.ckpt", "model/rank_0/.z.ckpt", "model/.x.ckpt")(r),
        ),
        takes=1,
    ),
    Case(
        "hidden files, macOS' `._` sidecars",
        then(
            hugging_face_parts("a.safetensors", "b.safetensors"),
            lambda r: entries("hf/._a.safetensors", "hf/._model.safetensors")(r),
        ),
        takes=1,
        refused=FOREIGN,
    ),
    Case(
        "unfinished downloads (`.incomplete`, `.crdownload`, `.part`, `.tmp`)",
        then(
            complete("m.ckpt", given="."), lambda r: entries("n.ckpt.tmp", "n.ckpt.part", "n.safetensors.crdownload")(r)
        ),
        takes=1,
    ),
    Case(
        "unfinished downloads (`.incomplete`, `.crdownload`, `.part`, `.tmp`)",
        then(
            hugging_face_parts("a.safetensors", "b.safetensors", index="model.safetensors.index.json"),
            lambda r: (r / "hf/b.safetensors").rename(r / "hf/b.safetensors.incomplete"),
        ),
        refused=dict.fromkeys(ALL, r"b.safetensors \(b.safetensors.incomplete is: an unfinished download\)"),
    ),
    Case(
        "strategy files (`*ckpt_strategy*.ckpt`) beside weights",
        then(complete("m.ckpt", given="."), lambda r: write_two_ranks_strategy(r)),
        takes=1,
    ),
    Case(
        "`x.CKPT`; a folder `x.ckpt`",
        then(
            one_rank({"a-1_1.ckpt": 1, "a-1_2.ckpt": 2}), lambda r: _rename(r, "rank_0/a-1_2.ckpt", "rank_0/a-1_2.CKPT")
        ),
        takes=1,
        says=r"rank_0/a-1_2.CKPT \(suffixes are written in lower case\)",
    ),
    Case(
        "`x.CKPT`; a folder `x.ckpt`",
        complete("m.ckpt", "x.ckpt/n.ckpt", given=".", tags=(1, 2)),
        takes=1,
        says=r"left aside: x.ckpt \(a folder\)",
    ),
    *(
        refused_by_all(
            "a link that leads nowhere, a pipe or an empty file, with the name of a weight file",
            then(one_rank({"a-1_1.ckpt": 1}), change),
            words,
        )
        for change, words in (
            (link("model/rank_0/a-1_2.ckpt"), "a-1_2.ckpt: cannot be read"),
            (pipe("model/rank_0/a-1_2.ckpt"), "a-1_2.ckpt: .*regular file"),
            (lambda r: (r / "model/rank_0/a-1_2.ckpt").touch(), "a-1_2.ckpt: the file is empty"),
        )
    ),
    *(
        Case(
            "`rank_1` that is a file, or a link that leads nowhere",
            rank_1_is(change),
            1,
            LOST,
            "ranks 1 are left aside",
        )
        for change in (link("model/rank_1"), lambda r: (r / "model/rank_1").touch())
    ),
    Case(
        "`rank_1` that is a file, or a link that leads nowhere",
        then(one_rank({"a.ckpt": 1}), link("model/rank_1")),
        refused={
            **dict.fromkeys(ALL, NO_STRATEGY),
            "convert": "rank_1: .* is a link that leads nowhere",
            "hook, as it is": "rank_1: .* is a link that leads nowhere",
        },
    ),
    *(
        refused_by_all(
            "`Rank_1`, `rank1`, `rank_1 ` with a blank, with weights in it",
            then(ranks({"a.ckpt": 1}), lambda r, name=name: _rename(r, "rank_1", name)),  # type: ignore[misc]
            rf"'{name}' is almost the name of a rank's folder",
        )
        for name in ("Rank_1", "rank1", "rank_1 ")
    ),
    # Which file of a rank folder
    Case("one file", ranks({"anything.ckpt": 1}), takes=1, refused=SHARDS),
    Case("several", ranks(TWO_STEPS), takes=2, refused=SHARDS),
    Case("several", one_rank({"l-1_1.ckpt": 1, "l-1_2.ckpt": 2}), takes=2),
    Case(
        "several",
        ranks({"l_rank_{}-9_1.ckpt": 1, "l_rank_{}-10_1.ckpt": 2}),
        takes=1,
        refused=SHARDS,
        says="although l_rank_0-10_1.ckpt has the higher numbers",
    ),
    Case(
        "several",
        one_rank({"l-9_1.ckpt": 1, "l-10_1.ckpt": 2}),
        takes=1,
        says="although l-10_1.ckpt has the higher numbers",
    ),
    Case(
        "several, of more than one prefix",
        one_rank({"a-1_1.ckpt": 1, "b-1_1.ckpt": 2}),
        takes=2,
        says="b-1_1.ckpt is used, .* and not a-1_1.ckpt",
    ),
    *(
        Case("`--step 3_150`, `--step NAME`; `resume_training: NAME` in a yaml", build, 1, refused)
        for build, refused in (
            (ranks(TWO_STEPS, step="1_1"), SHARDS),
            (ranks(TWO_STEPS, step="l_rank_0-1_1.ckpt"), SHARDS),
            (one_rank({"l-1_1.ckpt": 1, "l-1_2.ckpt": 2}, step="1_1"), {}),
            (one_rank({"l-1_1.ckpt": 1, "l_1-1_1.ckpt": 2}, step="l-1_1.ckpt"), {}),
            (one_rank({"x.ckpt": 1, "z.ckpt": 2}, step="x.ckpt"), {}),
        )
    ),
    refused_by_all(
        "`--step 3_150`, `--step NAME`; `resume_training: NAME` in a yaml",
        one_rank({"l-1_1.ckpt": 1, "l_1-1_1.ckpt": 2}, step="1_1"),
        r"'(1_1|any-1_1)' could be l-1_1.ckpt, l_1-1_1.ckpt",
    ),
    refused_by_all(
        "`--step 3_150`, `--step NAME`; `resume_training: NAME` in a yaml",
        one_rank({"l-1_1.ckpt": 1}, step="1_2"),
        "no file for '(1_2|any-1_2)'",
    ),
    Case("`resume_training: True`", ranks(TWO_STEPS, resume=True), 2, SHARDS, only=HOOKS),
    Case(
        "`resume_training: True`",
        then(ranks({"l_rank_{}-9_1.ckpt": 1, "l_rank_{}-10_1.ckpt": 2}, resume=True), with_meta),
        2,
        SHARDS,
        only=HOOKS,
    ),
    Case(
        "`resume_training: True`",
        then(one_rank({"l-1_1.ckpt": 1, "l-1_2.ckpt": 2}, resume=True), cut_off("model/rank_0/l-1_2.ckpt")),
        1,
        says="1_1, the last whole step that all ranks have, is resumed",
        only=HOOKS,
    ),
    Case(
        "`resume_training: True`",
        then(ranks({"l_rank_{}-1_1.ckpt": 1}, resume=True), only_on_rank(1, "l_rank_1-1_2.ckpt", 2)),
        1,
        SHARDS,
        "1_1, the last whole step that all ranks have, is resumed",
        HOOKS,
    ),
    refused_by_all(
        "`.ckpt` beside `.safetensors`",
        one_rank({"a.ckpt": 1, "a.safetensors": 2}),
        r"rank_0: .ckpt and .safetensors files are there \(a.ckpt, a.safetensors\)",
    ),
    Case(
        "`.ckpt` beside `.safetensors`",
        then(ranks({"a.ckpt": 1}), lambda r: _other_format(r / "model/rank_1")),
        1,
        SHARDS,
        r"of different formats \(.ckpt: ranks \[0\]; .safetensors: ranks \[1\]\)",
    ),
    Case("`.ckpt` beside `.safetensors`", one_rank({"a-1_1.ckpt": 1, "a-1_2.safetensors": 2}, step="1_2"), takes=2),
    refused_by_all(
        "numbered files of one model (`x-00001-of-00002`)",
        one_rank({"x-00001-of-00002.ckpt": 1, "x-00002-of-00002.ckpt": 2}),
        "x-00002-of-00002.ckpt is one of several files of a model",
    ),
    *(
        refused_by_all(
            "ranks at different epochs, steps, runs (`_rank_0_1-5_2`), marks (`_breakpoint`) or of other prefixes",
            then(ranks({"l_rank_{}-1_1.ckpt": 1}), only_on_rank(1, name, 2)),
            words,
        )
        for name, words in (
            ("l_rank_1-2_1.ckpt", r"--step 1_1 takes it"),
            ("l_rank_1-1_2.ckpt", r"--step 1_1 takes it"),
            ("l_rank_1_1-1_1.ckpt", r"1_1 of run 1: ranks \[1\]"),
            ("l_rank_1-1_1_breakpoint.ckpt", r"1_1_breakpoint: ranks \[1\]"),
            ("m_rank_1-1_1.ckpt", r"l 1_1: ranks \[0\]; m 1_1: ranks \[1\]"),
        )
    ),
    refused_by_all(
        "ranks at different epochs, steps, runs (`_rank_0_1-5_2`), marks (`_breakpoint`) or of other prefixes",
        then(ranks({"v1.ckpt": 1}), only_on_rank(1, "v2.ckpt", 2)),
        r"have different names \(rank_0/v1.ckpt, rank_1/v2.ckpt\)",
    ),
    Case(
        "folders that are empty or at an earlier step, while the others hold a replica of everything",
        replicas,
        2,
        {
            "convert": "files of some ranks are missing",
            "hook, as it is": "files of some ranks are missing|does not fit",
        },
        "ranks 2, 3 are left aside, the others hold everything",
    ),
    refused_by_all(
        "`rank_0` beside `rank_00`",
        then(ranks({"a.ckpt": 1}), lambda r: write_mindspore(r / "model/rank_00/a.ckpt", shards(2)[0])),
        "rank_0 and rank_00 are both rank 0",
    ),
    Case(
        "files beside the rank folders",
        then(one_rank({"a.ckpt": 1}), lambda r: write_mindspore(r / "model/full.ckpt", weights(2))),
        takes=1,
        says="left aside are the files beside them: full.ckpt",
    ),
    *(
        refused_by_all(
            "a file or folder of one rank, given alone, while other ranks' folders beside it hold files",
            ranks({"a.ckpt": 1}, given=path),
            "(?s)is the part of one rank: rank_0 beside it.*give .*symbolic link",
        )
        for path in ("model/rank_1", "model/rank_1/a.ckpt")
    ),
    Case(
        "a file or folder of one rank, given alone, while other ranks' folders beside it hold files",
        then(complete("rank_0/llama3_8b.ckpt"), lambda r: (r / "rank_1").mkdir()),
        takes=1,
    ),
    # Which files of a Hugging Face folder
    *(
        Case(
            "several of `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin`, "
            "`pytorch_model.bin.index.json`",
            build,
            1,
            FOREIGN,
            words,
        )
        for build, words in (
            (hugging_face({"model.safetensors": 1, "pytorch_model.bin": 2}), "left aside: pytorch_model.bin"),
            (
                hugging_face(
                    {"model.safetensors": 1, "a.safetensors": 2},
                    index={"model.safetensors.index.json": ["a.safetensors"]},
                ),
                "left aside: model.safetensors.index.json, a.safetensors",
            ),
            (
                hugging_face(
                    {"pytorch_model.bin": 2, "a.safetensors": 1},
                    index={"model.safetensors.index.json": ["a.safetensors"]},
                ),
                "left aside: pytorch_model.bin",
            ),
            (
                hugging_face({"pytorch_model.bin": 1, "a.bin": 2}, index={"pytorch_model.bin.index.json": ["a.bin"]}),
                "left aside: pytorch_model.bin.index.json, a.bin",
            ),
            (
                then(hugging_face({"model.safetensors": 1}), lambda r: write_mindspore(r / "hf/ms.ckpt", weights(2))),
                "left aside: ms.ckpt",
            ),
        )
    ),
    refused_by_all(
        "an index whose files are not all there",
        then(
            hugging_face_parts("a.safetensors", "b.safetensors", index="model.safetensors.index.json"),
            lambda r: (r / "hf/b.safetensors").unlink(),
        ),
        "names files that are not there\n  - b.safetensors",
    ),
    refused_by_all(
        "an index whose files are not all there",
        then(
            parts("a.safetensors", "b.safetensors", index=True),
            lambda r: (r / "b.safetensors").unlink(),
        ),
        "names files that are not there\n  - b.safetensors",
    ),
    Case(
        "a shard that holds more than the index assigns to it",
        greedy_index,
        1,
        FOREIGN,
        "does not assign them there: ",
    ),
    Case(
        "no such name, numbered files (`x-00001-of-00003.safetensors`)",
        hugging_face_parts("x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"),
        1,
        FOREIGN,
    ),
    Case(
        "no such name, numbered files (`x-00001-of-00003.safetensors`)",
        hugging_face_parts("x-00001-of-00002.bin", "x-00002-of-00002.bin"),
        1,
        FOREIGN,
    ),
    refused_by_all(
        "no such name, numbered files (`x-00001-of-00003.safetensors`)",
        hugging_face_parts("x-00001-of-00003.safetensors", "x-00002-of-00003.safetensors"),
        "lacks weight files\n  - x-00003-of-00003.safetensors",
    ),
    refused_by_all(
        "no such name, numbered files (`x-00001-of-00003.safetensors`)",
        then(
            hugging_face_parts("x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"),
            lambda r: hugging_face_parts("y-00001-of-00002.safetensors", "y-00002-of-00002.safetensors", tag=2)(r),
        ),
        "several sets of weights",
    ),
    Case(
        "no such name, numbered files (`x-00001-of-00003.safetensors`)",
        then(
            hugging_face_parts(
                "x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors", given="x-00001-of-00002.safetensors"
            ),
            lambda r: hugging_face_parts("y-00001-of-00002.safetensors", "y-00002-of-00002.safetensors", tag=2)(r),
        ),
        1,
        FOREIGN,
        "left aside: y-00001-of-00002.safetensors",
    ),
    Case(
        "other `.safetensors`, then `.bin`, `.pth`, `.pt` files",
        then(hugging_face_parts("a.safetensors", "b.safetensors"), lambda r: hugging_face({"w.pth": 2})(r)),
        1,
        FOREIGN,
        "left aside: w.pth",
    ),
    Case(
        "other `.safetensors`, then `.bin`, `.pth`, `.pt` files",
        then(
            hugging_face({"w.bin": 1}),
            lambda r: hugging_face({"optimizer.bin": 2, "consolidated.00.pth": 2, "adapter_model.bin": 2})(r),
        ),
        1,
        FOREIGN,
    ),
    Case(
        "other `.safetensors`, then `.bin`, `.pth`, `.pt` files",
        hugging_face({"a.safetensors": 1, "b.safetensors": 2}),
        refused={
            **FOREIGN,
            "convert": "holds several weights, name the file to convert",
            "merge-lora": "holds several checkpoints",
            "hook": "both hold .*name the file to read",
        },
    ),
]


def _other_format(folder: Path) -> None:
    (folder / "a.ckpt").unlink()
    write_mindspore(folder / "a.safetensors", shards(1)[1])


def _rename(root: Path, old: str, new: str) -> None:
    (root / "model" / old).rename(root / "model" / new)


def name_of(case: Case) -> str:
    return re.sub(r"\W+", "-", case.row[:40]).strip("-")


@pytest.mark.parametrize(
    ("case", "entrance"),
    [
        pytest.param(case, entrance, id=f"{name_of(case)}-{entrance}".replace(", ", "-").replace(" ", "-"))
        for case in CASES
        for entrance in case.only
    ],
)
def test_a_row(case: Case, entrance: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    given = case.build(tmp_path / "source")
    outcome = ENTRANCES[entrance](given, tmp_path)
    if entrance in case.refused:
        assert outcome.tensors is None
        assert re.search(case.refused[entrance], outcome.said, re.MULTILINE), outcome.said
        return
    assert case.takes is not None
    assert outcome.tensors is not None, outcome.said
    wanted = expected(case.takes, entrance, given)
    assert outcome.tensors.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(outcome.tensors[name], array, err_msg=name)
    assert re.search(case.says, outcome.said), outcome.said


def test_transform_makes_a_result_of_each_file(tmp_path: Path) -> None:
    """The one row whose result is several: a folder of files that repeat each other's tensors."""
    given = complete("a.ckpt", "b.ckpt", given=".", tags=(1, 2))(tmp_path / "source")
    assert ENTRANCES["transform"](Given(given.path / "a.ckpt"), tmp_path / "one").tensors  # type: ignore[operator]
    with pytest.raises(AssertionError):  # two results: `_outcome` takes one only
        ENTRANCES["transform"](given, tmp_path / "both")
    made = sorted(str(path.relative_to(tmp_path / "both/out")) for path in (tmp_path / "both/out").rglob("*.ckpt"))
    assert made == ["a/rank_0/checkpoint_0.ckpt", "b/rank_0/checkpoint_0.ckpt"]


def rows(page: Path) -> list[list[str]]:
    """The cells of all rows of all tables."""
    lines = [line for line in page.read_text("utf-8").splitlines() if line.startswith("|")]
    heads = {number - 1 for number, line in enumerate(lines) if line.startswith("|---")}
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for number, line in enumerate(lines)
        if number not in heads and not line.startswith("|---")
    ]


def test_every_row_is_tested() -> None:
    """But for adapters, which tests/lora/test_adapter_paths.py has."""
    documented = [row[0] for row in rows(DOCS / "sources.md")]
    assert len(set(documented)) == len(documented)
    tested = {case.row for case in CASES} | {"a PEFT folder or a file, for `merge-lora --adapter`"}
    assert set(documented) == tested


def test_the_chinese_page_has_the_same_rows() -> None:
    """The same headings and tables, and in each row the same file names and options."""
    english, chinese = DOCS / "sources.md", DOCS / "zh" / "sources.md"
    headings = [
        [line.split(" ")[0] for line in page.read_text("utf-8").splitlines() if line.startswith("#")]
        for page in (english, chinese)
    ]
    assert headings[0] == headings[1]
    assert len(rows(english)) == len(rows(chinese))
    for row, translated in zip(rows(english), rows(chinese)):
        assert sorted(re.findall("`.*?`", " ".join(row))) == sorted(re.findall("`.*?`", " ".join(translated)))
