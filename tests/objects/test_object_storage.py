"""Commands on an S3 server over HTTP: the results that they have on a disk, counted requests, faults, killed runs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface import random_tensors, write_folder
from s3_server import BUCKET, Fault, FlakyProxy, environment, s3_server
from storage import contents, files, keys, send
from test_storage import write_heads

import mindformers_ckpt as mc
from mindformers_ckpt import Layout
from mindformers_ckpt.engine import object_sink
from mindformers_ckpt.errors import CheckpointError, ConfigError, FormatError, PlanError, PublishError, TransferError
from mindformers_ckpt.formats import guesses
from mindformers_ckpt.formats.ckpt import scan
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.formats.tensor_file import TensorSpec
from mindformers_ckpt.objects import attempts, listing
from mindformers_ckpt.objects.attempts import Retries
from mindformers_ckpt.objects.client import forget_clients
from mindformers_ckpt.objects.path import as_path
from mindformers_ckpt.strategy.files import write_strategy

PART = 5 << 20  # the least that a storage takes
NAMES = ("embedding", "layers.0", "layers.1")
MESH = {"dp": 2, "mp": 2}


@pytest.fixture(scope="module")
def proxies() -> Iterator[FlakyProxy]:
    with s3_server() as port:
        proxy = FlakyProxy(port)
        forget_clients()
        yield proxy
        forget_clients()
        proxy.close()


@pytest.fixture
def storage(proxies: FlakyProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyProxy]:
    proxies.clear()
    for name, value in environment(proxies.port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(attempts, "RETRIES", Retries(attempts=4, first_pause=0.01))
    monkeypatch.setattr(object_sink, "_PART_BYTES", PART)
    listing._files.clear()
    listing._trees.clear()
    yield proxies


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Complete weights of 1.5 MiB, their strategy of four ranks, and the ranks as they are made on a disk."""
    folder = tmp_path_factory.mktemp("disk")
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal((128, 1024), np.float32) for name in NAMES}
    write_folder(folder / "complete", {**weights, "global_step": np.array(7, np.int32)}, None)
    rows, columns = Layout.on(MESH, "mp", None), Layout.on(MESH, None, "mp")
    (folder / "strategy").mkdir()
    for rank in range(4):
        layouts = {"embedding": rows, "layers.0": columns, "layers.1": columns}
        write_strategy(layouts, folder / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt")
    mc.transform(folder / "complete", folder / "ranks", dst_strategy=folder / "strategy", format="ckpt")
    return folder


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of 12 MiB, which are several parts."""
    weights = {f"layers.{n}": np.random.default_rng(n).standard_normal((1024, 1024), np.float32) for n in range(3)}
    return write_folder(tmp_path_factory.mktemp("big"), weights, None)


def tensors_of(found: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a result without its manifest, which has the time in it."""
    return {name: content for name, content in found.items() if not name.startswith("manifest")}


def test_slices_there_and_back(storage: FlakyProxy, disk: Path, tmp_path: Path) -> None:
    source = send(disk / "complete", "a/complete")
    strategy = send(disk / "strategy", "a/strategy")
    report = mc.transform(source, f"s3://{BUCKET}/a/ranks", dst_strategy=strategy, format="ckpt")
    assert str(report.destination) == f"s3://{BUCKET}/a/ranks"
    assert tensors_of(contents("a/ranks")) == tensors_of(files(disk / "ranks"))
    mc.transform(report.destination, tmp_path / "whole", src_strategy=strategy, format="safetensors")
    mc.transform(disk / "ranks", tmp_path / "same", src_strategy=disk / "strategy", format="safetensors")
    assert tensors_of(files(tmp_path / "whole")) == tensors_of(files(tmp_path / "same"))
    assert keys("a/.") == set()


@pytest.mark.slow
def test_several_processes(storage: FlakyProxy, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindformers_ckpt.engine.object_tasks._FILES_TOGETHER", 2)
    source = send(disk / "complete", "b/complete")
    mc.transform(source, f"s3://{BUCKET}/b/ranks", dst_strategy=disk / "strategy", format="ckpt", processes=2)
    assert tensors_of(contents("b/ranks")) == tensors_of(files(disk / "ranks"))


def test_only_what_is_needed_is_read(storage: FlakyProxy, disk: Path, tmp_path: Path) -> None:
    """One rank of two takes a half of each tensor; the others' files are not opened, and nobody lists twice."""
    source = send(disk / "ranks", "c/ranks")
    storage.clear()
    mc.transform(source, tmp_path / "half", src_strategy=disk / "strategy", dst_strategy=disk / "strategy", ranks=[1])
    read = sum(answer.sent for answer in storage.answers if answer.request.startswith(f"GET /{BUCKET}/c/ranks/"))
    assert read < 1.3 * (6 << 17)
    lists = [request for request in storage.requests if "prefix=c%2Franks%2F" in request]
    assert len(lists) == 2  # once to plan, and once to see that nothing has changed
    assert not [answer for answer in storage.answers if "/c/ranks/rank_" in answer.request and not answer.span]


def test_heads_of_files_that_are_alike_are_read_with_the_contents(
    storage: FlakyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first file a head takes a request, of the others two samples do, however many tensors there are."""
    names, rows = [f"layers.{number}.w" for number in range(40)], Layout.on({"mp": 4}, "mp", None)
    monkeypatch.setattr("mindformers_ckpt.engine.ahead._BATCH_BYTES", 32 << 20)
    weights = {name: np.random.default_rng(0).standard_normal((4 * 64, 512), np.float32) for name in names}
    write_folder(tmp_path / "complete", weights, None)
    write_strategy(dict.fromkeys(names, rows), tmp_path / "strategy.ckpt")
    mc.transform(tmp_path / "complete", tmp_path / "ranks", dst_strategy=tmp_path / "strategy.ckpt", format="ckpt")
    source = send(tmp_path / "ranks", "alike/ranks")
    storage.clear()
    mc.transform(source, tmp_path / "whole", src_strategy=tmp_path / "strategy.ckpt", contents="off")
    asked = [answer.request for answer in storage.answers if answer.request.startswith("GET") and answer.span]
    of_ranks = [sum(f"/rank_{rank}/" in request for request in asked) for rank in range(4)]
    assert of_ranks[0] >= len(names)
    assert max(of_ranks[1:]) < len(names) // 2
    mc.transform(tmp_path / "ranks", tmp_path / "same", src_strategy=tmp_path / "strategy.ckpt", contents="off")
    assert tensors_of(files(tmp_path / "whole")) == tensors_of(files(tmp_path / "same"))


def test_looking(storage: FlakyProxy, disk: Path) -> None:
    ranks, whole = send(disk / "ranks", "d/ranks"), send(disk / "complete", "d/complete")
    strategy = send(disk / "strategy", "d/strategy")
    found, same = mc.inspect(ranks, strategy), mc.inspect(disk / "ranks", disk / "strategy")
    assert found.parameters == same.parameters
    assert found.facts["counters"] == "global_step 7"
    assert mc.fingerprint(ranks, strategy).digest == mc.fingerprint(disk / "complete").digest
    assert mc.verify(ranks, strategy, against=whole).ok
    assert mc.diff(ranks, disk / "complete", strategy).ok


def test_heads_of_objects_are_guessed(storage: FlakyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few are waited for one by one; those of a second file like the first are compared, and equal."""
    names = [f"{prefix}layers.{n}.{part}" for prefix in ("", "adam_m.") for n in range(30) for part in ("wq", "w1")]
    specs = [TensorSpec(name, by_name("float32"), (64 if name.endswith("wq") else 2048,)) for name in names]
    for name in ("a.ckpt", "b.ckpt"):
        write_heads(tmp_path / name, specs)
    url = send(tmp_path, "heads")
    waited: list[int] = []
    real = guesses.Pieces.read

    def read(self: guesses.Pieces, start: int, length: int) -> bytes:
        waited.append(start)
        return real(self, start, length)

    with monkeypatch.context() as patch:
        patch.setattr(guesses.Pieces, "read", read)
        first = scan(as_path(f"{url}/a.ckpt"))
    assert [record.spec for record in first.tensors.values()] == specs
    assert first.frames == scan(tmp_path / "a.ckpt").frames
    assert 1 <= len(waited) <= 10
    assert scan(as_path(f"{url}/b.ckpt"), first).tensors is first.tensors


def test_a_distributed_checkpoint_of_pytorch(storage: FlakyProxy) -> None:
    folder = min(path.parent for path in (Path(__file__).parents[1] / "data").rglob(".metadata"))
    assert mc.fingerprint(send(folder, "r/dcp")).digest == mc.fingerprint(folder).digest


def test_conversion(storage: FlakyProxy, tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_attention_heads": 2,
    }
    layer = "model.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (12, 8),
        "model.norm.weight": (8,),
        "lm_head.weight": (12, 8),
        f"{layer}.input_layernorm.weight": (8,),
        f"{layer}.post_attention_layernorm.weight": (8,),
        **{f"{layer}.self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"},
        **{f"{layer}.mlp.{name}_proj.weight": (6, 8) for name in ("gate", "up")},
        f"{layer}.mlp.down_proj.weight": (8, 6),
    }
    model = write_folder(tmp_path / "model", random_tensors(shapes), config, shards=2)
    (model / "tokenizer.json").write_text("{}")
    url = send(model, "e/model")
    one = f"s3://{BUCKET}/e/ms.safetensors"
    mc.convert(url, one, qkv_concat=True)
    mc.convert(model, tmp_path / "ms.safetensors", qkv_concat=True)
    assert contents("e")["ms.safetensors"] == (tmp_path / "ms.safetensors").read_bytes()
    mc.convert(one, f"s3://{BUCKET}/e/back", reverse=True, hf_config=url)
    mc.convert(tmp_path / "ms.safetensors", tmp_path / "back", reverse=True, hf_config=model)
    assert tensors_of(contents("e/back")) == tensors_of(files(tmp_path / "back"))
    assert {"config.json", "tokenizer.json"} <= set(contents("e/back"))
    assert keys("e/.") == set()


def test_the_command_line(storage: FlakyProxy, disk: Path) -> None:
    """A dry run writes nothing and knows of no disk; commands that need one say so."""
    from click.testing import CliRunner

    from mindformers_ckpt.cli.main import cli

    source, target = send(disk / "complete", "p/complete"), f"s3://{BUCKET}/p/out"
    words = ["transform", "--src-checkpoint", source, "--dst-checkpoint-dir", target]
    dry = CliRunner().invoke(cli, [*words, "--dry-run"])
    assert (dry.exit_code, keys("p/out")) == (0, set())
    assert f"would write 1 file, 1.57 MB, to {target}\n" in dry.output
    refused = CliRunner().invoke(cli, [*words, "--hash"])
    assert (refused.exit_code, keys("p/out")) == (1, set())
    assert "--hash cannot be done" in refused.output
    local = CliRunner().invoke(cli, ["doctor", source])
    assert local.exit_code == 2
    assert "a path on a disk is expected" in local.output


# ------------------------------------------------------------------------------------------------ faults


def test_busy_and_broken(storage: FlakyProxy, big: Path, tmp_path: Path) -> None:
    """What has arrived before a connection is cut is not asked for again."""
    source = send(big, "f/complete")
    storage.clear()
    storage.faults += [
        Fault("503", "GET", "/f/complete/model.safetensors", times=2),
        Fault("cut", "GET", "/f/complete/model.safetensors", skip=4),
        Fault("503", "PUT", "partNumber=1", times=2),
        Fault("refuse", "PUT", "partNumber=2"),
        Fault("503", "POST", "?uploads"),
        Fault("503", "GET", "prefix="),
        Fault("503", "HEAD", "f/", times=2),
        Fault("lose", "POST", "?uploadId="),
    ]
    mc.transform(source, f"s3://{BUCKET}/f/out", format="ckpt")
    assert not [fault for fault in storage.faults if fault.times]
    mc.transform(big, tmp_path / "same", format="ckpt")
    assert tensors_of(contents("f/out")) == tensors_of(files(tmp_path / "same"))
    cut = next(
        answer for answer in storage.answers if answer.span and answer.sent < _length(answer.span) and answer.sent > 1
    )
    start, stop = _span(cut.span)
    rest = [_span(answer.span) for answer in storage.answers if answer.span and _span(answer.span)[1] == stop]
    assert any(start < again <= start + cut.sent for again, _ in rest)


def _span(text: str) -> tuple[int, int]:
    first, last = text.partition("=")[2].split("-")
    return int(first), int(last)


def _length(text: str) -> int:
    first, last = _span(text)
    return last - first + 1


def test_a_storage_that_stays_busy(storage: FlakyProxy, disk: Path, tmp_path: Path) -> None:
    source = send(disk / "complete", "g/complete")
    storage.faults.append(Fault("503", "GET", "model.safetensors", times=1000))
    with pytest.raises(FormatError, match=r"the storage answers 503.*given up after 4 attempts; check the storage"):
        mc.transform(source, tmp_path / "x", dst_strategy=disk / "strategy")
    assert not (tmp_path / "x").exists()


def test_a_storage_that_takes_nothing_more(storage: FlakyProxy, disk: Path) -> None:
    """What was sent is kept, whatever the storage says to the end of the run."""
    source, target = send(disk / "complete", "q/complete"), f"s3://{BUCKET}/q/out"
    storage.faults += [Fault("503", "PUT", "/q/", times=1000, skip=1), Fault("503", "DELETE", "/q/", times=1000)]
    with pytest.raises(TransferError, match=r"the storage answers 503 .*\n  What was sent is kept .*--resume goes on"):
        mc.transform(source, target)
    storage.clear()
    mc.transform(source, target, resume=True)
    assert set(contents("q/out")) == {"manifest.json", "rank_0/checkpoint_0.safetensors"}
    assert keys("q/.") == set()


def test_no_rights(storage: FlakyProxy, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.faults.append(Fault("403", "HEAD", "/h", times=1000))
    with pytest.raises(CheckpointError, match=r"s3://training/h: the storage refuses \(403\); check the credentials"):
        mc.inspect(f"s3://{BUCKET}/h")
    storage.clear()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    forget_clients()
    with pytest.raises(CheckpointError, match=r"s3://training/.*NoCredentials"):
        mc.inspect(f"s3://{BUCKET}/h")
    assert storage.requests == []
    forget_clients()


def test_a_source_that_is_written_meanwhile(storage: FlakyProxy, disk: Path, tmp_path: Path) -> None:
    source = send(disk / "complete", "i/complete")
    job = mc.plan(source, dst_strategy=disk / "strategy")
    content = bytearray((disk / "complete" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(content)
    send(tmp_path / "other", "i/complete")
    with pytest.raises(TransferError, match="written again while it was read"):
        mc.transform(job, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_nothing_there(storage: FlakyProxy) -> None:
    with pytest.raises(PlanError, match="there is no checkpoint at s3://training/nothing"):
        mc.inspect(f"s3://{BUCKET}/nothing")
    with pytest.raises(CheckpointError, match="s3://other/x/: there is no such bucket"):
        mc.inspect("s3://other/x")


# ------------------------------------------------------------------------------------------------ publishing


def test_a_destination_that_is_not_empty(storage: FlakyProxy, disk: Path) -> None:
    source, target = send(disk / "complete", "j/complete"), f"s3://{BUCKET}/j/out"
    send(disk / "strategy", "j/out")
    with pytest.raises(PublishError, match=r"is not empty; .*\(--overwrite\)"):
        mc.transform(source, target)
    with pytest.raises(PublishError, match=r"is not an earlier result .*--overwrite-anything"):
        mc.transform(source, target, overwrite=True)
    with pytest.raises(PlanError, match="is in the source folder"):
        mc.transform(source, f"{source}/x")
    with pytest.raises(ConfigError, match=r"--hash, --crc-check cannot be done; leave it out"):
        mc.transform(source, target, overwrite_anything=True, hashes=True, crc=True)
    before = contents("j/out")
    storage.clear()
    mc.transform(source, target, overwrite_anything=True)
    assert set(contents("j/out")) == {"manifest.json", "rank_0/checkpoint_0.safetensors"}
    assert len(before) == 4
    storage.clear()
    mc.transform(source, target, dst_strategy=disk / "strategy", format="ckpt", overwrite=True)
    assert tensors_of(contents("j/out")) == tensors_of(files(disk / "ranks"))


def test_the_manifest_comes_last_and_goes_first(storage: FlakyProxy, disk: Path) -> None:
    source, target = send(disk / "complete", "k/complete"), f"s3://{BUCKET}/k/out"
    mc.transform(source, target)
    storage.clear()
    mc.transform(source, target, dst_strategy=disk / "strategy", format="ckpt", overwrite=True)
    changes = [
        request.partition("?")[0] + ("?" if "uploadId" in request else "")
        for request in storage.requests
        if request.split()[0] in ("PUT", "POST", "DELETE") and "partNumber" not in request and "?uploads" not in request
    ]
    kinds = ["marker" if "unfinished" in change else change.replace(f"/{BUCKET}/k/", "") for change in changes]
    assert kinds[1:3] == ["marker", "DELETE out/manifest.json"]
    assert sorted(kinds[3:7]) == [f"POST out/rank_{rank}/checkpoint_{rank}.ckpt?" for rank in range(4)]
    assert kinds[7:10] == ["DELETE out/rank_0/checkpoint_0.safetensors", "PUT out/manifest.json", "marker"]
    assert kinds[0] == kinds[10].replace("DELETE", "PUT")  # the record of the uploads


@pytest.mark.slow
def test_ranks_of_two_runs(storage: FlakyProxy, disk: Path) -> None:
    source, target = send(disk / "complete", "l/complete"), f"s3://{BUCKET}/l/out"
    for ranks in ([0, 1], [2, 3]):
        mc.transform(source, target, dst_strategy=disk / "strategy", format="ckpt", ranks=ranks)
    found = contents("l/out")
    assert tensors_of(found) == tensors_of(files(disk / "ranks"))
    assert {name for name in found if name.startswith("manifest")} == {
        "manifest_rank_0-1.json",
        "manifest_rank_2-3.json",
    }
    with pytest.raises(PublishError, match="already holds rank_1, rank_2"):
        mc.transform(source, target, dst_strategy=disk / "strategy", format="ckpt", ranks=[1, 2])
    assert mc.verify(target, disk / "strategy", against=source).ok


def killed(storage: FlakyProxy, source: str, target: str, *words: str) -> None:
    """Start a command, and kill it when the proxy holds a request of it."""
    storage.held.clear()
    command = [sys.executable, "-m", "mindformers_ckpt", "transform", "--src-checkpoint", source]
    command += ["--dst-checkpoint-dir", target, "--format", "ckpt", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert storage.held.wait(60), process.communicate(timeout=1)
    time.sleep(0.5)
    process.kill()
    process.communicate()
    storage.clear()


def test_a_killed_run_goes_on(storage: FlakyProxy, big: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is there of a run that was killed; what it has sent is not sent again."""
    monkeypatch.setattr(object_sink, "_PART_BYTES", 8 << 20)  # as in the other process
    source, target = send(big, "m/complete"), f"s3://{BUCKET}/m/out"
    storage.faults.append(Fault("hold", "PUT", "partNumber=2"))
    killed(storage, source, target)
    assert keys("m/out/") == set()
    mc.transform(source, target, resume=True, format="ckpt")
    sent = {request.rpartition("partNumber=")[2] for request in storage.requests if "partNumber" in request}
    assert sent == {"2"}
    mc.transform(big, tmp_path / "same", format="ckpt")
    assert tensors_of(contents("m/out")) == tensors_of(files(tmp_path / "same"))
    assert keys("m/.") == set()
    storage.clear()
    report = mc.transform(source, target, resume=True, format="ckpt")
    assert report.resumed_bytes == report.bytes_written
    assert not [request for request in storage.requests if "partNumber" in request]


def test_a_run_that_is_killed_while_it_publishes(
    storage: FlakyProxy, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_sink, "_PART_BYTES", 8 << 20)
    source, target = send(disk / "complete", "n/complete"), f"s3://{BUCKET}/n/out"
    mc.transform(disk / "ranks", target, src_strategy=disk / "strategy")
    before = contents("n/out")
    storage.faults.append(Fault("hold", "POST", "uploadId=", skip=1, times=10))
    killed(storage, source, target, "--dst-strategy", str(disk / "strategy"), "--overwrite")
    found = contents("n/out")
    assert "manifest.json" not in found
    assert set(before) - {"manifest.json"} <= set(found)
    with pytest.raises(PublishError, match=r"may be a mixture: .*--resume, or replace what is there \(--overwrite\)"):
        mc.transform(disk / "ranks", target, src_strategy=disk / "strategy")
    for read in (mc.inspect, mc.open_checkpoint):
        with pytest.raises(PlanError, match=r"s3://training/n/out may be a mixture.*--resume"):
            read(target)
    with pytest.raises(PlanError, match="s3://training/n/out may be a mixture"):
        mc.inspect(f"{target}/rank_0")
    mc.transform(source, target, dst_strategy=disk / "strategy", format="ckpt", resume=True)
    assert tensors_of(contents("n/out")) == tensors_of(files(disk / "ranks"))
    assert keys("n/.") == set()


@pytest.mark.slow
def test_what_a_killed_run_has_sent_is_given_up(storage: FlakyProxy, disk: Path) -> None:
    source, target = send(disk / "complete", "o/complete"), f"s3://{BUCKET}/o/out"
    storage.faults.append(Fault("hold", "PUT", "partNumber=", times=10))
    killed(storage, source, target, "--dst-strategy", str(disk / "strategy"))
    assert keys("o/out/") == set()
    (record,) = keys("o/.out.run-")
    mc.transform(source, target)
    aborted = [request for request in storage.requests if request.startswith("DELETE") and "uploadId" in request]
    assert len(aborted) == 4
    assert record not in keys("o/.")
    assert keys("o/.") == set()
