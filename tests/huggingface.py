"""Small Hugging Face folders, written without transformers, and a reader of results.

Names and shapes are those that transformers 5 saves, or of the code in the repository where it has no class.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mindformers_ckpt.formats import read_header

Tensors = Mapping[str, Any]

CODES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "int64": "I64",
    "int32": "I32",
    "float64": "F64",
    "int8": "I8",
    "uint8": "U8",
}
VOCABULARY, HIDDEN, FFN, LAYERS = 12, 8, 6, 2


def random_tensor(name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    """Numbers that differ between tensors and elements, and are exact in no narrower type."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(dtype)


def random_tensors(shapes: Mapping[str, tuple[int, ...]], dtype: Any = np.float32) -> dict[str, Any]:
    return {name: random_tensor(name, shape, dtype) for name, shape in shapes.items()}


def write_safetensors(path: Path, tensors: Tensors) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": CODES[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
        data += np.ascontiguousarray(array).tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_folder(folder: Path, tensors: Tensors, config: Mapping[str, Any] | None, shards: int = 1) -> Path:
    """A folder with the weights in so many files, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    names = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    places = {name: names[number % shards] for number, name in enumerate(tensors)}
    for file in names:
        write_safetensors(folder / file, {name: tensors[name] for name in tensors if places[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def read_file(path: Path) -> dict[str, Any]:
    """All tensors of a .ckpt or .safetensors file."""
    data, found = path.read_bytes(), {}
    for name, (spec, segments) in read_header(path).tensors.items():
        content = b"".join(data[offset : offset + length] for offset, length in segments)
        kind = spec.dtype.name
        dtype = np.dtype(getattr(ml_dtypes, kind)) if hasattr(ml_dtypes, kind) else np.dtype(kind)
        found[name] = np.frombuffer(content, dtype).reshape(spec.shape)
    return found


def read_folder(folder: Path) -> dict[str, Any]:
    """All tensors in the safetensors files of a folder."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(read_file(path))
    return found


def assert_equal(found: Tensors, expected: Tensors) -> None:
    """The same names, types, shapes and bytes."""
    assert sorted(found) == sorted(expected), sorted(found.keys() ^ expected.keys())[:5]
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


def decoder_config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": FFN,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        **changes,
    }


def llama_shapes(
    *, layers: int = LAYERS, tied: bool = False, bias: bool = False, ffn: bool = True
) -> dict[str, tuple[int, ...]]:
    """4 heads of 4 in 2 groups on a hidden size of 8: head_dim is not hidden_size / heads."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for n in range(layers):
        layer = f"model.layers.{n}."
        rows = {"q": 16, "k": 8, "v": 8}
        shapes.update({f"{layer}self_attn.{name}_proj.weight": (count, HIDDEN) for name, count in rows.items()})
        if bias:
            shapes.update({f"{layer}self_attn.{name}_proj.bias": (count,) for name, count in rows.items()})
        shapes[f"{layer}self_attn.o_proj.weight"] = (HIDDEN, 16)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (HIDDEN,)
        if ffn:
            shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (FFN, HIDDEN)
            shapes[f"{layer}mlp.down_proj.weight"] = (HIDDEN, FFN)
    shapes["model.norm.weight"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return shapes


def mixtral_shapes(experts: int, layers: int = 1) -> dict[str, tuple[int, ...]]:
    shapes = llama_shapes(layers=layers, ffn=False)
    for n in range(layers):
        block = f"model.layers.{n}.block_sparse_moe."
        shapes[f"{block}gate.weight"] = (experts, HIDDEN)
        for expert in range(experts):
            shapes[f"{block}experts.{expert}.w1.weight"] = shapes[f"{block}experts.{expert}.w3.weight"] = (FFN, HIDDEN)
            shapes[f"{block}experts.{expert}.w2.weight"] = (HIDDEN, FFN)
    return shapes


DEEPSEEK_CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 6,
    "moe_intermediate_size": 5,
    "n_routed_experts": 11,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 6,
    "kv_lora_rank": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 3,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}


def deepseek_tensors(*, mtp: bool = True, dtype: Any = np.float32) -> dict[str, Any]:
    """A dense layer, a sparse one, and a prediction layer that repeats the embedding and the output layer."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, 8)}
    for n in range(3 if mtp else 2):
        layer = f"model.layers.{n}."
        shapes[f"{layer}self_attn.q_a_proj.weight"] = (6, 8)
        shapes[f"{layer}self_attn.q_a_layernorm.weight"] = (6,)
        shapes[f"{layer}self_attn.q_b_proj.weight"] = (16, 6)
        shapes[f"{layer}self_attn.kv_a_proj_with_mqa.weight"] = (8, 8)
        shapes[f"{layer}self_attn.kv_a_layernorm.weight"] = (4,)
        shapes[f"{layer}self_attn.kv_b_proj.weight"] = (14, 4)
        shapes[f"{layer}self_attn.o_proj.weight"] = (8, 6)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (8,)
        inside = {"mlp.": 6} if n == 0 else {f"mlp.experts.{expert}.": 5 for expert in range(11)}
        if n > 0:
            inside["mlp.shared_experts."] = 5
            shapes[f"{layer}mlp.gate.weight"] = (11, 8)
            shapes[f"{layer}mlp.gate.e_score_correction_bias"] = (11,)
        for prefix, ffn in inside.items():
            shapes[f"{layer}{prefix}gate_proj.weight"] = shapes[f"{layer}{prefix}up_proj.weight"] = (ffn, 8)
            shapes[f"{layer}{prefix}down_proj.weight"] = (8, ffn)
    if mtp:
        shapes["model.layers.2.enorm.weight"] = shapes["model.layers.2.hnorm.weight"] = (8,)
        shapes["model.layers.2.eh_proj.weight"] = (8, 16)
        shapes["model.layers.2.shared_head.norm.weight"] = (8,)
    shapes["model.norm.weight"] = (8,)
    shapes["lm_head.weight"] = (VOCABULARY, 8)
    tensors = random_tensors(shapes, dtype)
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = random_tensor(name, (11,))
    if mtp:
        tensors["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"]
    return tensors


