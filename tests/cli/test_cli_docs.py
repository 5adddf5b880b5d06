"""The blocks of docs/offline.md run as they stand, in order, and give what the page says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from recorded import assert_same, read_ranks, read_tensors
from toy import ROOT, TOOLS, shell

PAGE = (ROOT / "docs" / "offline.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every block of the page was run, each by a shell of its own, with what they printed."""
    folder = tmp_path_factory.mktemp("offline")
    (folder / "tools").symlink_to(TOOLS)
    (folder / "bin").mkdir()
    shim = folder / "bin/mindformers-ckpt"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m mindformers_ckpt "$@"\n')
    shim.chmod(0o755)
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 10
    printed = []
    for block in blocks:
        result = shell(f'PATH="$PWD/bin:$PATH"; set -euo pipefail\n{block}', folder)
        assert result.code == 0, f"{block}\n{result}"
        printed.append(result.out)
    (folder / "printed").write_text("".join(printed))
    return folder


def test_all_ways_lead_back_to_the_complete_weights(folder: Path) -> None:
    whole = read_tensors(folder / "llama.safetensors")
    for name in ("llama_complete", "llama_again"):
        assert_same(read_tensors(folder / name / "rank_0/checkpoint_0.ckpt"), whole)


def test_runs_for_the_same_target_agree(folder: Path) -> None:
    reference = read_ranks(folder / "llama_8to16")
    assert reference.keys() == set(range(16))
    for name in ("llama_1to16", "llama_planned", "node0/llama_dp2mp4pp2", "node0/llama_two_processes"):
        found = read_ranks(folder / name)
        assert found.keys() == reference.keys()
        for rank, tensors in reference.items():
            assert_same(found[rank], tensors)
    one, by_hand = read_ranks(folder / "llama_1to8"), read_ranks(folder / "llama_by_hand")
    assert one.keys() == by_hand.keys() == set(range(8))
    for rank, tensors in one.items():
        assert_same(by_hand[rank], tensors)


@pytest.mark.parametrize("name", ["llama_dp2mp4pp2", "llama_own"])
def test_every_node_has_its_ranks(folder: Path, name: str) -> None:
    reference = read_ranks(folder / "llama_8to16")
    second = read_ranks(folder / "node1" / name)
    assert second.keys() == set(range(8, 16))
    for rank, tensors in second.items():
        assert_same(tensors, reference[rank])


def test_the_plan_is_printed_as_the_page_shows(folder: Path) -> None:
    shown = re.search(r"^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert shown is not None
    printed = (folder / "printed").read_text().replace(str(folder.resolve()), "…")
    printed = re.sub(r"[\d.,]+ GB are free", "69.09 GB are free", printed)
    assert shown[1] in printed
