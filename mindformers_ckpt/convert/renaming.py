"""From one naming of MindSpore's weights to another: two conversions, over Hugging Face names, composed into one.

The tables of both namings say what the tensors of the same Hugging Face model are made of. Composed, they say what the
tensors under the new names are made of under the old ones, and so it is for the states that an optimizer keeps of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mindformers_ckpt.convert.composing import compose
from mindformers_ckpt.convert.config import LAYOUT_SETTINGS, read_config
from mindformers_ckpt.convert.copies import check_copies
from mindformers_ckpt.convert.misfit import Misfit
from mindformers_ckpt.convert.planning import Conversion, Converted, identity
from mindformers_ckpt.convert.prepare import Opened, Prepared, prepare_opened
from mindformers_ckpt.convert.request import Request, model_of, with_layout
from mindformers_ckpt.convert.weights import Found, Weights, config_folder, recorded_naming, weights_of
from mindformers_ckpt.errors import ConfigError, PlanError, describe_problems, raise_problems
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.objects.path import absolute
from mindformers_ckpt.planning.build import source_states
from mindformers_ckpt.planning.computations import Constant
from mindformers_ckpt.planning.missing import has_states
from mindformers_ckpt.planning.model import Numbers, Place, SourceFile
from mindformers_ckpt.publish.source_fingerprint import Origin
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.complete import only_checkpoint
from mindformers_ckpt.sources.find import check_outside, find_mindspore
from mindformers_ckpt.sources.plausibility import check_contents, check_names
from mindformers_ckpt.sources.shards import LogicalTensor, Shard
from mindformers_ckpt.sources.source import Source
from mindformers_ckpt.state_names import find_states, state_of
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.words import shortened


def prepare_renaming(request: Request, destination: Path, wanted: Collection[str] = ()) -> Prepared:
    """Plan all tensors under the names of `request.to_naming`. Nothing is written.

    `wanted` are names of the target's strategy, which may tell settings of the network.
    Raises ConfigError, FormatError and PlanError.
    """
    checkpoint = _opened(request)
    check_outside(checkpoint.files, destination)
    tensors = checkpoint.tensors()
    warnings = [*checkpoint.warnings, *_checked(checkpoint, tensors, request.contents)]
    old = _prepare_old(request, checkpoint, tensors)
    middle = {item.spec.name: item for item in old.conversion.tensors}
    new = _prepare_new(request, old, middle, checkpoint.files, wanted)
    if new.naming == old.naming:
        raise ConfigError(
            f"{checkpoint.files.root} has {old.naming} names already; for another strategy or another format under the "
            "same names: mindformers-ckpt transform"
        )
    check_copies(
        [(_found(tensors[copy.spec.name]), _found(tensors[of.spec.name])) for copy, of in old.conversion.copies]
    )
    renamed = _Renamed(tensors, new.naming, _composed(new, old, middle, tensors))
    if not request.weights_only:
        renamed.add_states()
        renamed.add_counters(checkpoint)
    told = (*warnings, *old.conversion.warnings, *new.conversion.warnings, *renamed.warnings)
    conversion = renamed.conversion(tuple(dict.fromkeys(told)))
    return replace(new, conversion=conversion, origins=_origins(tensors, old.conversion), renamed_from=old.naming)


def _origins(tensors: Mapping[str, LogicalTensor], conversion: Conversion) -> tuple[Origin, ...]:
    """The tensors of a checkpoint; of those that are equal, one says where both are."""
    equal = {copy.spec.name: of.spec.name for copy, of in conversion.copies}
    held = {name: equal.get(name, name) for name in tensors}
    return tuple(Origin.of(tensor.spec, held[name], tensors[held[name]].shards) for name, tensor in tensors.items())


def check_options(request: Request) -> None:
    """Refuse options that do not go together. Raises ConfigError that names them."""
    if request.to_naming is None:
        _refuse(
            request,
            ("from_naming", "src_strategy", "weights_only", "contents"),
            "without --to, which gives other names",
        )
        return
    if request.reverse:
        raise ConfigError("--reversed goes to Hugging Face, --to to other names of MindSpore; give one of them")
    layout = "with --to: say it there and in --from, as in --to legacy+qkv_concat"
    _refuse(request, ("naming", *LAYOUT_SETTINGS), layout)
    _refuse(request, ("num_layers", "num_nextn_predict_layers"), "with --to: all layers get their new names")


def _refuse(request: Request, options: Iterable[str], why: str) -> None:
    usual = Request.__dataclass_fields__
    chosen = [option for option in options if getattr(request, option) != usual[option].default]
    given = [f"--{option.replace('_naming', '')}" for option in chosen]
    if given:
        raise ConfigError(f"{', '.join(given)} cannot be given {why}")


def _opened(request: Request) -> Checkpoint:
    files = only_checkpoint(find_mindspore(request.input_path, request.step, weights_only=request.weights_only))
    return Checkpoint(files, files.strategy(request.src_strategy or Strategy.complete()))


def _checked(checkpoint: Checkpoint, tensors: Mapping[str, LogicalTensor], contents: str) -> list[str]:
    """Check that files and strategy go together, and that all is there; returns warnings. Raises PlanError."""
    check_names(checkpoint, tensors)
    warnings = [*check_contents(checkpoint, tensors, contents), *source_states(checkpoint, tensors)]
    checkpoint.whole_tensors()
    return warnings


# ------------------------------------------------------------------------------------- over Hugging Face names


def _prepare_old(request: Request, checkpoint: Checkpoint, tensors: Mapping[str, LogicalTensor]) -> Prepared:
    """Hugging Face tensors as made of those of the source, each taken as whole."""
    files = checkpoint.files
    path = absolute(request.input_path)
    model = model_of(request, read_config(config_folder(absolute(request.input_path), request.hf_config)))
    request = replace(request, model=model.name, reverse=True, dtype=None, write_tied=False)
    if request.from_naming is not None:
        request = with_layout(request, model, request.from_naming, "--from")
    states = find_states(tensors, tensors)
    kept = {name: _whole(tensor) for name, tensor in tensors.items() if name not in states.counters}
    kept = {name: tensor for name, tensor in kept.items() if state_of(name, tensors) is None}
    opened = Opened(partial(weights_of, files.root, kept), (), recorded_naming(path, files.files))
    return prepare_opened(request, opened)


def _prepare_new(
    request: Request, old: Prepared, middle: Mapping[str, Converted], files: Source, wanted: Collection[str]
) -> Prepared:
    """The target's tensors as made of those of Hugging Face, which are in the `middle`."""
    root = files.root
    computed = [name for name, item in middle.items() if any(place.compute for place in item.transfer.sources)]
    headline = f"{root} holds FP8 weights, whose elements would have to be computed; convert it to Hugging Face"
    raise_problems(PlanError, headline, computed)
    request = replace(request, model=old.model.name, strip_prefix=None)
    request = with_layout(request, old.model, str(request.to_naming), "--to")
    weights = Weights(root, root, {name: Found(files.files[0], item.spec) for name, item in middle.items()})
    try:
        return prepare_opened(request, Opened(lambda canonical: weights), wanted)
    except Misfit as misfit:
        if not misfit.unknown:
            raise
        names = (place.tensor for name in misfit.unknown for place in middle[name].transfer.sources)
        headline = (
            f"the network with {request.to_naming} names has no place for tensors of {root}; adapters are merged "
            "before (mindformers-ckpt merge-lora)"
        )
        raise PlanError(describe_problems(headline, list(dict.fromkeys(names)))) from None


