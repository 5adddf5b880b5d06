"""Take real models through their jobs on their true shapes: Hugging Face -> ranks -> other ranks -> LoRA -> back.

    python tools/real_models.py llama3_1_8b            # 2 of 32 layers, random numbers: every value is compared
    python tools/real_models.py qwen2_5_7b
    python tools/real_models.py deepseek_v3            # 2 of 61 layers, 8 of 256 experts, a part of the vocabulary
    python tools/real_models.py deepseek_v3 --whole    # all of it, sparse: what each step will take; copies nothing

The shapes are those of configs/<model>/config.json. Every command is printed as it runs, to be taken over. What the
values are compared with is computed here, with numpy, not with the code that is looked at. Works in --folder, which
is made anew and removed at the end unless --keep is given; the models of two layers need 10 GB there.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import checkout
import click
import numpy as np
from real_shapes import BLOCK, Shape, Shapes, huggingface_shapes, random_bits, write_file, write_huggingface

import mindformers_ckpt as mc
from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import plan_conversion
from mindformers_ckpt.engine.machine import MEMORY_PER_PROCESS
from mindformers_ckpt.formats import TensorSpec, layout_file, read_header
from mindformers_ckpt.formats.dtypes import by_name

CONFIGS = checkout.ROOT / "configs"
LORA_RANK, LORA_SCALING = 8, "16/8"


class Jobs(NamedTuple):
    """The meshes of two jobs of a model, and whether a LoRA job follows on the second."""

    first: Mapping[str, int]
    second: Mapping[str, int]
    lora: bool


JOBS = {
    "llama3_1_8b": Jobs({"dp": 1, "mp": 8, "pp": 2}, {"dp": 1, "mp": 8, "pp": 1}, lora=True),
    "qwen2_5_7b": Jobs({"dp": 2, "mp": 4, "pp": 1}, {"dp": 1, "mp": 2, "pp": 2}, lora=True),
    "deepseek_v3": Jobs({"dp": 2, "mp": 4, "pp": 2}, {"dp": 2, "mp": 4, "pp": 1}, lora=False),
}
# The jobs of the whole DeepSeek-V3.
WHOLE = {"deepseek_v3": Jobs({"dp": 8, "mp": 8, "pp": 16}, {"dp": 8, "mp": 8, "pp": 8}, lora=False)}
# What of config.json is smaller where values are compared.
SMALLER: dict[str, dict[str, int]] = {
    "llama3_1_8b": {"num_hidden_layers": 2},
    "qwen2_5_7b": {"num_hidden_layers": 2},
    "deepseek_v3": {
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
        "vocab_size": 16160,
    },
}

# What cuts a weight: by rows (the first dimension), by columns, experts over the data-parallel ranks.
_ROWS = re.compile(
    r"embedding_weight$|lm_head\.weight$|attention\.(wq|wk|wv)\.(weight|bias)$|feed_forward\.(\w+\.)?w[13]\.weight$"
    r"|l2q_(nope|pe)_proj\.weight$|lkv2kv_(k_nope|v)\.weight$|delta_lora_b$"
)
_COLUMNS = re.compile(r"attention\.wo\.weight$|feed_forward\.(\w+\.)?w2\.weight$")
_EXPERTS = {"routed_experts.ffn.w1": ("dp", None, "mp"), "routed_experts.ffn.w2": ("dp", "mp", None)}


def axes_of(name: str, dimensions: int) -> tuple[str | None, ...]:
    """The axis that cuts each dimension of a weight, by MindSpore's name."""
    expert = next((axes for ending, axes in _EXPERTS.items() if name.endswith(ending)), None)
    if expert is not None:
        return expert
    first = "mp" if _ROWS.search(name) else None
    last = "mp" if _COLUMNS.search(name) else None
    return (first, *(None,) * (dimensions - 1)) if last is None else (*(None,) * (dimensions - 1), last)


