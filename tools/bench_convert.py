"""Measure conversion: ours both ways and in one pass, `cp` of the same bytes, and the guide's way, in turn.

    python tools/bench_convert.py --gb 2 --guide-python .venv-guide/bin/python

Makes the Hugging Face folder of a Llama with random bf16 weights (several safetensors files, their index and a
config.json) and runs every way as a whole process, process start included, page cache warm. Prints medians of wall
and CPU time, the largest peak of private memory, and how the wall time compares with `cp -r` of the folder and with
the guide's way. Absolute times of a shared machine mean little: read the ratios.

The guide's way is what MindSpore Transformers' converter of Llama does in one process: the model is made by
`LlamaForCausalLM.from_pretrained`, its tensors are renamed one by one, and `mindspore.save_checkpoint` writes them;
back, `mindspore.load_checkpoint` and `torch.save`. It needs an interpreter that has mindspore, torch and transformers
(`pip install 'mindspore==2.10.0' 'numpy<2' torch transformers`), and is left out without `--guide-python`. It runs
once, and its file must hold the very tensors of ours.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import checkout  # noqa: F401 - finds the package of this checkout
import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from bench_transform import LAYERS, Measured, machine, measure, shapes, strategy_argument, write_strategies

from mindformers_ckpt.formats import FileLayout, TensorSpec, layout_file, read_header
from mindformers_ckpt.formats.dtypes import by_name

# The guide's names (MindSpore) and those of Hugging Face, without a layer's prefix.
NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "model.tok_embeddings.embedding_weight": "model.embed_tokens.weight",
    "model.norm_out.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
SHARDS = 4
_HEAD_DIM = 128
_PIECE = 16 << 20
_NUMBERS = np.random.default_rng(0).standard_normal(1 << 24, np.float32).view(np.uint16)[1::2].copy().data.cast("B")


def huggingface_name(name: str) -> str:
    """The Hugging Face name of a weight of MindSpore's Llama."""
    if not name.startswith("model.layers."):
        return NAMES[name]
    *layer, own = name.split(".", 3)
    return ".".join([*layer, NAMES[own]])


def make_folder(folder: Path, weights: Mapping[str, tuple[int, ...]]) -> int:
    """A Hugging Face folder with random weights of these shapes, by MindSpore name; its bytes of contents."""
    folder.mkdir(parents=True)
    specs = [TensorSpec(huggingface_name(name), by_name("bfloat16"), shape) for name, shape in weights.items()]
    total = sum(spec.nbytes for spec in specs)
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(held.nbytes for held in shards[-1]) + spec.nbytes / 2 > total / SHARDS:
            shards.append([])
        shards[-1].append(spec)
    places = {}
    for number, held in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, layout_file("safetensors", held, {"format": "pt"}))
        places.update({spec.name: file for spec in held})
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(weights)))
    return total


