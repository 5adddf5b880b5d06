"""What the commands that make a result have in common: how they are run, and what they say in the end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click

from mindformers_ckpt.api.transform import verify_crcs
from mindformers_ckpt.cli.notices import amount, say, say_fingerprints, warn
from mindformers_ckpt.cli.options import (
    CACHE,
    CRC_CHECK,
    DRY_RUN,
    FINGERPRINT,
    FSYNC,
    HASH,
    OVERWRITE,
    OVERWRITE_ANYTHING,
    RESUME,
    SIGN,
    json_option,
)
from mindformers_ckpt.cli.progress import show_progress
from mindformers_ckpt.execution.options import Options, Report, affordable_processes
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.strategy.iterations import is_save_path
from mindformers_ckpt.words import counted

_QUIET = click.option("--quiet", is_flag=True, help="Print errors only.")
_OPTIONS = (
    *(OVERWRITE, OVERWRITE_ANYTHING, HASH, FSYNC, CRC_CHECK, FINGERPRINT, SIGN),
    *(RESUME, CACHE, DRY_RUN, json_option, _QUIET),
)


class How(NamedTuple):
    """How a result is to be made, by the options of `making_options`."""

    overwrite: bool
    overwrite_anything: bool
    hashes: bool
    fsync: bool
    crc_check: bool
    fingerprints: bool
    sign: Path | None
    resume: bool
    drop_cache: bool
    dry_run: bool
    as_json: bool
    quiet: bool

    def options(self, processes: int, **more: Any) -> Options:
        """The same for a run, with as many of the wanted processes as there is memory for."""
        affordable = affordable_processes(processes)
        if affordable < processes:
            warn([f"the free memory is enough for {affordable} of {processes} processes; the run uses {affordable}"])
        return Options(
            processes=affordable,
            hashes=self.hashes,
            fsync=self.fsync,
            crc=self.crc_check,
            fingerprints=self.fingerprints,
            sign=self.sign,
            overwrite=self.overwrite,
            overwrite_anything=self.overwrite_anything,
            resume=self.resume,
            may_fork=True,
            drop_cache=self.drop_cache,
            **more,
        )

    def check_source(self, plan: Plan) -> list[str]:
        """Verify the CRC-32 of the source files of a plan, if that is asked for; returns what the user should know."""
        if not self.crc_check:
            return []
        with show_progress("verify CRC", quiet=self.quiet) as progress:
            return verify_crcs(plan, progress)


def making_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of every command that makes a result; the command gets them as `how`."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        how = How(**{name: given.pop(name) for name in How._fields})
        command(how=how, **given)

    made: Callable[..., None] = run
    for option in reversed(_OPTIONS):
        made = option(made)
    return made


def is_checkpoint2(plan: Plan) -> bool:
    """Whether a plan makes a checkpoint 2.0, by the names of its files."""
    return is_save_path({target.path.partition("/")[0] for target in plan.targets})


def next_with_checkpoint2(destination: Path) -> str:
    """The keys of a yaml of MindFormers under which a checkpoint 2.0 is loaded."""
    return f"next, in the yaml of MindFormers: load_checkpoint: {destination}, use_legacy_format: False"


def say_made(report: Report) -> None:
    """Print what a run wrote, and its fingerprints."""
    files = f"{counted(report.files, 'file')}, {amount(report.bytes_written)}"
    if report.resumed_bytes == report.bytes_written:
        say(f"nothing to do: {report.destination} has {files} of this run already")
    else:
        resumed = f" ({amount(report.resumed_bytes)} of it before)" if report.resumed_bytes else ""
        say(f"{files} written to {report.destination} in {report.seconds:.2f} s{resumed}")
    say_fingerprints(report.fingerprints, report.source_fingerprint, report.signature)
