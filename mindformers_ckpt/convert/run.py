"""A conversion from the command line's words to the published result."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mindformers_ckpt.convert.config import LAYOUT_SETTINGS, ModelConfig, read_config
from mindformers_ckpt.convert.copies import check_copies
from mindformers_ckpt.convert.misfit import Attempt, Misfit, explain, other_naming, without_prefix
from mindformers_ckpt.convert.model import Model, find_model, model_of_config, models
from mindformers_ckpt.convert.output import copy_companions, write_index, write_name_map
from mindformers_ckpt.convert.paths import check_path
from mindformers_ckpt.convert.planning import Conversion, plan_tensors
from mindformers_ckpt.convert.rules import Side
from mindformers_ckpt.convert.targets import rank_files, whole_files
from mindformers_ckpt.convert.weights import (
    Weights,
    config_folder,
    mindspore_source,
    read_weights,
    recorded_naming,
)
from mindformers_ckpt.errors import ConfigError, did_you_mean
from mindformers_ckpt.execution import Options, Progress, Report
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.objects.path import absolute
from mindformers_ckpt.planning.model import DEFAULT_PREFIX, Plan
from mindformers_ckpt.sources.find import find_huggingface
from mindformers_ckpt.sources.source import SUFFIXES, Source
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.targets.checkpoint2 import Made, as_checkpoint2
from mindformers_ckpt.transform import transform

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SHARD_BYTES = 5 * 10**9
# Options that only some models have.
_OWN_OPTIONS = (
    *("is_pretrain", "telechat_type", "mlp_concat", "use_rearrange_rope", "use_gmm", "use_gmm_training"),
    *("use_contiguous_weight_layout_attention", "use_interleaved_weight_layout_mlp", "mla_qkv_concat", "pynative"),
)
CHECKPOINT2 = "checkpoint2"
_PLAIN = Options()


@dataclass(frozen=True)
class Request:
    """What is to be converted, and how. Words are those of the command line.

    Attributes:
        model: name or alias; None for the model of the config.json.
        input_path: a Hugging Face folder or a file in it; with `reverse` a MindSpore file or folder.
        reverse: from MindSpore to Hugging Face.
        dtype: "fp32", "bf16" or "fp16" for all floating-point tensors; None keeps what they are.
        naming: "legacy" or "mcore" names on the MindSpore side; None for the model's default.
        qkv_concat: query, key and value, and gate and up, in one tensor each (legacy names); None for the
            model's usual.
        hf_config: folder of the model's config.json and tokenizer, if not the source's own.
        write_tied: write the output layer too where it is tied to the embedding.
        n_head, hidden_size, layers: what config.json may lack; a contradiction to it is an error.
        strip_prefix: what the names of the source have in front of what the model calls its tensors.
        is_pretrain, telechat_type: options of Swin and TeleChat.
        mlp_concat, use_rearrange_rope: settings of MindSpore's GLM4; use_gmm, use_gmm_training: of its Mixtral.
        use_contiguous_weight_layout_attention, use_interleaved_weight_layout_mlp: settings of its networks that have
            query, key and value, or gate and up, in one tensor.
        mla_qkv_concat, pynative: settings of its networks with latent attention.
        step: with `reverse`, the file of a rank folder to read: its name, or an epoch and step like "3_150".
    """

    model: str | None
    input_path: Path
    reverse: bool = False
    dtype: str | None = None
    naming: str | None = None
    qkv_concat: bool | None = None
    hf_config: Path | None = None
    write_tied: bool = False
    n_head: int | None = None
    hidden_size: int | None = None
    layers: int | None = None
    strip_prefix: str | None = None
    is_pretrain: bool | None = None
    telechat_type: str | None = None
    mlp_concat: bool | None = None
    use_rearrange_rope: bool | None = None
    use_gmm: bool | None = None
    use_gmm_training: bool | None = None
    use_contiguous_weight_layout_attention: bool | None = None
    use_interleaved_weight_layout_mlp: bool | None = None
    mla_qkv_concat: bool | None = None
    pynative: bool | None = None
    step: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A conversion that has been planned: the model, the naming, and the folder of its config.json."""

    request: Request
    model: Model
    naming: str
    config: ModelConfig
    config_folder: Path | None
    conversion: Conversion

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
        request = _as_recorded(request, recorded)
    folder = config_folder(path if path.is_dir() else path.parent, request.hf_config)
    options = {"n_head": request.n_head, "hidden_size": request.hidden_size, "layers": request.layers}
    config = read_config(folder).with_options(options)
    model = _model(request, config)
    as_setting = "qkv_concat" in model.options
    naming = model.naming(request.naming, bool(request.qkv_concat) and not as_setting)
    if request.reverse and recorded is None and naming.endswith("+qkv_concat"):
        _ask_for_rows(path, request)
    origin: Side = "ms" if request.reverse else "hf"
    source = _stripped(found, model.canonical.get(origin, str), request.strip_prefix)
    chosen = [option for option in model.options if getattr(request, option) is True]
    request = _as_told(request, model.told(source.tensors if request.reverse else wanted, chosen))
    layout = _layout_name(naming, model, request)
    if recorded not in (None, layout):
        raise ConfigError(f"{path} says that its names and layout are {recorded}, the options say {layout}")
    config, warnings = _completed(model, request, config, source)
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
    warnings = (*found.warnings, *warnings, *_other_type(model, config), *conversion.warnings)
    conversion = replace(conversion, warnings=warnings)
    return Prepared(request, model, layout, config, folder, conversion)


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
        report = transform(plan, output, options, progress=progress, check=check, file=True, shapes=shapes)
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


