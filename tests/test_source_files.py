from __future__ import annotations

import json
from pathlib import Path

import pytest
from recorded import random_model, touch, write_tensors

from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.sources.find import find_source


def chosen(root: Path, file_name: str | None = None) -> dict[int, list[str]]:
    by_rank = find_source(root, file_name).by_rank
    return {rank: [path.name for path in paths] for rank, paths in by_rank.items()}


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_a_file_of_complete_weights(name: str, tmp_path: Path) -> None:
    touch(tmp_path, name)
    files = find_source(tmp_path / name)
    assert not files.sharded
    assert files.by_rank == {0: (tmp_path / name,)}
    assert files.name == "model"


def test_rank_folders(tmp_path: Path) -> None:
    touch(tmp_path / "run-1.5", "rank_0/a.ckpt", "rank_1/a.ckpt", "rank_10/a.ckpt", "rank_x/c.ckpt", "log.txt")
    files = find_source(tmp_path / "run-1.5")
    assert files.sharded
    assert files.name == "run-1.5"
    assert {rank: paths[0].name for rank, paths in files.by_rank.items()} == {
        0: "a.ckpt",
        1: "a.ckpt",
        10: "a.ckpt",
    }
    assert files.warnings == ()


def test_other_files_of_a_rank_folder_do_not_count(tmp_path: Path) -> None:
    touch(tmp_path, "rank_0/a.ckpt", "rank_0/z.meta", "rank_0/z.ckpt.tmp")
    (tmp_path / "rank_0" / "z.ckpt").mkdir()
    assert chosen(tmp_path) == {0: ["a.ckpt"]}


def test_incumbent_finding_7_stale_file_chosen(tmp_path: Path) -> None:
    """MindSpore takes the last by string order without a word; we take the same, as the guide says, and warn."""
    for rank in range(2):
        touch(tmp_path, f"rank_{rank}/a_rank_{rank}-9_1.ckpt", f"rank_{rank}/a_rank_{rank}-10_1.ckpt")
    files = find_source(tmp_path)
    assert [path.name for paths in files.by_rank.values() for path in paths] == [
        "a_rank_0-9_1.ckpt",
        "a_rank_1-9_1.ckpt",
    ]
    (warning,) = files.warnings  # one for all ranks
    assert "rank_0 and 1 more holds several files; a_rank_0-9_1.ckpt is used, the last by default sort" in warning
    assert "a_rank_0-10_1.ckpt has the higher numbers" in warning


def test_incumbent_finding_7_ranks_of_different_steps(tmp_path: Path) -> None:
    """MindSpore mixes files of different steps: weights that never existed. We refuse."""
    touch(tmp_path, "rank_0/a-1_10.ckpt", "rank_1/a-1_20.ckpt", "rank_2/a-1_20.ckpt")
    with pytest.raises(PlanError, match=r"different epochs and steps \(1_10: ranks \[0\]; 1_20: ranks \[1, 2\]\)"):
        find_source(tmp_path).raise_absent()


@pytest.mark.parametrize(
    "wanted", ["1_5.ckpt", "1_5", "llama_rank_0-1_5.ckpt", "llama_rank_0-1_5", "any-1_5.safetensors"]
)
def test_a_named_step(wanted: str, tmp_path: Path) -> None:
    for rank in range(2):
        touch(tmp_path, *(f"rank_{rank}/llama_rank_{rank}-{step}.ckpt" for step in ("1_5", "1_15", "2_5", "11_5")))
    assert chosen(tmp_path, wanted) == {0: ["llama_rank_0-1_5.ckpt"], 1: ["llama_rank_1-1_5.ckpt"]}
    assert find_source(tmp_path, wanted).warnings == ()


def test_a_named_file(tmp_path: Path) -> None:
    touch(tmp_path, *(f"rank_{rank}/{name}.ckpt" for rank in range(2) for name in ("checkpoint", "other", "zzz")))
    assert chosen(tmp_path, "checkpoint.ckpt") == {0: ["checkpoint.ckpt"], 1: ["checkpoint.ckpt"]}
    assert chosen(tmp_path, "other") == {0: ["other.ckpt"], 1: ["other.ckpt"]}


def test_all_ranks_without_a_file_are_listed(tmp_path: Path) -> None:
    touch(tmp_path, "rank_0/a-1_1.ckpt", "rank_1/notes.txt", "rank_2/a-1_2.ckpt", "rank_3/a-1_1.ckpt")
    with pytest.raises(PlanError, match=r"(?s)rank_0: its last file, a-1_1.*rank_1: no checkpoint file in .*rank_1\n"):
        find_source(tmp_path).raise_absent()
    with pytest.raises(PlanError, match=r"(?s)rank_1: no file for 'a-1_1'.*rank_2: no file for 'a-1_1'"):
        find_source(tmp_path, "a-1_1").raise_absent()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="there is no checkpoint at"):
        find_source(tmp_path / "nothing")
    with pytest.raises(PlanError, match=r"holds neither rank_<n> folders nor a \.ckpt or .safetensors file"):
        find_source(tmp_path)


def test_a_folder_of_complete_files(tmp_path: Path) -> None:
    touch(tmp_path, "b.ckpt", "a.safetensors", "readme.md")
    files = find_source(tmp_path)
    assert not files.sharded
    assert files.by_rank == {0: (tmp_path / "a.safetensors", tmp_path / "b.ckpt")}


def indexed(tmp_path: Path, weight_map: object) -> Path:
    for name, tensor in (("a.safetensors", "w"), ("b.safetensors", "v"), ("stray.safetensors", "u")):
        write_tensors(tmp_path / name, random_model({tensor: (2, 2)}))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_an_index_tells_which_files_belong_together(tmp_path: Path) -> None:
    assert chosen(indexed(tmp_path, {"w": "a.safetensors", "v": "b.safetensors"})) == {
        0: ["a.safetensors", "b.safetensors"]
    }


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ([], "its weight_map does not map tensors to file names"),
        ({}, "its weight_map does not map tensors to file names"),
        ("text", "is not an index of weight files"),
        ({"w": 3}, "its weight_map does not map tensors to file names"),
        ({"w": "../a.safetensors"}, "names files outside of its folder"),
        ({"w": "/etc/passwd"}, "names files outside of its folder"),
        ({"w": "missing.safetensors"}, "names files that are not there\n  - missing.safetensors"),
        ({"x": "a.safetensors"}, "names tensors that are not there"),
    ],
)
def test_a_wrong_index(weight_map: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        find_source(indexed(tmp_path, weight_map))


def test_links_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "store/file.ckpt")
    (tmp_path / "job" / "rank_0").mkdir(parents=True)
    (tmp_path / "job" / "rank_0" / "a.ckpt").symlink_to(tmp_path / "store" / "file.ckpt")
    assert chosen(tmp_path / "job") == {0: ["a.ckpt"]}