def deepseek_kin() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """The relatives of DeepSeek-V3, config.json and tensors: without prediction layers and some of the tensors."""
    plain = {"num_nextn_predict_layers": 0}
    bias = ("e_score_correction_bias",)
    return {
        "deepseek_v3": (DEEPSEEK_CONFIG, deepseek_tensors()),
        "kimi_k2": _kin({"model_type": "kimi_k2", **plain}),
        "moonlight": _kin({"q_lora_rank": None, **plain}),
        "deepseek_v2": _kin({"model_type": "deepseek_v2", **plain}, *bias),
        "deepseek_v2_lite": _kin({"model_type": "deepseek_v2", "q_lora_rank": None, **plain}, *bias),
    }


def _kin(config: dict[str, Any], *without: str) -> tuple[dict[str, Any], dict[str, Any]]:
    tensors = deepseek_tensors(mtp=False)
    if config.get("q_lora_rank", 0) is None:
        without += ("q_a_", "q_b_proj")
        names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)]
        tensors |= {name: random_tensor(name, (16, 8)) for name in names}
    found = {name: array for name, array in tensors.items() if not any(part in name for part in without)}
    return {**DEEPSEEK_CONFIG, **config}, found


DEEPSEEK_V32_CONFIG = {**DEEPSEEK_CONFIG, "model_type": "deepseek_v32", "index_n_heads": 3, "index_head_dim": 12}


def deepseek_v32_tensors() -> dict[str, Any]:
    """Those of DeepSeek-V3, and an indexer in every layer: 3 heads of 12, of which 4 are rotary."""
    shapes = {"wq_b.weight": (36, 6), "wk.weight": (12, 8), "k_norm.weight": (12,), "k_norm.bias": (12,)}
    indexer = {**shapes, "weights_proj.weight": (3, 8)}
    names = {f"model.layers.{n}.self_attn.indexer.{name}": shape for n in range(3) for name, shape in indexer.items()}
    return {**deepseek_tensors(), **random_tensors(names)}


GLM_MOE_CONFIG = decoder_config(
    model_type="glm4_moe",
    attention_bias=True,
    use_qk_norm=True,
    n_routed_experts=11,
    n_shared_experts=1,
    moe_intermediate_size=5,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
)


def glm_moe_tensors() -> dict[str, Any]:
    """GLM-4.5: the attention of Llama with biases and norms, everything else as in DeepSeek-V3."""
    attention = {name: shape for name, shape in llama_shapes(layers=3, bias=True, ffn=False).items() if "attn" in name}
    norms = {f"model.layers.{n}.self_attn.{name}_norm.weight": (4,) for n in range(3) for name in "qk"}
    others = {name: array for name, array in deepseek_tensors().items() if "self_attn" not in name}
    return {**random_tensors({**attention, **norms}), **others}


CHATGLM_CONFIG = {
    "model_type": "chatglm",
    "num_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 4,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "ffn_hidden_size": 6,
}


def chatglm_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (VOCABULARY, HIDDEN)}
    for n in range(LAYERS):
        layer = f"transformer.encoder.layers.{n}."
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}self_attention.query_key_value.weight"] = (32, HIDDEN)
        shapes[f"{layer}self_attention.query_key_value.bias"] = (32,)
        shapes[f"{layer}self_attention.dense.weight"] = (HIDDEN, 16)
        shapes[f"{layer}mlp.dense_h_to_4h.weight"] = (2 * FFN, HIDDEN)
        shapes[f"{layer}mlp.dense_4h_to_h.weight"] = (HIDDEN, FFN)
    shapes["transformer.encoder.final_layernorm.weight"] = (HIDDEN,)
    shapes["transformer.output_layer.weight"] = (VOCABULARY, HIDDEN)
    return shapes


