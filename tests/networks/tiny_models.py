"""Makes tiny Hugging Face models with transformers' own classes, and the logits that they compute.

    python tests/networks/tiny_models.py FOLDER

writes FOLDER/<name>/ (config.json and weights) and FOLDER/<name>.npz (`tokens` and `logits`) for every name of MODELS.
Prediction (MTP) layers, which transformers does not have, are added to the weights. `bash tools/test_networks.sh` runs
this where transformers is installed, and hands the folder over to where MindFormers is.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

SEQUENCE = 8
BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 96,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
LATENT = {
    **BASE,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
# Of the four frequencies of a head those of time, height and width; for text all three are the same.
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
INDEXER = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 4}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}

# name -> (class, values of config.json, prediction layers)
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("LlamaForCausalLM", BASE, 0),
    "llama_tied": ("LlamaForCausalLM", {**BASE, "tie_word_embeddings": True}, 0),
    "mistral": ("MistralForCausalLM", {**BASE, "sliding_window": None}, 0),
    "qwen2": ("Qwen2ForCausalLM", BASE, 0),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": {**BASE, "rope_parameters": ROTARY}, "vision_config": VISION, "tie_word_embeddings": False},
        0,
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**BASE, **EXPERTS, "norm_topk_prob": False, "shared_expert_intermediate_size": 48},
        0,
    ),
    "qwen3": ("Qwen3ForCausalLM", {**BASE, "head_dim": 8}, 0),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**BASE, **EXPERTS, "head_dim": 8}, 0),
    "mixtral": ("MixtralForCausalLM", {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2}, 0),
    "deepseek_v3": ("DeepseekV3ForCausalLM", LATENT, 1),
    "moonlight": ("DeepseekV3ForCausalLM", {**LATENT, "q_lora_rank": None}, 0),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        {**LATENT, "topk_method": "greedy", "n_group": None, "topk_group": None, "norm_topk_prob": False},
        0,
    ),
    "deepseek_v32": (
        "DeepseekV32ForCausalLM",
        # The only sizes of heads that MindFormers takes.
        {**LATENT, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 48, **INDEXER},
        1,
    ),
    "glm4": ("Glm4ForCausalLM", {**BASE, "head_dim": 8, "attention_bias": True}, 0),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        {
            **BASE,
            "head_dim": 8,
            "attention_bias": True,
            "use_qk_norm": True,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "routed_scaling_factor": 1.5,
            "first_k_dense_replace": 1,
        },
        1,
    ),
}


def build(name: str) -> Any:
    """A model with random weights: norms are about one, and the biases of routers count."""
    import torch
    import transformers

    class_name, values, _ = MODELS[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(len(name))
    model = model_class(model_class.config_class(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1))
        for buffer_name, buffer in model.named_buffers():
            if "e_score_correction_bias" in buffer_name:
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    return model


def prediction_layers(tensors: dict[str, Any], layers: int, count: int) -> dict[str, Any]:
    """Layers behind the last one: its tensors moved by one element, and those that only prediction layers have."""
    found: dict[str, Any] = {}
    last = f"model.layers.{layers - 1}."
    for number in range(layers, layers + count):
        own = f"model.layers.{number}."
        inside = {name[len(last) :]: tensor for name, tensor in tensors.items() if name.startswith(last)}
        found |= {own + name: tensor.flatten().roll(number).reshape(tensor.shape) for name, tensor in inside.items()}
        norm = tensors["model.norm.weight"]
        found |= {f"{own}{name}.weight": norm + 1 for name in ("enorm", "hnorm", "shared_head.norm")}
        head = tensors["lm_head.weight"]
        wide = head[: norm.shape[0]].repeat(1, 2)
        found[f"{own}eh_proj.weight"] = wide + (wide * 0 + 1).cumsum(1) / 100
        found[f"{own}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        found[f"{own}shared_head.head.weight"] = head.clone()
    return found


def save(name: str, folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    _, values, predictions = MODELS[name]
    model = build(name)
    tokens = torch.arange(3, 3 + SEQUENCE).reshape(1, SEQUENCE)
    with torch.no_grad():
        logits = model(tokens).logits
    model.save_pretrained(folder / name)
    np.savez(folder / f"{name}.npz", tokens=tokens.numpy(), logits=logits.float().numpy())
    config = folder / name / "config.json"
    said = json.loads(config.read_text(encoding="utf-8"))
    if predictions:
        weights = folder / name / "model.safetensors"
        tensors = load_file(weights)
        more = prediction_layers(tensors, values["num_hidden_layers"], predictions)
        save_file({key: tensor.contiguous() for key, tensor in {**tensors, **more}.items()}, weights, {"format": "pt"})
    if any(key in values for key in ("n_routed_experts",)):
        said["num_nextn_predict_layers"] = predictions
    config.write_text(json.dumps(said, indent=2), encoding="utf-8")


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import logging

        logging.disable_progress_bar()
        for name in MODELS:
            save(name, folder)


if __name__ == "__main__":
    main()
