"""Re-slicing as a call: `plan` and `transform`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from mindformers_ckpt.api.checked import check_arguments, options_of
from mindformers_ckpt.api.request import Request
from mindformers_ckpt.errors import ConfigError, FormatError, describe_problems
from mindformers_ckpt.execution.options import Options, Report
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.objects.path import PathLike, as_path, path_or_none
from mindformers_ckpt.planning.file import Job
from mindformers_ckpt.planning.model import DEFAULT_PREFIX, Plan
from mindformers_ckpt.progress import Progress
from mindformers_ckpt.strategy.given import StrategyLike
from mindformers_ckpt.transform import transform as run
from mindformers_ckpt.words import shortened


def plan(
    src: PathLike,
    dst: PathLike | None = None,
    *,
    src_strategy: StrategyLike = None,
    dst_strategy: StrategyLike = None,
    step: str | None = None,
    ranks: Sequence[int] | None = None,
    prefix: str = DEFAULT_PREFIX,
    format: str | None = None,
    allow_missing: bool | Sequence[str] = False,
    weights_only: bool = False,
    contents: str = "error",
    like: PathLike | None = None,
) -> Job:
    """Plan a re-slicing, and write nothing: read headers and strategies, and find all that does not fit.

    Args:
        src: a file of complete weights, a folder of such files, or the folder of `rank_<n>` folders.
        dst: folder for the result, where it is known already.
        src_strategy, dst_strategy: a strategy file, merged file or folder, or a `Strategy`; None for complete weights.
        step: of several files, the epoch and step to read, like "3_150", or a file's name.
        ranks: make these target ranks only.
        prefix: target files are `rank_<n>/<prefix><n>.<format>`.
        format: "ckpt", "safetensors" or "checkpoint2"; None for that of the source (ckpt for a mixture).
        allow_missing: parameters that the source may lack: names and patterns, or True for all.
        weights_only: leave optimizer states and counters aside.
        contents: what is done when samples of the source contradict its strategy: "error", "warn" or "off".
        like: refuse a source with other full shapes than this checkpoint, or this Hugging Face config.json.

    The result is what `transform` takes as its source. `job.plan` has files, tensors, boxes, `bytes_read`,
    `bytes_written`, and `warnings` about choices that were made. Raises CheckpointError that lists all that is wrong.
    """
    check_arguments(src=src, dst=dst, step=step, prefix=prefix, format=format, contents=contents, like=like)
    request = Request(
        as_path(src),
        src_strategy,
        path_or_none(dst),
        step,
        dst_strategy,
        prefix,
        format,
        None if ranks is None else tuple(ranks),
        allow_missing=allow_missing,
        weights_only=weights_only,
        contents=contents,
        like=path_or_none(like),
    )
    return request.prepare().job


def transform(
    src: PathLike | Job,
    dst: PathLike | None = None,
    *,
    src_strategy: StrategyLike = None,
    dst_strategy: StrategyLike = None,
    step: str | None = None,
    ranks: Sequence[int] | None = None,
    prefix: str = DEFAULT_PREFIX,
    format: str | None = None,
    allow_missing: bool | Sequence[str] = False,
    weights_only: bool = False,
    contents: str = "error",
    like: PathLike | None = None,
    processes: int = 1,
    by_rank: bool = False,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    resume: bool = False,
    hashes: bool = False,
    fingerprints: bool = False,
    sign: PathLike | None = None,
    fsync: bool = False,
    crc: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Re-slice a checkpoint for another parallel strategy; `dst` appears when the result is complete.

    `src` is a path, with the arguments of `plan`, or what `plan` returned, which has decided them.

    Args:
        processes: processes that copy. Fewer are used where the free memory is short; the result is the same.
        by_rank: make one target rank the unit of work, instead of equal shares of bytes.
        overwrite: replace an earlier result at `dst`; `overwrite_anything`: whatever is there.
        resume: go on after what an interrupted call has done.
        hashes: take xxh3-128 of every written tensor into the manifest.
        fingerprints: count the fingerprint of the result while it is made, into the manifest and the report.
        sign: file of a private key (PEM) to sign the fingerprint with, which is counted then.
        fsync: force the result to the disk before it gets its name.
        crc: verify the CRC-32 that source .ckpt files store, and append one to target files.
        progress: is told the bytes written and the bytes in all, after every piece of work.

    Raises CheckpointError; then `dst` is as it was.
    """
    check_arguments(dst=dst, processes=processes, sign=sign)
    asked: dict[str, Any] = {
        "src_strategy": src_strategy,
        "dst_strategy": dst_strategy,
        "step": step,
        "ranks": ranks,
        "prefix": prefix,
        "format": format,
        "allow_missing": allow_missing,
        "weights_only": weights_only,
        "contents": contents,
        "like": like,
    }
    if not isinstance(src, Job):
        job = plan(src, dst, **asked)
    elif any(value != signature(plan).parameters[name].default for name, value in asked.items()):
        raise ConfigError("the plan decides source, strategies, files and ranks; give them to mc.plan")
    else:
        job = src
    options = options_of(
        processes,
        sign,
        by_rank=by_rank,
        hashes=hashes,
        fingerprints=fingerprints,
        fsync=fsync,
        crc=crc,
        overwrite=overwrite,
        overwrite_anything=overwrite_anything,
        resume=resume,
    )
    notes = verify_crcs(job.plan) if crc else []
    report = run_job(job, path_or_none(dst), options, progress)
    return replace(report, warnings=(*notes, *report.warnings))


def run_job(job: Job, destination: Path | None, options: Options, progress: Progress | None) -> Report:
    """Run what was planned. Raises ConfigError when nobody has said where the result is to be."""
    folder = destination or job.destination
    if folder is None:
        raise ConfigError("no folder is given for the result: give dst")
    options = replace(options, partial=job.partial)
    report = run(job.plan, folder, options, about=job.about, progress=progress, companions=job.companions)
    return replace(report, warnings=job.plan.warnings)


def verify_crcs(plan: Plan, progress: Progress | None = None) -> list[str]:
    """Compare the CRC-32 of source files with their bytes; returns what the user should know.

    Raises FormatError that lists all damaged files.
    """
    from mindformers_ckpt.formats.ckpt_crc import verify_crc

    headers = [read_header(file.path) for file in plan.sources if file.path.suffix == ".ckpt"]
    stored = [header for header in headers if header.crc is not None]
    problems = []
    total, done = sum(header.size for header in stored), 0
    for header in stored:
        try:
            verify_crc(header)
        except FormatError as error:
            problems.append(str(error))
        done += header.size
        if progress is not None:
            progress(done, total)
    if problems:
        raise FormatError(problems[0] if len(problems) == 1 else describe_problems("damaged files", problems))
    without = [str(header.path) for header in headers if header.crc is None]
    if not without:
        return []
    return [f"{len(without)} of {len(headers)} .ckpt files store no CRC-32 to verify: {shortened(without, 3)}"]
