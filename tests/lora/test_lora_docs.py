"""The blocks of docs/lora.md run as they stand, and give what the page says."""

from __future__ import annotations

from pathlib import Path

import pytest
from doc_pages import DOCS, Session, blocks_of, text_of
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

PAGE = DOCS / "lora.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the page names, in which all its blocks were run."""
    session = Session(tmp_path_factory.mktemp("lora"))
    folder = session.root
    (folder / "output").mkdir()
    write_complete(folder / "llama_lora.ckpt", lora_model())
    write_complete(folder / "llama.ckpt", base_model())
    write_complete(folder / "adapter.ckpt", adapters())
    write_distributed(folder / "model_dir", lora_model(), pipeline())
    write_strategies(folder / "output/strategy", pipeline())
    write_strategies(folder / "target_strategy", [layouts()])
    blocks = [block.text for block in blocks_of(PAGE, "bash")]
    assert len(blocks) == 4
    session.run(blocks)
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
        if option.replace("-", "_").replace("__", "--", 1) not in text_of(PAGE) and option != "--dst-ckpt-strategy"
    ]
    assert undocumented == []
