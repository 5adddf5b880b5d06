"""The commands that make a result share its options, and a message names only options that its command has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import messages
import numpy as np
import pytest
from recorded import Tensor, random_bits, read_ranks, write_ranks, write_tensors
from toy import ROOT, Result, invoke, listing, write_llama

from mindformers_ckpt.cli.main import cli
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.files import write_strategy

COMMANDS = ("transform", "convert", "merge-lora")
# Options of one command with a reason; all others that say how a result is made are those of all three.
OWN = {
    "--transform-by-rank": "the guide has it there; the result is the same",
    "--plan": "plan --out plans a re-slicing",
    "--ranks": "for nodes that each make their own ranks of the same plan",
    "--rank-id": "the same, as the guide starts processes by hand",
    "--world-size": "checks the number of the guide's script",
    "--like": "convert compares shapes with config.json, merge-lora with the factors",
    "--weights-only": "adapters are trained over weights that are frozen, and so have no states",
    "--merged-strategy": "where the guide's merge-lora puts its merged file",
}
# Rooms whose messages can reach the user of any of the three commands, but for those of files that one of them uses.
ROOMS = {"publish", "execution", "uploads", "engine", "planning", "sources", "formats"}
# Named by messages that speak of another command: inspect and its like, convert, merge-lora.
_OTHERS = {"--strategy", "--input-path", "--output-path", "--reversed", "--adapter", "--src-strategy", "--out"}
_OTHER_WORDS = {"--src-ckpt-path-or-dir", "--dst-ckpt-dir"}  # of paths, as merge-lora has them after the guide
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
_WHERE_ELSE = {
    "planning/file.py": "transform",  # --plan
    "sources/foreign.py": "merge-lora",  # says the command's name
    "execution/checks.py": "transform",  # --transform-by-rank was given
}

Tensors = dict[str, Tensor]
_random = np.random.default_rng(3)


def options(command: str) -> set[str]:
    found = cli.get_command(None, command)  # type: ignore[arg-type]  # our group needs no context
    assert found is not None
    return {name for parameter in found.params for name in parameter.opts if name.startswith("--")}


def test_how_a_result_is_made_has_the_same_options_everywhere() -> None:
    have = {command: options(command) for command in COMMANDS}
    for command in COMMANDS:
        assert have["transform"] - have[command] - {*OWN} - _OTHER_WORDS == set(), command


@pytest.mark.parametrize("command", COMMANDS)
def test_messages_of_all_commands_name_options_that_each_has(command: str) -> None:
    have = options(command)
    unknown = {
        f"{said.file}: {name}"
        for said in messages.messages_of(ROOT)
        if said.room in ROOMS and _WHERE_ELSE.get(said.file, command) == command and "mindformers-ckpt" not in said.text
        for name in _OPTION.findall(said.text)
        if name not in have and name not in _OTHERS
    }
    assert unknown == set()


# ----------------------------------------------------------------------------------------- merge-lora


def lora(seed: int = 0) -> Tensors:
    """A weight of a layer with its branch, and one without."""
    shapes = {"wq.weight": (8, 8), "wq.lora_A": (2, 8), "wq.lora_B": (8, 2), "norm.weight": (8,)}
    random = np.random.default_rng(seed)
    values = {f"layers.0.{name}": random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return {name: Tensor(by_name("float32"), value.view(np.uint32)) for name, value in values.items()}


def merge(folder: Path, *more: str, source: str = "lora.ckpt") -> Result:
    return invoke(["merge-lora", "--src-checkpoint", source, "--dst-ckpt-dir", "merged", "--alpha", "4", *more], folder)


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    write_tensors(tmp_path / "lora.ckpt", lora())
    done = merge(tmp_path)
    assert done.code == 0, done
    return tmp_path


def test_merge_lora_replaces_its_own_result_when_told(merged: Path) -> None:
    first = read_ranks(merged / "merged")[0]["layers.0.wq.weight"].bits.copy()
    write_tensors(merged / "lora.ckpt", lora(seed=1))
    refused = merge(merged)
    assert refused.code == 1
    assert "merged is not empty; choose another folder, or allow it to be replaced (--overwrite)" in refused.err
    assert "--overwrite replaces it" in merge(merged, "--dry-run").out
    assert np.array_equal(read_ranks(merged / "merged")[0]["layers.0.wq.weight"].bits, first)
    done = merge(merged, "--overwrite")
    assert done.code == 0, done
    assert not np.array_equal(read_ranks(merged / "merged")[0]["layers.0.wq.weight"].bits, first)


def test_merge_lora_replaces_what_is_not_its_own_only_by_the_longer_word(merged: Path) -> None:
    (merged / "merged/manifest.json").unlink()
    refused = merge(merged, "--overwrite")
    assert refused.code == 1
    assert "--overwrite-anything" in refused.err
    assert merge(merged, "--overwrite-anything").code == 0


def test_merge_lora_takes_hashes_and_a_crc(merged: Path) -> None:
    done = merge(merged, "--overwrite", "--hash", "--crc-check", "--fsync")
    assert done.code == 0, done
    assert "1 of 1 .ckpt files store no CRC-32 to verify" in done.err
    (file,) = json.loads((merged / "merged/manifest.json").read_text())["files"]
    assert file["xxh3_128"].keys() == {"layers.0.wq.weight", "layers.0.norm.weight"}
    assert read_header(merged / "merged/rank_0/checkpoint_0.ckpt").crc is not None


def contradiction(folder: Path) -> Path:
    """Two ranks whose halves of a weight are the same, though the strategy cuts it."""
    tensors = {**lora(), "layers.0.wo.weight": random_bits(by_name("float32"), (64, 64), _random)}
    write_ranks(folder / "cut", {0: tensors, 1: tensors})
    layouts = {"layers.0.wo.weight": Layout.on({"mp": 2}, "mp", None)}
    whole = [name for name in tensors if name not in layouts]
    layouts.update({name: Layout.on({"mp": 2}, *[None] * tensors[name].bits.ndim) for name in whole})
    for rank in range(2):
        write_strategy(layouts, folder / f"strategy/ckpt_strategy_rank_{rank}.ckpt")
    return folder


def test_merge_lora_goes_on_over_a_contradiction_as_its_message_says(tmp_path: Path) -> None:
    folder = contradiction(tmp_path)
    strategy = ["--src-strategy", "strategy"]
    refused = merge(folder, *strategy, source="cut")
    assert refused.code == 1
    assert "go on with --contents warn" in refused.err
    done = merge(folder, *strategy, "--contents", "warn", source="cut")
    assert done.code == 0, done
    assert "ranks hold the same values although the strategy says different boxes" in done.err


def test_merge_lora_leaves_out_what_may_be_missing(merged: Path) -> None:
    names = {name: tensor for name, tensor in lora().items() if "lora" not in name}
    layouts = {name: Layout.on({"mp": 2}, *[None] * tensor.bits.ndim) for name, tensor in names.items()}
    write_strategy({**layouts, "head.weight": Layout.on({"mp": 2}, "mp", None)}, merged / "mp2.ckpt")
    asked = ["--dst-strategy", "mp2.ckpt", "--overwrite"]
    refused = merge(merged, *asked)
    assert refused.code == 1
    assert "head.weight" in refused.err
    done = merge(merged, *asked, "--allow-missing")
    assert done.code == 0, done
    assert all("head.weight" not in tensors for tensors in read_ranks(merged / "merged").values())


# -------------------------------------------------------------------------------------------- convert


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Llama of one layer, and a strategy of two ranks that has one parameter more."""
    write_llama(tmp_path / "model")
    rows = Layout.on({"mp": 2}, "mp", None)
    names = ("model.tok_embeddings.embedding_weight", "model.layers.0.attention.wq.weight", "model.head.weight")
    write_strategy(dict.fromkeys(names, rows), tmp_path / "mp2.ckpt")
    return tmp_path