def config(weights: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    """The config.json of the model."""
    vocabulary, hidden = weights["lm_head.weight"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": weights["model.layers.0.feed_forward.w1.weight"][0],
        "num_hidden_layers": LAYERS,
        "num_attention_heads": hidden // _HEAD_DIM,
        "num_key_value_heads": hidden // _HEAD_DIM,
        "head_dim": _HEAD_DIM,
        "tie_word_embeddings": False,
    }


def write_file(path: Path, layout: FileLayout) -> None:
    """A file with this layout, of random bf16 numbers that differ from tensor to tensor."""
    with path.open("wb") as stream:
        os.ftruncate(stream.fileno(), layout.size)
        for offset, data in layout.frames:
            os.pwrite(stream.fileno(), data, offset)
        for number, record in enumerate(layout.tensors.values()):
            (segment,) = record.segments
            for written in range(0, segment.length, _PIECE):
                count = min(segment.length - written, _PIECE)
                start = (number * 7919 + written) % (len(_NUMBERS) - _PIECE) // 2 * 2
                os.pwrite(stream.fileno(), _NUMBERS[start : start + count], segment.offset + written)


def ours(source: Path, target: Path, *options: str) -> list[str]:
    """The command line of our conversion."""
    program = [sys.executable, "-m", "mindformers_ckpt", "convert", "--quiet", "--model", "llama", *options]
    return [*program, "--input_path", str(source), "--output_path", str(target)]


_GUIDE = """
import json, sys
source, target, names, back = json.loads(sys.argv[1])
import mindspore as ms
import torch
from transformers import LlamaForCausalLM

def renamed(name):
    if not name.startswith("model.layers."):
        return names[name]
    *layer, own = name.split(".", 3)
    return ".".join([*layer, names[own]])

if back:
    state = {}
    for name, value in ms.load_checkpoint(source).items():
        state[renamed(name)] = torch.from_numpy(value.astype(ms.float32).asnumpy()).to(torch.bfloat16)
    torch.save(state, target)
else:
    tensors = []
    for name, value in LlamaForCausalLM.from_pretrained(source, dtype="auto").state_dict().items():
        value = ms.Tensor(value.detach().to(torch.float32).numpy(), dtype=ms.bfloat16)
        tensors.append({"name": renamed(name), "data": value})
    ms.save_checkpoint(tensors, target)
"""


def guide(python: str, source: Path, target: Path, *, back: bool) -> list[str]:
    """The command line of the guide's way; `back` is from MindSpore."""
    names = NAMES if back else {hf: ms for ms, hf in NAMES.items()}
    return [python, "-c", _GUIDE, json.dumps([str(source), str(target), names, back])]


def different(first: Path, second: Path) -> Iterator[str]:
    """The names of the tensors that two files do not hold alike."""
    headers = [read_header(path).tensors for path in (first, second)]
    yield from headers[0].keys() ^ headers[1].keys()
    with first.open("rb") as one, second.open("rb") as other:
        for name in headers[0].keys() & headers[1].keys():
            contents = []
            for stream, header in ((one, headers[0]), (other, headers[1])):
                pieces = [os.pread(stream.fileno(), length, offset) for offset, length in header[name].segments]
                contents.append((header[name].spec, b"".join(pieces)))
            if contents[0] != contents[1]:
                yield name


@click.command()
@click.option("--gb", default=2.0, show_default=True, help="Bytes of the weights, in GB.")
@click.option("--repeats", default=3, show_default=True, help="Runs of ours and of cp.")
@click.option("--processes", default="1,2", show_default=True, help="Process numbers of ours.")
@click.option(
    "--strategy", default="mp8", type=click.Choice(["mp4", "mp8"]), show_default=True, help="Of the one pass."
)
@click.option("--guide-python", help="Interpreter with mindspore, torch and transformers.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("output/bench_convert"), show_default=True)
def main(gb: float, repeats: int, processes: str, strategy: str, guide_python: str | None, folder: Path) -> None:
    """Measure conversion and print a table."""
    folder = folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    weights = shapes(5 * gb)  # of 10 bytes a weight there, 2 here
    total = make_folder(folder / "huggingface", weights)
    write_strategies(folder / "strategy", weights)
    click.echo(f"{total / 1e9:.2f} GB in {len(weights)} tensors and {SHARDS} files; {machine()}")
    converted, target = folder / "llama.ckpt", folder / "target"
    subprocess.run(ours(folder / "huggingface", converted), check=True)
    ways, memory = our_ways(folder, processes.split(","), strategy), total * 5 // 4
    results = run_in_turn(ways, target, repeats, memory)
    if guide_python:
        run_guide(results, guide_python, folder, memory)
    print_table(results)
    shutil.rmtree(folder)


def our_ways(folder: Path, processes: Sequence[str], strategy: str) -> dict[str, list[str]]:
    """Our ways and `cp`, by the words of the table."""
    source, converted, target = folder / "huggingface", folder / "llama.ckpt", folder / "target"
    ways = {}
    for count in processes:
        number = ["--process_num", count]
        back = ["--reversed", "--hf_config", str(source), *number]
        cut = ["--dst_strategy", strategy_argument(folder / "strategy", strategy), *number]
        ways[f"to MindSpore, {count} proc."] = ours(source, target / "llama.ckpt", *number)
        ways[f"to Hugging Face, {count} proc."] = ours(converted, target / "back", *back)
        ways[f"to {strategy} in one pass, {count} proc."] = ours(source, target / "sliced", *cut)
    ways["cp -r"] = ["cp", "-r", str(source), str(target / "copy")]
    return ways


def run_in_turn(ways: Mapping[str, list[str]], target: Path, repeats: int, memory: int) -> dict[str, list[Measured]]:
    """Run every way so often: one after the other, each round begun by another one."""
    results: dict[str, list[Measured]] = {way: [] for way in ways}
    order = list(ways)
    for number in range(repeats):
        for way in order[number:] + order[:number]:
            target.mkdir()
            results[way].append(measure(ways[way], memory))
            shutil.rmtree(target)
    return results


def run_guide(results: dict[str, list[Measured]], python: str, folder: Path, memory: int) -> None:
    """Run the guide's way once in each direction. Raises RuntimeError when its tensors are not those of ours."""
    made = folder / "guide.ckpt"
    results["guide, to MindSpore"] = [measure(guide(python, folder / "huggingface", made, back=False), memory)]
    wrong = list(different(made, folder / "llama.ckpt"))
    if wrong:
        raise RuntimeError(f"the guide's file is not ours: {wrong[:5]}")
    results["guide, to Hugging Face"] = [measure(guide(python, made, folder / "guide.bin", back=True), memory)]


def print_table(results: Mapping[str, Sequence[Measured]]) -> None:
    """Print one line a way."""
    wall = {way: statistics.median(run.wall for run in runs) for way, runs in results.items()}
    header = "way                              wall s   x cp    CPU s  private MB  guide / this"
    click.echo(f"{header}\n{'-' * len(header)}")
    for way, runs in results.items():
        reference = wall.get("guide, to Hugging Face" if "Hugging Face" in way else "guide, to MindSpore")
        gain = f"{reference / wall[way]:13.1f}" if reference is not None and way != "cp -r" else f"{'-':>13}"
        cpu = statistics.median(run.cpu for run in runs)
        private = max(run.private for run in runs) / 1e6
        click.echo(f"{way:<32} {wall[way]:6.2f} {wall[way] / wall['cp -r']:6.2f} {cpu:8.2f} {private:11.0f} {gain}")


if __name__ == "__main__":
    main()
