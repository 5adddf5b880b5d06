"""Plan the re-slicing of a DeepSeek-V3-sized checkpoint over thousands of ranks, on one machine.

    python tools/simulate_scale.py                       # 2048 ranks (pipeline 16) -> 1024 ranks (pipeline 8)
    python tools/simulate_scale.py --table               # 64 … 16384 source ranks, and a tensor for each expert
    python tools/simulate_scale.py --merge 4096          # merging this many strategy files

The files are sparse: their headers are real, their contents are holes, and the ranks of a stage share one by hard
links. Nothing is copied; what is measured is the way up to the first byte: opening the source, the plan of one target
rank (`--ranks`), the whole plan, its digest, the cut into tasks of equal size and by rank, making what all ranks are
told of the plan (`auto_trans_save: False`), the reading of the longest share by its rank, the kB of that share, and
memory. Seconds are those of the processor (user and system): time on the clock tells more of what else the machine
does.
"""

from __future__ import annotations

import gc
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import checkout  # noqa: F401 - finds the package of this checkout
import click

from mindformers_ckpt.engine.sinks import FileSink
from mindformers_ckpt.engine.tasks import cut_into_tasks
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.planning.digest import digest_of
from mindformers_ckpt.planning.model import TargetFile
from mindformers_ckpt.planning.rank_plan import decode_rank, encode_ranks
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.strategy.files import merge_strategies, rank_file_name, write_strategy
from mindformers_ckpt.strategy.model import Strategy

LAYERS, DENSE_LAYERS, EXPERTS = 61, 3, 256
HIDDEN, FFN, MOE_FFN, VOCAB = 7168, 18432, 2048, 129280
HEADS, Q_RANK, KV_RANK, NOPE, ROPE, V = 128, 1536, 512, 128, 64, 128
COPIES = ("", "fp32_master.", "adam_m.", "adam_v.")  # bf16 weights, fp32 master weights and moments: 14 bytes each


class Mesh(NamedTuple):
    """Ranks of a job: data parallel x model parallel in a stage, and pipeline stages."""

    dp: int
    mp: int
    pp: int

    @property
    def ranks(self) -> int:
        return self.dp * self.mp * self.pp


class Weight(NamedTuple):
    """A weight of the model: the layer it belongs to, its shape, and the axis that cuts each dimension."""

    name: str
    layer: int
    shape: tuple[int, ...]
    cut: tuple[str | None, ...]


def weights(stacked: bool = True) -> Iterator[Weight]:
    """The weights of DeepSeek-V3 without the MTP layer, with stacked experts or a tensor for each expert."""
    yield Weight("model.tok_embeddings.embedding_weight", 0, (VOCAB, HIDDEN), ("mp", None))
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        attention = {
            "attention_norm.weight": ((HIDDEN,), (None,)),
            "ffn_norm.weight": ((HIDDEN,), (None,)),
            "attention.q2l_proj.weight": ((Q_RANK, HIDDEN), (None, None)),
            "attention.lq_norm.weight": ((Q_RANK,), (None,)),
            "attention.l2q_proj.weight": ((HEADS * (NOPE + ROPE), Q_RANK), ("mp", None)),
            "attention.kv2l.weight": ((KV_RANK + ROPE, HIDDEN), (None, None)),
            "attention.lkv_norm.weight": ((KV_RANK,), (None,)),
            "attention.lkv2kv.weight": ((HEADS * (NOPE + V), KV_RANK), ("mp", None)),
            "attention.wo.weight": ((HIDDEN, HEADS * V), (None, "mp")),
        }
        dense = {
            "feed_forward.w1.weight": ((FFN, HIDDEN), ("mp", None)),
            "feed_forward.w2.weight": ((HIDDEN, FFN), (None, "mp")),
            "feed_forward.w3.weight": ((FFN, HIDDEN), ("mp", None)),
        }
        sparse = {
            "feed_forward.routed_experts.router.dense.weight": ((EXPERTS, HIDDEN), (None, None)),
            **_experts(stacked),
            "feed_forward.shared_experts.w1.weight": ((MOE_FFN, HIDDEN), ("mp", None)),
            "feed_forward.shared_experts.w2.weight": ((HIDDEN, MOE_FFN), (None, "mp")),
            "feed_forward.shared_experts.w3.weight": ((MOE_FFN, HIDDEN), ("mp", None)),
        }
        for name, (shape, cut) in {**attention, **(dense if layer < DENSE_LAYERS else sparse)}.items():
            yield Weight(prefix + name, layer, shape, cut)
    yield Weight("model.norm_out.weight", LAYERS - 1, (HIDDEN,), (None,))
    yield Weight("lm_head.weight", LAYERS - 1, (VOCAB, HIDDEN), ("mp", None))