def _composed(
    new: Prepared, old: Prepared, middle: Mapping[str, Converted], tensors: Mapping[str, LogicalTensor]
) -> list[Converted]:
    """The target's tensors as made of those of the source. Raises PlanError that lists those that cannot be."""
    shapes = {name: tensor.spec.shape for name, tensor in tensors.items()}
    found, problems = [], []
    for item in new.conversion.tensors:
        try:
            found.append(compose(item, middle, shapes))
        except ValueError as error:
            problems.append(f"{item.spec.name}: {error}")
    headline = (
        f"{old.naming} weights cannot be rearranged to {new.naming} ones in one pass; convert them to Hugging Face "
        "and from there"
    )
    raise_problems(PlanError, headline, problems)
    return found


# ------------------------------------------------------------------------------------------ in the source's files


def _whole(tensor: LogicalTensor) -> LogicalTensor:
    """A tensor as if a file had it whole."""
    spec, path = tensor.spec, tensor.shards[0].path
    return tensor._replace(shards=(Shard(0, path, Box.whole(spec.shape), spec.name),))


def _found(tensor: LogicalTensor) -> Found:
    """A tensor with the boxes of it that files hold, under its name there."""
    shards = tuple(shard._replace(tensor=shard.tensor or tensor.spec.name) for shard in tensor.shards)
    return Found(shards[0].path, tensor.spec, shards)


