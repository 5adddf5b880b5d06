"""A conversion from the command line's words to the published result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.convert.output import copy_companions, write_index, write_name_map
from mindformers_ckpt.convert.prepare import Prepared, prepare
from mindformers_ckpt.convert.renaming import check_options, prepare_renaming
from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.targets import rank_files, whole_files
from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.execution.options import Options
from mindformers_ckpt.objects.path import absolute
from mindformers_ckpt.planning.model import DEFAULT_PREFIX, Plan
from mindformers_ckpt.progress import Progress
from mindformers_ckpt.sources.source import SUFFIXES, TORCH_SUFFIXES
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.targets.checkpoint2 import Made, as_checkpoint2
from mindformers_ckpt.transform import transform

SHARD_BYTES = 5 * 10**9
CHECKPOINT2 = "checkpoint2"
_PLAIN = Options()


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion made.

    Attributes:
        model, naming: the model, and the naming of its MindSpore side.
        destination: where the result is.
        files, tensors, bytes_written: how much of each.
        seconds: how long it took.
        warnings: what the user should know of choices that were made.
        fingerprints: digests of the checkpoints in the result, by their folders, where they were asked for.
        source_fingerprint: that of the source; "" where it was not asked for, or is not known from what was read.
        signature: what became of signatures: "made with …" or "left behind: …"; "" without any.
    """

    model: str
    naming: str
    destination: Path
    files: int
    tensors: int
    bytes_written: int
    seconds: float
    warnings: tuple[str, ...]
    fingerprints: Mapping[str, str]
    source_fingerprint: str
    signature: str


def convert(
    request: Request,
    output: Path,
    *,
    format: str | None = None,
    target: Strategy | None = None,
    prefix: str = DEFAULT_PREFIX,
    allow_missing: bool | Sequence[str] = False,
    options: Options = _PLAIN,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    check: Callable[[], None] = lambda: None,
    check_source: Callable[[Plan], Sequence[str]] = lambda plan: (),
) -> ConversionReport:
    """Convert weights and publish them at `output`.

    To MindSpore: one file, when `output` ends in .ckpt or .safetensors; a folder of files of at most
    `shard_bytes` otherwise; the rank folders of a strategy when `target` is one. To Hugging Face: always a
    folder, which `from_pretrained` loads. What was at `output` before stays as it is until the end.
    `check_source` is called with the plan before anything is written, and returns further warnings.
    """
    started = time.monotonic()
    files = _Files(format, target, prefix, allow_missing, shard_bytes)
    prepared, plan, companions, is_file = _planned(request, output, files)
    notes = check_source(plan)
    about = {"model": prepared.model.name, "naming": prepared.naming, "direction": prepared.direction}
    report = transform(
        plan,
        output,
        options,
        about=about if target is None else {**about, "target": target.describe()},
        progress=progress,
        check=check,
        companions=companions,
        file=is_file,
        shapes={item.spec.name: item.spec.shape for item in prepared.conversion.tensors},
        origins=prepared.origins,
    )
    return ConversionReport(
        prepared.model.name,
        prepared.naming,
        report.destination,
        report.files,
        len(prepared.conversion.tensors),
        report.bytes_written,
        time.monotonic() - started,
        (*plan.warnings, *notes),
        report.fingerprints,
        report.source_fingerprint,
        report.signature,
    )


def plan_conversion(
    request: Request,
    output: Path,
    *,
    format: str | None = None,
    target: Strategy | None = None,
    prefix: str = DEFAULT_PREFIX,
    allow_missing: bool | Sequence[str] = False,
) -> Plan:
    """What `convert` would do, with the same arguments. Nothing is written."""
    return _planned(request, output, _Files(format, target, prefix, allow_missing, SHARD_BYTES)).plan


class _Files(NamedTuple):
    """What the files of a result are to be; names are those of `convert`."""

    format: str | None
    target: Strategy | None
    prefix: str
    allow_missing: bool | Sequence[str]
    shard_bytes: int

    def of_ranks(self, prepared: Prepared, target: Strategy, format: str) -> Plan:
        return rank_files(
            prepared.conversion,
            target,
            prefix=self.prefix,
            format=format,
            origin=str(prepared.request.input_path),
            allow_missing=self.allow_missing,
        )


