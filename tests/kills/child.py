"""Runs something in a forked child under the shim, which counts its operations on files and does something at one.

This process has to have been started with LD_PRELOAD=shim.so.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.cli import signals
from mindformers_ckpt.errors import CheckpointError

SOURCE = Path(__file__).with_name("shim.c")
CRASHED = 70  # exit code of an exception that nobody expects


class Lacks(IntFlag):
    """What a file system cannot do. READS_TOO is not one of these: reading calls are counted, too."""

    NOTHING = 0
    EXCHANGE = 1
    LOCKS = 2
    LINKS = 4
    ROOM_AHEAD = 8
    READS_TOO = 16


class Act(IntEnum):
    """What happens at an operation."""

    NOTHING = 0
    KILL = 1
    FAIL = 2
    SIGNAL = 3


class Event(NamedTuple):
    """What happens at the operations `first` to `last`; of signals at these two. `value` is the error or the signal."""

    act: Act = Act.NOTHING
    first: int = 0
    last: int = 0
    value: int = 0


NO_EVENT = Event()


class Ended(NamedTuple):
    """How a child ended: its exit code (negative for a signal), its operations, and what it said."""

    code: int
    operations: int
    said: str


def build(folder: Path) -> Path:
    """Compile the shim."""
    shim = folder / "shim.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(shim), "-ldl"], check=True)
    return shim


class Child:
    """A forked process that runs an action, with the files below a folder watched."""

    def __init__(
        self,
        action: Callable[[], object],
        watched: Path,
        lacks: Lacks = Lacks.NOTHING,
        event: Event = NO_EVENT,
    ) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `wait`; without a name, so that it is not below the folder
        self._counted, theirs = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.HANDLED)
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._counted)
            _be_child(action, self._said.fileno(), watched, lacks, event, theirs)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.HANDLED)
        os.close(theirs)

    def wait(self, seconds: float = 60.0) -> Ended:
        """Wait for its end. One that does not come in time is killed, and TimeoutError raised."""
        with self._said, open(self._counted, "rb") as stream:
            ready, _, _ = select.select([stream], [], [], seconds)
            if not ready:
                self.kill()
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"it does not end within {seconds:g} s")
            counted = stream.read()
            _, status = os.waitpid(self.pid, 0)
            self._said.seek(0)
            said = self._said.read().decode(errors="replace")
        return Ended(os.waitstatus_to_exitcode(status), int(counted or 0), said)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; it may have ended already."""
        os.kill(self.pid, number)  # a zombie until `wait`


def _be_child(action: Callable[[], object], said: int, watched: Path, lacks: Lacks, event: Event, counted: int) -> None:
    shim = ctypes.CDLL(None)
    os.dup2(said, 1)
    os.dup2(said, 2)
    code = CRASHED
    signals.handle()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.HANDLED)
        shim.shim_arm(os.fsencode(watched), int(lacks), int(event.act), event.value, event.first, event.last)
        result = action()
        code = result if isinstance(result, int) else 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            os.write(2, stop.code.encode(errors="replace"))
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except CheckpointError as error:
        os.write(2, f"error: {error}".encode(errors="replace"))
        code = 1
    except KeyboardInterrupt:  # before the command could say it
        code = signals.exit_code()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error!r}".encode(errors="replace"))
    finally:
        operations = shim.shim_count()
        shim.shim_arm(b"", 0, 0, 0, 0, 0)
        os.write(counted, str(operations).encode())
        os._exit(code)


def run(
    action: Callable[[], object],
    watched: Path,
    lacks: Lacks = Lacks.NOTHING,
    event: Event = NO_EVENT,
    *,
    seconds: float = 60.0,
    after: tuple[float, tuple[int, ...]] | None = None,
) -> Ended:
    """Run an action in a child. `after`: seconds, and the signals that it then gets, some milliseconds apart.

    Raises TimeoutError when it does not end in time.
    """
    child = Child(action, watched, lacks, event)
    if after is not None:
        delay, numbers = after
        for number in numbers:
            time.sleep(delay)
            child.kill(number)
            delay = min(delay, 0.005)
    return child.wait(seconds)
