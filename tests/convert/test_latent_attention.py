"""DeepSeek and its kin under mcore names: three networks with the same elements in other tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface as hf
import numpy as np
import pytest

from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert, plan_ranks
from mindformers_ckpt.errors import CheckpointError, ConfigError
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.model import Strategy

SETTINGS: dict[str, dict[str, Any]] = {
    "separate": {},
    "concat": {"mla_qkv_concat": True},
    "pynative": {"pynative": True},
}
KIN = hf.deepseek_kin()
ATTENTION = "decoder.layers.1.self_attention."


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", KIN)
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_there_and_back(name: str, setting: str, suffix: str, tmp_path: Path) -> None:
    config, tensors = KIN[name]
    source = hf.write_folder(tmp_path / "source", tensors, config)
    weights = tmp_path / f"weights.{suffix}"
    convert(Request(None, source, naming="mcore", **SETTINGS[setting]), weights)
    # Names tell the network, but for PyNative without a router's bias, which a .ckpt file cannot record.
    words = SETTINGS[setting] if suffix == "ckpt" and "v2" in name else {}
    result = convert(Request(None, weights, True, hf_config=source, **words), tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), tensors)
    suffixes = {"separate": "", "concat": "+mla_qkv_concat", "pynative": "+pynative"}
    assert result.naming == f"mcore{suffixes[setting]}"


def test_separate_projections_keep_their_names_and_rows(tmp_path: Path) -> None:
    config, tensors = KIN["moonlight"]
    source = hf.write_folder(tmp_path / "source", tensors, config)
    convert(Request(None, source, naming="mcore", mla_qkv_concat=False), tmp_path / "weights.safetensors")
    found, theirs = hf.read_file(tmp_path / "weights.safetensors"), "model.layers.1.self_attn."
    for ms, name in (
        ("linear_q_proj", "q_proj"),
        ("linear_kv_down_proj", "kv_a_proj_with_mqa"),
        ("kv_layernorm", "kv_a_layernorm"),
        ("linear_kv_up_proj", "kv_b_proj"),
        ("linear_proj", "o_proj"),
    ):
        assert found[f"{ATTENTION}{ms}.weight"].tobytes() == tensors[f"{theirs}{name}.weight"].tobytes()
    assert not [name for name in found if "q_layernorm" in name or "linear_q_down" in name]


@pytest.mark.parametrize("name", ["deepseek_v3", "moonlight"])
@pytest.mark.parametrize("setting", ["concat", "pynative"])
def test_concatenated_projections(name: str, setting: str, tmp_path: Path) -> None:
    config, tensors = KIN[name]
    source = hf.write_folder(tmp_path / "source", tensors, config)
    convert(Request(None, source, naming="mcore", **SETTINGS[setting]), tmp_path / "weights.safetensors")
    found, theirs = hf.read_file(tmp_path / "weights.safetensors"), "model.layers.1.self_attn."
    query = "q_proj" if name == "moonlight" else "q_a_proj"
    rows = [tensors[f"{theirs}{part}.weight"] for part in (query, "kv_a_proj_with_mqa")]
    assert np.array_equal(found[f"{ATTENTION}linear_qkv.weight"], np.concatenate(rows))
    names = {"k_layernorm": "kv_a_layernorm", "linear_kvb": "kv_b_proj"}
    if name == "deepseek_v3":
        names |= {"q_layernorm": "q_a_layernorm", "linear_qb": "q_b_proj"}
    for ms, part in names.items():
        assert found[f"{ATTENTION}{ms}.weight"].tobytes() == tensors[f"{theirs}{part}.weight"].tobytes()


def test_experts_of_the_pynative_network(tmp_path: Path) -> None:
    config, tensors = KIN["deepseek_v3"]
    source = hf.write_folder(tmp_path / "source", tensors, config)
    convert(Request(None, source, naming="mcore", pynative=True, dtype="bf16"), tmp_path / "bf16.safetensors")
    convert(Request(None, source, naming="mcore", pynative=True), tmp_path / "weights.safetensors")
    found, mlp, theirs = hf.read_file(tmp_path / "weights.safetensors"), "decoder.layers.1.mlp.", "model.layers.1.mlp."
    for expert in range(11):
        gate, up, down = (tensors[f"{theirs}experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        assert np.array_equal(found[f"{mlp}experts.weight1"][expert], np.concatenate([gate.T, up.T], axis=1))
        assert np.array_equal(found[f"{mlp}experts.weight2"][expert], down.T)
    bias = tensors[f"{theirs}gate.e_score_correction_bias"]
    assert found[f"{mlp}expert_bias"].tobytes() == bias.tobytes()
    assert hf.read_file(tmp_path / "bf16.safetensors")[f"{mlp}expert_bias"].tobytes() == bias.tobytes()
    shared = found[f"{mlp}shared_experts.linear_fc1.weight"]  # row by row in turn, as in every network
    assert np.array_equal(shared[::2], tensors[f"{theirs}shared_experts.gate_proj.weight"])
    assert np.array_equal(shared[1::2], tensors[f"{theirs}shared_experts.up_proj.weight"])


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        (f"{ATTENTION}linear_kv_down_proj.weight", "separate"),
        (f"{ATTENTION}linear_qkv.weight", "concat"),
        ("decoder.layers.1.mlp.expert_bias", "pynative"),
    ],
)
def test_the_strategy_tells_which_network_it_is_of(name: str, setting: str, tmp_path: Path) -> None:
    """A yaml need not name the setting: what is usual differs between the networks."""
    config, tensors = KIN["deepseek_v3"]
    source = hf.write_folder(tmp_path / "source", tensors, config)
    convert(Request(None, source, naming="mcore", **SETTINGS[setting]), tmp_path / "weights.safetensors")
    expected = {name: array.shape for name, array in hf.read_file(tmp_path / "weights.safetensors").items()}
    whole = Layout((1,), ((),) * len(expected[name]))
    plan = plan_ranks(Request(None, source, naming="mcore"), Strategy(({name: whole},), 1, "a test"))
    assert {spec.name: spec.shape for spec in plan.targets[0].tensors} == expected


@pytest.mark.parametrize("name", ["moonlight", "deepseek_v2_lite"])
def test_no_legacy_network_trains_without_compressed_queries(name: str, tmp_path: Path) -> None:
    config, tensors = KIN[name]
    source = hf.write_folder(tmp_path / "source", tensors, config)
    with pytest.raises(ConfigError, match=r"no q_lora_rank: .*; take mcore names"):
        convert(Request(None, source), tmp_path / "weights.ckpt")
    assert not (tmp_path / "weights.ckpt").exists()


def test_settings_that_do_not_go_with_pynative(tmp_path: Path) -> None:
    config, tensors = KIN["deepseek_v3"]
    source = hf.write_folder(tmp_path / "source", tensors, config)
    wrong: list[dict[str, Any]] = [{"mla_qkv_concat": False}, {"use_interleaved_weight_layout_mlp": False}]
    for words in wrong:
        with pytest.raises(CheckpointError, match="do not go with pynative"):
            convert(Request(None, source, naming="mcore", pynative=True, **words), tmp_path / "weights.ckpt")
