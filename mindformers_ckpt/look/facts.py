"""What is said of a path before its parameters: strategy, manifest, model, step, counters; label -> text."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.look.parameters import Parameter
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.listing import Listing
from mindformers_ckpt.sources.source import Source
from mindformers_ckpt.sources.steps import moments
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.words import counted, shortened

_COUNTER_BYTES = 64
_MOST_COUNTERS = 16
# Element types of counters as `struct` knows them: numpy would take longer to start than all else here.
_FORMS = {
    "bool": "?",
    "int8": "b",
    "int16": "h",
    "int32": "i",
    "int64": "q",
    "uint8": "B",
    "uint16": "H",
    "uint32": "I",
    "uint64": "Q",
    "float16": "e",
    "float32": "f",
    "float64": "d",
}


def strategy_facts(strategy: Strategy) -> dict[str, str]:
    stages = len(strategy.stages)
    matrices: dict[str, int] = {}
    for layouts in strategy.stages:
        for layout in layouts.values():
            text = " x ".join(map(str, layout.device_matrix))
            matrices[text] = matrices.get(text, 0) + 1
    most = sorted(matrices, key=lambda text: -matrices[text])
    optimizer = sum(layout.optimizer_pieces > 1 for layouts in strategy.stages for layout in layouts.values())
    facts = {"ranks": counted(strategy.rank_count, "rank") + ("" if strategy.is_complete else f" ({strategy.origin})")}
    if stages > 1:
        facts["stages"] = f"{stages} pipeline stages of {strategy.stage_size} ranks"
    if most:
        facts["mesh"] = f"device matrix {shortened(most, 4)}, the last axis varies fastest"
        facts["layouts"] = f"{len(strategy.names())} parameters have one" + (
            f", {optimizer} are optimizer shards" if optimizer else ""
        )
    return facts


def manifest_facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What a manifest says of how the result was made."""
    words = {
        "source": "source strategy",
        "target": "target strategy",
        "source_path": "made of",
        "left_aside": "left aside",
    }
    facts = {}
    for key in ("created", "source_path", "source", "target", "left_aside", "model", "naming", "direction"):
        if isinstance(manifest.get(key), str):
            facts[words.get(key, key)] = manifest[key]
    facts["made by"] = f"mindformers_ckpt {manifest['mindformers_ckpt']}"
    files, lora = manifest.get("files"), manifest.get("lora")
    if isinstance(files, list):
        sizes = [entry.get("bytes") for entry in files if isinstance(entry, dict)]
        facts["manifest"] = (
            f"{counted(len(files), 'file')}, {sum(size for size in sizes if isinstance(size, int)):,} bytes"
        )
    if isinstance(lora, dict):
        branches = lora.get("branches")
        merged = counted(len(branches), "branch", "branches") if isinstance(branches, dict) else "branches"
        facts["LoRA"] = f"{merged} merged, adapter {lora.get('adapter') or 'in the source'}"
    return facts


def model_facts(root: Path) -> dict[str, str]:
    """What the config.json of a Hugging Face model says."""
    config = Listing(root if root.is_dir() else root.parent).json("config.json")
    if not isinstance(config, dict):
        return {}
    labels = ("model_type", "architectures", "num_hidden_layers", "hidden_size", "vocab_size", "torch_dtype", "dtype")
    words = [f"{label} {config[label]}" for label in labels if isinstance(config.get(label), (str, int))]
    return {"config.json": ", ".join(words)} if words else {}


def step_facts(source: Source) -> dict[str, str]:
    """Epoch and step by the names of the files."""
    names = moments({rank: files[0] for rank, files in source.by_rank.items()})
    found = {name.moment for name in names.values() if name is not None}
    prefixes = sorted({name.prefix for name in names.values() if name is not None})
    if not found:
        return {}
    listed = shortened([f"epoch {moment.epoch}, step {moment.step}{moment.mark}" for moment in sorted(found)], 4)
    return {"saved at": f"{listed} ({shortened(prefixes, 3)}; by the names of the files)"}


def counter_facts(files: Checkpoint, parameters: Sequence[Parameter]) -> dict[str, str]:
    """The values of counters, which tell the step; the only contents that are read."""
    wanted = [one for one in parameters if one.kind == "counters" and one.nbytes <= _COUNTER_BYTES]
    values = [_value(spec, content) for spec, content in files.files.counters]
    for parameter in wanted[:_MOST_COUNTERS]:
        if not files.holds(parameter.ranks[0], parameter.name):
            continue  # cut, as no counter is
        path, record = files.records_of(parameter.ranks[0])[parameter.name]
        try:
            with path.open("rb") as stream:
                data = b"".join(_pieces(stream, record.segments))
        except OSError:
            continue  # what is wrong with the file is told where its contents are needed
        values.append(_value(record.spec, data))
    shown = list(dict.fromkeys(filter(None, values)))
    return {"counters": ", ".join(shown)} if shown else {}


def _value(spec: TensorSpec, data: bytes) -> str:
    """A counter and its value; nothing where the bytes cannot be read as numbers."""
    form = _FORMS.get(spec.dtype.name)
    if form is None or len(data) != spec.nbytes or not data:
        return ""
    numbers = struct.unpack(f"<{spec.size}{form}", data)
    return f"{spec.name} {numbers[0] if len(numbers) == 1 else list(numbers)}"


def _pieces(stream: Any, segments: Sequence[Any]) -> Iterator[bytes]:
    for offset, length in segments:
        stream.seek(offset)
        yield stream.read(length)
