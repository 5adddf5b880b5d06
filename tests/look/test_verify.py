"""`verify` finds what was done to a result, and says where; what was not touched passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage_results import KINDS, LAYOUTS, MODEL, damage, flip, make, strategy_of
from recorded import write_tensors

from mindformers_ckpt import transform
from mindformers_ckpt.engine import tasks
from mindformers_ckpt.errors import ConfigError, PlanError
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.look.verify import verify
from mindformers_ckpt.look.verify_model import Verification
from mindformers_ckpt.publish.texts import with_checksum
from mindformers_ckpt.text_files import write_json


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """source.ckpt, the strategy, and a result of it with everything that can be recorded."""
    return make(tmp_path, hashes=True, fingerprints=True)


def against(result: Path, **options: Any) -> Verification:
    return verify(result, strategy_of(result.parent), against=result.parent / "source.ckpt", **options)


def content_of(path: Path, name: str) -> int:
    """Where the content of a tensor begins."""
    return read_header(path).tensors[name].segments[0].offset


@pytest.mark.parametrize("format", ["ckpt", "safetensors"])
@pytest.mark.parametrize("recorded", [{}, {"hashes": True}, {"fingerprints": True}, {"hashes": True, "crc": True}])
def test_a_result_as_it_was_made_passes(format: str, recorded: dict[str, bool], tmp_path: Path) -> None:
    path = make(tmp_path, format, **recorded)
    found = verify(path)
    assert found.ok, found.differences
    assert bool(found.unchecked) == (not recorded)
    assert against(path).ok
    told = " ".join(found.checked)
    assert ("xxh3" in told) == ("hashes" in recorded)
    assert ("fingerprint" in told) == ("fingerprints" in recorded)
    assert ("CRC-32" in told) == ("crc" in recorded and format == "ckpt")


def test_a_flipped_bit_is_found_where_it_is(result: Path) -> None:
    file = result / "rank_3/checkpoint_3.ckpt"
    place = content_of(file, "cube") + 21
    flip(file, place)
    (found,) = against(result).differences
    box = LAYOUTS["cube"].box((8, 12, 6), 3)
    assert (found.file, found.tensor, found.rank, found.offset, found.box) == (file, "cube", 3, place, box)
    assert found.what == "1 of 288 bytes differ from the source"
    assert str(found) == f"{file}: cube (rank 3, box [4:8, 6:12, 0:6], from byte {place} of the file on): {found.what}"
    by_manifest = verify(result).differences
    assert [(difference.tensor, difference.rank) for difference in by_manifest] == [("cube", 3), ("cube", None)]


@pytest.mark.parametrize("may_fork", [False, True])
def test_processes_find_what_one_finds(may_fork: bool, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_SMALLEST_TASK", 300)
    for rank, name in ((0, "cube"), (1, "matrix"), (3, "cube")):
        flip(
            result / f"rank_{rank}/checkpoint_{rank}.ckpt",
            content_of(result / f"rank_{rank}/checkpoint_{rank}.ckpt", name),
        )
    told: list[tuple[int, int]] = []
    found = against(result, processes=3, may_fork=may_fork, progress=lambda *done: told.append(done))
    assert [(difference.rank, difference.tensor) for difference in found.differences] == [
        (0, "cube"),
        (1, "matrix"),
        (3, "cube"),
    ]
    assert found.differences == against(result).differences
    assert len(told) > 3
    assert told[-1][0] == told[-1][1]


def test_a_replica_that_differs_is_told_from_the_others(result: Path) -> None:
    """The first ones are what was recorded, so that it is the other one."""
    manifest = json.loads((result / "manifest.json").read_bytes())
    for file in manifest["files"]:
        del file["xxh3_128"]
    write_json(result / "manifest.json", with_checksum(manifest))
    file = result / "rank_2/checkpoint_2.ckpt"
    place = content_of(file, "matrix") + 5
    flip(file, place)
    (found,) = verify(result).differences
    assert (found.rank, found.offset, found.box) == (2, place, Box((0, 0), (32, 24)))
    assert "differs from the replica in" in found.what


def test_shards_that_were_exchanged(result: Path) -> None:
    first, second = result / "rank_0", result / "rank_1"
    shutil.move(first / "checkpoint_0.ckpt", first / "other")
    shutil.move(second / "checkpoint_1.ckpt", first / "checkpoint_0.ckpt")
    shutil.move(first / "other", second / "checkpoint_1.ckpt")
    assert {difference.tensor for difference in verify(result).differences} == {"matrix", "cube"}
    assert {(found.tensor, found.rank) for found in against(result).differences} == {
        (name, rank) for name in ("matrix", "cube") for rank in (0, 1)
    }


def _remove(result: Path) -> None:
    (result / "rank_1/checkpoint_1.ckpt").unlink()


def _cut(result: Path) -> None:
    file = result / "rank_1/checkpoint_1.ckpt"
    file.write_bytes(file.read_bytes()[:-7])


def _add(result: Path) -> None:
    shutil.copy(result / "rank_1/checkpoint_1.ckpt", result / "rank_1/checkpoint_2.ckpt")


def _break_header(result: Path) -> None:
    flip(result / "rank_1/checkpoint_1.ckpt", 0)


def _forget_a_rank(result: Path) -> None:
    manifest = json.loads((result / "manifest.json").read_bytes())
    del manifest["files"][3]
    write_json(result / "manifest.json", with_checksum(manifest))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_remove, "checkpoint_1.ckpt (rank 1): it cannot be read: No such file"),
        (_cut, "the manifest says"),
        (_add, "checkpoint_2.ckpt: it is not of this result"),
        (_break_header, "checkpoint_1.ckpt"),
        (_forget_a_rank, "the manifests have no files of the ranks [3] of 4"),
    ],
)
def test_files_that_are_not_what_they_were(change: Callable[[Path], None], words: str, result: Path) -> None:
    change(result)
    found = verify(result)
    assert not found.ok
    assert any(words in str(difference) for difference in found.differences), found.differences


def test_against_finds_lost_ranks_and_tensors(result: Path) -> None:
    (result / "rank_2/checkpoint_2.ckpt").unlink()
    held = {name: tensor for name, tensor in MODEL.items() if name != "norm"}
    parts = {name: t.part(LAYOUTS[name].box(t.bits.shape, 1)) if name in LAYOUTS else t for name, t in held.items()}
    write_tensors(result / "rank_1/checkpoint_1.ckpt", {**parts, "more": MODEL["step"]})
    told = [(found.rank, found.tensor, found.what) for found in against(result).differences]
    assert told == [
        (1, "norm", "it is not in the file"),
        (1, "more", "the source gives nothing of it to this rank"),
        (2, None, "there are no files of this rank"),
    ]


def test_the_strategy_is_that_of_the_manifest(result: Path) -> None:
    assert verify(result, against=result.parent / "source.ckpt").ok
    flip(result / "rank_1/checkpoint_1.ckpt", content_of(result / "rank_1/checkpoint_1.ckpt", "matrix"))
    (found,) = verify(result, against=result.parent / "source.ckpt").differences
    assert (found.rank, found.tensor) == (1, "matrix")


def test_a_fingerprint_that_was_changed_in_the_manifest(result: Path) -> None:
    text = (result / "manifest.json").read_text()
    digest = json.loads(text)["fingerprints"]["."]["digest"]
    (result / "manifest.json").write_text(text.replace(digest, "0" * 64))
    assert [found.what for found in verify(result).differences] == [
        "it is not what was written: its checksum differs",
        "the fingerprint in the manifest is not that of its tensors",
    ]


def test_texts_beside_the_weights_are_those_that_were_written(tmp_path: Path) -> None:
    """Counters, layouts; what somebody puts there later is no difference, and neither is a manifest without them."""
    source = write_tensors(tmp_path / "source.ckpt", MODEL)
    strategy = strategy_of(tmp_path)
    result = transform(source, tmp_path / "result", dst_strategy=strategy, format="checkpoint2").destination
    (result / "notes.txt").write_text("of somebody")
    found = verify(result)
    assert found.ok
    assert "2 files beside the weights: xxh3-128 of their bytes" in found.checked
    latest, (metadata,) = result / "latest_checkpointed_iteration.txt", result.rglob("metadata.json")
    metadata.write_text(metadata.read_text().replace("{", "{ ", 1))
    latest.unlink()
    told = {difference.file: difference.what for difference in verify(result).differences}
    assert told[metadata] == "it is not what was written (xxh3-128 differs)"
    assert told[latest] == "it cannot be read: No such file or directory"


def test_a_manifest_of_an_earlier_version_has_no_checksum(result: Path) -> None:
    manifest = json.loads((result / "manifest.json").read_bytes())
    assert not {"checksum", "files"} - manifest.keys()
    del manifest["checksum"]
    (result / "manifest.json").write_text(json.dumps(manifest))
    assert verify(result).ok


def test_a_sample_reads_a_share(result: Path) -> None:
    assert "1 of 4 tensors" in against(result, sample=0.05).checked[0]
    assert any("1 of 4 tensors: fingerprint" in line for line in verify(result, sample=0.05).checked)
    with pytest.raises(ConfigError, match="sample"):
        verify(result, sample=0)


def test_without_its_strategy_only_fingerprints_are_left_out(result: Path) -> None:
    shutil.move(result.parent / "strategy", result.parent / "away")
    found = verify(result)
    assert found.ok
    assert "give it with --strategy" in found.warnings[0]
    assert found.unchecked == ["fingerprints: the strategy of the result is not known; give it with --strategy"]
    assert not verify(result, result.parent / "away/ckpt_strategy_rank_0.ckpt").unchecked


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "folder/source.ckpt", MODEL)
    with pytest.raises(PlanError, match="no manifest"):
        verify(tmp_path / "folder")
    (tmp_path / "folder/manifest.json").write_text('{"files": [{"path": "../x", "rank": 0, "bytes": 1}]}')
    with pytest.raises(PlanError, match="does not say which files"):
        verify(tmp_path / "folder")


@pytest.mark.parametrize("recorded", ["hashes", "both", "nothing"])
def test_every_damage_is_found(recorded: str, tmp_path: Path) -> None:
    """`python tools/damage_results.py --times 100000` does it longer."""
    outcome = damage(tmp_path, 60, recorded)
    assert outcome.missed == []
    assert {"flip_a_bit", "exchange_shards", "exchange_files", "of_another_step", "cut_off"} <= set(outcome.tried)


@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_of_a_kind_is_found(kind: str, tmp_path: Path) -> None:
    outcome = damage(tmp_path, 72, "fingerprints", kind=kind)
    assert outcome.missed == []
    assert {"flip_in_a_header", "flip_in_the_fingerprints", "exchange_tensors", "of_another_step"} <= set(outcome.tried)
    assert ("flip_in_a_text" in outcome.tried) == (kind in ("checkpoint2", "converted"))
    assert ("exchange_files" in outcome.tried) == (kind != "converted")
