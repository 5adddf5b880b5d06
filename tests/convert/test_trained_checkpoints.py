"""What a training run saves beside the weights is left aside on the way to Hugging Face, and said in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface as hf
import numpy as np
import pytest

from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert, plan_ranks
from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.state_names import find_states
from mindformers_ckpt.strategy.model import Strategy

NORM = "model.norm_out.weight"
OPTIMIZERS = [
    *(f"{word}.{NORM}" for word in ("adam_m", "adam_v", "moment1", "moment2", "moments", "accu_grads", "muon_m")),
    *(f"{word}.{NORM}" for word in ("fp32", "master", "exp_avg", "exp_avg_sq", "lamb_m", "accum", "momentum_buf")),
    f"exp_avg_sq_row_{NORM}",
    "muon_m.placeholder.7",
]
COUNTERS = [
    *("epoch_num", "step_num", "global_step", "global_batch_size", "loss_scale", "scale_sense", "learning_rate"),
    *("current_iterator_step", "last_overflow_iterator_step", "beta1_power", "learning_rate_group_1"),
]
BUFFERS = [
    "model.layers.0.attention.hidden_states_dropout.seed",
    "decoder.layers.0.hidden_states_dropout.offset",
    "embedding.embedding_dropout.seed",
    "embedding.embedding_dropout.dropout.offset",
    "decoder.layers.1.mlp.router.fi_accu",
    "decoder.layers.1.mlp.router.expert_load",
    "model.layers.1.feed_forward.routed_experts.expert_load",
    "decoder.layers.1.mlp.tokens_per_expert",
    "decoder.layers.1.mlp.num_tokens_per_expert",
    "model.layers.0.attention.infer_attention.paged_attention_mgr.key_cache",
    "model.layers.0.attention.infer_attention.paged_attention_mgr.value_cache",
]


def trained(tmp_path: Path, extra: dict[str, Any]) -> tuple[Path, Path, dict[str, Any]]:
    """A file of weights and other things, its Hugging Face folder, and the tensors of that."""
    tensors = hf.random_tensors(hf.llama_shapes())
    source = hf.write_folder(tmp_path / "source", tensors, hf.decoder_config())
    convert(Request("llama", source), tmp_path / "weights.safetensors")
    hf.write_safetensors(tmp_path / "trained.safetensors", {**hf.read_file(tmp_path / "weights.safetensors"), **extra})
    return tmp_path / "trained.safetensors", source, tensors


def test_states_counters_and_buffers_are_left_aside(tmp_path: Path) -> None:
    extra: dict[str, Any] = {name: np.zeros(8, np.float32) for name in [*OPTIMIZERS, *BUFFERS]}
    extra |= {name: np.array(3, np.int32) for name in COUNTERS}
    path, source, tensors = trained(tmp_path, extra)
    result = convert(Request("llama", path, reverse=True, hf_config=source), tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), tensors)
    (line,) = result.warnings
    assert f"{len(OPTIMIZERS)} optimizer states (adam_m.*, " in line
    assert f"{len(COUNTERS)} counters (epoch_num, " in line
    assert f"{len(BUFFERS)} buffers (seed, offset, fi_accu, " in line


@pytest.mark.parametrize(
    "name",
    [
        "adam_m.model.norm_out.weights",  # a state of a weight that is not there
        "adam_x.model.norm_out.weight",
        "ref_model.model.norm_out.weight",
        "epoch",
        "model.layers.0.attention.seed",
        "decoder.layers.1.mlp.expert_mapping",  # experts that were moved: their order matters
        "model.layers.7.attention.wq.weight",
    ],
)
def test_what_may_be_a_weight_is_not_left_aside(name: str, tmp_path: Path) -> None:
    path, source, _ = trained(tmp_path, {name: np.zeros(8, np.float32)})
    with pytest.raises(PlanError):
        convert(Request("llama", path, reverse=True, hf_config=source), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_hugging_face_weights_have_no_training_states(tmp_path: Path) -> None:
    tensors = {**hf.random_tensors(hf.llama_shapes()), "global_step": np.array(1, np.int32)}
    source = hf.write_folder(tmp_path / "source", tensors, hf.decoder_config())
    with pytest.raises(PlanError, match="unknown: global_step"):
        convert(Request("llama", source), tmp_path / "weights.ckpt")


def test_a_strategy_may_name_states_and_buffers(tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "source", hf.random_tensors(hf.llama_shapes()), hf.decoder_config())
    rows = Layout((2,), ((0,),))
    names = [NORM, f"adam_m.{NORM}", f"accu_grads.{NORM}", *BUFFERS, "global_step"]
    plan = plan_ranks(Request("llama", source), Strategy((dict.fromkeys(names, rows),), 2, "a test"))
    held = {spec.name: spec.shape for spec in plan.targets[1].tensors}
    assert held[NORM] == (4,)
    assert set(BUFFERS).isdisjoint(held)
    # The caches of inference are in no checkpoint, and not worth a word.
    caches = [name for name in BUFFERS if name.endswith("_cache")]
    assert any(f"{len(BUFFERS) - len(caches)} buffers" in line for line in plan.warnings)
    lacking = Strategy(({NORM: rows, "model.other.weight": rows, BUFFERS[0]: rows},), 2, "a test")
    with pytest.raises(PlanError, match=r"model\.other\.weight") as caught:
        plan_ranks(Request("llama", source), lacking)
    assert BUFFERS[0] not in str(caught.value)


def test_old_rotary_buffers_of_any_family_are_dropped(tmp_path: Path) -> None:
    for case, name in (
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("llama", "model.rotary_emb.inv_freq"),
        ("qwen3", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ):
        tensors = hf.random_tensors(hf.llama_shapes())
        if case == "qwen3":
            for layer in range(hf.LAYERS):
                for norm in ("q_norm", "k_norm"):
                    tensors[f"model.layers.{layer}.self_attn.{norm}.weight"] = np.zeros(4, np.float32)
        source = hf.write_folder(tmp_path / name, {**tensors, name: np.zeros(2, np.float32)}, hf.decoder_config())
        convert(Request(case, source), tmp_path / f"{case}-{name}.safetensors")
        assert not [found for found in hf.read_file(tmp_path / f"{case}-{name}.safetensors") if "inv_freq" in found]


def test_states_are_told_in_one_line_however_many() -> None:
    weights = {f"w{number}" for number in range(1000)}
    found = find_states([f"adam_m.{name}" for name in sorted(weights)], weights)
    assert str(found) == "1000 optimizer states (adam_m.*)"
