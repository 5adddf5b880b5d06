"""The tensors of a model on disk: a Hugging Face folder, or MindSpore files, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.errors import PlanError, raise_problems
from mindformers_ckpt.formats import TensorSpec, read_header
from mindformers_ckpt.formats.headers import sound_headers
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.planning.model import Place
from mindformers_ckpt.planning.shards import in_shard
from mindformers_ckpt.publish.manifest import MANIFEST_FILE, read_manifests
from mindformers_ckpt.publish.source_fingerprint import Origin
from mindformers_ckpt.sources import dcp
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source, instead
from mindformers_ckpt.sources.huggingface import CONFIG_FILE
from mindformers_ckpt.sources.shards import LogicalTensor, Shard
from mindformers_ckpt.sources.source import Kind, Source
from mindformers_ckpt.strategy.model import Strategy


class Found(NamedTuple):
    """A tensor on disk; `spec` has the name of the file. `shards` are its boxes, where the source itself tells them."""

    path: Path
    spec: TensorSpec
    shards: tuple[Shard, ...] = ()

    def origin(self, held: Found) -> Origin:
        """The tensor as one of the source; `held` is itself, or the equal one that is read in its place."""
        return Origin.of(self.spec, held.spec.name, held.shards or [Shard(0, held.path, Box.whole(held.spec.shape))])

    def places(self, place: Place, file: Callable[[Path], int]) -> list[Place]:
        """A place in the whole tensor as places in files, whose numbers `file` gives. Raises ValueError."""
        if not self.shards:
            return [place._replace(file=file(self.path), tensor=self.spec.name)]
        if len(self.shards) == 1:
            return [place._replace(file=file(self.path), tensor=self.shards[0].tensor)]
        found = []
        for shard in self.shards:
            for part in in_shard(place, self.spec.shape, shard.box):
                found.append(part._replace(file=file(shard.path), tensor=shard.tensor))
        return found


@dataclass(frozen=True)
class Weights:
    """All tensors of a source, by the name that tables use.

    Attributes:
        root: the path that was given.
        folder: the folder that may hold the model's config.json.
        tensors: name -> where it is.
    """

    root: Path
    folder: Path
    tensors: Mapping[str, Found]

    def origins(self, copies: Iterable[tuple[Found, Found]]) -> tuple[Origin, ...]:
        """The tensors under the names of their files; of `copies`, which are equal, the second says where both are."""
        original = dict(copies)
        return tuple(found.origin(original.get(found, found)) for found in self.tensors.values())


def read_weights(source: Source, canonical: Callable[[str], str] = lambda name: name) -> Weights:
    """Read the headers of all files. Raises FormatError and PlanError with everything that is wrong."""
    if source.tensors is not None:
        return weights_of(source.root, Checkpoint(source, Strategy.complete()).tensors(), canonical)
    tensors: dict[str, Found] = {}
    problems = []
    for path, header in sound_headers(source.files).items():
        for record in header.tensors.values():
            if not source.assigns(record.spec.name, path):
                continue
            name = canonical(record.spec.name)
            if name in tensors:
                problems.append(f"{name}: in {tensors[name].path.name} and in {path.name}")
            tensors[name] = Found(path, record.spec)
    return _weights(source.root, tensors, problems)


def weights_of(
    root: Path, held: Mapping[str, LogicalTensor], canonical: Callable[[str], str] = lambda name: name
) -> Weights:
    """Tensors whose boxes in files are known. Raises PlanError where two have one name."""
    tensors: dict[str, Found] = {}
    problems = []
    for told, tensor in held.items():
        name = canonical(told)
        if name in tensors:
            problems.append(f"{name}: as {tensors[name].spec.name} and as {told}")
        tensors[name] = Found(tensor.shards[0].path, tensor.spec, tensor.shards)
    return _weights(root, tensors, problems)


def _weights(root: Path, tensors: Mapping[str, Found], problems: Sequence[str]) -> Weights:
    raise_problems(PlanError, f"{root} holds several weights, name the file to convert", problems)
    return Weights(root, root if root.is_dir() else root.parent, tensors)


def mindspore_source(path: Path, step: str | None = None) -> Source:
    """Complete MindSpore weights. Raises PlanError when they are cut for several ranks, or a Hugging Face model."""
    source = find_source(path, step)
    if source.kind is Kind.HUGGING_FACE:
        raise PlanError(f"{path} is a Hugging Face model already; to convert it to MindSpore leave --reversed out")
    source.raise_absent()
    if source.tensors is not None:
        return dcp.weights_of(source)
    if source.own_strategy is not None and not source.own_strategy.is_complete:
        raise PlanError(
            f"{path} holds the shards of {source.own_strategy.rank_count} ranks; merge them first: mindformers-ckpt "
            "transform --src-checkpoint … --dst-checkpoint-dir …"
        )
    if len(source.by_rank) > 1:
        raise PlanError(
            f"{path} holds the shards of {len(source.by_rank)} ranks; merge them first: mindformers-ckpt transform "
            "--src-checkpoint … --src-strategy … --dst-checkpoint-dir …"
        )
    return source


def recorded_naming(root: Path, files: Sequence[Path]) -> str | None:
    """What a conversion wrote of the naming of MindSpore files: in a .safetensors file, or a folder's manifest."""
    record: Mapping[str, Any] = {}
    if files[0].suffix == ".safetensors":
        record = read_header(files[0]).metadata
    if "model" not in record and root.is_dir():
        record = read_manifests(root).get(MANIFEST_FILE, {})
    naming = record.get("naming") if "model" in record else None
    return naming if isinstance(naming, str) else None


def config_folder(weights: Path, given: Path | None) -> Path | None:
    """The folder whose config.json describes the weights: the given one, or the weights' own."""
    if given is not None:
        folder = given.parent if given.name == CONFIG_FILE else given
        if not (folder / CONFIG_FILE).is_file():
            if not given.exists():
                raise PlanError(f"there is nothing at {given} (hf_config){instead(given)}")
            raise PlanError(f"{given} holds no {CONFIG_FILE}; give the folder of the model that has it (hf_config)")
        return folder
    folder = weights if weights.is_dir() else weights.parent
    return folder if (folder / CONFIG_FILE).is_file() else None
