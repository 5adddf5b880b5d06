"""What a path is taken for: one reading, or an error that shows both (docs/sources.md)."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from recorded import Tensor, random_model, touch, write_tensors

from mindformers_ckpt.errors import FormatError, PlanError
from mindformers_ckpt.sources.find import find_huggingface, find_mindspore, find_source, is_huggingface_folder
from mindformers_ckpt.sources.source import Kind, Source
from mindformers_ckpt.sources.steps import Moment, SavedName, matching, parse

CONFIG = json.dumps({"model_type": "llama"})


def names(source: Source) -> dict[int, list[str]]:
    return {rank: [path.name for path in files] for rank, files in source.by_rank.items()}


def hugging_face(folder: Path, files: Mapping[str, Mapping[str, Tensor]], index: object = None) -> Path:
    """A folder of transformers' form; MindSpore's mark is not in its files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(CONFIG)
    for name, tensors in files.items():
        write_tensors(folder / name, dict(tensors))
        if name.endswith(".safetensors"):
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content.replace(b'"format":"ms"', b'"format":"pt"'))
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama_rank_3-1_20.ckpt", SavedName("llama", 3, Moment(0, 1, 20))),
        ("llama_rank_3_1-5_2.ckpt", SavedName("llama", 3, Moment(1, 5, 2))),
        ("llama_rank_0-3_150_breakpoint.safetensors", SavedName("llama", 0, Moment(0, 3, 150, "_breakpoint"))),
        # The 5 could be a run as well: what matters is that it is the same on all ranks.
        ("qwen-2_5-1_10.ckpt", SavedName("qwen-2", None, Moment(5, 1, 10))),
        ("llama-3-8b_rank_12-10_2", SavedName("llama-3-8b", 12, Moment(0, 10, 2))),
        ("gpt_2-5_2.ckpt", SavedName("gpt", None, Moment(2, 5, 2))),
        ("checkpoint_7.ckpt", None),
        ("llama3_8b.ckpt", None),
    ],
)
def test_names_are_parsed(name: str, expected: SavedName | None) -> None:
    assert parse(name) == expected


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("a_rank_0-5_2.ckpt", ["a_rank_1-5_2.ckpt"]),  # the exact name, with the rank's own number
        ("a_rank_1_1-5_2", ["a_rank_1_1-5_2.ckpt"]),
        ("b-5_2", ["a_rank_1-5_2.ckpt", "a_rank_1_1-5_2.ckpt"]),  # two runs: the caller refuses
        ("x_1-5_2.ckpt", ["a_rank_1_1-5_2.ckpt"]),
        ("5_3", ["a_rank_1-5_3.ckpt"]),
        ("5_3_breakpoint", []),
        ("b-5_3_breakpoint", ["a_rank_1-5_3_breakpoint.ckpt"]),
        ("5_20", []),
    ],
)
def test_a_named_file_goes_before_any_looser_match(wanted: str, expected: list[str]) -> None:
    held = ("a_rank_1-5_2", "a_rank_1_1-5_2", "a_rank_1-5_3", "a_rank_1-5_3_breakpoint", "a_rank_1-15_2")
    files = [Path(f"/m/rank_1/{name}.ckpt") for name in held]
    assert [file.name for file in matching(files, wanted, 1)] == expected


def test_runs_are_never_mixed(tmp_path: Path) -> None:
    """A second run has saved on rank 0 only (case 04); the last step of both ranks is proposed."""
    touch(tmp_path, "rank_0/a_rank_0-5_2.ckpt", "rank_0/a_rank_0_1-5_2.ckpt", "rank_1/a_rank_1-5_2.ckpt")
    source = find_source(tmp_path)
    assert names(source) == {0: ["a_rank_0_1-5_2.ckpt"]}
    with pytest.raises(PlanError, match=r"--step 5_2 takes it\n  - rank_1: its last file, a_rank_1-5_2\.ckpt"):
        source.raise_absent()
    with pytest.raises(PlanError, match=r"'5_2' could be a_rank_0-5_2\.ckpt, a_rank_0_1-5_2\.ckpt"):
        find_source(tmp_path, "5_2")
    assert names(find_source(tmp_path, "a_rank_0-5_2.ckpt")) == {0: ["a_rank_0-5_2.ckpt"], 1: ["a_rank_1-5_2.ckpt"]}


def test_what_a_failing_job_saved_is_not_joined_with_what_others_saved(tmp_path: Path) -> None:
    touch(tmp_path, "rank_0/a_rank_0-3_150.ckpt", "rank_0/a_rank_0-3_180_breakpoint.ckpt", "rank_1/a_rank_1-3_150.ckpt")
    with pytest.raises(PlanError, match=r"3_180_breakpoint: ranks \[0\]; 3_150: ranks \[1\].*--step 3_150"):
        find_source(tmp_path)