def write_job(folder: Path, shapes: Mapping[str, Shape], mesh: Mapping[str, int], layers: int) -> None:
    """The strategy files of a job, as MindSpore would write them into output/strategy."""
    inside = {"dp": mesh["dp"], "mp": mesh["mp"]}
    size = mesh["dp"] * mesh["mp"]
    stages: list[dict[str, mc.Layout]] = [{} for _ in range(mesh["pp"])]
    for name, shape in shapes.items():
        match = re.search(r"layers\.(\d+)\.", name)
        layer = int(match[1]) if match else 0 if "embedding" in name else layers - 1
        stage = min(layer, layers - 1) * mesh["pp"] // layers
        stages[stage][name] = mc.Layout.on(inside, *axes_of(name, len(shape)))
    for rank in range(size * mesh["pp"]):
        mc.write_strategy(stages[rank // size], folder / f"ckpt_strategy_rank_{rank}.ckpt", stage=rank // size)


def run(*words: object) -> str:
    """Run a command of ours; prints it and its time, and returns what it printed. Ends the script when it fails."""
    shown = shlex.join(map(str, words))
    click.echo(f"$ mindformers-ckpt {shown}")
    began = time.perf_counter()
    command = [sys.executable, "-m", "mindformers_ckpt", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: the command ended with {done.returncode}")
    click.echo(f"  {time.perf_counter() - began:.1f} s")
    return done.stdout


def write_sparse_ranks(folder: Path, shapes: Mapping[str, Shape], strategy: Path) -> None:
    """The rank files of a job as holes with real heads; the ranks of a stage share one by hard links."""
    read = mc.read_strategy(strategy)
    for stage, layouts in enumerate(read.stages):
        first = stage * read.stage_size
        specs = [
            TensorSpec(name, by_name("bfloat16"), layout.box(shapes[name], 0).shape) for name, layout in layouts.items()
        ]
        original = folder / f"rank_{first}" / f"model_rank_{first}-1_1.ckpt"
        write_file(original, layout_file("ckpt", specs), sparse=True)
        for rank in range(first + 1, first + read.stage_size):
            path = folder / f"rank_{rank}" / f"model_rank_{rank}-1_1.ckpt"
            path.parent.mkdir(parents=True)
            os.link(original, path)


# ------------------------------------------------------------------------------------------- values


def chain(name: str, folder: Path) -> None:
    """Two layers with random numbers through all jobs; every value of the last folder is compared."""
    jobs = JOBS[name]
    config = {**json.loads((CONFIGS / name / "config.json").read_text(encoding="utf-8")), **SMALLER[name]}
    downloaded = huggingface_shapes(config)
    write_huggingface(folder / "hf", config, downloaded, sparse=False)
    shapes = converted_shapes(folder / "hf")
    layers = config["num_hidden_layers"]
    write_job(folder / "strategy_first", shapes, jobs.first, layers)
    write_job(folder / "strategy_second", shapes, jobs.second, layers)

    run(
        "convert",
        "--input_path",
        folder / "hf",
        "--output_path",
        folder / "first",
        "--dst_strategy",
        folder / "strategy_first",
    )
    source = ("--src_checkpoint", folder / "first", "--src_strategy", folder / "strategy_first")
    run("transform", *source, "--dst_checkpoint_dir", folder / "second", "--dst_strategy", folder / "strategy_second")
    shutil.rmtree(folder / "first")
    if jobs.lora:
        trained = {**shapes, **adapters(shapes)}
        write_job(folder / "strategy_lora", trained, jobs.second, layers)
        add_adapters(folder, trained)
        shutil.rmtree(folder / "second")
        source = ("--src_ckpt_path_or_dir", folder / "lora", "--src_ckpt_strategy", folder / "strategy_lora")
        run("merge-lora", *source, "--dst_ckpt_dir", folder / "merged", "--lora_scaling", LORA_SCALING)
        shutil.rmtree(folder / "lora")
    else:
        source = ("--src_checkpoint", folder / "second", "--src_strategy", folder / "strategy_second")
        run("transform", *source, "--dst_checkpoint_dir", folder / "merged")
        shutil.rmtree(folder / "second")
    whole = folder / "merged" / "rank_0" / "checkpoint_0.ckpt"
    back = ("--output_path", folder / "back", "--hf_config", folder / "hf")
    run("convert", "--reversed", "--model", config["model_type"], "--input_path", whole, *back)
    click.echo(compare(folder / "back", downloaded, adapters(shapes) if jobs.lora else {}, folder / "hf"))


def converted_shapes(huggingface: Path) -> dict[str, Shape]:
    """The tensors that the conversion makes: MindSpore's name -> whole shape."""
    plan = plan_conversion(Request(None, huggingface), Path("all.ckpt"))
    return {spec.name: spec.shape for target in plan.targets for spec in target.tensors}


def adapters(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The factors that a LoRA job trains beside query and value: name -> whole shape."""
    found: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if re.search(r"attention\.w[qv]\.weight$", name):
            module = name[: -len(".weight")]
            found[f"{module}.mindpet_delta_lora_a"] = (LORA_RANK, shape[1])
            found[f"{module}.mindpet_delta_lora_b"] = (shape[0], LORA_RANK)
    return found


def add_adapters(folder: Path, trained: Mapping[str, Shape]) -> None:
    """The checkpoint of a LoRA job: the files of `second`, each with its rank's parts of the factors beside."""
    strategy = mc.read_strategy(folder / "strategy_lora")
    for rank in range(strategy.rank_count):
        (source,) = (folder / "second" / f"rank_{rank}").iterdir()
        held = read_header(source).tensors
        parts = {}
        for name, layout in strategy.stages[strategy.stage_of(rank)].items():
            if name not in held:
                spec = TensorSpec(name, by_name("bfloat16"), trained[name])
                box = layout.box(spec.shape, rank % strategy.stage_size)
                parts[name] = random_bits(name, spec)[tuple(map(slice, *box))]
        specs = [record.spec for record in held.values()]
        specs += [TensorSpec(name, by_name("bfloat16"), part.shape) for name, part in parts.items()]
        made = layout_file("ckpt", specs)
        path = folder / "lora" / f"rank_{rank}" / f"lora_rank_{rank}-1_1.ckpt"
        write_file(path, made, sparse=True)
        with path.open("r+b") as stream, source.open("rb") as old:
            for name, record in made.tensors.items():
                content = parts[name].tobytes() if name in parts else None
                for number, segment in enumerate(record.segments):
                    if content is None:
                        piece = os.pread(old.fileno(), segment.length, held[name].segments[number].offset)
                    else:
                        piece = content
                    os.pwrite(stream.fileno(), piece, segment.offset)


def compare(back: Path, downloaded: Shapes, factors: Mapping[str, Shape], original: Path) -> str:
    """Hold every tensor that came back against what numpy makes of the downloaded numbers; ends at a fault."""
    import ml_dtypes

    adapted = {}
    if factors:
        words = {"wq": "q_proj", "wv": "v_proj"}
        for name in factors:
            module = name.rpartition(".")[0]
            layer, word = re.findall(r"layers\.(\d+)\.attention\.(\w+)$", module)[0]
            adapted[f"model.layers.{layer}.self_attn.{words[word]}.weight"] = module
    equal = merged = 0
    with mc.open_checkpoint(back) as found:
        wanted = {name: tensor for name, tensor in downloaded.items() if not name.endswith("_scale_inv")}
        if set(found) != set(wanted):
            raise SystemExit(f"error: other names came back: {sorted(set(found) ^ set(wanted))[:20]}")
        for name, (dtype, shape) in wanted.items():
            spec = TensorSpec(name, by_name(dtype), shape)
            expected = random_bits(name, spec).view(getattr(ml_dtypes, dtype, dtype))
            if dtype.startswith("float8"):
                factor_shape = downloaded[f"{name}_scale_inv"][1]
                factor = random_bits(f"{name}_scale_inv", TensorSpec("", by_name("float32"), factor_shape)).view(
                    np.float32
                )
                spread = factor.repeat(BLOCK, 0)[: shape[0]].repeat(BLOCK, 1)[:, : shape[1]]
                expected = (expected.astype(np.float32) * spread).astype(ml_dtypes.bfloat16)
            got = np.asarray(found[name])
            if name in adapted:
                merged += 1
                sides = [f"{adapted[name]}.mindpet_delta_lora_{side}" for side in "ab"]
                a, b = (
                    random_bits(side, TensorSpec("", by_name("bfloat16"), factors[side]))
                    .view(ml_dtypes.bfloat16)
                    .astype(np.float32)
                    for side in sides
                )
                # Sums of eight products may be rounded in another order: at most one step of bfloat16.
                sum_ = (expected.astype(np.float32) + 2.0 * (b @ a)).astype(ml_dtypes.bfloat16)
                steps = np.abs(got.view(np.int16).astype(np.int32) - sum_.view(np.int16).astype(np.int32))
                if int(steps.max()) > 1 or np.array_equal(got.view(np.uint16), expected.view(np.uint16)):
                    raise SystemExit(f"error: {name} is not W + s B A: {int(steps.max())} steps of bfloat16 apart")
            elif got.dtype == expected.dtype and got.tobytes() == expected.tobytes():
                equal += 1
            else:
                raise SystemExit(f"error: {name} came back with other values")
    return f"{equal} tensors came back bit for bit, {merged} with their adapters merged; {original} -> {back}"


# ------------------------------------------------------------------------------------------- the whole model


def whole(name: str, folder: Path) -> None:
    """All of the model, sparse: what each step reads, writes and needs, and how long this machine's disk would take."""
    jobs = WHOLE.get(name, JOBS[name])
    config = json.loads((CONFIGS / name / "config.json").read_text(encoding="utf-8"))
    write_huggingface(folder / "hf", config, huggingface_shapes(config), sparse=True)
    shapes = converted_shapes(folder / "hf")
    layers = config["num_hidden_layers"]
    for job, mesh in (("first", jobs.first), ("second", jobs.second)):
        write_job(folder / f"strategy_{job}", shapes, mesh, layers)
        write_sparse_ranks(folder / job, shapes, folder / f"strategy_{job}")
    rate = copy_rate(folder)
    huggingface = ("--input_path", folder / "hf", "--output_path", folder / "made")
    first = ("--src_checkpoint", folder / "first", "--src_strategy", folder / "strategy_first")
    second = ("--src_checkpoint", folder / "second", "--src_strategy", folder / "strategy_second")
    to_second = ("--dst_strategy", folder / "strategy_second", "--dst_checkpoint_dir", folder / "made")
    # Holes are equal everywhere, so that contents would contradict any strategy.
    steps = (
        (
            f"Hugging Face -> {size_of(jobs.first)}",
            ("convert", *huggingface, "--dst_strategy", folder / "strategy_first", "--dry-run"),
        ),
        (f"{size_of(jobs.first)} -> {size_of(jobs.second)}", ("plan", *first, *to_second, "--contents", "off")),
        (
            f"{size_of(jobs.second)} -> complete",
            ("plan", *second, "--dst_checkpoint_dir", folder / "made", "--contents", "off"),
        ),
    )
    rows: list[tuple[str, ...]] = [("step", "reads", "writes", "memory", "planned in", "copied in, here")]
    for title, words in steps:
        began = time.perf_counter()
        report = json.loads(run(*words, "--json"))
        seconds = time.perf_counter() - began
        memory = report.get("memory_needed", MEMORY_PER_PROCESS)
        copying = max(report["bytes_read"], report["bytes_written"]) / rate
        sizes = [f"{report[key] / 1e9:,.1f} GB" for key in ("bytes_read", "disk_needed")]
        rows.append((title, *sizes, f"{memory / 1e6:.0f} MB", f"{seconds:.1f} s", in_words(copying)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    click.echo()
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    free = shutil.disk_usage(folder).free
    click.echo(f"\nThis disk copies {rate / 1e9:.2f} GB/s and has {free / 1e9:.0f} GB free. Nothing was copied.")


def size_of(mesh: Mapping[str, int]) -> str:
    """The ranks of a mesh, in words."""
    axes = " ".join(f"{axis}{extent}" for axis, extent in mesh.items() if extent > 1)
    return f"{mesh['dp'] * mesh['mp'] * mesh['pp']} ranks ({axes})"


def in_words(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def copy_rate(folder: Path) -> float:
    """Bytes a second that a file is copied with here, until it is on the disk."""
    size = 256 << 20
    source, target = folder / "rate_a", folder / "rate_b"
    source.write_bytes(os.urandom(size))
    began = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("r+b") as stream:
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - began
    source.unlink()
    target.unlink()
    return size / seconds


@click.command(help=__doc__ and __doc__.partition("\n\n")[0])
@click.argument("model", type=click.Choice(list(JOBS)))
@click.option("--whole", "is_whole", is_flag=True, help="Plan all of the model, sparse; copy nothing.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("output/real_models"), show_default=True)
@click.option("--keep", is_flag=True, help="Leave what was made in the folder.")
def main(model: str, is_whole: bool, folder: Path, keep: bool) -> None:
    place = folder / (f"{model}_whole" if is_whole else model)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        (whole if is_whole else chain)(model, place)
    finally:
        if not keep:
            shutil.rmtree(place)


if __name__ == "__main__":
    main()
