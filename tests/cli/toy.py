"""A checkpoint small enough to cut by hand, its strategies, and the command line as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from forks import template
from recorded import Tensor, random_bits, write_ranks, write_tensors
from safetensors.numpy import save_file

from mindformers_ckpt.cli.main import _COMMANDS
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.files import write_strategy

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = ROOT / "tools"

# What commands import while they run.
IMPORTS = (
    "numpy.random",
    "xxhash",
    "ml_dtypes",
    "psutil",
    "google.protobuf.descriptor_pb2",
    "google.protobuf.message_factory",
    *(f"mindformers_ckpt.cli.{module}" for module, _ in _COMMANDS.values()),
)

_random = np.random.default_rng(7)
MODEL: dict[str, Tensor] = {
    "embedding.weight": random_bits(by_name("bfloat16"), (8, 6), _random),
    "layers.0.weight": random_bits(by_name("float32"), (8, 6), _random),
    "layers.1.weight": random_bits(by_name("float32"), (8, 6), _random),
    "norm.bias": random_bits(by_name("float32"), (6,), _random),
    "global_step": random_bits(by_name("int32"), (), _random),
}

_MESH = {"dp": 2, "mp": 2}
DP2MP2 = {
    "embedding.weight": Layout.on(_MESH, "mp", None),
    "layers.0.weight": Layout.on(_MESH, None, "mp"),
    "layers.1.weight": Layout.on(_MESH, None, "mp"),
    "norm.bias": Layout.on(_MESH, None),
}
_STAGE = {"mp": 2}
MP2PP2 = (
    {"embedding.weight": Layout.on(_STAGE, None, "mp"), "layers.0.weight": Layout.on(_STAGE, "mp", None)},
    {"layers.1.weight": Layout.on(_STAGE, "mp", None), "norm.bias": Layout.on(_STAGE, None)},
)


def _part(name: str, *index: slice) -> Tensor:
    dtype, bits = MODEL[name]
    return Tensor(dtype, bits[index])


def dp2mp2() -> dict[int, dict[str, Tensor]]:
    """What the ranks of two data-parallel groups hold, cut by hand."""
    everything, ranks = slice(None), {}
    for rank in range(4):
        rows, columns = slice(4 * (rank % 2), 4 * (rank % 2) + 4), slice(3 * (rank % 2), 3 * (rank % 2) + 3)
        ranks[rank] = {
            "embedding.weight": _part("embedding.weight", rows),
            "layers.0.weight": _part("layers.0.weight", everything, columns),
            "layers.1.weight": _part("layers.1.weight", everything, columns),
            "norm.bias": MODEL["norm.bias"],
            "global_step": MODEL["global_step"],
        }
    return ranks


def mp2pp2() -> dict[int, dict[str, Tensor]]:
    """What the ranks of two pipeline stages hold, cut by hand."""
    everything, ranks = slice(None), {}
    for rank in range(4):
        rows, columns = slice(4 * (rank % 2), 4 * (rank % 2) + 4), slice(3 * (rank % 2), 3 * (rank % 2) + 3)
        if rank < 2:
            own = {
                "embedding.weight": _part("embedding.weight", everything, columns),
                "layers.0.weight": _part("layers.0.weight", rows),
            }
        else:
            own = {"layers.1.weight": _part("layers.1.weight", rows), "norm.bias": MODEL["norm.bias"]}
        ranks[rank] = {**own, "global_step": MODEL["global_step"]}
    return ranks


def write_toy(folder: Path) -> None:
    """Write full.ckpt, full.safetensors, the strategies dp2mp2/ and mp2pp2/, and the source folder sharded/."""
    write_tensors(folder / "full.ckpt", MODEL)
    write_tensors(folder / "full.safetensors", MODEL)
    write_ranks(folder / "sharded", dp2mp2())
    for rank in range(4):
        write_strategy(DP2MP2, folder / f"dp2mp2/ckpt_strategy_rank_{rank}.ckpt")
        write_strategy(MP2PP2[rank // 2], folder / f"mp2pp2/ckpt_strategy_rank_{rank}.ckpt", stage=rank // 2)


class Result:
    """What a finished command said."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.out}--- stderr\n{self.err}"


def environment(extra: Mapping[str, str] = {}) -> dict[str, str]:
    """The environment of a user's shell in which this interpreter is `python`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **extra}


def shell(command: str, folder: Path, **extra: str) -> Result:
    """Run a line of bash in a folder."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment(extra), capture_output=True, text=True, timeout=120
    )
    return Result(done.returncode, done.stdout, done.stderr)


def command(arguments: Iterable[str | Path], folder: Path) -> Result:
    """Run `mindformers-ckpt` with arguments in a folder: a process, whose imports are done."""
    words = [str(ROOT / "mindformers_ckpt" / "__main__.py"), *map(str, arguments)]
    process = template("mindformers_ckpt.cli.main", *IMPORTS, warnings="error").start(words, environment(), folder)
    try:
        out, err = process.communicate(timeout=120)
        return Result(process.wait(), out, err)
    finally:
        process.kill()


def invoke(arguments: Iterable[str | Path], folder: Path) -> Result:
    """`command` in this process, which is quicker."""
    from click.testing import CliRunner

    from mindformers_ckpt.cli.main import cli

    before = Path.cwd()
    apart: dict[str, Any] = {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}
    os.chdir(folder)
    try:
        done = CliRunner(**apart).invoke(cli, list(map(str, arguments)))
    finally:
        os.chdir(before)
    return Result(done.exit_code, done.stdout, done.stderr)


def listing(folder: Path) -> list[str]:
    """Every path below a folder, hidden ones included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write_llama(folder: Path) -> None:
    """Write a Hugging Face Llama of one layer, all zeros."""
    folder.mkdir()
    shapes = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,), "lm_head.weight": (16, 8)}
    layer = {
        **{f"self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"},
        "mlp.gate_proj.weight": (12, 8),
        "mlp.up_proj.weight": (12, 8),
        "mlp.down_proj.weight": (8, 12),
        "input_layernorm.weight": (8,),
        "post_attention_layernorm.weight": (8,),
    }
    shapes.update({f"model.layers.0.{name}": shape for name, shape in layer.items()})
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, folder / "model.safetensors")
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = {"model_type": "llama", **sizes, "intermediate_size": 12, "vocab_size": 16}
    (folder / "config.json").write_text(json.dumps(config))
