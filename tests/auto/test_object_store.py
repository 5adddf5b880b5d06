"""Stores and transfers by themselves: the same calls on S3 over HTTP and on a stand-in for moxing, and faults."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import BUCKET, Fault, FlakyProxy, environment, s3_server

from mindformers_ckpt.errors import ConfigError, PlanError
from mindformers_ckpt.job.modelarts import fetch_sources
from mindformers_ckpt.job.object_store import MoxingStore, ObjectStore, S3Store, StoreError, open_store
from mindformers_ckpt.job.transfers import Entry, Transfers, content_hash
from mindformers_ckpt.objects.attempts import Retries
from mindformers_ckpt.objects.client import Client

QUICK = Retries(attempts=4, first_pause=0.01)


def nothing() -> None:
    pass


@pytest.fixture(scope="module")
def proxies() -> Iterator[FlakyProxy]:
    with s3_server() as port:
        proxy = FlakyProxy(port)
        yield proxy
        proxy.close()


@pytest.fixture
def proxy(proxies: FlakyProxy, monkeypatch: pytest.MonkeyPatch) -> FlakyProxy:
    proxies.faults.clear()
    proxies.requests.clear()
    for name, value in environment(proxies.port).items():
        monkeypatch.setenv(name, value)
    return proxies


@pytest.fixture
def s3(proxy: FlakyProxy, tmp_path: Path) -> S3Store:
    return S3Store(f"s3://{BUCKET}/{tmp_path.name}")


@pytest.fixture
def moxing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the module that ModelArts has: the documented functions, on a folder for the buckets."""
    root = tmp_path / "buckets"

    def local(path: str) -> Path:
        return root / path[len("obs://") :] if path.startswith("obs://") else Path(path)

    def copy(source: str, target: str) -> None:
        local(target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(local(source), local(target))

    def remove(path: str, recursive: bool = False) -> None:
        shutil.rmtree(local(path)) if recursive else local(path).unlink()

    def list_directory(path: str, recursive: bool = False) -> list[str]:
        assert recursive
        return [str(entry.relative_to(local(path))) for entry in local(path).rglob("*")]

    file = types.SimpleNamespace(
        copy=copy,
        remove=remove,
        list_directory=list_directory,
        exists=lambda path: local(path).exists(),
        is_directory=lambda path: local(path).is_dir(),
        get_size=lambda path: local(path).stat().st_size,
    )
    module = types.ModuleType("moxing")
    module.file = file  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace(name="moxing")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "moxing", module)
    return root


