"""Which names are those of adapters, and what a name of a wrapped model was before."""

from __future__ import annotations

import pytest

from mindformers_ckpt.lora_names import FactorName, factor_name, is_adapter_name, original_name, original_names
from mindformers_ckpt.planning.missing import missing_names

ADAPTERS = [
    "model.layers.0.attention.wq.mindpet_delta_lora_a",
    "model.layers.0.attention.wq.tk_delta_lora_B",
    "decoder.layers.0.self_attention.linear_qkv.lora_a",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "model.layers.0.self_attn.q_proj.lora_B.default.weight",
    "model.layers.0.self_attn.q_proj.lora_B.bias",
    "model.embed_tokens.lora_embedding_A",
    "model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight",
    "model.layers.0.mindpet_delta_adapter_tk_delta_adapter_block.weight",
    "adam_m.model.layers.0.attention.wq.mindpet_delta_lora_a",
    "unet.to_q.processor.lora.up.weight",
    "lora_A.weight",
    "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
]
OTHERS = [
    "exploration.head.weight",
    "model.exploration_head.weight",
    "floral.weight",
    "model.colora.weight",
    "model.layers.0.attention.pelora_a.weight",
    "model.layers.0.self_attn.q_lora_rank.weight",
    "model.layers.0.attn.w_lora.lora.0.weight",  # a base weight of RWKV-7
    "model.layers.0.self_attn.kv_lora_norm.weight",
    "model.lora.weight",
    "adapter.weight",
    "mindpet_deltas.weight",
    "network_delta_lora.weight",
    "",
]


@pytest.mark.parametrize("name", ADAPTERS)
def test_names_of_adapters(name: str) -> None:
    assert is_adapter_name(name)


@pytest.mark.parametrize("name", OTHERS)
def test_names_that_only_look_like_it(name: str) -> None:
    assert not is_adapter_name(name)
    assert factor_name(name) is None


def test_only_adapters_may_be_missing_in_a_source() -> None:
    names = [name for name in (*ADAPTERS, *OTHERS) if name and not name.startswith("adam_m.")]
    missing = missing_names(names, ())
    assert missing.required == sorted(name for name in OTHERS if name)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.wq.mindpet_delta_lora_a", FactorName("a.wq", "a")),
        ("a.q_proj.lora_B.default.weight", FactorName("a.q_proj", "b")),
        ("a.q_proj.lora_A", FactorName("a.q_proj", "a")),
        ("a.q_proj.lora_B.bias", None),
        ("a.q_proj.lora_B.default.bias", None),
        ("a.q_proj.lora_magnitude_vector", None),
        ("lora_A.weight", None),
    ],
)
def test_factors(name: str, found: FactorName | None) -> None:
    assert factor_name(name) == found


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        ("base_model.model.model.layers.0.q_proj.base_layer.bias", "model.layers.0.q_proj.bias"),
        ("base_model.model.model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("module.base_model.model.lm_head.weight", "lm_head.weight"),
        ("_orig_mod.module.base_model.model.lm_head.weight", "lm_head.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("base_model.model.lm_head.original_module.weight", "lm_head.weight"),
        ("base_model.model.score.modules_to_save.my_run.dense.bias", "score.dense.bias"),
        ("model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),  # transformers' add_adapter
        ("model.base_layer_norm.weight", "model.base_layer_norm.weight"),
        ("model.base_model.model.weight", "model.base_model.model.weight"),
        ("module.lm_head.weight", "module.lm_head.weight"),
    ],
)
def test_names_before_the_model_was_wrapped(name: str, plain: str) -> None:
    assert original_name(name) == plain


def test_a_trained_copy_takes_the_place_of_the_original() -> None:
    names = ["norm.weight", "head.original_module.weight", "head.modules_to_save.default.weight"]
    found = original_names(names)
    assert found.names == {"norm.weight": "norm.weight", "head.weight": "head.modules_to_save.default.weight"}
    assert (found.replaced, found.clashes) == (("head.original_module.weight",), {})


@pytest.mark.parametrize(
    "names",
    [
        ["q.weight", "q.base_layer.weight"],
        ["q.weight", "base_model.model.q.weight"],
        ["q.modules_to_save.one.weight", "q.modules_to_save.two.weight", "q.original_module.weight"],
        ["q.weight", "q.modules_to_save.default.weight"],
    ],
)
def test_two_parameters_that_were_one(names: list[str]) -> None:
    assert set(original_names(names).clashes) == {"q.weight"}
