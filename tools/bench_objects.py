"""Rows of tools/bench_storage.py for object storage (`--s3`)."""

from __future__ import annotations

import http.client
import itertools
import os
import resource
import shutil
import subprocess
import threading
import time
from pathlib import Path

import click
from bench_transform import ours, strategy_argument
from object_server import BUCKET, Server, serving

from mindformers_ckpt.objects.path import as_path

_REQUEST = 4 << 20
_WAYS = ("raw, 32 connections", "s3 -> disk", "disk -> s3", "s3 -> s3")


def read_raw(server: Server, keys: dict[str, int], connections: int) -> None:
    """Read objects by ranges of 4 MiB over some connections, and drop what is read."""
    host = server.endpoint.rpartition("/")[2]
    jobs = iter([(key, start, size) for key, size in keys.items() for start in range(0, size, _REQUEST)])
    lock = threading.Lock()

    def read() -> None:
        connection, buffer = http.client.HTTPConnection(host), bytearray(1 << 20)
        while True:
            with lock:
                job = next(jobs, None)
            if job is None:
                connection.close()
                return
            key, start, size = job
            span = f"bytes={start}-{min(start + _REQUEST, size) - 1}"
            connection.request("GET", f"/{BUCKET}/{key}", headers={"Range": span})
            answer = connection.getresponse()
            while answer.readinto(buffer):
                pass

    threads = [threading.Thread(target=read) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def processor_seconds() -> float:
    """What this process and those that it has waited for have taken of the processor."""
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


def report_s3(folder: Path, result: Path, *, delay_ms: float, link: float, repeats: int) -> None:
    """Measure an object storage behind a delay, and print its rows. `folder` holds data/source and data/strategy."""
    objects = folder / "s3" / "objects"
    shutil.rmtree(objects, ignore_errors=True)
    objects.mkdir(parents=True)
    shutil.copytree(folder / "data" / "source", objects / "source", copy_function=os.link)
    keys = {str(path.relative_to(objects)): path.stat().st_size for path in objects.rglob("*.ckpt")}
    size = sum(keys.values())
    src, dst = (strategy_argument(folder / "data" / "strategy", name) for name in ("mp4", "mp8"))
    header = "way                    seconds   MB/s  of the link  CPU s   gets   puts  lists  others  in flight"
    click.echo(f"S3, {delay_ms:g} ms before each answer, {link / 1e6:g} MB/s in each direction")
    click.echo(f"{header}\n{'-' * len(header)}")
    best: dict[str, tuple[float, float, dict[str, int]]] = {}
    with serving(folder / "s3", delay_ms=delay_ms, link=link) as server:
        for _, way in itertools.product(range(repeats), _WAYS):
            shutil.rmtree(result, ignore_errors=True)
            shutil.rmtree(objects / "target", ignore_errors=True)
            server.counters()
            started, worked = time.perf_counter(), processor_seconds()
            if way.startswith("raw"):
                read_raw(server, keys, 32)
            else:
                source = as_path(f"s3://{BUCKET}/source") if way.startswith("s3") else folder / "data" / "source"
                target = as_path(f"s3://{BUCKET}/target") if way.endswith("s3") else result
                subprocess.run(ours(source, src, target, dst), check=True, env=server.environment)
            seconds = time.perf_counter() - started
            if way not in best or seconds < best[way][0]:
                best[way] = seconds, processor_seconds() - worked, server.counters()
    for way, (seconds, worked, asked) in best.items():
        numbers = [asked.get(name, 0) for name in ("gets", "puts", "lists", "others", "most_in_flight")]
        click.echo(
            f"{way:<21} {seconds:8.2f} {size / seconds / 1e6:6.0f} {size / seconds / link:12.2f} {worked:6.1f} "
            "{:6d} {:6d} {:6d} {:7d} {:10d}".format(*numbers)
        )
    shutil.rmtree(result, ignore_errors=True)
