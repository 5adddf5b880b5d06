"""Blocks of the README and of the pages on conversion and migration run on small weights; every other block has a test.

Absolute paths of the guide (`/worker`, `/home/user`) are folders of the test.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from dcp_files import rows, write_dcp
from doc_pages import DOCS, ROOT, Session, blocks_of, missing_lines
from recorded import assert_same, read_ranks, read_tensors
from small_llama import (
    hugging_face_weights,
    shards,
    weights,
    write_config,
    write_mindspore,
    write_pytorch,
    write_two_ranks_strategy,
)

from mindformers_ckpt import Layout, convert, transform
from mindformers_ckpt.strategy.files import rank_file_name, write_strategy

# Blocks that no test runs as they stand, by page and first line, with the reason, or what runs in their place.
NOT_RUN = {
    "README.md": {
        "bash tools/quickstart.sh": "installs MindSpore; tests/jobs/test_quickstart_job.py runs what it starts",
        "bash tools/test.sh": "runs the tests",
        "python3 -m venv .venv": "installs",
    },
    "start.md": {"pip install .": "installs"},
    "automatic.md": {
        'bash tools/msrun_launcher.sh "tools/run_mindformer.py --config CONFIG --run_mode train" \\': "is for several "
        "machines; tests/jobs/test_automatic_jobs.py starts it with two nodes on one",
    },
    "multi_node.md": {"# the first server (main node)": "the same"},
    "mindformers.md": {
        "python -m mindformers_ckpt.run run_mindformer.py --config finetune.yaml --auto_trans_ckpt True": "needs "
        "MindFormers; tests/mindformers runs it",
    },
    "conversion.md": {
        "python tools/bench_convert.py --gb 2": "measures, with gigabytes",
        "bash tools/test_transformers.sh tests/lora   # makes .venv-transformers": "installs packages",
        "mindformers-ckpt convert --model mymodel --plugin /home/user/mymodel \\": "is a pattern; "
        "tests/convert/test_plugins.py has real ones",
    },
    "models.md": {
        "python tools/real_models.py llama3_1_8b": "takes gigabytes; tests/test_real_models.py runs it on a part",
        "mindformers-ckpt convert --input_path Llama-3.1-8B --output_path llama_16 --dst_strategy strategy_16": "is "
        "what that script runs",
    },
}


def write_hugging_face(folder: Path) -> None:
    write_pytorch(write_config(folder) / "model.safetensors", hugging_face_weights(1))


def write_rank_folders(folder: Path) -> None:
    for rank, arrays in shards(1).items():
        path = folder / f"rank_{rank}" / f"llama_rank_{rank}-1_10.ckpt"
        path.parent.mkdir(parents=True)
        write_mindspore(path, arrays)


def assert_whole(path: Path, tmp_path: Path) -> None:
    """A file holds the weights of `small_llama`, whole."""
    assert_same(read_tensors(path), read_tensors(write_mindspore(tmp_path / "expected.ckpt", weights(1))))


@pytest.mark.parametrize("name", ["README.md", "README_CN.md"])
def test_the_command_of_the_readme(name: str, tmp_path: Path) -> None:
    session, worker = Session(tmp_path), tmp_path / "worker"
    source = worker / "checkpoint/llama3-8b-2layer/rank_0/llama3_8b.ckpt"
    source.parent.mkdir(parents=True)
    write_mindspore(source, weights(1))
    write_two_ranks_strategy(worker / "mindformers/output/strategy")
    (block,) = (block for block in blocks_of(ROOT / name, "bash") if "/worker" in block.text)
    session.run([block.text.replace(" /worker/", f" {worker}/")])
    assert read_ranks(worker / "transform_ckpt/llama3_8b_1to8").keys() == {0, 1}


def test_conversion(tmp_path: Path) -> None:
    session, home = Session(tmp_path), tmp_path / "home"
    write_hugging_face(home / "torch_weights")
    write_two_ranks_strategy(home / "output/strategy")
    block = blocks_of(DOCS / "conversion.md", "bash")[0]
    session.run([block.text.replace("/home/user", str(home))])
    assert_whole(home / "ms_weights/llama.ckpt", tmp_path)
    again = read_tensors(home / "back/model.safetensors")
    assert again.keys() == hugging_face_weights(1).keys()
    assert read_ranks(home / "sliced").keys() == {0, 1}


def test_coming_from_megatron(tmp_path: Path) -> None:
    session = Session(tmp_path)
    write_hugging_face(session.root / "exported")
    write_dcp(session.root / "checkpoint-1000", hugging_face_weights(1), rows(hugging_face_weights(1)))
    write_two_ranks_strategy(session.root / "strategy_mp2")
    page = DOCS / "from_megatron.md"
    printed = session.run([block.text for block in blocks_of(page, "bash")])
    assert missing_lines(page, printed) == []
    back = read_tensors(session.root / "back/model.safetensors")
    for name, array in hugging_face_weights(1).items():
        assert back[name].bits.tobytes() == array.tobytes()
    made, same = (read_ranks(session.root / name) for name in ("llama_from_dcp", "llama_mp2"))
    assert made.keys() == same.keys() == {0, 1}
    for rank, tensors in made.items():
        assert_same(tensors, same[rank])


def write_mcore_strategy(folder: Path, names: Mapping[str, Sequence[int]]) -> None:
    """A strategy of two ranks that cuts the rows of matrices."""
    layouts = {
        name: Layout.on({"mp": 2}, "mp", *(None for _ in shape[1:])) if len(shape) > 1 else Layout.on({"mp": 2}, None)
        for name, shape in names.items()
    }
    for rank in range(2):
        write_strategy(layouts, folder / rank_file_name(rank))


def test_migration(tmp_path: Path) -> None:
    session = Session(tmp_path)
    write_rank_folders(session.root / "output/checkpoint")
    for name in ("output/strategy", "strategy_of_the_old_job"):
        write_two_ranks_strategy(session.root / name)
    write_two_ranks_strategy(session.root / "strategy_of_the_new_job", replicas=2)
    write_hugging_face(session.root / "torch_weights")
    convert(session.root / "torch_weights", tmp_path / "mcore.safetensors", naming="mcore")
    mcore = read_tensors(tmp_path / "mcore.safetensors")
    write_mcore_strategy(
        session.root / "strategy_of_the_mcore_job", {name: tensor.bits.shape for name, tensor in mcore.items()}
    )
    session.run([block.text for block in blocks_of(DOCS / "migration.md", "bash")])
    for folder in ("for_1_x", "for_1_x_again"):
        ranks = read_ranks(session.root / folder)
        assert ranks.keys() == {0, 1}
        for rank, arrays in shards(1).items():
            assert ranks[rank].keys() == arrays.keys()
            for name, array in arrays.items():
                assert ranks[rank][name].bits.tobytes() == array.tobytes()
    transform(session.root / "checkpoint_mcore", tmp_path / "whole", format="safetensors")
    assert_same(read_tensors(tmp_path / "whole/rank_0/checkpoint_0.safetensors"), mcore)


@pytest.mark.parametrize("page", [*sorted(DOCS.glob("*.md")), ROOT / "README.md"], ids=lambda page: page.name)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    """A page whose blocks are run is named by the test that does it."""
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    excused = NOT_RUN.get(page.name, {})
    left = [block.text for block in blocks_of(page, "bash") if block.text.splitlines()[0] not in excused]
    assert not left or re.search(rf"\b{page.name}\"", tests), f"no test runs {left[0]}"