def converted(folder: Path, *more: str, to: str = "out") -> Result:
    return invoke(["convert", "--input-path", "model", "--output-path", to, *more], folder)


def test_convert_names_the_files_of_ranks_and_leaves_out_what_may_be_missing(model: Path) -> None:
    cut = ["--dst-strategy", "mp2.ckpt", "--prefix", "llama_"]
    refused = converted(model, *cut)
    assert refused.code == 1
    assert "model.head.weight" in refused.err
    done = converted(model, *cut, "--allow-missing", "--hash", "--crc-check")
    assert done.code == 0, done
    assert (model / "out/rank_1/llama_1.ckpt").is_file()
    assert read_header(model / "out/rank_1/llama_1.ckpt").crc is not None
    files = json.loads((model / "out/manifest.json").read_text())["files"]
    assert all("xxh3_128" in file for file in files)


def test_convert_refuses_options_that_would_do_nothing(model: Path) -> None:
    before = listing(model)
    for more, words in (
        (["--prefix", "x_"], "--prefix: for the files of ranks"),
        (["--contents", "warn"], "--contents cannot be given without --to"),
    ):
        refused = converted(model, *more)
        assert refused.code == 1, refused
        assert words in refused.err
    assert "a manifest, which a single file has not" in converted(model, "--hash", to="out.ckpt").err
    assert listing(model) == before


def test_a_plugin_is_not_given_options_that_it_would_not_hear_of(tmp_path: Path) -> None:
    (tmp_path / "convert_weight.py").write_text("def convert_pt_to_ms(**given):\n    raise AssertionError\n")
    asked = ["convert", "--model", "mine", "--plugin", ".", "--input-path", ".", "--output-path", "out"]
    refused = invoke([*asked, "--overwrite", "--dst-strategy", "s.ckpt", "--hash"], tmp_path)
    assert refused.code == 2
    assert "--dst-strategy, --overwrite, --hash: a plugin writes its result itself" in refused.err