def _experts(stacked: bool) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """The experts of a layer: shape and cut by name."""
    if stacked:
        return {
            "feed_forward.routed_experts.ffn.w1.weight": ((EXPERTS, HIDDEN, 2 * MOE_FFN), ("dp", None, "mp")),
            "feed_forward.routed_experts.ffn.w2.weight": ((EXPERTS, MOE_FFN, HIDDEN), ("dp", "mp", None)),
        }
    experts: dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]] = {}
    for expert in range(EXPERTS):
        prefix = f"feed_forward.routed_experts.{expert}."
        experts[prefix + "w1.weight"] = ((HIDDEN, 2 * MOE_FFN), (None, "mp"))
        experts[prefix + "w2.weight"] = ((MOE_FFN, HIDDEN), ("mp", None))
    return experts


def strategy_of(mesh: Mesh, stacked: bool = True) -> Strategy:
    """The strategy of a job: tensor parallel, experts over data parallel, the rest with optimizer shards."""
    stages: list[dict[str, Layout]] = [{} for _ in range(mesh.pp)]
    axes = {"dp": mesh.dp, "mp": mesh.mp}
    for weight in weights(stacked):
        spare = "dp" not in weight.cut and weight.shape[0] % (mesh.dp * mesh.mp) == 0
        layout = Layout.on(axes, *weight.cut, optimizer_shards=mesh.dp if spare and len(weight.shape) > 1 else 0)
        for copy in COPIES:
            stages[weight.layer * mesh.pp // LAYERS][copy + weight.name] = layout
    return Strategy.of_stages(tuple(stages), f"simulated dp{mesh.dp} mp{mesh.mp} pp{mesh.pp}")


def write_source(folder: Path, strategy: Strategy, stacked: bool = True) -> None:
    """The rank files of a job, sparse."""
    shapes = {weight.name: weight.shape for weight in weights(stacked)}
    for stage, layouts in enumerate(strategy.stages):
        shards = []
        for name, layout in layouts.items():
            weight = name if name in shapes else name.partition(".")[2]
            dtype = by_name("bfloat16" if weight == name else "float32")
            shards.append(TensorSpec(name, dtype, layout.box(shapes[weight], 0).shape))
        specs = (*shards, TensorSpec("global_step", by_name("int32"), (1,)))
        ranks = range(stage * strategy.stage_size, (stage + 1) * strategy.stage_size)
        files = [TargetFile(f"rank_{rank}/model_{rank}.ckpt", rank, "ckpt", specs) for rank in ranks]
        sink = FileSink(folder, files)
        sink.prepare(0, sparse=True)
        for file in range(1, len(files)):
            sink.path(file).parent.mkdir()
            os.link(sink.path(0), sink.path(file))


def mesh_of(ranks: int, stages: int) -> Mesh:
    """A mesh of this many ranks, model parallel at most 8."""
    mp = min(8, ranks // stages)
    return Mesh(ranks // stages // mp, mp, stages)


def measure(folder: Path, source: tuple[int, int], target: tuple[int, int], stacked: bool) -> str:
    """Simulate a pair of jobs of (ranks, stages); a row of figures. To be run in a process of its own."""
    source_strategy = strategy_of(mesh_of(*source), stacked)
    target_strategy = strategy_of(mesh_of(*target), stacked)
    shutil.rmtree(folder, ignore_errors=True)
    write_source(folder, source_strategy, stacked)
    gc.disable()  # as the command line does
    clock = Clock()
    checkpoint = Checkpoint(find_source(folder), source_strategy)
    tensors = checkpoint.tensors()
    clock.lap()
    build_plan(checkpoint, target_strategy, ranks=[target[0] // 2])
    clock.lap()
    plan = build_plan(checkpoint, target_strategy)
    clock.lap()
    digest_of(plan)
    clock.lap()
    cut_into_tasks(plan)
    clock.lap()
    cut_into_tasks(plan, by_rank=True)
    clock.lap()
    longest = max(encode_ranks(plan, folder, checkpoint.header), key=len)
    clock.lap()
    decode_rank(longest, folder)
    clock.lap()
    shutil.rmtree(folder)
    size = sum(tensor.spec.nbytes for tensor in tensors.values()) / 1e12
    pairs = sum(len(transfer.targets) for transfer in plan.transfers)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return (
        f"{source[0]:6d} ({source[1]:2d}) -> {target[0]:5d} ({target[1]:2d})  {len(tensors):6d}  {size:6.2f}"
        f"{''.join(f'{seconds:9.2f}' for seconds in clock.laps)}  {len(longest) / 1e3:6.0f}  {peak:6.2f}"
        f"  {pairs:9d}"
    )


class Clock:
    """Seconds of the processor between laps."""

    def __init__(self) -> None:
        self.laps: list[float] = []
        self._last = time.process_time()

    def lap(self) -> None:
        now = time.process_time()
        self.laps.append(now - self._last)
        self._last = now


HEADER = (
    "source ranks (stages) -> target  tensors      TB     open   1 rank     plan   digest    tasks  by rank     told"
    "      own      kB      GB     pieces"
)


def merge(folder: Path, count: int) -> str:
    """Merge the strategy files of a job of `count` ranks."""
    shutil.rmtree(folder, ignore_errors=True)
    strategy = strategy_of(mesh_of(count, 16))
    for stage, layouts in enumerate(strategy.stages):
        first = folder / rank_file_name(stage * strategy.stage_size)
        write_strategy(layouts, first, stage)
        data = first.read_bytes()
        for rank in range(stage * strategy.stage_size, (stage + 1) * strategy.stage_size):
            (folder / rank_file_name(rank)).write_bytes(data)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    started = time.perf_counter()
    merged = merge_strategies(folder, folder / "merged_ckpt_strategy.ckpt")
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return f"{count} strategy files ({size:.0f} MB, {len(merged.names())} layouts) merged in {seconds:.2f} s"


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("output/scale"), show_default=True)
@click.option("--table", is_flag=True, help="A row for 64, 128, … 16384 source ranks, and for a tensor an expert.")
@click.option("--merge", "merged", type=int, help="Merge this many strategy files instead.")
@click.option("--row", nargs=4, type=int, help="Source ranks and stages, target ranks and stages.")
@click.option("--apart", is_flag=True, help="With --row: a tensor for each expert, not one for all.")
def main(folder: Path, table: bool, merged: int | None, row: tuple[int, int, int, int] | None, apart: bool) -> None:
    """Simulate, and print a table."""
    if merged:
        click.echo(merge(folder, merged))
        return
    if row:
        click.echo(measure(folder, row[:2], row[2:], not apart))
        return
    counts = (64, 128, 256, 512, 1024, 2048, 4096, 16384)
    rows = [[str(count), "16", str(count // 2), "8"] for count in counts] + [["256", "16", "128", "8", "--apart"]]
    click.echo(HEADER)
    for wanted in rows if table else [["2048", "16", "1024", "8"]]:
        subprocess.run([sys.executable, __file__, "--folder", str(folder), "--row", *wanted], check=True)


if __name__ == "__main__":
    main()
