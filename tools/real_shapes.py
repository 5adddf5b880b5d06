"""Hugging Face folders of Llama, Qwen2 and DeepSeek-V3 by their config.json: true shapes, random numbers or holes."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import checkout  # noqa: F401 - finds the package of this checkout
import click
import numpy as np

from mindformers_ckpt.formats import FileLayout, TensorSpec, layout_file
from mindformers_ckpt.formats.dtypes import by_name

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
Shapes = dict[str, tuple[str, Shape]]

FILE_BYTES = 5_000_000_000
BLOCK = 128  # of an FP8 weight in each dimension has one factor


def huggingface_shapes(config: Mapping[str, Any]) -> Shapes:
    """Type and shape of every tensor of the downloaded model."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    layer = _deepseek_layer if config["model_type"] == "deepseek_v3" else _llama_layer
    found: Shapes = {"model.embed_tokens.weight": ("bfloat16", (vocabulary, hidden))}
    for number in range(config["num_hidden_layers"]):
        found.update((f"model.layers.{number}.{name}", tensor) for name, tensor in layer(config, number))
    for number in range(
        config["num_hidden_layers"], config["num_hidden_layers"] + config.get("num_nextn_predict_layers", 0)
    ):
        prefix = f"model.layers.{number}."
        found.update((prefix + name, tensor) for name, tensor in _deepseek_layer(config, number))
        found.update((prefix + name, ("bfloat16", (hidden,))) for name in ("enorm.weight", "hnorm.weight"))
        found[prefix + "shared_head.norm.weight"] = ("bfloat16", (hidden,))
        found[prefix + "eh_proj.weight"] = ("bfloat16", (hidden, 2 * hidden))
        for name in ("embed_tokens.weight", "shared_head.head.weight"):
            found[prefix + name] = ("bfloat16", (vocabulary, hidden))
    found["model.norm.weight"] = ("bfloat16", (hidden,))
    found["lm_head.weight"] = ("bfloat16", (vocabulary, hidden))
    return found


def _llama_layer(config: Mapping[str, Any], number: int) -> Iterator[tuple[str, tuple[str, Shape]]]:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    dim = hidden // config["num_attention_heads"]
    rows = {"q": hidden, "k": config["num_key_value_heads"] * dim, "v": config["num_key_value_heads"] * dim}
    for name, count in rows.items():
        yield f"self_attn.{name}_proj.weight", ("bfloat16", (count, hidden))
        if config["model_type"] == "qwen2":
            yield f"self_attn.{name}_proj.bias", ("bfloat16", (count,))
    yield "self_attn.o_proj.weight", ("bfloat16", (hidden, hidden))
    yield "mlp.gate_proj.weight", ("bfloat16", (ffn, hidden))
    yield "mlp.up_proj.weight", ("bfloat16", (ffn, hidden))
    yield "mlp.down_proj.weight", ("bfloat16", (hidden, ffn))
    yield "input_layernorm.weight", ("bfloat16", (hidden,))
    yield "post_attention_layernorm.weight", ("bfloat16", (hidden,))


def _deepseek_layer(config: Mapping[str, Any], number: int) -> Iterator[tuple[str, tuple[str, Shape]]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rank, latent, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value, small = config["qk_nope_head_dim"], config["v_head_dim"], config["moe_intermediate_size"]
    matrices = {
        "self_attn.q_a_proj": (rank, hidden),
        "self_attn.q_b_proj": (heads * (nope + rope), rank),
        "self_attn.kv_a_proj_with_mqa": (latent + rope, hidden),
        "self_attn.kv_b_proj": (heads * (nope + value), latent),
        "self_attn.o_proj": (hidden, heads * value),
    }
    vectors = {"self_attn.q_a_layernorm": rank, "self_attn.kv_a_layernorm": latent}
    vectors |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), hidden)
    inside = {"mlp": config["intermediate_size"]}
    if number >= config["first_k_dense_replace"]:
        experts = config["n_routed_experts"]
        inside = {f"mlp.experts.{expert}": small for expert in range(experts)}
        inside["mlp.shared_experts"] = config["n_shared_experts"] * small
        yield "mlp.gate.weight", ("bfloat16", (experts, hidden))
        yield "mlp.gate.e_score_correction_bias", ("float32", (experts,))
    for name, ffn in inside.items():
        matrices |= {f"{name}.gate_proj": (ffn, hidden), f"{name}.up_proj": (ffn, hidden)}
        matrices[f"{name}.down_proj"] = (hidden, ffn)
    for name, (rows, columns) in matrices.items():
        yield f"{name}.weight", ("float8_e4m3fn", (rows, columns))
        yield f"{name}.weight_scale_inv", ("float32", (-(-rows // BLOCK), -(-columns // BLOCK)))
    for name, extent in vectors.items():
        yield f"{name}.weight", ("bfloat16", (extent,))


def write_huggingface(folder: Path, config: Mapping[str, Any], shapes: Shapes, sparse: bool) -> None:
    """A folder as it is downloaded, with random numbers or holes."""
    folder.mkdir(parents=True)
    files: list[list[TensorSpec]] = [[]]
    for name, (dtype, shape) in shapes.items():
        spec = TensorSpec(name, by_name(dtype), shape)
        if files[-1] and sum(held.nbytes for held in files[-1]) + spec.nbytes > FILE_BYTES:
            files.append([])
        files[-1].append(spec)
    places = {}
    for number, specs in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        places.update({spec.name: name for spec in specs})
        write_file(folder / name, layout_file("safetensors", specs, {"format": "pt"}), sparse)
    total = sum(spec.nbytes for specs in files for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    click.echo(f"{folder}: {len(places)} tensors, {total / 1e9:.2f} GB, {'sparse' if sparse else 'random numbers'}")


def write_file(path: Path, layout: FileLayout, sparse: bool) -> None:
    """A file of this layout: random numbers, or holes for the contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        os.ftruncate(stream.fileno(), layout.size)
        for offset, frame in layout.frames:
            os.pwrite(stream.fileno(), frame, offset)
        for name, record in layout.tensors.items():
            content = memoryview(b"" if sparse else random_bits(name, record.spec).tobytes())
            for segment in record.segments:
                os.pwrite(stream.fileno(), content[: segment.length], segment.offset)
                content = content[segment.length :]


def random_bits(name: str, spec: TensorSpec) -> Array:
    """The numbers of a tensor, by its name, as bits of its type: [*shape]."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    if spec.dtype.name == "float32":
        return random.uniform(1e-4, 2e-4, spec.shape).astype(np.float32).view(np.uint32)
    # A sign, the exponents of common weights, any mantissa; of FP8 all but the codes of NaN.
    low, high, kind, sign = (0x3C00, 0x3D00, np.uint16, 15) if spec.dtype.itemsize == 2 else (0, 0x7F, np.uint8, 7)
    numbers: Array = random.integers(low, high, spec.shape, kind)
    numbers |= random.integers(0, 2, spec.shape, kind) << kind(sign)
    return numbers
