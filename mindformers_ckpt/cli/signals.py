"""Ctrl-C, and what schedulers and terminals send: one line, and an exit code of its own, at any moment."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_received: list[int] = []
_at_work: list[bool] = []  # not empty while a command runs


def quiet_start() -> None:
    """While modules are imported an interrupt ends the program without a traceback; nothing has been begun."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def handle() -> None:
    """From now on the first signal raises KeyboardInterrupt in a command's work, so that it is left in order.

    A second one ends the program at once, and so does one outside of `work`, where nothing has been begun.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    _received.clear()
    _at_work.clear()
    for number in HANDLED:
        # What a parent has had ignored stays so: nohup, or a shell's job in the background.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


@contextlib.contextmanager
def work() -> Iterator[None]:
    """While a command runs. Whoever enters this turns KeyboardInterrupt into the end of the program."""
    _at_work.append(True)
    try:
        yield
    finally:
        _at_work.pop()


def exit_code() -> int:
    """What a program that was stopped exits with: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (_received[0] if _received else signal.SIGINT)


def _stop(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    if len(_received) == 1 and _at_work and not _is_importing(frame):
        raise KeyboardInterrupt
    # Workers end with this process; what is finished is in the journal.
    with contextlib.suppress(OSError):
        os.write(2, b"error: interrupted\n")
    os._exit(exit_code())


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: numpy makes an ImportError of an interrupt there."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def is_program() -> bool:
    """Whether this process is the command line, and not a program that imports it."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    folder = os.path.basename(os.path.dirname(sys.argv[0])) if sys.argv else ""
    return name == "mindformers-ckpt" or (name == "__main__.py" and folder == "mindformers_ckpt")
