"""Who may take part in the meeting of a job's ranks: the secret, and what strangers can do. Loopback device only."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_cluster import free_address, job, run_ranks, share_rank, start_ranks, wait_for_listener

from mindformers_ckpt.errors import ConfigError, PlanError
from mindformers_ckpt.job.cluster import coordinator, proof, secret
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.cluster.environment import PORT_OFFSET
from mindformers_ckpt.job.cluster.messages import Address, Decoder, encode
from mindformers_ckpt.job.cluster.rendezvous import RankError
from mindformers_ckpt.job.cluster.secret import (
    NO_NUMBER,
    PREFIX,
    Job,
    Trust,
    keeps_secrets,
    leave_secret,
    read_secret,
)
from mindformers_ckpt.job.shared_disk import owners_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def address() -> Address:
    return free_address()


@pytest.fixture
def trust(tmp_path: Path) -> Iterator[Trust]:
    """A secret in a folder that all ranks see; nothing is left of it."""
    yield Trust(folder=tmp_path / "output", strict=True)
    assert list((tmp_path / "output").glob("*")) == []


def secrets_in(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{PREFIX}*"))


# --------------------------------------------------------------------------------------------- the secret


def test_the_secret_is_there_while_ranks_join_and_only_then(address: Address, trust: Trust) -> None:
    assert trust.folder is not None
    with ThreadPoolExecutor(2) as pool:
        first = start_ranks(pool, address, 2, share_rank, ranks=[0], trust=trust)
        wait_for_listener(address)
        deadline = time.monotonic() + 60
        while not secrets_in(trust.folder) and time.monotonic() < deadline:  # it listens first
            time.sleep(0.01)
        (file,) = secrets_in(trust.folder)
        status = file.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, os.geteuid())

        def look(cluster: Cluster) -> list[Any]:
            assert secrets_in(cluster._folder or Path()) == []  # all have joined
            return share_rank(cluster)

        second = start_ranks(pool, address, 2, look, ranks=[1], trust=trust)
        assert [future.result() for future in first + second] == [[0, 1]] * 2


def test_a_secret_of_the_environment_needs_no_file(address: Address, tmp_path: Path) -> None:
    env = {"MINDFORMERS_CKPT_SECRET": "correct horse battery"}

    def run(rank: int) -> tuple[int, ...]:
        environment = job(rank, address.port - PORT_OFFSET, **env)
        with Cluster.from_environment(5.0, environment, tmp_path / "output") as cluster:
            return cluster.unproved

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [(), ()]
    assert not (tmp_path / "output").exists()
    with pytest.raises(ConfigError, match=r"MINDFORMERS_CKPT_SECRET has 6 characters, at least 16.*openssl rand"):
        Cluster.from_environment(1.0, job(0, 8118, MINDFORMERS_CKPT_SECRET="secret"))


def test_ranks_have_a_key_between_them_only_where_all_know_a_secret(address: Address, tmp_path: Path) -> None:
    def keys(trust: Trust) -> list[bytes | None]:
        found: list[bytes | None] = run_ranks(address, 2, lambda cluster: cluster.peer_key, trust=trust)
        return found

    first, second = keys(Trust("the secret of this job"))
    assert first == second
    assert first is not None
    assert Job(address, 2).key(b"the secret of this job") != first  # the key of the meeting is not told to ranks
    assert keys(Trust("another secret of the job"))[0] not in (None, first)
    one, other = keys(Trust(folder=tmp_path, strict=True))
    assert one == other
    assert one not in (None, first)
    assert keys(Trust()) == [None, None]


def test_ranks_that_anybody_may_be_have_no_key(
    address: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one does not see the file with the secret."""
    monkeypatch.setattr(secret, "_PATIENCE", 0.1)
    folders = [tmp_path / name for name in ("mine", "other")]

    def work(cluster: Cluster) -> bytes | None:
        return cluster.peer_key

    with ThreadPoolExecutor(2) as pool:
        ranks = start_ranks(pool, address, 2, work, ranks=[0], trust=Trust(folder=folders[0]))
        wait_for_listener(address)
        ranks += start_ranks(pool, address, 2, work, ranks=[1], trust=Trust(folder=folders[1]))
        assert [future.result() for future in ranks] == [None, None]