def telechat_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    prefix = "transformer." if kind == "telechat_12b" else ""
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}word_embeddings.weight": (VOCABULARY, HIDDEN)}
    for n in range(LAYERS):
        layer = f"{prefix}h.{n}."
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}self_attention.query.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{layer}self_attention.key_value.weight"] = (2 * HIDDEN, HIDDEN)
        shapes[f"{layer}self_attention.dense.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{layer}self_attention.dense.bias"] = shapes[f"{layer}mlp.down_proj.bias"] = (HIDDEN,)
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (FFN, HIDDEN)
        shapes[f"{layer}mlp.down_proj.weight"] = (HIDDEN, FFN)
    shapes[f"{prefix}ln_f.weight"] = (HIDDEN,)
    if prefix:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return shapes


def bloom_shapes(prefix: str = "transformer.") -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}word_embeddings.weight": (VOCABULARY, HIDDEN)}
    norms = [f"{prefix}word_embeddings_layernorm", f"{prefix}ln_f"]
    for n in range(LAYERS):
        layer = f"{prefix}h.{n}."
        norms += [f"{layer}input_layernorm", f"{layer}post_attention_layernorm"]
        for name, rows, columns in (
            ("self_attention.query_key_value", 24, 8),
            ("self_attention.dense", 8, 8),
            ("mlp.dense_h_to_4h", 32, 8),
            ("mlp.dense_4h_to_h", 8, 32),
        ):
            shapes[f"{layer}{name}.weight"], shapes[f"{layer}{name}.bias"] = (rows, columns), (rows,)
    shapes.update({f"{norm}.{kind}": (HIDDEN,) for norm in norms for kind in ("weight", "bias")})
    return shapes


def gpt2_shapes(prefix: str = "transformer.", layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}wte.weight": (VOCABULARY, HIDDEN),
        f"{prefix}wpe.weight": (16, HIDDEN),
    }
    norms = [f"{prefix}ln_f"]
    for n in range(layers):
        layer = f"{prefix}h.{n}."
        norms += [f"{layer}ln_1", f"{layer}ln_2"]
        for name, rows, columns in (
            ("attn.c_attn", 8, 24),
            ("attn.c_proj", 8, 8),
            ("mlp.c_fc", 8, 32),
            ("mlp.c_proj", 32, 8),
        ):
            shapes[f"{layer}{name}.weight"], shapes[f"{layer}{name}.bias"] = (rows, columns), (columns,)
    shapes.update({f"{norm}.{kind}": (HIDDEN,) for norm in norms for kind in ("weight", "bias")})
    return shapes


def microsoft_swin_tensors(*, pretrained: bool = False) -> dict[str, Any]:
    """Two stages of two blocks; the second block of a stage has a mask, and positions are integers."""
    prefix = "encoder." if pretrained else ""
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}patch_embed.proj.weight": (4, 3, 2, 2)}
    vectors = {f"{prefix}patch_embed.proj.bias": 4}
    norms = {f"{prefix}patch_embed.norm": 4, f"{prefix}norm": 8}
    positions: dict[str, Any] = {}
    for stage in range(2):
        width = 4 * (stage + 1)
        for number in range(2):
            block = f"{prefix}layers.{stage}.blocks.{number}."
            norms.update({f"{block}norm1": width, f"{block}norm2": width})
            for name, rows, columns in (
                ("attn.qkv", 3 * width, width),
                ("attn.proj", width, width),
                ("mlp.fc1", 2 * width, width),
                ("mlp.fc2", width, 2 * width),
            ):
                shapes[f"{block}{name}.weight"], vectors[f"{block}{name}.bias"] = (rows, columns), rows
            shapes[f"{block}attn.relative_position_bias_table"] = (9, 2)
            positions[f"{block}attn.relative_position_index"] = np.arange(16).reshape(4, 4)
            if number:
                shapes[f"{block}attn_mask"] = (2, 4, 4)
    shapes[f"{prefix}layers.0.downsample.reduction.weight"] = (8, 16)
    norms[f"{prefix}layers.0.downsample.norm"] = 16
    if pretrained:
        shapes[f"{prefix}mask_token"] = (1, 1, 4)
        shapes["decoder.0.weight"], vectors["decoder.0.bias"] = (12, 8, 1, 1), 12
    else:
        shapes["head.weight"], vectors["head.bias"] = (5, 8), 5
    for name, extent in norms.items():
        vectors.update({f"{name}.weight": extent, f"{name}.bias": extent})
    shapes.update({name: (extent,) for name, extent in vectors.items()})
    return {**random_tensors(shapes), **positions}
