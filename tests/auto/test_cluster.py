"""The ranks of a job meet, share values, and learn of each other's failures: real sockets, real processes."""

from __future__ import annotations

import itertools
import json
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ckpt.errors import ConfigError, TransferError
from mindformers_ckpt.job.cluster import coordinator, proof, rendezvous
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.cluster.environment import PORT_OFFSET, misspelt_names, node_name
from mindformers_ckpt.job.cluster.messages import Address, Decoder, ProtocolError, encode, name_ranks
from mindformers_ckpt.job.cluster.rendezvous import RankError, listen
from mindformers_ckpt.job.cluster.secret import NO_SECRET, Job

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys, time
from mindformers_ckpt.job.cluster.messages import Address
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.cluster.rendezvous import RankError
rank, size, port, timeout = *map(int, sys.argv[1:4]), float(sys.argv[4])
def say(**facts): print(json.dumps(facts), flush=True)
try:
    with Cluster.connect(rank, size, Address("127.0.0.1", port), timeout) as cluster:
        say(joined=rank)
        BODY
except RankError as error:
    say(text=str(error), rank=error.rank, step=error.step)
"""


def free_address() -> Address:
    """A port nobody listens on, below the ephemeral ones, so that no outgoing connection takes it."""
    while True:
        address = Address("127.0.0.1", random.randrange(20000, 32000))
        try:
            listen(address).close()
        except OSError:
            continue
        return address


@pytest.fixture
def address() -> Address:
    return free_address()


class Member:
    """A rank in a process of its own, which says what happens in lines of JSON."""

    def __init__(self, rank: int, size: int, address: Address, timeout: float, body: str) -> None:
        command = [sys.executable, "-W", "error", "-c", PROGRAM.replace("BODY", body)]
        numbers = [str(number) for number in (rank, size, address.port, timeout)]
        self.process = subprocess.Popen([*command, *numbers], stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        facts = json.loads(self.process.stdout.readline())
        assert isinstance(facts, dict)
        return facts


Starter = Callable[..., Member]


@pytest.fixture
def start(address: Address) -> Iterator[Starter]:
    members: list[Member] = []

    def start_member(rank: int, size: int, body: str, timeout: float = 20) -> Member:
        members.append(Member(rank, size, address, timeout, body))
        return members[-1]

    yield start_member
    for member in members:
        member.process.kill()
        member.process.communicate()


def wait_for_listener(address: Address) -> None:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(address) == 0:
                return
        time.sleep(0.02)
    raise AssertionError(f"nobody listens on {address}")


def start_ranks(
    pool: ThreadPoolExecutor, address: Address, size: int, work: Callable[[Cluster], Any], **options: Any
) -> list[Future[Any]]:
    """Each rank in a thread: `work` with its cluster, which is closed then."""
    settings = {"timeout": 10.0, **options}

    def run(rank: int) -> Any:
        with Cluster.connect(rank, size, address, **settings) as cluster:
            return work(cluster)

    return [pool.submit(run, rank) for rank in settings.pop("ranks", range(size))]


def share_rank(cluster: Cluster) -> list[Any]:
    return cluster.gather("ranks", cluster.rank)


def run_ranks(address: Address, size: int, work: Callable[[Cluster], Any], **options: Any) -> list[Any]:
    """What `work` returned or raised on each rank."""
    with ThreadPoolExecutor(size) as pool:
        futures = start_ranks(pool, address, size, work, **options)
        return [future.exception() or future.result() for future in futures]


def join_all(address: Address, size: int, timeout: float = 10) -> list[Cluster]:
    """The clusters of all ranks, open; rank 0 coordinates."""
    with ThreadPoolExecutor(size) as pool:
        first = pool.submit(Cluster.connect, 0, size, address, timeout)
        wait_for_listener(address)
        others = [pool.submit(Cluster.connect, rank, size, address, timeout) for rank in range(1, size)]
        return [future.result() for future in [first, *others]]


def close_all(clusters: list[Cluster]) -> None:
    with ThreadPoolExecutor(len(clusters)) as pool:
        list(pool.map(Cluster.close, clusters))


# ---------------------------------------------------------------------------------------------- sharing


def test_eight_processes_share_their_values(start: Starter) -> None:
    body = "say(values=cluster.gather('layouts', {'rank': rank, 'square': rank * rank}))"
    members = [start(rank, 8, body) for rank in range(8)]
    expected = [{"rank": rank, "square": rank * rank} for rank in range(8)]
    for rank, member in enumerate(members):
        assert member.hear() == {"joined": rank}
        assert member.hear() == {"values": expected}
        assert member.process.wait(10) == 0


def test_sixty_four_ranks_on_eight_nodes(address: Address) -> None:
    def connect(rank: int) -> tuple[Any, ...]:
        with Cluster.connect(rank, 64, address, 10, node=f"node{rank % 8}") as cluster:
            first = cluster.gather("one", rank)
            cluster.barrier("two")
            second = cluster.gather("three", [rank, None])
            return first, second, cluster.node_ranks, cluster.local_rank, cluster.is_first_on_node

    with ThreadPoolExecutor(64) as pool:
        results = list(pool.map(connect, range(64)))
    for rank, (first, second, node_ranks, local_rank, is_first) in enumerate(results):
        assert first == list(range(64))
        assert second == [[other, None] for other in range(64)]
        assert node_ranks == tuple(range(rank % 8, 64, 8))
        assert local_rank == rank // 8
        assert is_first == (rank < 8)


def test_one_step_can_share_megabytes(address: Address) -> None:
    texts = [letter * (4 << 20) for letter in "ab"]
    assert run_ranks(address, 2, lambda cluster: cluster.gather("big", texts[cluster.rank])) == [texts, texts]


def test_a_value_over_the_limit_fails_everywhere(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindformers_ckpt.job.cluster.cluster.MAX_VALUES", 1000)
    errors = run_ranks(address, 2, lambda cluster: cluster.gather("big", "x" * (600 * cluster.rank)))
    assert str(errors[0]) == "rank 1 failed in step 'big': a value of 602 bytes, 500 are allowed"
    assert str(errors[1]) == "a value of 602 bytes, 500 are allowed"


def test_a_single_rank_needs_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)
    with Cluster.from_environment(1.0, {}) as cluster:
        assert (cluster.rank, cluster.size, cluster.node_ranks) == (0, 1, (0,))
        assert cluster.is_first_on_node
        assert cluster.gather("one", {"a": (1, 2)}) == [{"a": [1, 2]}]
        cluster.barrier("two")
        cluster.check()
        with pytest.raises(KeyError), cluster.step("three"):
            raise KeyError("x")
        with pytest.raises(RankError, match="rank 0 failed in step 'three': KeyError: 'x'"):
            cluster.barrier("four")


# -------------------------------------------------------------------------------------------- failures


def test_a_failure_reaches_all_with_rank_step_and_cause(address: Address) -> None:
    def work(cluster: Cluster) -> None:
        with cluster.step("clear"):
            if cluster.rank == 2:
                raise TransferError("the disk is full")
        cluster.barrier("cleared")

    results = run_ranks(address, 4, work)
    assert isinstance(results[2], TransferError)
    assert str(results[2]) == "the disk is full"
    for result in (results[0], results[1], results[3]):
        assert isinstance(result, RankError)
        assert str(result) == "rank 2 failed in step 'clear': the disk is full"
        assert (result.rank, result.step) == (2, "clear")


def test_an_exception_outside_of_any_step_is_reported_too(address: Address) -> None:
    def work(cluster: Cluster) -> None:
        if cluster.rank == 1:
            raise ValueError("no such key")
        cluster.barrier("end")

    results = run_ranks(address, 2, work)
    assert str(results[0]) == "rank 1 failed: ValueError: no such key"
    assert isinstance(results[1], ValueError)


def test_check_sees_a_failure_and_it_is_final(address: Address) -> None:
    clusters = join_all(address, 3)
    for cluster in clusters:
        cluster.check()
    clusters[1].fail(RuntimeError("gone wrong"), "copy")
    until = time.monotonic() + 5
    with pytest.raises(RankError, match="rank 1 failed in step 'copy': RuntimeError: gone wrong") as caught:
        while time.monotonic() < until:
            clusters[0].check()
            time.sleep(0.005)
    calls = [lambda: clusters[0].gather("x"), lambda: clusters[0].barrier("y"), clusters[0].check]
    for call in calls:
        with pytest.raises(RankError) as again:
            call()
        assert again.value is caught.value
    clusters[0].fail(RuntimeError("a consequence"))
    with pytest.raises(RankError) as again:
        clusters[0].check()
    assert again.value is caught.value
    with pytest.raises(RankError, match="rank 1 failed in step 'copy'"):
        clusters[2].barrier("x")
    close_all(clusters)


def test_the_first_failure_counts(address: Address) -> None:
    clusters = join_all(address, 3)
    clusters[1].fail(RuntimeError("first"))
    with pytest.raises(RankError, match="first"):
        clusters[2].barrier("x")
    clusters[0].fail(RuntimeError("second"))
    for rank, text in [(0, "second"), (1, "first"), (2, "first")]:  # a rank's own failure stays its error
        with pytest.raises(RankError, match=text):
            clusters[rank].barrier("y")
    close_all(clusters)


def test_a_killed_member_is_named_at_once(address: Address, start: Starter) -> None:
    first = start(0, 4, "cluster.barrier('load')")
    wait_for_listener(address)  # rank 0 coordinates
    others = [start(rank, 4, "cluster.barrier('load')") for rank in (1, 2)]
    victim = start(3, 4, "time.sleep(60)")
    for member in [first, *others, victim]:
        assert "joined" in member.hear()
    time.sleep(0.2)
    victim.process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    for member in [first, *others]:
        facts = member.hear()
        assert time.monotonic() - killed < 2
        assert (facts["rank"], facts["step"]) == (3, "load")
        assert facts["text"].startswith(f"rank 3 on {node_name({})} died (step 'load')")


def is_in_time_wait(port: int) -> bool:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(int(row[1].split(":")[1], 16) == port and row[3] == "06" for row in rows)


def test_a_killed_coordinator_is_named_and_a_new_job_starts_at_once(address: Address, start: Starter) -> None:
    coordinator = start(2, 3, "time.sleep(60)")
    wait_for_listener(address)
    others = [start(rank, 3, "cluster.barrier('load')") for rank in (0, 1)]
    for member in [coordinator, *others]:
        assert "joined" in member.hear()
    time.sleep(0.2)
    coordinator.process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    for member in others:
        facts = member.hear()
        assert time.monotonic() - killed < 2
        assert (facts["rank"], facts["step"]) == (2, "load")
        assert facts["text"].startswith("rank 2, which coordinates, died")
        assert member.process.wait(5) == 0
    assert is_in_time_wait(address.port)
    assert run_ranks(address, 3, share_rank) == [[0, 1, 2]] * 3


def test_ranks_that_do_not_arrive_are_named(address: Address) -> None:
    clusters = join_all(address, 6, timeout=0.5)
    begin = time.monotonic()
    text = r"^step 'load': ranks 1, 3-4 have not arrived within 0.5 s \(on .+\)$"
    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(clusters[rank].barrier, "load") for rank in (0, 2, 5)]:
            with pytest.raises(RankError, match=text) as caught:
                future.result()
            assert (caught.value.rank, caught.value.step) == (None, "load")
    assert 0.4 < time.monotonic() - begin < 2
    for rank in (1, 3, 4):
        with pytest.raises(RankError, match=text):
            clusters[rank].check()
    close_all(clusters)


def test_a_rank_that_never_joins_is_named(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "LINGER", 0.1)
    errors = run_ranks(address, 3, lambda cluster: None, ranks=[0, 2], timeout=0.5)
    for error in errors:
        assert str(error).startswith("step 'join': rank 1 has not arrived within 0.5 s")
        assert "MINDFORMERS_CKPT_MASTER" in str(error)  # each node has a loopback address of its own
        assert (error.rank, error.step) == (1, "join")


def test_ranks_at_different_steps(address: Address) -> None:
    clusters = join_all(address, 3)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(clusters[rank].barrier, "merge") for rank in (0, 1)]
        time.sleep(0.2)
        text = "rank 2 arrived at step 'load' while ranks 0-1 waited at step 'merge'"
        with pytest.raises(RankError, match=text):
            clusters[2].barrier("load")
        for future in waiting:
            with pytest.raises(RankError, match=text):
                future.result()
    close_all(clusters)


def test_a_rank_that_left_is_not_waited_for(address: Address) -> None:
    clusters = join_all(address, 3)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(clusters[0].barrier, "load")
        clusters[2].close()
        with pytest.raises(RankError, match="rank 2 left before step 'load'"):
            waiting.result(timeout=2)
        with pytest.raises(RankError, match="rank 2 left before step 'load'"):
            clusters[1].barrier("load")
    with pytest.raises(RankError, match="rank 2 has left"):
        clusters[2].barrier("load")
    close_all(clusters)


# --------------------------------------------------------------------------------------- joining, leaving


def test_a_late_rank_is_waited_for(address: Address) -> None:
    with ThreadPoolExecutor(3) as pool:
        futures = start_ranks(pool, address, 3, share_rank, ranks=[0, 2])
        time.sleep(0.5)
        assert not any(future.done() for future in futures)
        futures += start_ranks(pool, address, 3, share_rank, ranks=[1])
        assert [future.result() for future in futures] == [[0, 1, 2]] * 3


def test_a_late_rank_learns_of_an_earlier_failure(address: Address) -> None:
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(Cluster.connect, 0, 3, address, 10)
        wait_for_listener(address)
        rendezvous.meet(Job(address, 3), 2, "node7", NO_SECRET, 10).link.close()
        time.sleep(0.1)
        late = pool.submit(Cluster.connect, 1, 3, address, 10)
        for joining in (first, late):
            with pytest.raises(RankError, match=r"rank 2 on node7 died \(step 'join'\)") as caught:
                joining.result()
            assert caught.value.rank == 2


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_ranks_leave_in_any_order_without_disturbing_others(address: Address, order: tuple[int, ...]) -> None:
    clusters = join_all(address, 3)
    closing = [threading.Thread(target=clusters[rank].close) for rank in order]
    for position, thread in enumerate(closing):
        thread.start()
        time.sleep(0.03)
        for rank in order[position + 1 :]:
            clusters[rank].check()
    for thread in closing:
        thread.join(2)
        assert not thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def test_the_coordinator_does_not_wait_for_ever_for_others_to_leave(address: Address) -> None:
    clusters = join_all(address, 2, timeout=0.5)
    begin = time.monotonic()
    clusters[0].close()
    assert 0.4 < time.monotonic() - begin < 2
    with pytest.raises(RankError, match=r"rank 0, which coordinates, has waited 0.5 s for rank 1 to leave"):
        clusters[1].check()
    clusters[1].close()


def test_a_new_job_waits_for_the_end_of_the_last_one(address: Address) -> None:
    old = join_all(address, 2)
    with ThreadPoolExecutor(2) as pool:
        new = start_ranks(pool, address, 2, share_rank)
        time.sleep(0.3)
        assert not any(future.done() for future in new)
        close_all(old)
        assert [future.result() for future in new] == [[0, 1]] * 2


def test_a_rank_that_is_there_twice(address: Address) -> None:
    clusters = join_all(address, 2)
    with pytest.raises(RankError, match=r"rank 1 found no coordinator at .* rank 1 has joined already"):
        Cluster.connect(1, 2, address, 0.5)
    close_all(clusters)


@pytest.mark.parametrize(("size", "job"), [(2, "other"), (3, "")])
def test_another_job_on_the_address_is_refused(address: Address, size: int, job: str) -> None:
    clusters = join_all(address, 2)
    with pytest.raises(RankError) as caught:
        Cluster.connect(0, size, address, 10, job)
    assert str(caught.value).startswith(
        f"something else listens on {address}: another job (this one has {size} ranks), or one with another secret; "
        "set MINDFORMERS_CKPT_MASTER=host:port"
    )
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(share_rank, clusters)) == [[0, 1], [0, 1]]
    close_all(clusters)


@pytest.mark.parametrize(
    ("banner", "text"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n" + bytes(99), "something else listens on .*: an unexpected greeting"),
        (proof.GREETING + bytes(99), "something else listens on .*: another job"),
        (proof.GREETING, "something listens on .* but does not answer"),
        (b"", "something listens on .* but does not answer"),
    ],
)
def test_another_service_on_the_address(address: Address, banner: bytes, text: str) -> None:
    with socket.create_server(address) as server, ThreadPoolExecutor(1) as pool:
        joining = pool.submit(Cluster.connect, 0, 2, address, 0.5)
        with server.accept()[0] as connection:
            connection.sendall(banner)
            with pytest.raises(RankError, match=f"{text}.*set MINDFORMERS_CKPT_MASTER=host:port"):
                joining.result()


def test_nobody_can_listen_on_the_address() -> None:
    with pytest.raises(RankError, match=r"192\.0\.2\.1:20000.*cannot listen there.*MINDFORMERS_CKPT_MASTER"):
        Cluster.connect(0, 2, Address("192.0.2.1", 20000), 0.3)  # an address kept for documentation


def test_only_one_of_many_can_listen() -> None:
    for _ in range(20):
        address, together = free_address(), threading.Barrier(8)

        def compete(_: int, address: Address = address, together: threading.Barrier = together) -> Any:
            together.wait()
            try:
                return listen(address)
            except OSError:
                return None

        with ThreadPoolExecutor(8) as pool:
            owners = [sock for sock in pool.map(compete, range(8)) if sock is not None]
        assert len(owners) <= 1  # none when two were quite at the same time: then they try again
        for owner in owners:
            owner.close()


# -------------------------------------------------------------------------------------------- environment


def job(rank: int, port: int, **changes: str) -> dict[str, str]:
    """The environment of a worker as msrun sets it."""
    env = {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "2", "RANK_SIZE": "2", "MS_NODE_ID": str(rank)}
    env |= {"RANK_ID": str(rank), "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": str(port)}
    return {name: value for name, value in (env | changes).items() if value}


def meet_in(*environments: dict[str, str]) -> list[tuple[int, int, tuple[int, ...]]]:
    def run(env: dict[str, str]) -> tuple[int, int, tuple[int, ...]]:
        with Cluster.from_environment(5.0, env) as cluster:
            return cluster.rank, cluster.size, cluster.node_ranks

    with ThreadPoolExecutor(len(environments)) as pool:
        return list(pool.map(run, environments))


def test_the_environment_of_msrun(address: Address) -> None:
    port = address.port - PORT_OFFSET
    # Workers of the scheduler's node inherit RANK_ID=0 when msrun does not know the rank: it does not count.
    environments = [job(rank, port, RANK_ID="0", MINDFORMERS_CKPT_NODE=f"n{rank}") for rank in (0, 1)]
    assert meet_in(*environments) == [(0, 2, (0,)), (1, 2, (1,))]


def test_the_environment_of_a_rank_table_job(address: Address) -> None:
    environments = [
        {"RANK_ID": str(rank), "RANK_SIZE": "2", "MINDFORMERS_CKPT_MASTER": str(address)} for rank in (1, 0)
    ]
    assert meet_in(*environments) == [(1, 2, (0, 1)), (0, 2, (0, 1))]


def test_with_a_rank_table_the_rank_of_mindspore_counts(address: Address) -> None:
    port = address.port - PORT_OFFSET
    environments = [job(rank, port, RANK_ID=str(1 - rank), RANK_TABLE_FILE="hccl.json") for rank in (0, 1)]
    assert [rank for rank, _, _ in meet_in(*environments)] == [1, 0]


def test_a_dry_run_is_alone() -> None:
    env = job(3, 0, MS_ROLE="", MS_SIMULATION_LEVEL="1", RANK_ID="3", RANK_SIZE="8", MS_WORKER_NUM="8")
    with Cluster.from_environment(1.0, env) as cluster:
        assert (cluster.rank, cluster.size) == (0, 1)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"MS_ROLE": "MS_SCHED"}, "scheduler.*init"),
        ({"MS_NODE_ID": ""}, "MS_NODE_ID is not set in a job of 2 ranks.*--node_rank"),
        ({"MS_NODE_ID": "worker-a"}, "MS_NODE_ID='worker-a' is not a whole number"),
        ({"MS_NODE_ID": "2"}, "MS_NODE_ID=2 is not a rank of a job of 2 ranks"),
        ({"MS_WORKER_NUM": "two"}, "MS_WORKER_NUM='two' is not a whole number"),
        ({"MS_SCHED_HOST": ""}, "MS_SCHED_HOST= and .*: no address.*set MINDFORMERS_CKPT_MASTER"),
        ({"MS_SCHED_PORT": ""}, "MS_SCHED_PORT=: no address"),
        ({"MINDFORMERS_CKPT_MASTER": "0.0.0.0:9000"}, "MINDFORMERS_CKPT_MASTER=0.0.0.0:9000: no"),
        ({"MINDFORMERS_CKPT_MASTER": "node0"}, "MINDFORMERS_CKPT_MASTER=node0: no address"),
        ({"MINDFORMERS_CKPT_MASTER": "node0:http"}, "MINDFORMERS_CKPT_MASTER=node0:http: no address"),
        ({"MINDFORMERS_CKPT_SECRETS": "x"}, "MINDFORMERS_CKPT_SECRETS: did you mean MINDFORMERS_CKPT_SECRET[?]"),
        ({"MINDFORMERS_CKPT_JOBID": "x"}, "did you mean MINDFORMERS_CKPT_JOB_ID"),
        ({"MINDFORMERS_CKPT_MASTER": "node0:99999"}, "MINDFORMERS_CKPT_MASTER=node0:99999: no"),
    ],
)
def test_environments_without_an_answer(changes: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Cluster.from_environment(1.0, job(0, 8118, **changes))


def test_variables_that_only_begin_like_ours_are_left_alone() -> None:
    ours = {"MINDFORMERS_CKPT_NODE": "a", "MINDFORMERS_CKPT_TIMEOUT": "9"}
    assert misspelt_names({**ours, "MINDFORMERS_CKPT_PATH": "/ckpt", "MINDFORMERS_CKPT_NAME": "llama"}) == []


def test_node_names() -> None:
    assert node_name({}) == node_name({})
    assert node_name({}).startswith(socket.gethostname()[:64])
    assert node_name({"MINDFORMERS_CKPT_NODE": "a"}) != node_name({"MINDFORMERS_CKPT_NODE": "b"})
    long_names = {node_name({"MINDFORMERS_CKPT_NODE": "n" * 500 + letter}) for letter in "ab"}
    assert len(long_names) == 2
    assert max(map(len, long_names)) < 100


# ------------------------------------------------------------------------------------------------ protocol


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=20)), max_size=5),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_messages_survive_any_cutting_of_the_stream(values: list[dict[str, Any]], cuts: list[int]) -> None:
    stream = b"".join(encode(value) for value in values)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    decoder = Decoder(1 << 20)
    received = [message for a, b in zip(edges, edges[1:]) for message in decoder.feed(stream[a:b])]
    assert received == values


@pytest.mark.parametrize("data", [b"\0\0\1\0", b"HTTP", b"\0\0\0\2[]", b"\0\0\0\3{{{"])
def test_other_protocols_are_told_apart(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Decoder(200).feed(data)


@pytest.mark.parametrize(
    ("ranks", "text"), [({3}, "rank 3"), ({3, 8, 9, 10}, "ranks 3, 8-10"), (range(4096), "ranks 0-4095")]
)
def test_ranks_are_written_short(ranks: set[int], text: str) -> None:
    assert name_ranks(ranks) == text


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(RankError("gone", 3, "load")))
    assert (str(error), error.rank, error.step) == ("gone", 3, "load")
