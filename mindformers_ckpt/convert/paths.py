"""Paths that cannot be what they are given as: of the other side, or without weights in a known format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mindformers_ckpt.errors import ConfigError, PlanError
from mindformers_ckpt.sources.find import folders_with_weights
from mindformers_ckpt.sources.listing import Listing, is_strategy_file
from mindformers_ckpt.strategy.iterations import is_save_path

_READ = (".safetensors", ".bin", ".pth", ".pt", ".distcp")
# Files that stand in repositories in place of the weights, and what to do about them.
_FOREIGN = (
    ((".gguf", ".ggml"), "GGUF", "take the repository that it was made from"),
    ((".h5", ".tflite"), "TensorFlow", "save it from PyTorch (from_pretrained(…, from_tf=True), then save_pretrained)"),
    ((".msgpack",), "Flax", "save it from PyTorch (from_pretrained(…, from_flax=True), then save_pretrained)"),
    ((".onnx",), "ONNX", "take the repository that it was made from"),
    ((".ckpt",), "MindSpore's .ckpt", "give --reversed to convert to Hugging Face"),
    ((".incomplete", ".crdownload", ".part", ".aria2", ".tmp"), "unfinished downloads", "download it again"),
)


def check_path(path: Path, reverse: bool) -> None:
    """Refuse a path that is plainly not what is to be read. Raises ConfigError or PlanError with the next step."""
    if reverse:
        return  # the readers of MindSpore files say so themselves
    if path.is_file() and is_strategy_file(path.name):
        raise ConfigError(f"{path} is a strategy file; give the weights")
    if path.suffix == ".ckpt" and path.is_file():
        raise ConfigError(f"{path} is a MindSpore checkpoint; give --reversed to convert it to Hugging Face")
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
        if not any(entry.suffix in _READ for entry in files):
            raise PlanError(f"{path} holds no .safetensors, .bin, .pth or .pt file; {_next_step(path, files)}")


def _next_step(path: Path, files: Iterable[Path]) -> str:
    names = [entry.name for entry in files]
    if is_save_path([entry.name for entry in path.iterdir()]):
        return "it is a checkpoint 2.0 of MindFormers: give --reversed to convert it to Hugging Face"
    if names and all(map(is_strategy_file, names)):
        return "what is there are strategy files; give the folder of the weights"
    for suffixes, format_name, step in _FOREIGN:
        found = [name for name in names if name.endswith(suffixes)]
        if found:
            return f"what is there is {format_name} ({found[0]}): {step}"
    if any(entry.is_dir() and entry.name.startswith("rank_") for entry in path.iterdir()):
        return "it has rank folders of MindSpore: merge them with `mindformers-ckpt transform`, then give --reversed"
    inside = folders_with_weights(Listing(path))
    if inside:
        return f"give {inside}"
    if "config.json" in names:
        return "it has a config.json, but no weights: were they left out when the repository was cloned?"
    return "give the folder of a cloned Hugging Face repository"