@pytest.mark.parametrize("mine", ["another secret of 16", ""])
def test_a_rank_with_another_secret_is_refused(address: Address, mine: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        ranks = start_ranks(pool, address, 2, share_rank, ranks=[0], trust=Trust("the secret of this job"))
        wait_for_listener(address)
        with pytest.raises(RankError) as caught:
            Cluster.connect(1, 2, address, 5, trust=Trust(mine))
        assert "another job (this one has 2 ranks), or one with another secret" in str(caught.value)
        ranks += start_ranks(pool, address, 2, share_rank, ranks=[1], trust=Trust("the secret of this job"))
        assert [future.result() for future in ranks] == [[0, 1]] * 2


def test_what_a_killed_coordinator_left_is_replaced(tmp_path: Path) -> None:
    def leave(owner: str) -> Path:
        left = leave_secret(tmp_path, owner)
        assert left is not None
        return left[2]

    stale, other = leave("node:1 127.0.0.1:9000"), leave("node:2 127.0.0.1:9000")
    new = leave("node:1 127.0.0.1:9000")
    assert secrets_in(tmp_path) == sorted([new, other])
    assert not stale.exists()


def test_only_a_private_file_of_this_user_is_a_secret(tmp_path: Path) -> None:
    left = leave_secret(tmp_path, "me")
    assert left is not None
    number, secret, file = left
    assert read_secret(tmp_path, number, 0) == secret
    file.chmod(0o640)
    assert read_secret(tmp_path, number, 0) is None
    file.chmod(0o600)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to("elsewhere")
    assert read_secret(tmp_path, number, 0) is None
    file.unlink()
    os.mkfifo(file, 0o600)
    assert read_secret(tmp_path, number, 0) is None
    file.unlink()
    file.mkdir()
    assert read_secret(tmp_path, number, 0) is None
    file.rmdir()
    (tmp_path / "elsewhere").rename(file)
    if os.geteuid() == 0:
        os.chown(file, 12345, 12345)
        assert read_secret(tmp_path, number, 0) is None


def test_a_secret_of_another_node_may_come_into_sight_late(tmp_path: Path) -> None:
    left = leave_secret(tmp_path / "there", "me")
    assert left is not None
    number, secret, _ = left
    mover = threading.Timer(0.3, lambda: (tmp_path / "there").rename(tmp_path / "here"))
    mover.start()
    assert read_secret(tmp_path / "here", number, 10) == secret
    mover.join()


def test_a_folder_that_keeps_no_secret(address: Address, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file stands where the folder should be: one line is logged, and the job goes on."""
    folder = tmp_path / "output"
    folder.touch()
    assert not keeps_secrets(folder)
    results = run_ranks(address, 2, lambda cluster: cluster.unproved, trust=Trust(folder=folder, strict=True))
    assert results == [(), ()]
    (line,) = [record.getMessage() for record in caplog.records if "secret" in record.getMessage()]
    assert line == (
        f"no secret can be left in {folder}, so whoever reaches {address} could take part in this job; "
        "set MINDFORMERS_CKPT_SECRET, alike on all ranks"
    )


def test_nodes_that_do_not_see_the_secret(address: Address, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a shared disk they are let in, are known by number, and a job that trusts them with folders ends."""

    def run(rank: int) -> tuple[tuple[int, ...], str]:
        trust = Trust(folder=tmp_path / f"disk {rank // 2}")
        with Cluster.connect(rank, 4, address, 20, trust=trust) as cluster:
            cluster.barrier("all there")
            try:
                cluster.check_members()
            except ConfigError as error:
                return cluster.unproved, str(error)
            return cluster.unproved, ""

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(run, 0)
        wait_for_listener(address)
        others = [pool.submit(run, rank) for rank in (1, 2, 3)]
        found = [future.result() for future in [first, *others]]
    assert [unproved for unproved, _ in found[:2]] == [(2, 3)] * 2
    assert [unproved for unproved, _ in found[2:]] == [(0, 1, 2, 3)] * 2  # they cannot know who coordinates
    assert found[0][1].startswith(f"ranks 2-3 did not see the secret of this job in {tmp_path / 'disk 0'} and may be")
    lines = {record.getMessage() for record in caplog.records if "did not see the secret" in record.getMessage()}
    assert (
        f"ranks 2-3 did not see the secret in {tmp_path / 'disk 0'}, so whoever reaches {address} could take part in "
        "this job; set MINDFORMERS_CKPT_SECRET, alike on all ranks"
    ) in lines


def test_on_one_node_nobody_is_let_in_without_the_secret(address: Address, tmp_path: Path, trust: Trust) -> None:
    with ThreadPoolExecutor(2) as pool:
        ranks = start_ranks(pool, address, 2, share_rank, ranks=[0], trust=trust)
        wait_for_listener(address)
        with pytest.raises(RankError) as caught:
            Cluster.connect(1, 2, address, 0.5, trust=Trust(folder=tmp_path / "other", strict=True))
        assert f"has left its secret in no file of {tmp_path / 'other'} that this rank can read" in str(caught.value)
        with pytest.raises(RankError, match="another secret"):
            Cluster.connect(1, 2, address, 0.5)  # the key of public values
        ranks += start_ranks(pool, address, 2, share_rank, ranks=[1], trust=trust)
        assert [future.result() for future in ranks] == [[0, 1]] * 2


def test_the_owner_of_a_place_puts_out_who_took_it_without_the_secret(address: Address, tmp_path: Path) -> None:
    trust = Trust(folder=tmp_path)
    with ThreadPoolExecutor(3) as pool:
        ranks = start_ranks(pool, address, 3, share_rank, ranks=[0], trust=trust)
        wait_for_listener(address)
        key = Job(address, 3).key(b"")
        for words in (
            encode({"kind": "failed", "step": None, "text": "give me money"}),
            encode({"kind": "leave"}),
            b"7",
        ):
            with Caller(address, 3, 1, key) as stranger:
                assert stranger.receive()["kind"] == "welcome"
                stranger.sock.sendall(words)
                stranger.sock.shutdown(socket.SHUT_WR)
                assert stranger.sock.recv(1) == b""  # he is forgotten
        with Caller(address, 3, 1, key) as stranger:
            assert stranger.receive()["kind"] == "welcome"
            ranks += start_ranks(pool, address, 3, share_rank, ranks=[1], trust=trust)
            assert stranger.sock.recv(1) == b""
        ranks += start_ranks(pool, address, 3, share_rank, ranks=[2], trust=trust)
        assert [future.result() for future in ranks] == [[0, 1, 2]] * 3


# ----------------------------------------------------------------------------------------------- strangers


class Caller:
    """A connection that proves a key and says hello, spoken by hand."""

    def __init__(self, address: Address, size: int, rank: int, key: bytes) -> None:
        self.sock = socket.create_connection(address, 10)
        challenge = self.sock.recv(proof.CHALLENGE, socket.MSG_WAITALL)
        answer = proof.new_answer(key, challenge)
        self.sock.sendall(answer)
        assert self.sock.recv(proof.DIGEST, socket.MSG_WAITALL) == proof.confirmation(key, challenge, answer)
        self.sock.sendall(encode({"kind": "hello", "rank": rank, "node": "evil"}))
        self.decoder = Decoder(1 << 20)

    def receive(self) -> dict[str, Any]:
        head = self.sock.recv(4, socket.MSG_WAITALL)
        body = self.sock.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
        return self.decoder.feed(head + body)[0]

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *error: object) -> None:
        self.sock.close()


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_meeting", ROOT / "tools" / "fuzz_meeting.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_strangers(fuzz: ModuleType, trust: Trust, count: int) -> None:
    """The tool raises when a rank fails, a value is wrong, or a stranger is told anything."""
    figures = fuzz.fuzz(count, 7, trust)
    assert figures["steps of the job"] > 1
    assert sum(figures[kind] for kind in ("garbage", "noise", "guess", "mutated guess", "echo", "half-open")) == count


def test_brackets_end_no_job(address: Address) -> None:
    with ThreadPoolExecutor(2) as pool:
        ranks = start_ranks(pool, address, 2, share_rank, ranks=[0])
        wait_for_listener(address)
        for data in (b"[" * 4000, encode({"kind": "hello"}), b"\0\0\x0f\xa0" + b"[" * 4000):
            with socket.create_connection(address, 10) as stranger:
                stranger.sendall(data)
        ranks += start_ranks(pool, address, 2, share_rank, ranks=[1])
        assert [future.result() for future in ranks] == [[0, 1]] * 2


@pytest.mark.parametrize("body", [b"[" * 4000, b'{"kind":"gather"}', b'{"kind":"gather","step":[1],"value":1}', b"7"])
def test_a_rank_that_talks_nonsense_is_named(address: Address, body: bytes) -> None:
    with ThreadPoolExecutor(1) as pool:
        (first,) = start_ranks(pool, address, 2, lambda cluster: cluster.barrier("x"), ranks=[0])
        wait_for_listener(address)
        with Caller(address, 2, 1, Job(address, 2).key(b"")) as rank:
            rank.sock.sendall(len(body).to_bytes(4, "big") + body)
            assert str(first.exception(10)).startswith("rank 1 on evil died")


def test_a_refusal_says_nothing(address: Address) -> None:
    with ThreadPoolExecutor(2) as pool:
        ranks = start_ranks(pool, address, 2, share_rank, ranks=[0], trust=Trust("the secret of this job"))
        wait_for_listener(address)
        with socket.create_connection(address, 10) as stranger, stranger.makefile("rb") as stream:
            stranger.sendall(proof.new_answer(Job(address, 2).key(b""), bytes(proof.CHALLENGE)))
            said = stream.read()
        assert said[: len(proof.GREETING)] == proof.GREETING
        assert said[len(proof.GREETING) :][:8] == NO_NUMBER
        assert said[proof.CHALLENGE :] == proof.NO
        ranks += start_ranks(pool, address, 2, share_rank, ranks=[1], trust=Trust("the secret of this job"))
        assert [future.result() for future in ranks] == [[0, 1]] * 2


def test_proofs_cannot_be_used_again() -> None:
    key = bytes(32)
    challenge, other = proof.new_challenge(NO_NUMBER), proof.new_challenge(NO_NUMBER)
    answer = proof.new_answer(key, challenge)
    assert proof.is_answer(key, challenge, answer)
    assert not proof.is_answer(key, other, answer)  # of another connection
    assert not proof.is_answer(bytes(31) + b"1", challenge, answer)
    confirmed = proof.confirmation(key, challenge, answer)
    assert not proof.is_answer(key, challenge, answer[: proof.NONCE] + confirmed)  # of the other role
    assert len(challenge) == proof.CHALLENGE
    assert len(answer) == proof.ANSWER
    assert len(confirmed) == proof.DIGEST


def test_slow_and_half_open_connections_hold_no_place(
    address: Address, trust: Trust, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "HELLO_TIMEOUT", 1.0)
    with ThreadPoolExecutor(2) as pool:
        ranks = start_ranks(pool, address, 2, share_rank, ranks=[0], trust=trust)
        wait_for_listener(address)
        silent = [socket.create_connection(address, 10) for _ in range(coordinator.SPARE + 40)]
        for sock in silent[-20:]:
            sock.shutdown(socket.SHUT_WR)
        began = time.monotonic()
        for sock in silent:  # those beyond the limit are put out at once, the others when their time is over
            while sock.recv(100):
                pass
        assert time.monotonic() - began < 10
        with socket.create_connection(address, 10) as slow, pytest.raises(ConnectionError):
            for _ in range(200):  # a byte at a time
                slow.sendall(b"x")
                time.sleep(0.02)
        ranks += start_ranks(pool, address, 2, share_rank, ranks=[1], trust=trust)
        assert [future.result() for future in ranks] == [[0, 1]] * 2
    for sock in silent:
        sock.close()


LIMITED = """
import resource, socket, sys
sys.path.insert(0, "tests/auto")
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
from concurrent.futures import ThreadPoolExecutor
from test_cluster import free_address, share_rank, start_ranks, wait_for_listener
address = free_address()
with ThreadPoolExecutor(2) as pool:
    ranks = start_ranks(pool, address, 2, share_rank, ranks=[0], timeout=200)
    wait_for_listener(address)
    print(address.port, flush=True)
    sys.stdin.readline()
    ranks += start_ranks(pool, address, 2, share_rank, ranks=[1], timeout=200)
    print([rank.result() for rank in ranks], flush=True)
"""


def test_strangers_that_use_up_the_open_files(tmp_path: Path) -> None:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", LIMITED], text=True, cwd=ROOT, **pipes)
    assert process.stdout is not None
    port = int(process.stdout.readline())
    strangers = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(100)]
    assert process.communicate("\n", timeout=200)[0] == "[[0, 1], [0, 1]]\n"
    for sock in strangers:
        sock.close()