def test_numbers_are_those_of_ascii_and_of_bounded_length(tmp_path: Path) -> None:
    touch(tmp_path, "rank_0/a-1_1.ckpt", "rank_0/a-\u0662_\u0663.ckpt")
    source = find_source(tmp_path)
    assert names(source) == {0: ["a-\u0662_\u0663.ckpt"]}  # the last by name; that is not a step, and so it is said
    assert "and not a-1_1.ckpt" in source.warnings[0]
    with pytest.raises(PlanError, match="no file for"):
        find_source(tmp_path, "1_" + 5000 * "9")
    touch(tmp_path, "rank_\u0661/a-1_1.ckpt")
    with pytest.raises(PlanError, match="is almost the name of a rank's folder"):
        find_source(tmp_path)


@pytest.mark.parametrize(
    ("files", "read"),
    [
        (["rank_0/checkpoint_0", "rank_1/checkpoint_1"], True),
        (["rank_0/00000", "rank_1/00001"], True),
        (["rank_0/m", "rank_1/m"], True),
        (["rank_0/a1", "rank_1/a1", "rank_1/a0"], True),  # the name is the same, although 1 is the rank as well
        (["rank_8/device_0", "rank_9/device_1"], True),  # no rank had a choice
        (["rank_8/device_0", "rank_9/device_1", "rank_9/device_0"], False),
        (["rank_0/v1", "rank_1/v1", "rank_1/v2"], False),
        (["rank_0/llama", "rank_1/qwen"], False),
    ],
)
def test_names_that_tell_no_step(files: list[str], read: bool, tmp_path: Path) -> None:
    touch(tmp_path, *(f"{file}.ckpt" for file in files))
    if read:
        assert not find_source(tmp_path).absent
        return
    with pytest.raises(PlanError, match="have different names"):
        find_source(tmp_path)


def test_leading_zeros_are_the_same_step(tmp_path: Path) -> None:
    touch(tmp_path, "rank_0/a_rank_0-01_02.ckpt", "rank_1/a_rank_1-1_2.ckpt")
    assert not find_source(tmp_path).absent
    assert names(find_source(tmp_path, "1_2")) == {0: ["a_rank_0-01_02.ckpt"], 1: ["a_rank_1-1_2.ckpt"]}
    touch(tmp_path, "rank_0/a_rank_0-1_2.ckpt")
    with pytest.raises(PlanError, match=r"'1_2' could be a_rank_0-01_02\.ckpt, a_rank_0-1_2\.ckpt"):
        find_source(tmp_path, "1_2")


def test_names_in_any_bytes(tmp_path: Path) -> None:
    strange = os.fsdecode(b"\xc4\xe3 \n")
    for rank in range(2):
        saved(tmp_path, f"rank_{rank}/{strange}_rank_{rank}-1_1.ckpt", f"rank_{rank}/{strange}_rank_{rank}-1_2.ckpt")
    assert names(find_source(tmp_path)) == {rank: [f"{strange}_rank_{rank}-1_2.ckpt"] for rank in range(2)}
    assert names(find_source(tmp_path, f"{strange}_rank_0-1_1.ckpt"))[1] == [f"{strange}_rank_1-1_1.ckpt"]


def test_numbers_that_are_the_ranks_are_no_runs(tmp_path: Path) -> None:
    touch(tmp_path, *(f"rank_{rank}/gpt_{rank}-5_2.ckpt" for rank in range(3)))
    assert not find_source(tmp_path).absent


def test_files_of_other_models_do_not_belong_together(tmp_path: Path) -> None:
    touch(tmp_path, "rank_0/llama_rank_0-1_1.ckpt", "rank_1/qwen_rank_1-1_1.ckpt")
    with pytest.raises(PlanError, match=r"llama 1_1: ranks \[0\]; qwen 1_1: ranks \[1\]"):
        find_source(tmp_path)


def test_a_file_of_another_rank_in_a_folder_is_said(tmp_path: Path) -> None:
    touch(tmp_path, "rank_0/a_rank_0-1_1.ckpt", "rank_1/a_rank_0-1_1.ckpt")
    (warning,) = find_source(tmp_path).warnings
    assert "rank_1/a_rank_0-1_1.ckpt" in warning


