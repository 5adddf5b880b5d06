"""Weights that a model's table does not fit: what is wrong, and the one cause of it where there is one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mindformers_ckpt.convert.config import LAYERS, ModelConfig
from mindformers_ckpt.convert.matching import known_names, other_side
from mindformers_ckpt.convert.model import Facts, Model, layer_of
from mindformers_ckpt.convert.rules import Side, Table
from mindformers_ckpt.convert.weights import Found, Weights
from mindformers_ckpt.errors import CheckpointError, PlanError, describe_problems
from mindformers_ckpt.formats import TensorSpec

# What other ways of quantising keep beside a layer: GPTQ, AWQ, bitsandbytes, compressed-tensors, HQQ, MXFP4.
_QUANTISED = re.compile(
    r".*\.(?:qweight|qzeros|scales|g_idx|weight_scale|weight_packed|weight_shape|weight_zero_point|input_scale"
    r"|SCB|weight_format|weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|SCB)"
    r"|W_q|weight_global_scale|\w+_(?:blocks|scales))"
)
# Names may have more in front of them than a table knows, and this in the middle of them.
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# Of the names on a side, how many must be known to call a source one of that side.
_MOST = 0.8


class Misfit(PlanError):
    """Weights that a table does not fit, in full."""

    def __init__(
        self,
        source: Weights,
        missing: Sequence[str],
        unknown: Sequence[str],
        shapes: Sequence[str],
        integers: Sequence[Found],
        others: Sequence[str],
    ) -> None:
        self.source = source
        self.missing = missing
        self.unknown = unknown
        self.shapes = shapes
        self.integers = integers
        self.others = others
        super().__init__(self.listed("is it this model, and is its config.json the right one?"))

    def listed(self, hint: str) -> str:
        """All that is wrong below a headline, the same of several layers in one line."""
        specs = self.source.tensors
        problems = [f"missing: {name}" for name in self.missing]
        problems += [f"unknown: {name} {describe(specs[name].spec, named=False)}" for name in self.unknown]
        problems += self.shapes
        problems += [f"{describe(found.spec)}: floating-point numbers are expected" for found in self.integers]
        problems += self.others
        return describe_problems(f"{self.source.root} cannot be converted; {hint}", grouped(problems))


class Attempt(NamedTuple):
    """What was tried: the table of a model and a naming, with what config.json says, on its way to a side.

    `renamed` says that it is only on its way to other names of MindSpore.
    """

    model: Model
    naming: str
    table: Table
    facts: Facts
    config: ModelConfig
    to: Side
    renamed: bool = False


def explain(misfit: Misfit, attempt: Attempt) -> CheckpointError:
    """The error to raise: one cause and one next step where they can be told, everything listed otherwise."""
    for cause in (_quantised, _wrong_side, _wrong_naming, _prefixed, _other_depth):
        told = cause(misfit, attempt)
        if told is not None:
            return PlanError(told)
    other = other_type(attempt.model, attempt.config)
    if other:
        return PlanError(misfit.listed(other))
    if misfit.shapes and not (misfit.missing or misfit.unknown):
        path = attempt.config.path or "config.json"
        return PlanError(misfit.listed(f"the shapes do not go with {path}: is it that of a model of another size?"))
    return misfit


def other_type(model: Model, config: ModelConfig) -> str:
    """What to do where config.json is that of another model; "" where it is not."""
    kind = config.text("model_type")
    if not kind or kind in model.model_types:
        return ""
    told = f"config.json says model_type {kind!r}, --model {model.name} is for {' or '.join(model.model_types)}"
    return f"{told}: leave --model out, or choose another"


def describe(spec: TensorSpec, *, named: bool = True) -> str:
    """ "model.norm.weight float32[8]" """
    kind = f"{spec.dtype.name}{list(spec.shape)}"
    return f"{spec.name} {kind}" if named else kind


def grouped(lines: Iterable[str]) -> list[str]:
    """The lines; of those that differ in numbers of layers or experts only the first, with how many there are."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(_NUMBER.sub("#", line), []).append(line)
    return [
        first if not others else f"{first} (and {len(others)} more of this form)" for first, *others in groups.values()
    ]


def without_prefix(name: str, prefix: str) -> str:
    """A name without what `--strip_prefix` says; wrappers of PyTorch may stand in its middle as well."""
    name = name.removeprefix(prefix)
    return name.replace(f".{prefix}", ".") if prefix in WRAPPERS else name