@pytest.fixture(params=["s3", "moxing"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    if request.param == "s3":
        found: ObjectStore = request.getfixturevalue("s3")
        return found
    request.getfixturevalue("moxing")
    return MoxingStore("obs://bucket/folder")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(40_000))
    return path


# ------------------------------------------------------------------------------------------------ stores


def test_files_in_and_out(store: ObjectStore, file: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for key in ("a/b/1", "a/b/2", "a/bc", "c"):
        store.put(file, key, nothing)
    store.put(empty, "a/b/d/none", nothing)
    assert store.list("a/b") == {"a/b/1": 40_000, "a/b/2": 40_000, "a/b/d/none": 0}
    assert store.list("c") == {"c": 40_000}
    assert len(store.list("")) == 5
    assert store.list("absent") == {}
    assert [store.exists(key) for key in ("a/b/1", "a/b", "a/b/3", "c")] == [True, False, False, True]
    store.get("a/b/2", tmp_path / "back", nothing)
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    store.get("a/b/d/none", tmp_path / "back", nothing)
    assert (tmp_path / "back").read_bytes() == b""

    store.put(empty, "c", nothing)
    assert store.list("c") == {"c": 0}
    store.delete_prefix("a/b")
    store.delete_prefix("absent")
    assert set(store.list("")) == {"a/bc", "c"}


def test_missing_objects(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match=r"fetching \S*/folder/x to|fetching \S*/x to \S*back: there is no such object"
    ) as caught:
        store.get("x", tmp_path / "back", nothing)
    assert caught.value.final


def test_file_in_parts(s3: S3Store, proxy: FlakyProxy, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(os.urandom(1 << 20) * 40)
    proxy.faults.append(Fault("refuse", "PUT", "partNumber=2"))
    transfers = Transfers(s3, 60, retries=QUICK)
    (entry,) = transfers.send({"large": large})
    assert sum("partNumber" in request for request in proxy.requests) >= 4
    proxy.faults.append(Fault("cut", "GET", "large", times=2))
    transfers.fetch([(entry, tmp_path / "back")])
    assert (tmp_path / "back").read_bytes() == large.read_bytes()


def test_large_files_can_be_stopped(s3: S3Store, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(40 << 20))

    def stop() -> None:
        raise StoreError("stopped", final=True)  # as at every later call

    with pytest.raises(StoreError, match=r"^stopped$"):
        s3.put(large, "large", stop)
    assert not s3.exists("large")


def test_an_upload_that_lacks_a_part_is_not_completed(
    s3: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(40 << 20))
    real = Client.parts
    monkeypatch.setattr(Client, "parts", lambda *place: dict(list(real(*place).items())[1:]))
    with pytest.raises(StoreError, match=r"/large: the storage lacks parts that were sent") as caught:
        s3.put(large, "large", nothing)
    assert not caught.value.final
    assert not s3.exists("large")


@pytest.mark.parametrize(("kind", "final"), [("500", False), ("503", False), ("refuse", False), ("403", True)])
def test_which_errors_are_final(
    s3: S3Store, proxy: FlakyProxy, file: Path, kind: str, final: bool, tmp_path: Path
) -> None:
    s3.put(file, "there", nothing)
    for method, call in (
        ("PUT", lambda: s3.put(file, "x", nothing)),
        ("GET", lambda: s3.get("there", tmp_path / "back", nothing)),
        ("GET", lambda: s3.list("")),
    ):
        proxy.faults = [Fault(kind, method, "", times=9)]
        with pytest.raises(StoreError) as caught:
            call()
        assert caught.value.final == final, method


def test_a_bucket_that_is_not_there(proxy: FlakyProxy, file: Path) -> None:
    with pytest.raises(StoreError, match=r"sending .* to s3://absent/x/y: there is no such bucket") as caught:
        S3Store("s3://absent/x").put(file, "y", nothing)
    assert caught.value.final


def test_open_store(proxy: FlakyProxy, moxing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_store("obs://bucket/x/"), MoxingStore)
    monkeypatch.delitem(sys.modules, "moxing")
    assert isinstance(open_store("s3://bucket/x/"), S3Store)
    assert open_store("obs://bucket/x/").url == "obs://bucket/x"
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    with pytest.raises(ConfigError, match="set AWS_ENDPOINT_URL to the OBS endpoint"):
        open_store("obs://bucket/x")
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    with pytest.raises(ConfigError, match=r"pip install 'mindformers_ckpt\[object-storage\]'"):
        open_store("s3://bucket/x")


# --------------------------------------------------------------------------------------------- transfers


def test_corrupted_for_good(s3: S3Store, proxy: FlakyProxy, file: Path, tmp_path: Path) -> None:
    transfers = Transfers(s3, 60, retries=QUICK)
    (entry,) = transfers.send({"k": file})
    assert entry == Entry("k", 40_000, content_hash(file))
    proxy.faults.append(Fault("corrupt", "GET", "/k", times=9))
    back = tmp_path / "folder" / "back"
    with pytest.raises(
        StoreError, match=r"/k did not arrive as it was sent: other contents \(given up after 4 attempts"
    ):
        transfers.fetch([(entry, back)])
    assert list(back.parent.iterdir()) == []
    with pytest.raises(StoreError, match="40000 instead of 39999 bytes"):
        transfers.fetch([(entry._replace(bytes=39_999), back)])


class Fake:
    """A store whose puts do as they are told."""

    url = "s3://fake/x"

    def __init__(self, *results: str) -> None:
        self.results = list(results)
        self.times: list[float] = []

    def put(self, file: Path, key: str, check: object) -> None:
        self.times.append(time.monotonic())
        result = self.results.pop(0) if self.results else ""
        if result:
            raise StoreError(result, final=result == "final")


def test_pauses_grow(file: Path) -> None:
    store = Fake("one", "two", "three")
    Transfers(store, 60, retries=Retries(4, 0.1, 0.25)).send({"k": file})  # type: ignore[arg-type]
    pauses = [after - before for before, after in zip(store.times, store.times[1:])]
    for pause, most in zip(pauses, (0.1, 0.2, 0.25)):
        assert most / 2 <= pause < most + 0.2


@pytest.mark.parametrize(("result", "count"), [("final", 1), ("again", 4)])
def test_attempts_end(file: Path, result: str, count: int) -> None:
    store = Fake(*[result] * 9)
    with pytest.raises(StoreError, match=result):
        Transfers(store, 60, retries=QUICK).send({"k": file})  # type: ignore[arg-type]
    assert len(store.times) == count


def test_time_limit(file: Path) -> None:
    store = Fake(*["again"] * 99)
    started = time.monotonic()
    with pytest.raises(StoreError, match="given up"):
        Transfers(store, 0.3, retries=Retries(99, 0.1, 0.1)).send({"k": file})  # type: ignore[arg-type]
    assert time.monotonic() - started < 2
    assert 2 <= len(store.times) <= 8


def test_failure_elsewhere_stops_the_transfers(file: Path) -> None:
    class Slow(Fake):
        def put(self, file: Path, key: str, check: object) -> None:
            while True:
                check()  # type: ignore[operator]
                time.sleep(0.01)

    def check() -> None:
        if time.monotonic() > until:
            raise PlanError("rank 7 failed")

    until = time.monotonic() + 0.2
    before = set(threading.enumerate())
    with pytest.raises(PlanError, match="rank 7 failed"):
        Transfers(Slow(), 60, check).send({str(number): file for number in range(9)})  # type: ignore[arg-type]
    assert set(threading.enumerate()) <= before


def test_manifest(store: ObjectStore) -> None:
    transfers = Transfers(store, 60, retries=QUICK)
    transfers.send_manifest("m/manifest.json", {"files": [1, "ä"]})
    assert transfers.fetch_manifest("m/manifest.json") == {"files": [1, "ä"]}
    transfers.drop("m")
    with pytest.raises(StoreError, match=r"m/manifest\.json"):
        transfers.fetch_manifest("m/manifest.json")


def test_drop_does_not_fail(s3: S3Store, proxy: FlakyProxy, caplog: pytest.LogCaptureFixture) -> None:
    proxy.faults.append(Fault("403", "GET", "", times=9))
    Transfers(s3, 60).drop("run")
    assert f"left behind, to be deleted by hand: {s3.url}/run" in caplog.text


def test_no_room_on_the_local_disk(s3: S3Store, file: Path) -> None:
    transfers = Transfers(s3, 60, retries=QUICK)
    (entry,) = transfers.send({"k": file})
    with pytest.raises(StoreError, match=r"cannot be written: (Not a directory|File exists)"):
        transfers.fetch([(entry, file / "below")])


def test_sources_by_url(s3: S3Store, file: Path, tmp_path: Path) -> None:
    from mindformers_ckpt.job.cluster.cluster import Cluster
    from mindformers_ckpt.job.config import Config

    cluster = Cluster(0, 1, ("node",), 60, None)
    s3.put(file, "in/whole.ckpt", nothing)
    config = fetch_sources(Config(load_checkpoint=f"{s3.url}/in/whole.ckpt"), cluster, tmp_path / "out", 0)
    assert config.load_checkpoint == str(tmp_path / "out" / "fetched" / "load_checkpoint" / "whole.ckpt")
    assert Path(config.load_checkpoint).read_bytes() == file.read_bytes()
    for wrong, message in ((f"{s3.url}/absent", "there is nothing at"), (f"s3://{BUCKET}", "whole bucket")):
        with pytest.raises(PlanError, match=message):
            fetch_sources(Config(load_checkpoint=wrong), cluster, tmp_path / "out", 0)
    assert Path(config.load_checkpoint).exists()
