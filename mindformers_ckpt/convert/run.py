"""A conversion from the command line's words to the published result."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mindformers_ckpt.convert import depth
from mindformers_ckpt.convert.config import ModelConfig, read_config
from mindformers_ckpt.convert.copies import check_copies
from mindformers_ckpt.convert.misfit import Attempt, Misfit, explain, other_naming, without_prefix
from mindformers_ckpt.convert.model import Model
from mindformers_ckpt.convert.output import copy_companions, write_index, write_name_map
from mindformers_ckpt.convert.paths import check_path
from mindformers_ckpt.convert.planning import Conversion, plan_tensors
from mindformers_ckpt.convert.request import (
    DTYPES,
    Request,
    as_recorded,
    as_told,
    ask_for_rows,
    completed,
    layout_name,
    model_of,
    with_settings,
)
from mindformers_ckpt.convert.rules import Side
from mindformers_ckpt.convert.targets import rank_files, whole_files
from mindformers_ckpt.convert.weights import (
    Weights,
    config_folder,
    mindspore_source,
    read_weights,
    recorded_naming,
)
from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.execution import Options, Progress, Report
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.objects.path import absolute
from mindformers_ckpt.planning.model import DEFAULT_PREFIX, Plan
from mindformers_ckpt.publish.source_fingerprint import Origin
from mindformers_ckpt.sources.find import find_huggingface
from mindformers_ckpt.sources.source import SUFFIXES, Source
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.targets.checkpoint2 import Made, as_checkpoint2
from mindformers_ckpt.transform import transform

# Names of `request` are taken from here as well: together they are what a conversion is started with.
__all__ = [
    "CHECKPOINT2",
    "DTYPES",
    "SHARD_BYTES",
    "ConversionReport",
    "Prepared",
    "Request",
    "convert",
    "plan_conversion",
    "plan_ranks",
    "prepare",
    "with_settings",
]

SHARD_BYTES = 5 * 10**9
CHECKPOINT2 = "checkpoint2"
_PLAIN = Options()


@dataclass(frozen=True)
class Prepared:
    """A conversion that has been planned: the model, the naming, the folder of its config.json, what of that file is to
    be changed where it is copied, and the tensors of the source."""

    request: Request
    model: Model
    naming: str
    config: ModelConfig
    config_folder: Path | None
    config_changes: Mapping[str, Any]
    conversion: Conversion
    origins: tuple[Origin, ...] | None = None

    @property
    def record(self) -> tuple[tuple[str, str], ...]:
        """What files say of themselves: two layouts have gone by the same names in the past."""
        return (("model", self.model.name), ("naming", self.naming))

    @property
    def dtype(self) -> str | None:
        return DTYPES[self.request.dtype] if self.request.dtype else None


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
        source_fingerprint: that of the source; "" where it was not asked for, or is not known from what was copied.
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


def prepare(request: Request, wanted: Collection[str] = ()) -> Prepared:
    """Read headers and plan all tensors. Nothing is written.

    `wanted` are names of the target's strategy, which may tell settings of the network.
    Raises ConfigError, FormatError and PlanError.
    """
    path = absolute(request.input_path)
    check_path(path, request.reverse)
    find = mindspore_source if request.reverse else find_huggingface
    found = find(request.input_path, request.step)
    recorded = recorded_naming(path, found.files) if request.reverse else None
    if recorded is not None:
        request = as_recorded(request, recorded)
    folder = config_folder(path if path.is_dir() else path.parent, request.hf_config)
    options = {"n_head": request.n_head, "hidden_size": request.hidden_size, "layers": request.layers}
    config = read_config(folder).with_options(options)
    changed = depth.changes(config, request.num_layers, request.num_nextn_predict_layers)
    if changed:
        config = depth.shortened(config, changed, whole=not request.reverse)
    model = model_of(request, config)
    as_setting = "qkv_concat" in model.options
    naming = model.naming(request.naming, bool(request.qkv_concat) and not as_setting)
    if request.reverse and recorded is None and naming.endswith("+qkv_concat"):
        ask_for_rows(path, request)
    origin: Side = "ms" if request.reverse else "hf"
    source = _stripped(found, model.canonical.get(origin, str), request.strip_prefix)
    whole_source = source
    told: tuple[str, ...] = ()
    if changed and not request.reverse:
        source, told = depth.without_layers(source, config)
    chosen = [option for option in model.options if getattr(request, option) is True]
    request = as_told(request, model.told(source.tensors if request.reverse else wanted, chosen))
    layout = layout_name(naming, model, request)
    if recorded not in (None, layout):
        raise ConfigError(f"{path} says that its names and layout are {recorded}, the options say {layout}")
    config, warnings = completed(model, request, config, source)
    table = model.tables[_table_key(model, naming, config, source)]
    to: Side = "hf" if request.reverse else "ms"
    facts = model.facts(config)
    dtype = by_name(DTYPES[request.dtype]) if request.dtype else None
    try:
        conversion = plan_tensors(table, facts, config, source, to, dtype=dtype, write_copies=request.write_tied)
    except Misfit as misfit:
        attempt = Attempt(model, naming, table, facts, config, to)
        other = other_naming(misfit, attempt)
        if other is not None and request.naming is None and request.qkv_concat is None:
            # Names tell legacy and mcore apart; nothing was chosen by the user or recorded in the source.
            request = replace(request, naming=other.partition("+")[0], qkv_concat="+qkv_concat" in other)
            return prepare(request, wanted)
        raise explain(misfit, attempt) from None
    unfit = None if request.reverse else model.unfit(naming, facts)
    if unfit is not None:
        raise ConfigError(unfit)
    check_copies(conversion.copies)
    origins = whole_source.origins(conversion.copies)
    warnings = (*found.warnings, *told, *warnings, *_other_type(model, config), *conversion.warnings)
    conversion = replace(conversion, warnings=warnings)
    return Prepared(request, model, layout, config, folder, changed, conversion, origins)


def convert(
    request: Request,
    output: Path,
    *,
    format: str | None = None,
    target: Strategy | None = None,
    options: Options = _PLAIN,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    check: Callable[[], None] = lambda: None,
) -> ConversionReport:
    """Convert weights and publish them at `output`.

    To MindSpore: one file, when `output` ends in .ckpt or .safetensors; a folder of files of at most
    `shard_bytes` otherwise; the rank folders of a strategy when `target` is one. To Hugging Face: always a
    folder, which `from_pretrained` loads. What was at `output` before stays as it is until the end.
    """
    started = time.monotonic()
    prepared, plan, companions = _planned(request, output, format, target, shard_bytes)
    output = absolute(output)
    shapes = _shapes(prepared.conversion)
    if not request.reverse and target is None and output.suffix in SUFFIXES and format != CHECKPOINT2:
        report = transform(
            plan, output, options, progress=progress, check=check, file=True, shapes=shapes, origins=prepared.origins
        )
    else:
        report = _write_folder(prepared, plan, output, options, progress, check, target, companions)
    return ConversionReport(
        prepared.model.name,
        prepared.naming,
        output,
        len(plan.targets),
        len(prepared.conversion.tensors),
        plan.bytes_written,
        time.monotonic() - started,
        plan.warnings,
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
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """What `convert` would do, with the same arguments. Nothing is written."""
    return _planned(request, output, format, target, shard_bytes)[1]


def _planned(
    request: Request, output: Path, format: str | None, target: Strategy | None, shard_bytes: int
) -> tuple[Prepared, Plan, Callable[[Path], None]]:
    """The conversion, its plan, and what puts further files into the folder of the result."""
    if request.reverse and (target is not None or format not in (None, "safetensors")):
        raise ConfigError("a strategy and that format are of the MindSpore side; leave them out with --reversed")
    prepared = prepare(request, target.names() if target is not None else ())
    companions: Callable[[Path], None]
    if format == CHECKPOINT2:
        plan, companions = _checkpoint2(prepared, target or Strategy.complete())
    else:
        plan = _targets(prepared, absolute(output), format, target, shard_bytes)
        companions = partial(_add_companions, prepared=prepared, plan=plan)
    plan.check()
    return prepared, plan, companions


def plan_ranks(
    request: Request,
    target: Strategy,
    *,
    prefix: str = DEFAULT_PREFIX,
    format: str = "ckpt",
    allow_missing: bool | Sequence[str] = False,
) -> Plan:
    """The plan that makes the files of a strategy's ranks out of Hugging Face weights, in one pass.

    Raises what `prepare` raises, and PlanError where weights and strategy do not fit together.
    """
    prepared = prepare(request, target.names())
    origin = str(request.input_path)
    plan = rank_files(
        prepared.conversion,
        target,
        prefix=prefix,
        format=format,
        origin=origin,
        allow_missing=allow_missing,
    )
    plan.check()
    return plan


def _targets(prepared: Prepared, output: Path, format: str | None, target: Strategy | None, shard_bytes: int) -> Plan:
    request, conversion = prepared.request, prepared.conversion
    # Jobs of networks with mcore names load nothing else.
    usual = "safetensors" if prepared.naming.startswith("mcore") else "ckpt"
    if target is not None:
        return rank_files(conversion, target, format=format or usual, origin=str(request.input_path))
    if request.reverse:
        pytorch = (("format", "pt"),)
        return whole_files(conversion, "model", "safetensors", limit=shard_bytes, metadata=pytorch)
    suffix = output.suffix.lstrip(".") if output.suffix in SUFFIXES else ""
    if suffix and format and suffix != format:
        raise ConfigError(f"--format {format} contradicts the name {output.name}")
    if suffix:
        return whole_files(conversion, output.name, suffix, metadata=prepared.record)
    return whole_files(conversion, "ms-model", format or usual, limit=shard_bytes, metadata=prepared.record)


def _write_folder(
    prepared: Prepared,
    plan: Plan,
    output: Path,
    options: Options,
    progress: Progress | None,
    check: Callable[[], None],
    target: Strategy | None,
    companions: Callable[[Path], None],
) -> Report:
    request = prepared.request
    if output.suffix in (*SUFFIXES, ".bin", ".pt", ".pth"):
        raise ConfigError(f"{output} has the name of a file, but the result is a folder; give the name of a folder")
    about: dict[str, Any] = {
        "model": prepared.model.name,
        "naming": prepared.naming,
        "direction": "to Hugging Face" if request.reverse else "to MindSpore",
        **({} if target is None else {"target": target.describe()}),
    }
    return transform(
        plan,
        output,
        options,
        about=about,
        progress=progress,
        check=check,
        companions=companions,
        shapes=_shapes(prepared.conversion),
        origins=prepared.origins,
    )


def _shapes(conversion: Conversion) -> dict[str, tuple[int, ...]]:
    return {item.spec.name: item.spec.shape for item in conversion.tensors}


def _add_companions(folder: Path, prepared: Prepared, plan: Plan) -> None:
    """Put indexes, and the model's other files, beside converted weights."""
    if prepared.request.reverse:
        write_index(plan, folder)
        changes = prepared.config_changes
        copy_companions(prepared.config_folder, folder, prepared.dtype, plain=True, changes=changes)
    elif all(target.format == "safetensors" and "/" not in target.path for target in plan.targets):
        write_name_map(plan, folder)


