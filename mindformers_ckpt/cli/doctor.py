"""`mindformers-ckpt doctor`: this machine, its libraries and a file system, to read and to paste into an issue."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import click

from mindformers_ckpt.cli.notices import say, say_json
from mindformers_ckpt.cli.options import LocalPath, json_option
from mindformers_ckpt.errors import CheckpointError, ConfigError
from mindformers_ckpt.look import doctor
from mindformers_ckpt.look.doctor import Finding
from mindformers_ckpt.words import counted


@click.command("doctor")
@click.argument("path", type=LocalPath(), default=".")
@json_option
def command(path: Path, as_json: bool) -> None:
    """Say what this machine and the file system of PATH are like, and what is known to go wrong with them.

    PATH is a folder for results, or a checkpoint: then up to 256 MB of it are read, and as much is written beside it
    and removed, to tell what a run over all of it would take. Nothing is sent anywhere; the text can be pasted into
    an issue as it is.
    """
    sections: dict[str, list[Finding]] = {
        "versions": [*doctor.versions(), *doctor.traps()],
        "machine": [*doctor.machine(), *_meeting(os.environ)],
    }
    folder = doctor.existing(path)
    sections["storage"] = [*doctor.file_system(folder), *doctor.stray(folder)]
    sections["checkpoint"] = list(_checkpoint(path, folder))
    if as_json:
        say_json({title: [finding._asdict() for finding in found] for title, found in sections.items()})
        return
    for title, found in sections.items():
        if found:
            say(f"{title}")
        for finding in found:
            mark = f"{finding.mark}: " if finding.mark else ""
            say(f"  {finding.about + ':':<18} {mark}{finding.text}")
    count = sum(finding.mark == "warning" for found in sections.values() for finding in found)
    say(counted(count, "warning") if count else "no warnings")


def _meeting(environment: Mapping[str, str]) -> Iterator[Finding]:
    """The address where the ranks of a job would meet, if this environment names one."""
    from mindformers_ckpt.job.cluster.environment import meeting_address

    if not any(environment.get(name) for name in ("MINDFORMERS_CKPT_MASTER", "MS_SCHED_HOST")):
        yield Finding("meeting", "no address in the environment (MS_SCHED_HOST, MS_SCHED_PORT): not in a job of ranks")
        return
    try:
        address = meeting_address(environment)
    except ConfigError as error:
        yield Finding("meeting", str(error), "warning")
        return
    yield from doctor.meeting(address.host, address.port)


def _checkpoint(path: Path, folder: Path) -> Iterator[Finding]:
    from mindformers_ckpt.sources.find import find_source

    if not path.exists():
        yield Finding("checkpoint", f"{path} is not there; what is said of the storage is of {folder}")
        return
    try:
        source = find_source(path)
    except CheckpointError as error:
        if path != Path():
            yield Finding("checkpoint", f"none that can be read: {str(error).splitlines()[0]}")
        return
    yield from doctor.checkpoint(source.files, folder if path.is_file() else folder.parent)
