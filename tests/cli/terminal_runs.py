"""Runs commands on a pseudo-terminal of a width, one after the other in forks, and prints what each showed as JSON.

python terminal_runs.py WIDTH FOLDER < commands.json
"""

from __future__ import annotations

import fcntl
import functools
import gc
import json
import os
import pty
import re
import struct
import sys
import termios

import click
import forks
import numpy as np  # noqa: F401 - what is imported here is there in all forks
import rich.progress  # noqa: F401

from mindformers_ckpt.cli.main import _COMMANDS, cli, main
from mindformers_ckpt.look import diff, verify, verify_against  # noqa: F401
from mindformers_ckpt.strategy.schema import strategy_map_class

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run(arguments: list[str], width: int) -> tuple[int, str]:
    """The exit code, and the lines without colours as they stand in the end."""
    process, terminal = pty.fork()
    if not process:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
        forks.run(functools.partial(main, arguments))
    data = b""
    while True:
        try:
            more = os.read(terminal, 1 << 16)
        except OSError:  # how Linux tells that the other side is closed
            break
        if not more:
            break
        data += more
    os.close(terminal)
    status = os.waitpid(process, 0)[1]
    lines = _ESCAPE.sub("", data.decode()).replace("\r\n", "\n").split("\n")
    return os.waitstatus_to_exitcode(status), "\n".join(line.rpartition("\r")[2] for line in lines)


if __name__ == "__main__":
    os.environ.update(TERM="xterm-256color")
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        os.environ.pop(name, None)
    os.chdir(sys.argv[2])
    strategy_map_class()
    for name in _COMMANDS:
        cli.get_command(click.Context(cli), name)
    gc.freeze()
    print(json.dumps([run(arguments, int(sys.argv[1])) for arguments in json.load(sys.stdin)]))