def _checkpoint2(prepared: Prepared, target: Strategy) -> Made:
    """The plan of a checkpoint 2.0, and what puts its texts into the folder."""
    plan = rank_files(prepared.conversion, target, format="safetensors", origin=str(prepared.request.input_path))
    return as_checkpoint2(plan, target, metadata=prepared.record)


def _stripped(found: Source, canonical: Callable[[str], str], prefix: str | None) -> Weights:
    """The tensors of a source, without what `--strip_prefix` says in their names."""
    if not prefix:
        return read_weights(found, canonical)
    source = read_weights(found, lambda name: canonical(without_prefix(name, prefix)))
    names = [tensor.spec.name for tensor in source.tensors.values()]
    if all(without_prefix(name, prefix) == name for name in names):
        raise ConfigError(f"--strip_prefix {prefix}: no tensor of {found.root} has it, they are called as {names[:1]}")
    return source


def _other_type(model: Model, config: ModelConfig) -> tuple[str, ...]:
    """A warning where config.json is of another model than the one that was chosen."""
    kind = config.text("model_type")
    if not kind or kind in model.model_types:
        return ()
    told = (
        f"config.json says model_type {kind!r}, the weights are converted as {model.name} (model_type "
        f"{' or '.join(model.model_types)}): names and shapes fit, but the network may compute something else"
    )
    return (told,)


def _table_key(model: Model, naming: str, config: ModelConfig, source: Weights) -> str:
    if model.layout is None:
        return naming
    return f"{naming}:{model.layout(config, list(source.tensors))}"
