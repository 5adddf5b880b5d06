"""A conversion that is planned: from what is asked for to the boxes that every target tensor is made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.convert import depth
from mindformers_ckpt.convert.config import ModelConfig, read_config
from mindformers_ckpt.convert.copies import check_copies
from mindformers_ckpt.convert.misfit import Attempt, Misfit, explain, other_naming, other_type, without_prefix
from mindformers_ckpt.convert.model import Model
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
)
from mindformers_ckpt.convert.rules import Side
from mindformers_ckpt.convert.weights import Weights, config_folder, mindspore_source, read_weights, recorded_naming
from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.objects.path import absolute
from mindformers_ckpt.publish.source_fingerprint import Origin
from mindformers_ckpt.sources.find import find_huggingface

ReadWeights = Callable[[Callable[[str], str]], Weights]


class Opened(NamedTuple):
    """A source whose files are known.

    Attributes:
        read: its tensors, under names that a function makes of those in its files.
        warnings: what the user should know of the choice of files.
        recorded: the naming that it says it has, None where it does not.
    """

    read: ReadWeights
    warnings: tuple[str, ...] = ()
    recorded: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A conversion that has been planned: the model, the naming, the folder of its config.json, what of that file is to
    be changed where it is copied, and the tensors of the source. `renamed_from` is the naming of a source that is
    MindSpore's, too."""

    request: Request
    model: Model
    naming: str
    config: ModelConfig
    config_folder: Path | None
    config_changes: Mapping[str, Any]
    conversion: Conversion
    origins: tuple[Origin, ...]
    renamed_from: str | None = None

    @property
    def direction(self) -> str:
        """Where weights go, in words."""
        if self.renamed_from is not None:
            return f"from {self.renamed_from} names to {self.naming} ones"
        return "to Hugging Face" if self.request.reverse else "to MindSpore"

    @property
    def record(self) -> tuple[tuple[str, str], ...]:
        """What files say of themselves: two layouts have gone by the same names in the past."""
        return (("model", self.model.name), ("naming", self.naming))

    @property
    def dtype(self) -> str | None:
        return DTYPES[self.request.dtype] if self.request.dtype else None


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
    prepared = prepare_opened(request, Opened(partial(read_weights, found), found.warnings, recorded), wanted)
    check_copies(prepared.conversion.copies)
    return prepared


def prepare_opened(request: Request, opened: Opened, wanted: Collection[str] = ()) -> Prepared:
    """`prepare` for a source that has been found. Tensors that must be equal are not compared yet."""
    path, recorded = absolute(request.input_path), opened.recorded
    if recorded is not None:
        request = as_recorded(request, recorded)
    folder = config_folder(path, request.hf_config)
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
    source = _stripped(opened.read, model.canonical.get(origin, str), request.strip_prefix)
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
        attempt = Attempt(model, naming, table, facts, config, to, request.to_naming is not None)
        other = other_naming(misfit, attempt)
        if other is not None and request.naming is None and request.qkv_concat is None:
            # Names tell legacy and mcore apart; nothing was chosen by the user or recorded in the source.
            request = replace(request, naming=other.partition("+")[0], qkv_concat="+qkv_concat" in other)
            return prepare_opened(request, opened, wanted)
        raise explain(misfit, attempt) from None
    except ConfigError as error:  # config.json lacks what this model needs
        other = other_type(model, config)
        raise ConfigError(f"{other} ({error})" if other else str(error)) from None
    unfit = None if request.reverse else model.unfit(naming, facts)
    if unfit is not None:
        raise ConfigError(unfit)
    origins = whole_source.origins(conversion.copies)
    warnings = (*opened.warnings, *told, *warnings, *_other_type(model, config), *conversion.warnings)
    conversion = replace(conversion, warnings=warnings)
    return Prepared(request, model, layout, config, folder, changed, conversion, origins)


def _stripped(read: ReadWeights, canonical: Callable[[str], str], prefix: str | None) -> Weights:
    """The tensors of a source, without what `--strip_prefix` says in their names."""
    if not prefix:
        return read(canonical)
    source = read(lambda name: canonical(without_prefix(name, prefix)))
    names = [tensor.spec.name for tensor in source.tensors.values()]
    if all(without_prefix(name, prefix) == name for name in names):
        raise ConfigError(f"--strip_prefix {prefix}: no tensor of {source.root} has it, they are called as {names[:1]}")
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
