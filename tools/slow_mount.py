"""A file system of this machine that behaves like one behind a network: `slowfs.c`, compiled and mounted.

    with mounted(folder, mountpoint, scratch=temporary, latency_ms=30) as mount:
        ...                          # work on mountpoint
        mount.counters()             # opens, stats, listings, reads, read_bytes, writes, most_in_flight …

For benchmarks, and for tests of what such file systems lack: no exchange of names, no fallocate, delayed attributes,
no locks. Two mounts of one folder are what two nodes see of it.
Needs a C compiler, libfuse3-dev, fuse3 and /dev/fuse; `why_not` says what is not there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_SOURCE = Path(__file__).with_name("slowfs.c")
CONTROL = ".slowfs"
STATS = "slowfs.json"
# What NFS and most others send in one request; a FUSE file system starts with 128 KiB.
_READ_AHEAD_KB = 1024
_SECONDS = 10.0


def why_not() -> str | None:
    """What keeps this machine from mounting a slow file system, None when nothing does."""
    for program in ("gcc", "pkg-config", "fusermount3"):
        if shutil.which(program) is None:
            return f"{program} is not there; install gcc, pkg-config, libfuse3-dev and fuse3"
    if subprocess.run(["pkg-config", "--exists", "fuse3"], check=False).returncode:
        return "the headers of FUSE are not there; install libfuse3-dev"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse cannot be opened; in a container, give it --device /dev/fuse --cap-add SYS_ADMIN"
    return None


class Mount:
    """A mounted slow file system."""

    def __init__(self, mountpoint: Path, stats: Path, process: int) -> None:
        self.mountpoint = mountpoint
        self._stats = stats
        self._process = psutil.Process(process)

    def cpu_seconds(self) -> float:
        """What the file system itself took of the processor."""
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def counters(self, *, reset: bool = False) -> dict[str, int]:
        """What was asked of the file system since it was mounted, or since a `reset`."""
        (self.mountpoint / CONTROL).write_text("reset" if reset else "dump", encoding="ascii")
        found: dict[str, int] = json.loads(self._stats.read_text(encoding="ascii"))
        return found


@contextmanager
def mounted(
    source: Path,
    mountpoint: Path,
    *,
    scratch: Path,
    latency_ms: float = 0,
    bytes_per_s: float = 0,
    exchange: bool = False,
    locks: bool = True,
    attribute_seconds: float = 3,
) -> Iterator[Mount]:
    """Show the folder `source` at `mountpoint`, each request `latency_ms` late; unmounted at the end.

    `scratch` is a folder for the program and its counters. Raises RuntimeError where nothing can be mounted.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"no slow file system can be mounted here: {reason}")
    program, stats = _compiled(scratch), scratch / STATS
    mountpoint.mkdir(parents=True, exist_ok=True)
    delay = round(latency_ms * 1000)
    options = {
        "latency_us": delay,
        "meta_us": delay,
        "bytes_per_s": bytes_per_s,
        "exchange": int(exchange),
        "locks": int(locks),
        "attr_s": attribute_seconds,
    }
    words = ",".join(f"{name}={value}" for name, value in options.items())
    environment = {**os.environ, "SLOWFS_STATS": str(stats)}
    process = subprocess.Popen([str(program), str(source), str(mountpoint), "-o", words], env=environment)
    try:
        _wait_for(mountpoint, process)
        yield Mount(mountpoint, stats, process.pid)
    finally:
        subprocess.run(["fusermount3", "-u", "-z", str(mountpoint)], check=False, stderr=subprocess.DEVNULL)
        try:
            process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _compiled(scratch: Path) -> Path:
    program = scratch / "slowfs"
    if not program.exists():
        scratch.mkdir(parents=True, exist_ok=True)
        asked = ["pkg-config", "--cflags", "--libs", "fuse3"]
        flags = subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        command = ["gcc", "-O2", "-D_FILE_OFFSET_BITS=64", str(_SOURCE), "-o", str(program), *flags, "-lpthread"]
        subprocess.run(command, check=True)
    return program


def _wait_for(mountpoint: Path, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _SECONDS
    while not os.path.ismount(mountpoint):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"{mountpoint}: nothing could be mounted (exit code {process.poll()})")
        time.sleep(0.01)
    device = os.stat(mountpoint).st_dev
    with suppress(OSError):  # only root may
        setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        setting.write_text(str(_READ_AHEAD_KB), encoding="ascii")
