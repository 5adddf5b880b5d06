"""The ranks of one training job do things together: share a value, wait for each other, learn of a failure.

    with Cluster.from_environment(timeout=600) as cluster:
        with cluster.step("clear"):                 # an exception in here reaches all the others
            clear_stale_folders()
        seen = cluster.gather("layouts", summary)   # one value a rank, in rank order

Nothing waits without a limit, nothing is left on a disk, and no collective operator of the training
framework is used (those hang when a rank is dead). Behind it: how ranks find each other (`rendezvous.py`), who takes
care of them (`coordinator.py`), what is said (`messages.py`), and who is let in (`secret.py`, `proof.py`).

The ranks make the same calls in the same order. A failure is final: from then on every call on every rank
raises the same `RankError`. A cluster belongs to one thread. Processes started while it is open should be
spawned: a forked child keeps the connection of a killed rank open, so that only the time-out tells.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from mindformers_ckpt.errors import CheckpointError, ConfigError, raise_problems
from mindformers_ckpt.job.cluster.environment import (
    is_loopback,
    meeting_address,
    misspelt_names,
    node_name,
    rank_and_size,
    secret_of,
)
from mindformers_ckpt.job.cluster.messages import (
    GRACE,
    JOIN,
    MAX_VALUES,
    Address,
    Message,
    ProtocolError,
    name_ranks,
)
from mindformers_ckpt.job.cluster.rendezvous import SECRET, Meeting, RankError, meet
from mindformers_ckpt.job.cluster.secret import NO_SECRET, Job, Trust
from mindformers_ckpt.log import log
from mindformers_ckpt.printable import printable

MAX_TEXT = 4000  # characters of a failure's text that are passed on
# What vanishes under a rank because another one failed and cleared up, it may see before it hears of the failure.
MOMENT = 1.0  # seconds


class Cluster:
    """The ranks of one job; built by `from_environment` or `connect`.

    `nodes[r]` names the node of rank r. `unproved` are the ranks that did not know the secret of the job, where there
    is one: with them anybody may have taken part. `host` is the address of this rank's host, "" where it is alone, and
    `peer_key` what the ranks can prove to each other with, None where they have no secret.
    """

    def __init__(self, rank: int, size: int, nodes: tuple[str, ...], timeout: float, meeting: Meeting | None) -> None:
        self.rank = rank
        self.size = size
        self.nodes = nodes
        self.timeout = timeout
        self.unproved: tuple[int, ...] = ()
        self.host = "" if meeting is None else meeting.link.host
        self.peer_key: bytes | None = None
        self._folder: Path | None = None  # of the secret
        self._meeting = meeting
        self._error: RankError | None = None

    @property
    def node(self) -> str:
        """The name of this rank's node."""
        return self.nodes[self.rank]

    @property
    def node_ranks(self) -> tuple[int, ...]:
        """The ranks on this rank's node, ascending."""
        return tuple(rank for rank, node in enumerate(self.nodes) if node == self.node)

    @property
    def local_rank(self) -> int:
        """The position of this rank among those of its node, from 0."""
        return self.node_ranks.index(self.rank)

    @property
    def leaders(self) -> list[int]:
        """The lowest rank of every node, in the order of the ranks."""
        return [self.nodes.index(node) for node in dict.fromkeys(self.nodes)]

    @property
    def is_first_on_node(self) -> bool:
        """Whether this is the lowest rank of its node."""
        return self.local_rank == 0

    @classmethod
    def from_environment(
        cls, timeout: float, env: Mapping[str, str] = os.environ, folder: Path | None = None
    ) -> Cluster:
        """Join the ranks of the job that `msrun` (or a rank table) describes in the environment.

        Returns when all ranks are there. Besides what msrun sets, these count:

        - MINDFORMERS_CKPT_MASTER=host:port, the meeting address, alike on all ranks; otherwise it is
          MS_SCHED_HOST and MS_SCHED_PORT + PORT_OFFSET.
        - MINDFORMERS_CKPT_SECRET, alike on all ranks; otherwise the coordinator leaves a secret in `folder`.
        - MINDFORMERS_CKPT_JOB_ID, alike on all ranks: keeps jobs of the same size and address apart.
        - MINDFORMERS_CKPT_NODE, the name of this node, where host name and kernel do not tell (containers).

        Raises ConfigError when the environment is incomplete, RankError as `connect` does.
        """
        raise_problems(ConfigError, "the environment of this job is wrong", misspelt_names(env))
        rank, size = rank_and_size(env)
        node = node_name(env)
        if size == 1:
            return cls(rank, size, (node,), timeout, None)
        address = meeting_address(env)
        # A loopback address means one node; but containers, which have names of their own then, may share it.
        strict = is_loopback(address.host) and not env.get("MINDFORMERS_CKPT_NODE")
        trust = Trust(secret_of(env), folder, strict)
        return cls.connect(rank, size, address, timeout, env.get("MINDFORMERS_CKPT_JOB_ID", ""), node, trust)

    @classmethod
    def connect(
        cls,
        rank: int,
        size: int,
        address: Address,
        timeout: float,
        job: str = "",
        node: str | None = None,
        trust: Trust = NO_SECRET,
    ) -> Cluster:
        """Join `size` ranks at an address that one of their hosts owns; returns when all are there.

        `timeout`: seconds for finding the coordinator, and then for each step from its first arrival.
        `trust`: where the secret of the job is; by default there is none.
        Raises RankError when a rank does not come, or something else listens on the address.
        """
        node = node_name({}) if node is None else node
        meeting = meet(Job(address, size, job), rank, node, trust, timeout)
        cluster = cls(rank, size, (), timeout, meeting)
        try:
            members = cluster._values(meeting, JOIN)
            cluster.nodes = tuple(printable(str(member[0])) for member in members)
            trusted = [meeting.key.is_trusted and member[1] is True for member in members]
        except BaseException:
            cluster.close()
            raise
        cluster._folder = trust.folder
        cluster.unproved = tuple(rank for rank, is_trusted in enumerate(trusted) if not is_trusted)
        cluster.peer_key = None if cluster.unproved else meeting.key.of_peers()
        if cluster.unproved and rank == min(set(range(size)) - set(cluster.unproved), default=0):
            log.warning(
                "%s did not see the secret in %s, so whoever reaches %s could take part in this job; set %s, alike on "
                "all ranks",
                *(name_ranks(cluster.unproved), trust.folder, address, SECRET),
            )
        return cluster

    def check_members(self) -> None:
        """Raise ConfigError where a rank did not know the secret of the job. Before a folder that it names is read."""
        if self.unproved:
            raise ConfigError(
                f"{name_ranks(self.unproved)} did not see the secret of this job in {self._folder} and may be anybody. "
                "Nothing was cleared. Is the folder on a disk that all nodes share, and do all ranks run as one user? "
                f"Else set {SECRET} to the same text of your choice on all ranks (openssl rand -hex 32)"
            )

    def gather(self, step: str, value: object = None) -> list[Any]:
        """Share a small JSON value: the values of all ranks in rank order, once all have arrived at `step`.

        The values come back as JSON gives them (a tuple as a list). All of them together may take 64 MiB.
        Raises RankError on every rank when one failed, died, left, came to another step, or did not come.
        """
        self.check()
        encoded = self._encoded(value, step, MAX_VALUES // self.size)
        if self._meeting is None:
            return [json.loads(encoded)]
        self._send(self._meeting, {"kind": "gather", "step": step, "value": value})
        return self._values(self._meeting, step)

    def collect(self, step: str, value: object = None, *, here: bool) -> list[Any] | None:
        """As `gather`, but one rank alone gets the values: the one that calls it with `here`; the others get None.

        For values that nobody else needs: thousands of ranks would be sent those of thousands.
        """
        self.check()
        encoded = self._encoded(value, step, MAX_VALUES // self.size)
        if self._meeting is None:
            return [json.loads(encoded)]
        self._send(self._meeting, {"kind": "collect" if here else "gather", "step": step, "value": value})
        return self._values(self._meeting, step) if here else self._handed(self._meeting, step)

    def hand_out(self, step: str, values: Sequence[object] | None = None) -> Any:
        """Tell every rank a JSON value of its own: one rank gives `values`, in rank order, and each gets its own back.

        All of them together may take 64 MiB. Raises as `gather` does.
        """
        self.check()
        message: Message = {"kind": "gather", "step": step, "value": None}
        if values is not None:
            encoded = self._encoded(values, step, MAX_VALUES)
            message = {"kind": "hand", "step": step, "values": values}
        if self._meeting is None:
            return None if values is None else json.loads(encoded)[0]
        self._send(self._meeting, message)
        return self._handed(self._meeting, step)

    def _encoded(self, value: object, step: str, limit: int) -> str:
        """The JSON of what is to be sent. Raises RankError, on all ranks, where it is over the limit."""
        encoded = json.dumps(value)
        if len(encoded) > limit:
            error = RankError(f"a value of {len(encoded)} bytes, {limit} are allowed", self.rank, step)
            self.fail(error, step)
            raise error
        return encoded

    def barrier(self, step: str) -> None:
        """Wait until all ranks have arrived at `step`; raises as `gather` does."""
        self.gather(step)

    def check(self) -> None:
        """Raise RankError if a failure has been announced; does not wait. For the loops of long work."""
        if self._error is None and self._meeting is not None:
            try:
                message = self._meeting.link.poll()
            except (ConnectionError, ProtocolError) as error:
                raise self._lost(error, None) from error
            if message is not None:
                raise self._announced(message)
        if self._error is not None:
            raise self._error

    def first_failure(self, wait: float = MOMENT) -> RankError | None:
        """What another rank failed of before this one did; waits up to `wait` seconds for the news.

        For who meets an error that may be a consequence: a file that is gone, say. None when there is no such failure,
        or when this rank was the first.
        """
        until = time.monotonic() + wait
        while True:
            try:
                self.check()
            except RankError as error:
                return None if error.rank == self.rank else error
            if self._meeting is None or time.monotonic() >= until:
                return None
            time.sleep(0.02)

    def fail(self, error: BaseException, step: str | None = None) -> None:
        """Tell all ranks that this one failed. Does nothing after an earlier failure."""
        if self._error is not None:
            return
        text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        where = "" if step is None else f" in step {step!r}"
        text = f"rank {self.rank} failed{where}: {text}"[:MAX_TEXT]
        self._error = RankError(text, self.rank, step)
        if self._meeting is not None:
            self._send(self._meeting, {"kind": "failed", "step": step, "text": text})

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Run the body; an exception in it is reported to all ranks and raised here unchanged.

        Where another rank failed before, that is the cause, and is raised in the place of our errors and of those of
        the system. Does not wait for anybody: the next `gather` or `barrier` does.
        """
        try:
            yield
        except (CheckpointError, OSError) as error:
            cause = self.first_failure()
            if cause is not None and cause is not error:
                raise cause from error
            self.fail(error, name)
            raise
        except BaseException as error:
            self.fail(error, name)
            raise

    def close(self) -> None:
        """Leave, without disturbing the others. The rank that coordinates waits until all have left.

        It waits `timeout` seconds at most, and only a moment after a failure.
        """
        meeting, self._meeting = self._meeting, None
        if self._error is None:
            self._error = RankError(f"rank {self.rank} has left")
        if meeting is not None:
            self._send(meeting, {"kind": "leave"})
            meeting.link.close()
            if meeting.coordinator is not None:
                meeting.coordinator.join(self.timeout + GRACE)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.fail(error)
        self.close()

    def _send(self, meeting: Meeting, message: Message) -> None:
        try:
            meeting.link.send(message, time.monotonic() + self.timeout)
        except OSError:
            return  # the coordinator's last words, or its end, are found by whoever receives next

    def _values(self, meeting: Meeting, step: str) -> list[Any]:
        """The values of all ranks at the step."""
        message = self._receive(meeting, step)
        values = message.get("values")
        if message.get("kind") != "gathered" or not isinstance(values, list) or len(values) != self.size:
            raise self._announced(message)
        return values

    def _handed(self, meeting: Meeting, step: str) -> Any:
        """What this rank alone is told at the step."""
        answer = self._receive(meeting, step)
        if answer.get("kind") != "handed" or "value" not in answer:
            raise self._announced(answer)
        return answer["value"]

    def _receive(self, meeting: Meeting, step: str) -> Message:
        """The coordinator's answer at the step."""
        try:
            return meeting.link.receive(time.monotonic() + self.timeout + GRACE)
        except TimeoutError as error:
            text = f"step {step!r}: rank {meeting.host_rank}, which coordinates, does not answer"
            self._error = RankError(f"{text} ({self.timeout + GRACE:g} s)", meeting.host_rank, step)
            raise self._error from error
        except (ConnectionError, ProtocolError) as error:
            raise self._lost(error, step) from error

    def _announced(self, message: Message) -> RankError:
        rank, step, text = message.get("rank"), message.get("step"), message.get("text")
        if message.get("kind") != "failed" or not isinstance(text, str):
            return self._lost(ProtocolError("it sends what was not asked for"), None)
        self._error = RankError(text, rank, step)
        return self._error

    def _lost(self, error: Exception, step: str | None) -> RankError:
        host_rank = self._meeting.host_rank if self._meeting is not None else None
        text = f"rank {host_rank}, which coordinates, died or is cut off: {error}"
        self._error = RankError(text, host_rank, step)
        return self._error