def test_two_thousand_ranks_at_once(address: Address, tmp_path: Path) -> None:
    """Simulated in one loop, amid strangers that send nothing."""
    size = 2000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 3 * size:
        pytest.skip(f"{hard} open files are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3 * size), hard))
    trust = Trust(folder=tmp_path, strict=True)

    async def introduce(rank: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while True:
            reader, writer = await asyncio.open_connection(*address)
            try:
                challenge = await reader.readexactly(proof.CHALLENGE)
                key = trust.key(Job(address, size), proof.number_in(challenge))
                assert key is not None
                answer = proof.new_answer(key.content, challenge)
                writer.write(answer + encode({"kind": "hello", "rank": rank, "node": f"n{rank // 8}"}))
                assert await reader.readexactly(proof.DIGEST) == proof.confirmation(key.content, challenge, answer)
            except asyncio.IncompleteReadError:  # too late on a busy machine: as a rank does, it tries again
                writer.close()
                await asyncio.sleep(0.1)
            else:
                return reader, writer

    async def be_a_rank(rank: int) -> tuple[int, int]:
        reader, writer = await introduce(rank)
        sizes = []
        for step in ("welcome", "join", "share"):
            sizes.append(int.from_bytes(await reader.readexactly(4), "big"))
            await reader.readexactly(sizes[-1])
            if step == "join":
                writer.write(encode({"kind": "gather", "step": "ranks", "value": rank}))
        writer.write(encode({"kind": "leave"}))
        await reader.read()
        writer.close()
        return sizes[1], sizes[2]

    async def be_all() -> list[tuple[int, int]]:
        strangers = [await asyncio.open_connection(*address) for _ in range(100)]
        sizes = await asyncio.gather(*map(be_a_rank, range(1, size)))
        for _, writer in strangers:
            writer.close()
        return sizes

    with ThreadPoolExecutor(1) as pool:
        (first,) = start_ranks(pool, address, size, share_rank, ranks=[0], timeout=120, trust=trust)
        wait_for_listener(address)
        sizes = asyncio.run(be_all())
        assert first.result() == list(range(size))
    assert len(set(sizes)) == 1
    assert secrets_in(tmp_path) == []


def test_who_listens_in_the_place_of_the_job_learns_nothing_and_names_no_folder(
    address: Address, tmp_path: Path
) -> None:
    """A user of the same host has the port: he knows the public key, not the secret."""
    key = Job(address, 2).key(b"")
    with socket.create_server(address) as server, ThreadPoolExecutor(1) as pool:
        joining = pool.submit(Cluster.connect, 1, 2, address, 1.0, trust=Trust(folder=tmp_path, strict=True))
        heard = b""
        server.settimeout(0.2)
        while not joining.done():
            try:
                connection = server.accept()[0]
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(5)
                connection.sendall(proof.new_challenge(NO_NUMBER))
                heard += connection.recv(4096)
        with pytest.raises(RankError, match="has left no secret: another job or user"):
            joining.result()
    assert heard == b""
    assert key not in heard


def test_what_a_rank_says_is_no_path_and_no_escape_code(address: Address, tmp_path: Path) -> None:
    """A rank without the secret, in the place of rank 0: the others look for a shared disk, and then refuse."""
    victim = tmp_path / "victim"
    victim.touch()

    def work(cluster: Cluster) -> Any:
        return owners_of(tmp_path / "output", cluster), cluster.nodes[1]

    with ThreadPoolExecutor(2) as pool:
        (first,) = start_ranks(pool, address, 2, work, ranks=[1], node="n\x1b[31m:1")
        wait_for_listener(address)
        with Caller(address, 2, 0, Job(address, 2).key(b"")) as rank:
            for step, value in (("probe", "/../../victim"), ("probe made", None), ("probe seen", 0)):
                while rank.receive()["kind"] != "gathered":
                    pass
                rank.sock.sendall(encode({"kind": "gather", "step": step, "value": value}))
            assert first.result(20) == ([0, 1], r"n\x1b[31m:1")
            rank.sock.sendall(encode({"kind": "leave"}))
    assert [path.name for path in tmp_path.iterdir() if path != victim] == ["output"]
    assert victim.exists()


# -------------------------------------------------------------------------------------- the first failure


def test_whoever_fails_of_a_consequence_says_the_cause(address: Address, tmp_path: Path) -> None:
    """Rank 0 fails and clears up; what rank 1 misses then is not what went wrong."""
    file = tmp_path / "staging"
    file.touch()

    def work(cluster: Cluster) -> None:
        cluster.barrier("begin")
        if cluster.rank == 0:
            with cluster.step("copy"):
                file.unlink()
                time.sleep(0.3)  # the news comes after the harm
                raise KeyError("the cause")
        with cluster.step("read"):
            while True:
                file.read_bytes()

    errors = run_ranks(address, 2, work)
    assert isinstance(errors[0], KeyError)
    assert isinstance(errors[1], RankError)
    assert str(errors[1]) == "rank 0 failed in step 'copy': KeyError: 'the cause'"
    assert isinstance(errors[1].__cause__, FileNotFoundError)


def test_the_first_to_fail_says_what_it_met(address: Address) -> None:
    def work(cluster: Cluster) -> None:
        if cluster.rank == 0:
            with cluster.step("read"):
                raise PlanError("no such file")
        cluster.barrier("read")

    errors = run_ranks(address, 2, work)
    assert isinstance(errors[0], PlanError)
    assert str(errors[1]) == "rank 0 failed in step 'read': no such file"


def test_a_failure_is_not_waited_for_alone() -> None:
    with Cluster.from_environment(1.0, {}) as cluster:
        began = time.monotonic()
        assert cluster.first_failure(30) is None
        assert time.monotonic() - began < 1