class _Planned(NamedTuple):
    """A conversion and its plan, what puts further files into the folder of the result, or whether that is a file."""

    prepared: Prepared
    plan: Plan
    companions: Callable[[Path], None]
    is_file: bool


def _planned(request: Request, output: Path, files: _Files) -> _Planned:
    format, target = files.format, files.target
    check_options(request)
    given = {"--prefix": files.prefix != DEFAULT_PREFIX, "--allow-missing": bool(files.allow_missing)}
    if target is None and format != CHECKPOINT2 and any(given.values()):
        names = " and ".join(name for name, is_given in given.items() if is_given)
        raise ConfigError(f"{names}: for the files of ranks, which --dst-strategy asks for; give it, or leave them out")
    if request.reverse and (target is not None or format not in (None, "safetensors")):
        raise ConfigError("a strategy and that format are of the MindSpore side; leave them out with --reversed")
    wanted = target.names() if target is not None else ()
    if request.to_naming is None:
        prepared = prepare(request, wanted)
    else:
        prepared = prepare_renaming(request, absolute(output), wanted)
    is_file = not request.reverse and target is None and output.suffix in SUFFIXES and format != CHECKPOINT2
    if not is_file and output.suffix in (*SUFFIXES, *TORCH_SUFFIXES):
        raise ConfigError(f"{output} has the name of a file, but the result is a folder; give the name of a folder")
    companions: Callable[[Path], None] = lambda folder: None  # noqa: E731
    if format == CHECKPOINT2:
        plan, companions = _checkpoint2(prepared, files)
    else:
        plan = _targets(prepared, output, files)
        if not is_file:
            companions = partial(_add_companions, prepared=prepared, plan=plan)
    plan.check()
    return _Planned(prepared, plan, companions, is_file)


def plan_ranks(
    request: Request,
    target: Strategy,
    *,
    format: str = "ckpt",
    allow_missing: bool | Sequence[str] = False,
) -> Plan:
    """The plan that makes the files of a strategy's ranks out of Hugging Face weights, in one pass.

    Raises what `prepare` raises, and PlanError where weights and strategy do not fit together.
    """
    prepared = prepare(request, target.names())
    origin = str(request.input_path)
    plan = rank_files(prepared.conversion, target, format=format, origin=origin, allow_missing=allow_missing)
    plan.check()
    return plan


def _targets(prepared: Prepared, output: Path, files: _Files) -> Plan:
    request, conversion, format = prepared.request, prepared.conversion, files.format
    # Jobs of networks with mcore names load nothing else.
    usual = "safetensors" if prepared.naming.startswith("mcore") else "ckpt"
    if files.target is not None:
        return files.of_ranks(prepared, files.target, format or usual)
    if request.reverse:
        pytorch = (("format", "pt"),)
        return whole_files(conversion, "model", "safetensors", limit=files.shard_bytes, metadata=pytorch)
    suffix = output.suffix.lstrip(".") if output.suffix in SUFFIXES else ""
    if suffix and format and suffix != format:
        raise ConfigError(f"--format {format} contradicts the name {output.name}")
    if suffix:
        return whole_files(conversion, output.name, suffix, metadata=prepared.record)
    return whole_files(conversion, "ms-model", format or usual, limit=files.shard_bytes, metadata=prepared.record)


def _add_companions(folder: Path, prepared: Prepared, plan: Plan) -> None:
    """Put indexes, and the model's other files, beside converted weights."""
    if prepared.request.reverse:
        write_index(plan, folder)
        copy_companions(prepared.config_folder, folder, prepared.dtype, prepared.config_changes)
    elif all(target.format == "safetensors" and "/" not in target.path for target in plan.targets):
        write_name_map(plan, folder)


def _checkpoint2(prepared: Prepared, files: _Files) -> Made:
    """The plan of a checkpoint 2.0, and what puts its texts into the folder."""
    target = files.target or Strategy.complete()
    plan = files.of_ranks(prepared, target, "safetensors")
    return as_checkpoint2(plan, target, files.prefix, prepared.record)