def test_both_formats_in_a_rank_folder(tmp_path: Path) -> None:
    touch(tmp_path, "rank_0/a-1_1.ckpt", "rank_0/a-1_2.safetensors", "rank_1/a-1_2.safetensors")
    with pytest.raises(PlanError, match=r"rank_0: \.ckpt and \.safetensors files are there \(a-1_1.ckpt, a-1_2.safe"):
        find_source(tmp_path)
    assert names(find_source(tmp_path, "1_2")) == {0: ["a-1_2.safetensors"], 1: ["a-1_2.safetensors"]}


def test_two_folders_of_one_rank(tmp_path: Path) -> None:
    touch(tmp_path, "rank_0/a.ckpt", "rank_00/a.ckpt", "rank_1/a.ckpt")
    with pytest.raises(PlanError, match="rank_0 and rank_00 are both rank 0"):
        find_source(tmp_path)


def test_leftovers_and_hidden_files_do_not_count(tmp_path: Path) -> None:
    touch(
        tmp_path, *(f"rank_0/{name}" for name in ("a.ckpt", "._z.ckpt", ".z.ckpt", "z.ckpt.tmp", "z.ckpt.incomplete"))
    )
    touch(tmp_path / "complete", "w.safetensors", "._w.safetensors", "x.safetensors.crdownload")
    assert names(find_source(tmp_path)) == {0: ["a.ckpt"]}
    assert names(find_source(tmp_path / "complete")) == {0: ["w.safetensors"]}


def test_files_beside_rank_folders_are_said(tmp_path: Path) -> None:
    touch(tmp_path, "rank_0/a.ckpt", "rank_1/a.ckpt", "merged.ckpt", "merged_ckpt_strategy.ckpt")
    (warning,) = find_source(tmp_path).warnings
    assert warning.endswith("left aside are the files beside them: merged.ckpt")


def test_strategy_files_are_no_weights(tmp_path: Path) -> None:
    touch(tmp_path, "ckpt_strategy_rank_0.ckpt", "ckpt_strategy_rank_1.ckpt")
    with pytest.raises(PlanError, match="strategy files, which hold no weights"):
        find_source(tmp_path)


@pytest.mark.parametrize("given", ["rank_1", "rank_1/a-1_1.ckpt"])
def test_a_shard_is_not_taken_for_the_whole(given: str, tmp_path: Path) -> None:
    touch(tmp_path, "rank_0/a-1_1.ckpt", "rank_1/a-1_1.ckpt")
    with pytest.raises(PlanError, match=r"(?s)part of one rank: rank_0 beside it.*give .*strategy.*symbolic link"):
        find_source(tmp_path / given)
    (tmp_path / "rank_0/a-1_1.ckpt").unlink()
    assert names(find_source(tmp_path / given)) == {0: ["a-1_1.ckpt"]}  # the guide's own example: alone
    touch(tmp_path, "rank_0/a-1_1.ckpt")
    os.symlink(tmp_path / "rank_1", tmp_path / "whole")
    assert names(find_source(tmp_path / "whole")) == {0: ["a-1_1.ckpt"]}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["m_rank0_.safetensors"], "hyper-parallel without its .metadata"),
        (["x.gguf"], "GGUF"),
        (["mp_rank_00/x"], "Megatron-LM or DeepSpeed"),
        (["readme.md"], r"neither rank_<n> folders nor .*, but readme\.md"),
        ([], "but nothing"),
    ],
)
def test_other_folders_are_named(entries: list[str], message: str, tmp_path: Path) -> None:
    touch(tmp_path, *entries)
    with pytest.raises(PlanError, match=message):
        find_source(tmp_path)


