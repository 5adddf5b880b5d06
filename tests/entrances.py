"""The four ways into the library, called alike: a path in, tensors or a message out."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from recorded import read_tensors
from small_llama import ADAPTED, HUGGING_FACE_NAMES, weights, write_config, write_mindspore, write_pytorch

from mindformers_ckpt.cli.main import cli
from mindformers_ckpt.errors import CheckpointError

HAS_MINDSPORE = importlib.util.find_spec("mindspore") is not None
DELTA = 2.0  # what the adapter adds to every element of the weight that it is for


@dataclass(frozen=True)
class Given:
    """What a user has and asks for.

    Attributes:
        path: of the checkpoint.
        strategy: the one it was saved under, None for complete weights.
        step: which files of rank folders.
        hugging_face: whether the tensors have Hugging Face's names.
    """

    path: Path | str
    strategy: Path | None = None
    step: str | None = None
    resume: bool = False
    hugging_face: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of it: the tensors, or none after an error; and everything that was said."""

    tensors: Mapping[str, Any] | None
    said: str


def transform(given: Given, scratch: Path) -> Outcome:
    options = [] if given.strategy is None else ["--src-strategy", given.strategy]
    done = _run("transform", "--src-checkpoint", given.path, *options, *_step(given), out=scratch / "out")
    return _outcome(done, scratch / "out")


def convert(given: Given, scratch: Path) -> Outcome:
    """From Hugging Face, or with `--reversed` to it; MindSpore weights have no config.json, one is given."""
    if given.hugging_face:
        done = _run("convert", "--input-path", given.path, "--output-path", scratch / "out.ckpt", *_step(given))
        return _outcome(done, scratch / "out.ckpt")
    described = ("--model", "llama", "--hf-config", write_config(scratch / "described"))
    paths = ("--input-path", given.path, "--output-path", scratch / "out")
    done = _run("convert", "--reversed", *described, *_step(given), *paths)
    return _outcome(done, scratch / "out")


def merge_lora(given: Given, scratch: Path) -> Outcome:
    """An adapter of rank 1 that adds DELTA, under names like those of the weights."""
    rows, columns = weights(0)[ADAPTED].shape
    up, down = np.ones((rows, 1), np.float32), np.ones((1, columns), np.float32)
    if given.hugging_face:
        module = f"base_model.model.{HUGGING_FACE_NAMES[ADAPTED][: -len('.weight')]}"
        factors = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        adapter = write_pytorch(scratch / "adapter" / "adapter_model.safetensors", factors)
    else:
        module = f"{ADAPTED[: -len('.weight')]}.mindpet_delta_lora"
        adapter = write_mindspore(scratch / "adapter.ckpt", {f"{module}_a": down, f"{module}_b": up})
    options = [] if given.strategy is None else ["--src-ckpt-strategy", given.strategy]
    paths = ("--src-ckpt-path-or-dir", given.path, "--adapter", adapter, "--dst-ckpt-dir", scratch / "out")
    done = _run("merge-lora", *paths, "--lora-scaling", DELTA, *options, *_step(given))
    return _outcome(done, scratch / "out" / "rank_0")


def hook(given: Given, scratch: Path, *, auto: bool = True) -> Outcome:
    """The loader hook on one card, into a network of the model."""
    if not HAS_MINDSPORE:
        pytest.skip("the hook needs MindSpore")
    from mindformers_ckpt import CheckpointHook
    from mindformers_ckpt.job.config import Config

    resume: Any = True if given.resume else given.step
    if given.step is not None and re.fullmatch(r"\d+_\d+", given.step):
        resume = f"any-{given.step}"
    keys = {
        "load_checkpoint": given.path,
        "src_strategy_path_or_dir": given.strategy,
        "auto_trans_ckpt": auto,
        "resume_training": resume,
        "output_dir": scratch / "output",
        "use_parallel": False,
    }
    network = _network()
    with _Log() as said:
        try:
            loading = CheckpointHook(Config.from_mapping(keys))
            loading.prepare()
            loading.load(network)
        except CheckpointError as error:
            return Outcome(None, str(error))
    found = {parameter.name: parameter.asnumpy() for _, parameter in network.parameters_and_names()}
    return Outcome(found, "\n".join(said.lines))


def direct_hook(given: Given, scratch: Path) -> Outcome:
    """The hook without `auto_trans_ckpt`: the files are loaded as they are."""
    return hook(given, scratch, auto=False)


ENTRANCES: Mapping[str, Callable[[Given, Path], Outcome]] = {
    "transform": transform,
    "convert": convert,
    "merge-lora": merge_lora,
    "hook": hook,
    "hook, as it is": direct_hook,
}


def expected(tag: int, entrance: str, given: Given) -> dict[str, Any]:
    """The tensors that an entrance gives of a checkpoint of `weights(tag)`."""
    tensors = weights(tag)
    if entrance == "merge-lora":
        tensors[ADAPTED] = tensors[ADAPTED] + np.float32(DELTA)
    keeps_names = entrance in ("transform", "merge-lora")
    if given.hugging_face if keeps_names else entrance == "convert" and not given.hugging_face:
        return {HUGGING_FACE_NAMES[name]: array for name, array in tensors.items()}
    return tensors


def _step(given: Given) -> list[str]:
    return [] if given.step is None else ["--step", given.step]


def _run(command: str, *arguments: object, out: Path | None = None) -> Any:
    target = [] if out is None else ["--dst-checkpoint-dir", str(out)]
    return CliRunner().invoke(cli, [command, *map(str, arguments), *target])


def _outcome(done: Any, made: Path) -> Outcome:
    """The result of a command. Any exception but those that the command line reports is a failure of the test."""
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    if done.exit_code:
        assert not made.exists()
        return Outcome(None, done.output)
    files = [made] if made.is_file() else sorted(path for path in made.rglob("*") if path.suffix in _READ)
    tensors: dict[str, Any] = {}
    for file in files:
        for name, tensor in read_tensors(file).items():
            assert name not in tensors
            tensors[name] = np.ascontiguousarray(tensor.bits).view(np.float32)
    return Outcome(tensors, done.output)


_READ = (".ckpt", ".safetensors")


def _network() -> Any:
    """A network of MindSpore with the parameters of the model, all zero."""
    import mindspore
    from mindspore import Parameter, nn

    class Net(nn.Cell):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(auto_prefix=False)
            for name, array in weights(0).items():
                start = mindspore.Tensor(np.zeros(array.shape, np.float32))
                self.insert_param_to_cell(name.replace(".", "_"), Parameter(start, name=name))

    return Net()


class _Log(logging.Handler):
    """The warnings of the library while it is entered."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> _Log:
        logging.getLogger("mindformers_ckpt").addHandler(self)
        return self

    def __exit__(self, *reason: object) -> None:
        logging.getLogger("mindformers_ckpt").removeHandler(self)
