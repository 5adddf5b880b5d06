"""What the environment of a process says of its job: its rank, its node, where the ranks meet, their secret."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping

from mindformers_ckpt.disk.locks import boot_id
from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.job.cluster.messages import ADVICE, Address
from mindformers_ckpt.job.cluster.rendezvous import SECRET
from mindformers_ckpt.job.misspelt import meant_key

# Jobs on one host are given neighbouring scheduler ports (8118, 8119 ...) or round distances between them:
# neither should lead to another job's port. With it, usual ports stay below the ephemeral ones (32768 up).
PORT_OFFSET = 1013
MIN_SECRET = 16  # characters: who listens on the address in our place sees proofs, and could try all short secrets


_PREFIX = "MINDFORMERS_CKPT_"
_NAMES = ("allow_missing", "job_id", "master", "node", "secret", "timeout")  # what stands behind it, in small letters


def misspelt_names(env: Mapping[str, str]) -> list[str]:
    """A line for each variable that is nearly one of ours, and would not reach us."""
    found = []
    for name in env:
        own = name[len(_PREFIX) :].lower()
        if name.startswith(_PREFIX) and own not in _NAMES and (meant := meant_key(own, _NAMES)) is not None:
            found.append(f"{name}: did you mean {_PREFIX}{meant.upper()}?")
    return found


def node_name(env: Mapping[str, str]) -> str:
    """A name that the ranks of one node share: host name and a hash of it with the kernel's boot id.

    MINDFORMERS_CKPT_NODE takes the place of both.
    """
    name = env.get("MINDFORMERS_CKPT_NODE", "")
    identity = name
    if not name:
        name = socket.gethostname()
        identity = f"{name} {boot_id()}"
    return f"{name[:64]}:{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def rank_and_size(env: Mapping[str, str]) -> tuple[int, int]:
    """This process's rank and the number of ranks, (0, 1) outside of a job.

    msrun sets MS_NODE_ID (the rank, in spite of its name) unless it runs on several nodes without
    --node_rank; RANK_ID is then 0 for all workers of the first node, inherited from the scheduler. With a
    rank table MindSpore renumbers RANK_ID in `init()`, so there it is the one that counts.
    """
    if env.get("MS_ROLE") == "MS_SCHED":
        raise ConfigError(
            "this process is MindSpore's scheduler (MS_ROLE=MS_SCHED), no rank: call "
            "mindspore.communication.init() before the weights are loaded, it does not return there"
        )
    size = _integer(env, "MS_WORKER_NUM") or _integer(env, "RANK_SIZE") or 1
    if size == 1 or env.get("MS_SIMULATION_LEVEL"):  # a dry run plays one rank of many, alone
        return 0, 1
    name = "MS_NODE_ID" if env.get("MS_ROLE") and not env.get("RANK_TABLE_FILE") else "RANK_ID"
    rank = _integer(env, name)
    if rank is None:
        raise ConfigError(f"{name} is not set in a job of {size} ranks: give msrun --node_rank on each node")
    if rank >= size:
        raise ConfigError(f"{name}={rank} is not a rank of a job of {size} ranks (MS_WORKER_NUM or RANK_SIZE)")
    return rank, size


def _integer(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "")
    if text and not text.isdecimal():
        raise ConfigError(f"{name}={text!r} is not a whole number")
    return int(text) if text else None


def secret_of(env: Mapping[str, str]) -> str:
    """The secret that is set, "" for none. Raises ConfigError for one that could be guessed."""
    secret = env.get(SECRET, "")
    if secret and len(secret) < MIN_SECRET:
        raise ConfigError(
            f"{SECRET} has {len(secret)} characters, at least {MIN_SECRET} were expected; `openssl rand -hex 32` "
            "makes a good one"
        )
    return secret


def is_loopback(host: str) -> bool:
    """Whether an address leads to this machine alone."""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def meeting_address(env: Mapping[str, str]) -> Address:
    """Where the ranks meet: MINDFORMERS_CKPT_MASTER, or beside MindSpore's scheduler."""
    master = env.get("MINDFORMERS_CKPT_MASTER", "")
    if master:
        source = f"MINDFORMERS_CKPT_MASTER={master}"
        host, _, digits = master.rpartition(":")
        host, port = host.strip("[]"), int(digits) if digits.isdecimal() else 0
    else:
        host, port = env.get("MS_SCHED_HOST", ""), _integer(env, "MS_SCHED_PORT") or 0
        source = f"MS_SCHED_HOST={host} and MS_SCHED_PORT={port or ''}"
        port = port and port + (PORT_OFFSET if port + PORT_OFFSET < 1 << 16 else -PORT_OFFSET)
    if host in ("", "0.0.0.0", "::") or not 0 < port < 1 << 16:
        raise ConfigError(f"{source}: no address where the ranks can meet; {ADVICE}")
    return Address(host, port)