def test_a_checkpoint_2_of_one_card_is_complete(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a-model-0000000-0000001.safetensors", random_model({"w": (2,)}))
    write_tensors(tmp_path / "a-opt-0000000-0000001.safetensors", random_model({"adam_m.w": (2,)}))
    source = find_source(tmp_path)
    assert (source.kind, list(source.by_rank)) == (Kind.CHECKPOINT2, [0])
    assert find_source(tmp_path / "a-model-0000000-0000001.safetensors").kind is Kind.COMPLETE


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path(path: str) -> None:
    with pytest.raises(PlanError, match="is a variable not set"):
        find_source(path)


def test_a_link_that_leads_to_itself(tmp_path: Path) -> None:
    touch(tmp_path, "a/rank_0/x.ckpt")
    for link in ("itself", "a/rank_1", "a/rank_0/y.ckpt"):
        os.symlink(Path(link).name, tmp_path / link)
    with pytest.raises(PlanError, match="there is no checkpoint at"):
        find_source(tmp_path / "itself")
    source = find_source(tmp_path / "a")
    assert names(source) == {0: ["y.ckpt"]}
    assert source.absent[1].endswith("rank_1 is a link that leads nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "meta.json"])
def test_a_pipe_in_place_of_json_is_not_waited_for(name: str, tmp_path: Path) -> None:
    hugging_face(tmp_path / "m", {"a.safetensors": W})
    saved(tmp_path, "ranks/rank_0/a-1_1.ckpt")
    folder = {"meta.json": tmp_path / "ranks/rank_0"}.get(name, tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    if name == "meta.json":
        assert names(find_source(tmp_path / "ranks", resume=True)) == {0: ["a-1_1.ckpt"]}
        return
    with pytest.raises(PlanError, match=r"cannot be read as JSON|index.json cannot be read: it is not a regular file"):
        find_source(tmp_path / "m")


@contextlib.contextmanager
def without_the_rights_of_root() -> Iterator[None]:
    """Be nobody for a while: root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_may_not_be_read() -> None:
    with tempfile.TemporaryDirectory() as name:  # tmp_path is in a folder of root alone
        root = Path(name)
        touch(root, "rank_0/a.ckpt", "rank_1/a.ckpt")
        root.chmod(0o755)
        (root / "rank_1").chmod(0)
        try:
            denied = pytest.raises(PlanError, match=r"rank_1: cannot be read: Permission denied")
            with without_the_rights_of_root(), denied:
                find_source(root)
        finally:
            (root / "rank_1").chmod(0o700)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_folder_with_the_name_of_a_standard_file(name: str, tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m", {"a.safetensors": W})
    (folder / name).mkdir()
    source = find_source(folder)
    assert names(source) == {0: ["a.safetensors"]}
    assert source.warnings == ((f"{folder}: left aside: {name} (a folder)",) if name == "model.safetensors" else ())


def test_an_index_of_files_that_mindspore_wrote(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m", {}, {"w": "a.safetensors", "v": "a.safetensors"})
    write_tensors(folder / "a.safetensors", W)
    assert find_source(folder).kind is Kind.COMPLETE


def test_a_folder_that_holds_weights_one_level_deeper(tmp_path: Path) -> None:
    touch(tmp_path, "checkpoint/rank_0/a.ckpt", "checkpoint_network/rank_0/a.ckpt", "log/rank_0.txt")
    with pytest.raises(PlanError, match=r"; give \S+/checkpoint or \S+/checkpoint_network$"):
        find_source(tmp_path)


@pytest.mark.parametrize("path", ["http://host/folder", "https:/host/folder", Path("hf://model")])
def test_a_url(path: str | Path) -> None:
    with pytest.raises(PlanError, match="is on the web"):
        find_source(path)


def test_a_path_that_is_not_there_says_what_is(tmp_path: Path) -> None:
    touch(tmp_path, "rank_0/a.ckpt", "strategy/x")
    with pytest.raises(PlanError, match=r"there is no checkpoint at .*; .* holds rank_0, strategy"):
        find_source(tmp_path / "checkpoint" / "rank_0")


@pytest.mark.parametrize(("given", "expected"), [(".", "llama"), ("a/..", "llama"), ("model.ckpt", "model")])
def test_the_name_is_asked_of_the_source(
    given: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = touch(tmp_path / "llama", "model.ckpt", "a/x")
    monkeypatch.chdir(folder)
    assert find_source(given).name == expected


W, V = random_model({"w": (2, 2), "v": (2, 2)}), random_model({"v": (2, 2), "u": (2,)})


def test_a_single_file_goes_before_the_index(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m", {"model.safetensors": W, "a.safetensors": V}, {"v": "a.safetensors"})
    source = find_source(folder)
    assert (source.kind, names(source)) == (Kind.HUGGING_FACE, {0: ["model.safetensors"]})
    (warning,) = source.warnings
    assert (
        "model.safetensors is read, as transformers does; left aside: model.safetensors.index.json, a.safe" in warning
    )


def test_the_index_says_who_holds_what(tmp_path: Path) -> None:
    """Both shards hold v: the one that the index assigns it to is read (transformers would take the last)."""
    folder = hugging_face(
        tmp_path / "m", {"a.safetensors": W, "b.safetensors": V}, {"w": "a.safetensors", "v": "b.safetensors"}
    )
    source = find_huggingface(folder)
    assert source.owners == {"w": folder / "a.safetensors", "v": folder / "b.safetensors"}
    (warning,) = source.warnings
    assert "does not assign them there: v in a.safetensors, u in b.safetensors" in warning


def test_an_unfinished_download_is_named(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m", {"a.safetensors": W}, {"w": "a.safetensors", "v": "b.safetensors"})
    touch(folder, "b.safetensors.incomplete")
    with pytest.raises(PlanError, match=r"b.safetensors \(b.safetensors.incomplete is: an unfinished download\)"):
        find_source(folder)


def test_safetensors_go_before_bin(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m", {"model.safetensors": W})
    touch(folder, "pytorch_model.bin.index.json", "pytorch_model.bin")
    source = find_source(folder)
    assert names(source) == {0: ["model.safetensors"]}
    assert "left aside: pytorch_model.bin, pytorch_model.bin.index.json" in source.warnings[0]


def test_several_sets_of_weights(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m", {})
    touch(folder, "model-00001-of-00001.safetensors", "fp16-00001-of-00001.safetensors")
    with pytest.raises(PlanError, match=r"(?s)several sets of weights.*fp16-\*-of-00001.*model-\*-of-00001"):
        find_huggingface(folder)
    (folder / "fp16-00001-of-00001.safetensors").rename(folder / "model-00002-of-00003.safetensors")
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model-00001-of-00003.safetensors")
    with pytest.raises(PlanError, match=r"lacks weight files\n  - model-00003-of-00003\.safetensors"):
        find_huggingface(folder)


def test_a_count_that_no_folder_has(tmp_path: Path) -> None:
    folder = touch(hugging_face(tmp_path / "m", {}), "model-1-of-99999999999999.safetensors")
    with pytest.raises(PlanError, match=r"lacks weight files"):
        find_huggingface(folder)


def test_a_hugging_face_model_is_not_cut_under_its_own_names(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m", {"model.safetensors": W})
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(PlanError, match=r"is a Hugging Face model.*mindformers-ckpt convert"):
            find_mindspore(path)
    write_tensors(folder / "model.safetensors", W)  # written by MindSpore, with a config.json beside
    assert not is_huggingface_folder(folder)
    assert find_mindspore(folder).kind is Kind.COMPLETE


def test_damaged_files_of_an_index(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "m", {}, {"w": "a.safetensors", "v": "b.safetensors"})
    touch(folder, "a.safetensors", "b.safetensors")
    with pytest.raises(FormatError, match=r"(?s)files cannot be read.*a\.safetensors.*b\.safetensors"):
        find_source(folder)


def resumed(root: Path, meta: Mapping[int, str] = {}) -> Source:
    for rank, name in meta.items():
        (root / f"rank_{rank}/meta.json").write_text(json.dumps({"last_epoch": 1, "last_ckpt_file": name}))
    return find_source(root, resume=True)


def saved(root: Path, *paths: str) -> Path:
    for path in paths:
        write_tensors(root / path, random_model({"w": (4,)}))
    return root


def test_resuming_believes_meta_json(tmp_path: Path) -> None:
    saved(tmp_path, *(f"rank_{rank}/a_rank_{rank}-{step}_1.ckpt" for rank in range(2) for step in (9, 10)))
    source = resumed(tmp_path, {rank: f"a_rank_{rank}-10_1.ckpt" for rank in range(2)})
    assert names(source) == {0: ["a_rank_0-10_1.ckpt"], 1: ["a_rank_1-10_1.ckpt"]}
    assert source.warnings == ()


def test_resuming_goes_back_to_the_last_whole_step_of_all(tmp_path: Path) -> None:
    saved(tmp_path, *(f"rank_{rank}/a_rank_{rank}-{step}_1.ckpt" for rank in range(2) for step in (1, 2, 3)))
    for rank, step in ((1, 3), (0, 2)):
        path = tmp_path / f"rank_{rank}/a_rank_{rank}-{step}_1.ckpt"
        os.truncate(path, path.stat().st_size - 3)
    source = resumed(tmp_path)
    assert names(source) == {0: ["a_rank_0-1_1.ckpt"], 1: ["a_rank_1-1_1.ckpt"]}
    (warning,) = source.warnings
    assert "a_rank_1-3_1.ckpt" in warning
    assert "1_1, the last whole step that all ranks have, is resumed" in warning


def test_resuming_with_a_rank_that_is_behind(tmp_path: Path) -> None:
    saved(tmp_path, *(f"rank_{rank}/a_rank_{rank}-{step}_1.ckpt" for rank, step in ((0, 1), (0, 2), (1, 1))))
    source = resumed(tmp_path, {0: "a_rank_0-2_1.ckpt", 1: "a_rank_1-1_1.ckpt"})
    assert names(source) == {0: ["a_rank_0-1_1.ckpt"], 1: ["a_rank_1-1_1.ckpt"]}
    assert "the last files of the ranks are of different steps" in source.warnings[0]