class _Renamed:
    """The tensors under new names, in the files of the source.

    Attributes:
        warnings: what was left aside.
    """

    def __init__(self, tensors: Mapping[str, LogicalTensor], naming: str, weights: Sequence[Converted]) -> None:
        """`weights` are made of whole tensors of the source."""
        self._found = {name: _found(tensor) for name, tensor in tensors.items()}
        self._tensors, self._naming = tensors, naming
        self._files: Numbers[Path] = Numbers()
        self._weights = weights
        self._others: list[Converted] = []
        self._problems: list[str] = []
        self.warnings: list[str] = []

    def add_states(self) -> None:
        """Add the states that an optimizer keeps of weights: rearranged like these."""
        left = []
        for prefix, weights in _states(self._tensors).items():
            used: set[str] = set()
            for item in self._weights:
                made_of = dict.fromkeys(place.tensor for place in item.transfer.sources)
                if weights.issuperset(made_of) and self._add_state(prefix, item, made_of):
                    used.update(made_of)
            left += [prefix + weight for weight in weights - used]
        if left:
            self.warnings.append(
                f"left aside, as no states under {self._naming} names can be made of them: {shortened(sorted(left))}"
            )

    def _add_state(self, prefix: str, item: Converted, made_of: Collection[str]) -> bool:
        """Add a state of a weight; False where it has another shape, and the weight is more than renamed."""
        specs = [self._tensors[prefix + name].spec for name in made_of]
        alike = all(spec.shape == self._tensors[name].spec.shape for spec, name in zip(specs, made_of))
        transfer, renamed = item.transfer, prefix + item.spec.name
        plain = len(transfer.sources) == 1 and transfer.sources[0].view is None
        if not alike and not plain:
            return False
        dtype, shape = specs[0].dtype, item.spec.shape if alike else specs[0].shape
        if any(spec.dtype != dtype for spec in specs):
            listed = ", ".join(f"{spec.name} {spec.dtype.name}" for spec in specs[:4])
            self._problems.append(f"{renamed}: of several element types: {listed}")
        if not alike:
            item = identity(TensorSpec(renamed, dtype, shape), specs[0].name)
        else:
            sources = tuple(place._replace(tensor=prefix + place.tensor, compute=None) for place in transfer.sources)
            transfer = transfer._replace(name=renamed, dtype=dtype, sources=sources)
            item = Converted(TensorSpec(renamed, dtype, shape), transfer, item.groups)
        self._others.append(item)
        return True

    def add_counters(self, checkpoint: Checkpoint) -> None:
        """Add the counters of the training, under their names."""
        counters = find_states(self._tensors, self._tensors).counters
        self._others += [identity(self._tensors[name].spec, name) for name in counters]
        if self._others and has_states(self._tensors):
            self._others += [
                _constant(spec, content) for spec, content in checkpoint.files.counters if spec.name not in counters
            ]

    def conversion(self, warnings: tuple[str, ...]) -> Conversion:
        """All of them. Raises PlanError."""
        tensors = [self._placed(item) for item in (*self._weights, *self._others)]
        raise_problems(PlanError, "tensors cannot be put together", self._problems)
        files = tuple(SourceFile(path, path.stat().st_size) for path in self._files)
        return Conversion(files, tuple(tensors), (), warnings)

    def _placed(self, item: Converted) -> Converted:
        """A tensor as made of boxes that files hold, for the stages of a pipeline that have it."""
        places: list[Place] = []
        stages = item.stages
        for place in item.transfer.sources:
            if isinstance(place.compute, Constant):
                places.append(place)
                continue
            stages = self._tensors[place.tensor].stages
            try:
                places += self._found[place.tensor].places(place, self._files.__getitem__)
            except ValueError as error:
                self._problems.append(f"{item.spec.name}: {error}")
        return item._replace(transfer=item.transfer._replace(sources=tuple(places)), stages=stages)


def _states(tensors: Mapping[str, LogicalTensor]) -> dict[str, set[str]]:
    """What stands before a weight's name in those of its states ("adam_m."), and the weights that have such a one."""
    found: dict[str, set[str]] = {}
    for name in tensors:
        state = state_of(name, tensors)
        if state is not None:
            found.setdefault(name[: -len(state.weight)], set()).add(state.weight)
    return found


def _constant(spec: TensorSpec, content: bytes) -> Converted:
    item = identity(spec, "")
    place = item.transfer.sources[0]._replace(compute=Constant(spec.dtype, content))
    return item._replace(transfer=item.transfer._replace(sources=(place,)))