def with_settings(request: Request, settings: Mapping[str, bool]) -> Request:
    """The request with those of a network's settings that its model has. Raises ConfigError for unknown models."""
    path = absolute(request.input_path)
    model = _model(request, read_config(config_folder(path if path.is_dir() else path.parent, request.hf_config)))
    has_fused_names = any(naming.endswith("+qkv_concat") for naming in model.namings)
    known = {*model.options, *(("qkv_concat",) if has_fused_names else ())}
    own: dict[str, Any] = {key: value for key, value in settings.items() if key in known}
    return replace(request, model=model.name, **own)


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
    if target is not None:
        return rank_files(conversion, target, format=format or "ckpt", origin=str(request.input_path))
    if request.reverse:
        pytorch = (("format", "pt"),)
        return whole_files(conversion, "model", "safetensors", limit=shard_bytes, metadata=pytorch)
    suffix = output.suffix.lstrip(".") if output.suffix in SUFFIXES else ""
    if suffix and format and suffix != format:
        raise ConfigError(f"--format {format} contradicts the name {output.name}")
    if suffix:
        return whole_files(conversion, output.name, suffix, metadata=prepared.record)
    return whole_files(conversion, "ms-model", format or "ckpt", limit=shard_bytes, metadata=prepared.record)


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
    )


def _shapes(conversion: Conversion) -> dict[str, tuple[int, ...]]:
    return {item.spec.name: item.spec.shape for item in conversion.tensors}


def _add_companions(folder: Path, prepared: Prepared, plan: Plan) -> None:
    """Put indexes, and the model's other files, beside converted weights."""
    if prepared.request.reverse:
        write_index(plan, folder)
        copy_companions(prepared.config_folder, folder, prepared.dtype, plain=True)
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


def _model(request: Request, config: ModelConfig) -> Model:
    if request.model is None:
        return model_of_config(config)
    model = find_model(request.model)
    if model is None:
        like = did_you_mean(request.model, models())
        raise ConfigError(f"unknown model {request.model!r}.{like} Known are {', '.join(models())}")
    return model


def _completed(
    model: Model, request: Request, config: ModelConfig, source: Weights
) -> tuple[ModelConfig, tuple[str, ...]]:
    """The configuration with the model's own options, and what must be counted where nothing tells it."""
    values = dict(config.values)
    for option in (*_OWN_OPTIONS, *({"qkv_concat"} & set(model.options))):
        value = getattr(request, option)
        if value is not None and option not in model.options:
            raise ConfigError(f"--{option} is not an option of the model {model.name}")
        if value is not None:
            values[option] = value
    if config.path is not None:
        return ModelConfig(values, config.path), ()
    counted = {key: value for key, value in model.counted(source.tensors).items() if key not in values}
    told = ", ".join(f"{key} {value}" for key, value in counted.items())
    warnings = [f"{source.folder} has no config.json; by the names of the tensors: {told}"] if counted else []
    if request.reverse:
        warnings.append("the result has no config.json, which from_pretrained needs; give its folder with --hf_config")
    return ModelConfig({**counted, **values}), tuple(warnings)


def _as_recorded(request: Request, recorded: str) -> Request:
    """The request, with what a source says of its own layout where no option says it: "legacy+use_gmm"."""
    naming, *settings = recorded.split("+")
    values: dict[str, Any] = {"naming": naming}
    for option in LAYOUT_SETTINGS:
        if option in settings or f"no_{option}" in settings:
            values[option] = option in settings
    return replace(request, **{key: value for key, value in values.items() if getattr(request, key) is None})


def _as_told(request: Request, told: Mapping[str, bool | None]) -> Request:
    """The request, with what names tell where no option says it."""
    values = {key: value for key, value in told.items() if value is None or getattr(request, key) is None}
    own: dict[str, Any] = values
    return replace(request, **own)


def _layout_name(naming: str, model: Model, request: Request) -> str:
    """The naming, and the settings by which its tensors differ from the usual ones: "legacy+use_gmm"."""
    for option, usual in LAYOUT_SETTINGS.items():
        if option in model.options and getattr(request, option) not in (None, usual):
            naming += f"+{option}" if not usual else f"+no_{option}"
    return naming


def _ask_for_rows(path: Path, request: Request) -> None:
    """Two layouts have had these names, and nothing in the file tells which it is. Raises ConfigError."""
    if None not in (request.use_contiguous_weight_layout_attention, request.use_interleaved_weight_layout_mlp):
        return
    raise ConfigError(
        f"{path} does not say how query, key and value, and gate and up, lie in its fused tensors; give "
        "--use_contiguous_weight_layout_attention False --use_interleaved_weight_layout_mlp True for files of "
        "MindFormers 1.4 and later (by groups of heads, and row by row in turn), True and False for those of 1.3 and "
        "before (one behind the other)"
    )


def _table_key(model: Model, naming: str, config: ModelConfig, source: Weights) -> str:
    if model.layout is None:
        return naming
    return f"{naming}:{model.layout(config, list(source.tensors))}"