def _quantised(misfit: Misfit, attempt: Attempt) -> str | None:
    """Weights in fewer bits, without a rule for them."""
    marks = [misfit.source.tensors[name] for name in misfit.unknown if _QUANTISED.fullmatch(name)]
    found = [*misfit.integers, *marks]
    if not found:
        return None
    method = attempt.config.quantisation("quant_method")
    said = "config.json names no quant_method" if method is None else f"quant_method {method!r} of config.json"
    step = "take the weights as they were trained"
    if attempt.to == "ms":
        step += ", or have transformers dequantise them (model.dequantize(), then save_pretrained) and convert those"
    return (
        f"{misfit.source.root} holds quantised weights ({said}), for which there is no rule: {len(found)} tensors, "
        f"such as {describe(found[0].spec)}; {step}"
    )


def _wrong_side(misfit: Misfit, attempt: Attempt) -> str | None:
    """Weights of the side that they are to be converted to."""
    names = misfit.source.tensors
    if not misfit.missing or not names:
        return None
    here = known_names(attempt.table, attempt.facts, other_side(attempt.to))
    there = {
        name
        for key, table in attempt.model.tables.items()
        for name in known_names(table, attempt.facts, attempt.to)
        if name in names
    }
    if len(there) < _MOST * len(names) or len(there) <= len(here & names.keys()):
        return None
    told = "Hugging Face weights" if attempt.to == "hf" else "MindSpore weights"
    step = "leave --reversed out" if attempt.to == "hf" else "give --reversed"
    if attempt.renamed:
        step = "give --naming in place of --to"
    return f"{misfit.source.root} holds {told}, by the names of its tensors; {step}"


def other_naming(misfit: Misfit, attempt: Attempt) -> str | None:
    """The naming of MindSpore weights that are read, where their names are those of another one of the model."""
    if attempt.to == "ms":
        return None
    names = misfit.source.tensors.keys()
    found = {
        key.partition(":")[0]: len(known_names(table, attempt.facts, "ms") & names)
        for key, table in attempt.model.tables.items()
    }
    best = max(found, key=lambda naming: found[naming])
    return best if found[best] > len(known_names(attempt.table, attempt.facts, "ms") & names) else None


def _wrong_naming(misfit: Misfit, attempt: Attempt) -> str | None:
    other = other_naming(misfit, attempt)
    if other is None:
        return None
    options = "--from" if attempt.renamed else "--naming and --qkv_concat"
    return (
        f"the names of the tensors in {misfit.source.root} are {other}, not {attempt.naming}; leave {options} out to "
        "have them told by the names"
    )


def _other_depth(misfit: Misfit, attempt: Attempt) -> str | None:
    """A config.json with another number of layers, when that is all that is wrong."""
    told = attempt.config.integer(*LAYERS)
    count = attempt.model.counted(misfit.source.tensors).get("num_hidden_layers")
    wrong = [*misfit.missing, *misfit.unknown]
    if told is None or not isinstance(count, int) or not wrong or misfit.shapes or misfit.integers or misfit.others:
        return None
    layers = [layer_of(name) for name in wrong]
    if told == count or any(layer is None or layer < min(told, count) for layer in layers):
        return None
    path = attempt.config.path
    fewer = f", or --num_layers {count}" if attempt.to == "hf" and count < told and not attempt.renamed else ""
    says = f"{path} says {told}; give the config.json of these weights (--hf_config){fewer}"
    if path is None:
        says = f"--layers says {told}"
    return f"{misfit.source.root} cannot be converted: its tensors are of {count} layers, {says}"


def _prefixed(misfit: Misfit, attempt: Attempt) -> str | None:
    """Names with the same text in front of them, without which the table knows them."""
    missing, unknown = set(misfit.missing), misfit.unknown
    if not missing or not unknown:
        return None
    known = known_names(attempt.table, attempt.facts, other_side(attempt.to))
    candidates = Counter(prefix for name in unknown for prefix in _prefixes(name))
    for prefix, _ in candidates.most_common():
        stripped = {without_prefix(name, prefix) for name in unknown}
        if missing <= stripped <= known:
            example = next(name for name in unknown if without_prefix(name, prefix) in missing)
            return (
                f"the names of the tensors in {misfit.source.root} have {prefix!r} in front of what the model "
                f"{attempt.model.name} calls them ({example}): give --strip_prefix {prefix}"
            )
    return None


def _prefixes(name: str) -> Iterable[str]:
    words = name.split(".")
    yield from (".".join(words[:count]) + "." for count in range(1, min(4, len(words))))
    yield from (wrapper for wrapper in WRAPPERS if f".{wrapper}" in name)
