"""Programs that start as forks of a process that has imported what they need: in milliseconds instead of a second.

A program is a module with `main() -> int`, which reads sys.argv. It runs as if Python had been started with it, in its
own environment and folder and with its own pipes, in a session of its own; only the imports are done. That a program
starts by itself, too, is for one test of each to see.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, NoReturn

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
_LONGEST = 1 << 17  # bytes of a request


class Fork:
    """A program that was started, with those parts of subprocess.Popen that tests use.

    What it prints fits in a pipe: that is read when it has ended.
    """

    def __init__(self, requests: socket.socket, words: Sequence[str], environment: Mapping[str, str], folder: Path):
        self.words = list(words)
        self.returncode: int | None = None
        self._printed: tuple[str, str] | None = None
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed with what it said
        self._keeper, told = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        (asked, stdin), (stdout, answered) = os.pipe(), os.pipe()
        self.stdin, self.stdout = os.fdopen(stdin, "w", encoding="utf-8"), os.fdopen(stdout, encoding="utf-8")
        request = json.dumps([self.words, dict(environment), str(folder)]).encode()
        assert len(request) < _LONGEST
        socket.send_fds(requests, [request], [asked, answered, self._log.fileno(), told.fileno()])
        for descriptor in (asked, answered):
            os.close(descriptor)
        told.close()
        self.pid = self._hear()

    def _hear(self) -> int:
        said = self._keeper.recv(20)
        if not said:
            raise EOFError("the template has ended")
        return int(said)

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._keeper.settimeout(timeout)
            try:
                self.returncode = self._hear()
            except (socket.timeout, BlockingIOError) as error:
                raise subprocess.TimeoutExpired(self.words, timeout or 0) from error
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it said on stdout and on stderr."""
        if self._printed is None:
            self.stdin.close()
            self.wait(timeout)
            output = self.stdout.read()
            self._log.seek(0)
            self._printed = output, self._log.read()
            for stream in (self.stdout, self._log, self._keeper):
                stream.close()
        return self._printed

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Template:
    """The process that has imported a program's module, and what that imports when it runs."""

    def __init__(self, program: str, imports: Sequence[str], folder: Path, warnings: str) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own = {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
            "PYTHONWARNINGS": warnings,
            "OPENBLAS_NUM_THREADS": "1",  # threads do not live on in forks
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), program, *imports],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **own},
                stdin=subprocess.PIPE,  # streams of the kind that the programs have
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )

    def start(self, words: Sequence[str], environment: Mapping[str, str], folder: Path) -> Fork:
        try:
            return Fork(self._requests, words, environment, folder)
        except (OSError, EOFError) as error:
            _, said = self._process.communicate(timeout=10)
            raise RuntimeError(f"the template of {words[0]} has ended:\n{said.decode()}") from error

    def close(self) -> None:
        self._requests.close()
        self._process.communicate()


@functools.cache
def template(program: str, *imports: str, folder: Path = TESTS, warnings: str = "") -> Template:
    """One of a program for all tests; it ends with them. `folder`: where the program's module is."""
    made = Template(program, imports, folder, warnings)
    atexit.register(made.close)
    return made


# ------------------------------------------------------------------------------------------ in the template

_running: dict[int, int] = {}  # process -> the descriptor by which its end is told
_ENDS = {signal.SIGCHLD}


def serve(requests: socket.socket, program: Callable[[], int]) -> None:
    """Fork for each request, until there are no more."""
    signal.signal(signal.SIGCHLD, tell_ends)
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, _LONGEST, 4)
        if not request:
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)  # until this process has noted its child
        process = os.fork()
        if not process:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)
            requests.close()
            become(request, descriptors)
            run(program)
        *streams, told = descriptors
        _running[process] = told
        os.write(told, str(process).encode())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)
        for descriptor in streams:
            os.close(descriptor)


def become(request: bytes, descriptors: Sequence[int]) -> None:
    """Take on words, environment, folder and streams of a program."""
    os.setsid()
    for number, descriptor in enumerate(descriptors[:-1]):
        os.dup2(descriptor, number)
    for descriptor in (*descriptors, *_running.values()):
        os.close(descriptor)
    sys.argv, environment, folder = json.loads(request)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)


def run(program: Callable[[], int]) -> NoReturn:
    """Run a program to its end, as Python does, but for taking apart what was imported: that takes longer than most."""
    try:
        ended: Any = program()
    except SystemExit as error:
        ended = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        ended = 1
    if isinstance(ended, str):
        print(ended, file=sys.stderr)
        ended = 1
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended or 0)


def tell_ends(*arguments: object) -> None:
    """Tell the exit codes of programs that have ended."""
    while _running:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # this interrupts itself, which has the last one already and notes it next
            return
        if not process:
            return
        told = _running.pop(process)
        with contextlib.suppress(OSError):  # the test has not waited for it
            os.write(told, str(os.waitstatus_to_exitcode(status)).encode())
        os.close(told)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        main, *_ = (importlib.import_module(name) for name in sys.argv[2:])
        gc.freeze()  # no fork looks through what is there
        serve(requests, main.main)
