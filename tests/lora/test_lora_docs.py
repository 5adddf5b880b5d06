"""The blocks of docs/lora.md run as they stand, and give what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lora_model import (
    SCALING,
    Model,
    adapters,
    assert_merged,
    base_model,
    layouts,
    lora_model,
    merged_numbers,
    pipeline,
    write_complete,
    write_distributed,
    write_strategies,
)
from recorded import read_ranks, read_tensors

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "lora.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the page names, in which all its blocks were run."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "tools").symlink_to(ROOT / "tools")
    (folder / "mindformers-ckpt").write_text(f'#!/bin/sh\nexec {sys.executable} -m mindformers_ckpt "$@"\n')
    (folder / "mindformers-ckpt").chmod(0o755)
    (folder / "output").mkdir()
    write_complete(folder / "llama_lora.ckpt", lora_model())
    write_complete(folder / "llama.ckpt", base_model())
    write_complete(folder / "adapter.ckpt", adapters())
    write_distributed(folder / "model_dir", lora_model(), pipeline())
    write_strategies(folder / "output/strategy", pipeline())
    write_strategies(folder / "target_strategy", [layouts()])
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        done = subprocess.run(
            ["bash", "-euc", block], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{block}\n{done.stderr}"
    return folder


@pytest.mark.parametrize("name", ["merged", "merged_from_shards", "merged_with_adapter"])
def test_complete_results(name: str, folder: Path) -> None:
    expected = merged_numbers(base_model(), adapters(), SCALING)
    for file in ("rank_0/checkpoint_0.ckpt", "merged_lora.ckpt"):
        assert_merged(read_tensors(folder / name / file), base_model(), expected)


def test_shards_of_the_target(folder: Path) -> None:
    whole: Model = read_tensors(folder / "merged/merged_lora.ckpt")
    ranks = read_ranks(folder / "merged_for_target")
    assert ranks.keys() == {0, 1, 2, 3}
    for rank, tensors in ranks.items():
        for name, layout in layouts("weight").items():
            part = whole[name].part(layout.box(whole[name].bits.shape, rank))
            assert tensors[name].bits.tobytes() == part.bits.tobytes(), name


def test_every_option_is_documented() -> None:
    from mindformers_ckpt.cli.merge_lora import command

    undocumented = [
        option
        for parameter in command.params
        for option in parameter.opts
        if option.replace("-", "_").replace("__", "--", 1) not in PAGE and option != "--dst-ckpt-strategy"
    ]
    assert undocumented == []
