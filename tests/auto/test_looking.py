"""All ranks look at a source of many rank folders, and choose and find what one rank alone would."""

from __future__ import annotations

import json
import os
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recorded import random_model, write_tensors
from test_own_files import on_ranks

from mindformers_ckpt.disk import waiting
from mindformers_ckpt.errors import CheckpointError
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.job import looking
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.config import Config
from mindformers_ckpt.job.direct import read_direct
from mindformers_ckpt.job.looking import Looked, look_together
from mindformers_ckpt.job.output_dir import OutputDir
from mindformers_ckpt.job.reslice import Reslicing
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.planning.rank_plan import decode_rank, encode_ranks
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.strategy.files import write_strategy
from mindformers_ckpt.strategy.model import Strategy

FOLDERS = 70
NAME = "llama_rank_1-1_1.ckpt"
RANKS = 5
FIRST = random_model({"a.w": (4, 6), "b.w": (3, 5), "global_step": ()}, seed=1)
SECOND = random_model({"c.w": (4, 6), "head.w": (7, 2)}, seed=2)


def saved(root: Path, suffix: str = ".ckpt", steps: tuple[int, ...] = (1, 2)) -> Path:
    """A checkpoint of two stages."""
    for rank in range(FOLDERS):
        for step in steps:
            file = root / f"rank_{rank}" / f"llama_rank_{rank}-1_{step}{suffix}"
            write_tensors(file, FIRST if rank < FOLDERS // 2 else SECOND)
    return root


def look(
    root: Path, step: str | None = None, *, resume: bool = False, others: Path | None = None
) -> Looked | str | None:
    """What the main rank has in the end; `others`: where the other ranks find the checkpoint."""
    found = on_ranks(
        RANKS,
        lambda cluster: look_together(cluster, root if cluster.rank == 0 else others or root, step, resume=resume),
    )
    assert found[1:] == [None] * (RANKS - 1) or isinstance(found[0], str)
    main: Looked | str | None = found[0]
    return main


def assert_as_alone(found: Looked | str | None, root: Path, step: str | None = None, *, resume: bool = False) -> None:
    """Everything is as one rank finds it that reads all headers."""
    assert isinstance(found, Looked)
    assert found.files == find_source(root, step, resume=resume)
    assert found.headers == {file: read_header(file) for file in found.files.files}
    for file, header in found.headers.items():
        assert header.modified == file.stat().st_mtime_ns


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize(("step", "resume"), [(None, False), ("1_1", False), (None, True)])
def test_what_is_found_is_what_one_rank_finds(tmp_path: Path, suffix: str, step: str | None, resume: bool) -> None:
    root = saved(tmp_path / "ck", suffix)
    found = look(root, step, resume=resume)
    assert_as_alone(found, root, step, resume=resume)
    likely = [file for file, header in found.headers.items() if header.is_likely]  # type: ignore[union-attr]
    assert len(likely) == (FOLDERS - 2 if suffix == ".ckpt" else 0)  # one of each stage was read


def test_few_folders_are_left_to_the_main_rank(tmp_path: Path) -> None:
    root = tmp_path / "ck"
    write_tensors(root / "rank_0" / "a.ckpt", FIRST)
    for path in (root, root / "rank_0" / "a.ckpt", tmp_path / "nothing"):
        assert look(path) is None
    assert on_ranks(1, lambda cluster: look_together(cluster, saved(tmp_path / "many"), None, resume=False)) == [None]


def cut_off(root: Path) -> None:
    """The last step of a rank was not saved whole."""
    file = root / "rank_33" / "llama_rank_33-1_2.ckpt"
    os.truncate(file, file.stat().st_size - 3)


def recorded(root: Path) -> None:
    """MindFormers says which step is the last one."""
    for rank in range(FOLDERS):
        name = f"llama_rank_{rank}-1_1.ckpt"
        (root / f"rank_{rank}" / "meta.json").write_text(json.dumps({"last_epoch": 1, "last_ckpt_file": name}))


def lost(root: Path) -> None:
    """A rank has no file of the last step, another one no folder, and a third something else in its place."""
    (root / "rank_5" / "llama_rank_5-1_2.ckpt").unlink()
    for rank in (6, 7):
        for file in (root / f"rank_{rank}").iterdir():
            file.unlink()
        (root / f"rank_{rank}").rmdir()
    (root / "rank_7").touch()


def beside(root: Path) -> None:
    """Files that are left aside, with a warning."""
    write_tensors(root / "whole.ckpt", SECOND)
    (root / "rank_8" / "x.CKPT").touch()
    (root / "rank_9" / ".hidden.ckpt").touch()


@pytest.mark.parametrize("happens", [cut_off, recorded, lost, beside])
@pytest.mark.parametrize("resume", [True, False])
def test_what_is_not_as_it_should_be(tmp_path: Path, happens: Callable[[Path], None], resume: bool) -> None:
    root = saved(tmp_path / "ck")
    happens(root)
    found = look(root, resume=resume)
    if happens is cut_off and not resume:
        assert isinstance(found, Looked)
        assert found.files == find_source(root)
        (left,) = set(found.files.files) - set(found.headers)  # whoever reads it says what is wrong
        assert left.parent.name == "rank_33"
        return
    assert_as_alone(found, root, resume=resume)


def test_errors_are_those_of_one_rank(tmp_path: Path) -> None:
    root = saved(tmp_path / "ck")
    write_tensors(root / "rank_3" / "other.safetensors", FIRST)
    with pytest.raises(CheckpointError) as alone:
        find_source(root)
    assert look(root) == f"error: {alone.value}"


def test_a_file_that_is_not_like_the_others_of_its_size(tmp_path: Path) -> None:
    root = saved(tmp_path / "ck")
    renamed = {{"a.w": "x.w"}.get(name, name): tensor for name, tensor in FIRST.items()}
    file = write_tensors(root / "rank_11" / "llama_rank_11-1_2.ckpt", renamed)
    found = look(root)
    assert_as_alone(found, root)
    assert "x.w" in found.headers[file].tensors  # type: ignore[union-attr]


def test_headers_may_hold_any_bytes(tmp_path: Path) -> None:
    """A scalar as MindSpore writes it has a dimension of 0; of a .safetensors file a digest is told."""
    root = tmp_path / "ck"
    record = b"\n\x10\n\x01s\x12\x0b\x08\x00\x12\x04Bool\x1a\x01\x01"
    for rank in range(FOLDERS):
        (root / f"rank_{rank}").mkdir(parents=True)
        (root / f"rank_{rank}" / f"a_{rank}.ckpt").write_bytes(record)
    found = look(root)
    assert_as_alone(found, root)
    assert sum(header.is_likely for header in found.headers.values()) == FOLDERS - 1  # type: ignore[union-attr]
    checkpoint = Checkpoint(find_source(root), Strategy.of_stages(({"s": Layout.on({"dp": FOLDERS})},), "dp"))
    plan = build_plan(checkpoint, Strategy.complete())
    (text,) = encode_ranks(plan, root, lambda path: replace(checkpoint.header(path), is_likely=True))
    own = decode_rank(text, root)
    assert [content.tobytes() for _, content in read_direct(own.plan, lambda: None, own.headers)] == [b"\1"]
    for number in range(100):
        file = write_tensors(tmp_path / "one.safetensors", random_model({f"w{number}": (2, 2)}))
        if b"\0" in read_header(file).frames[0][1]:
            break
    for rank in range(FOLDERS):
        write_tensors(tmp_path / "st" / f"rank_{rank}" / "a.safetensors", random_model({f"w{number}": (2, 2)}))
    assert_as_alone(look(tmp_path / "st"), tmp_path / "st")


def test_what_is_too_long_to_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = saved(tmp_path / "ck")
    monkeypatch.setattr(looking, "MAX_VALUES", 1000)
    assert_as_alone(look(root), root)


def test_files_of_as_many_sizes_as_there_are(tmp_path: Path) -> None:
    for rank in range(FOLDERS):
        write_tensors(tmp_path / f"rank_{rank}" / "a.ckpt", random_model({"w": (rank + 1, 3)}))
    assert_as_alone(look(tmp_path), tmp_path)


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    for rank in range(FOLDERS):
        write_tensors(tmp_path / f"rank_{rank}" / "m\udce9.ckpt", FIRST)
    assert_as_alone(look(tmp_path), tmp_path)


def test_ranks_that_do_not_see_the_checkpoint(tmp_path: Path) -> None:
    root = saved(tmp_path / "ck")
    assert_as_alone(look(root, others=tmp_path / "elsewhere"), root)


def test_each_rank_asks_for_its_share_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of as many ranks as there are folders: a folder, a state, and a file at samples for each rank."""
    root = saved(tmp_path / "ck")
    asked: dict[int, list[str]] = defaultdict(list)

    def counted(name: str) -> None:
        real = getattr(os, name)

        def call(path: Any, *arguments: Any, **more: Any) -> Any:
            if str(root) in str(path) or name == "preadv":
                asked[threading.get_ident()].append(name)
            return real(path, *arguments, **more)

        monkeypatch.setattr(os, name, call)

    for name in ("scandir", "open", "stat", "preadv"):
        counted(name)
    # All ranks are threads of this process; where one of them waits, it is for the others.
    monkeypatch.setattr(waiting, "_waits_and_work", lambda: (0, 0.0))
    monkeypatch.setattr(waiting, "_waited", 0.0)
    found = on_ranks(FOLDERS, lambda cluster: look_together(cluster, root, None, resume=False))
    assert isinstance(found[0], Looked)
    assert len(asked) == FOLDERS
    main, *others = sorted(asked.values(), key=len, reverse=True)
    assert all(len(calls) <= 7 for calls in others)
    assert len(main) <= 40


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"rank_1": 5}, "cannot be read: a list of 2 must stand where 5 does"),
        ({"rank_1": [{}, 7]}, "a table must stand where 7 does"),
        ({"rank_1": [{"a/b.ckpt": False}, {}]}, "told of a folder what no folder holds"),
        ({"rank_1": [{"a.ckpt": 1}, {}]}, "told of a folder what no folder holds"),
        ({"rank_1": [{NAME: False}, {NAME: [1, -1]}]}, "a number must stand where -1 does"),
    ],
)
def test_what_no_rank_says(tmp_path: Path, answer: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = saved(tmp_path / "ck", steps=(1,))
    real = looking._answer
    monkeypatch.setattr(looking, "_answer", lambda at, task: real(at, task) if at == root else answer)
    found = look(root, others=tmp_path / "other")
    assert isinstance(found, str)
    assert message in found


def test_files_elsewhere_are_not_looked_at(tmp_path: Path) -> None:
    for name in ("../x", "/etc/passwd", "rank_0/../../x"):
        with pytest.raises(CheckpointError, match="which is not in"):
            looking._answer(tmp_path, {"state": [name]})


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_job_loads_what_its_ranks_have_looked_at(tmp_path: Path, suffix: str) -> None:
    """Rank files of 64 ranks, two of which are not like the others, for a job of four."""
    model = random_model({f"{name}.w": (64, 8) for name in "abcdef"})
    layouts = {ranks: dict.fromkeys(model, Layout.on({"mp": ranks}, "mp", None)) for ranks in (64, 4)}
    for rank in range(64):
        part = {name: tensor.part(layouts[64][name].box((64, 8), rank)) for name, tensor in model.items()}
        items = list(part.items())
        write_tensors(tmp_path / "ck" / f"rank_{rank}" / f"c_{rank}{suffix}", dict(items[::-1] if rank > 61 else items))
    write_strategy(layouts[64], tmp_path / "strategy.ckpt")
    keys = {
        "load_checkpoint": str(tmp_path / "ck"),
        "src_strategy_path_or_dir": str(tmp_path / "strategy.ckpt"),
        "auto_trans_ckpt": True,
        "auto_trans_save": False,
    }
    target = Strategy.of_stages((layouts[4],), "mp4")

    def load(cluster: Cluster) -> dict[str, bytes]:
        reslicing = Reslicing(Config.from_mapping(keys), cluster, OutputDir(tmp_path / "output"), target)
        reslicing.look()
        own = reslicing.own_plan()
        assert own is not None
        assert cluster.rank or len(reslicing._headers) == 64
        return {spec.name: content.tobytes() for spec, content in read_direct(own.plan, lambda: None, own.headers)}

    found = on_ranks(4, load)
    for rank in range(4):
        boxes = {name: layouts[4][name].box((64, 8), rank) for name in model}
        assert found[rank] == {name: model[name].part(box).bits.tobytes() for name, box in boxes.items()}
