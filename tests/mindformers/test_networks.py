"""MindFormers' own networks, built with tiny sizes: their parameters are what `convert` writes, in names and shapes."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import huggingface as hf
import pytest

from mindformers_ckpt.convert.run import Request, convert
from mindformers_ckpt.state_names import find_states

try:
    VERSION = version("mindformers")
except PackageNotFoundError:
    pytest.skip("MindFormers is not installed; bash tools/test_mindformers.sh runs these", allow_module_level=True)

KIN = hf.deepseek_kin()
pytestmark = pytest.mark.filterwarnings("ignore")
pynative = pytest.mark.skipif(VERSION.startswith("1."), reason="PyNative networks came with 2.0")

# What config.json says, and what the yaml of a training adds to it.
YAML = {"moe_grouped_gemm": True, "qk_layernorm": True, "max_position_embeddings": 16, "seq_length": 16}
ROUTER = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}


@pytest.fixture
def mindspore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(os.environ, "LOG_MF_PATH", str(tmp_path / "log"))
    import mindspore
    from mindformers.parallel_core.training_graph.transformer import utils

    monkeypatch.setattr(utils, "is_legacy_model", lambda: False)  # as `use_legacy: False` of the yaml
    mindspore.set_device("CPU")
    return mindspore


def parameters(network: Any) -> dict[str, tuple[int, ...]]:
    """The weights of a network, without what it counts or keeps between steps."""
    shapes = {parameter.name: tuple(parameter.shape) for parameter in network.get_parameters()}
    aside = find_states(shapes, shapes).names()
    return {name: shape for name, shape in shapes.items() if name not in aside}


def converted(kin: str, folder: Path, model: str | None = None, **words: Any) -> dict[str, tuple[int, ...]]:
    config, tensors = KIN[kin]
    source = hf.write_folder(folder / "source", tensors, config)
    convert(Request(model, source, naming="mcore", **words), folder / "weights.safetensors")
    return {name: array.shape for name, array in hf.read_file(folder / "weights.safetensors").items()}


@pytest.mark.parametrize("kin", ["deepseek_v3", "moonlight"])
@pytest.mark.parametrize("concat", [False, True])
def test_graph_networks_with_latent_attention(kin: str, concat: bool, tmp_path: Path, mindspore: Any) -> None:
    from mindformers.models.deepseek3 import DeepseekV3Config
    from mindformers.models.deepseek3.modeling_deepseek_v3_train import TrainingDeepseekV3ForCausalLM

    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    network = TrainingDeepseekV3ForCausalLM(DeepseekV3Config(**KIN[kin][0], **YAML, **ROUTER, mla_qkv_concat=concat))
    assert parameters(network) == converted(kin, tmp_path, mla_qkv_concat=concat)


@pynative
@pytest.mark.parametrize("concat", [False, True])
def test_telechat3_with_experts(concat: bool, tmp_path: Path, mindspore: Any) -> None:
    from mindformers.models.telechat3_moe.configuration_telechat3_moe import TeleChat3MoeConfig
    from mindformers.models.telechat3_moe.modeling_telechat3_moe_train import TrainingTeleChat3MoeForCausalLM

    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    # Sizes of heads under MindFormers' own names: this network does not take them from those of config.json.
    sizes = {"qk_head_dim": 4, "qk_pos_emb_head_dim": 4}
    config = {**KIN["deepseek_v3"][0], **YAML, **ROUTER, **sizes, "model_type": "telechat3_moe"}
    network = TrainingTeleChat3MoeForCausalLM(TeleChat3MoeConfig(**config, mla_qkv_concat=concat))
    assert parameters(network) == converted("deepseek_v3", tmp_path, model="telechat3_moe", mla_qkv_concat=concat)


@pynative
def test_telechat3(tmp_path: Path, mindspore: Any) -> None:
    from mindformers.models.telechat3.configuration_telechat3 import TeleChat3Config
    from mindformers.models.telechat3.modeling_telechat3_train import TrainingTeleChat3ForCausalLM

    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    config = hf.decoder_config(model_type="telechat3")
    network = TrainingTeleChat3ForCausalLM(TeleChat3Config(**config, max_position_embeddings=16, seq_length=16))
    source = hf.write_folder(tmp_path / "source", hf.random_tensors(hf.llama_shapes()), config)
    convert(Request(None, source), tmp_path / "weights.safetensors")
    found = hf.read_file(tmp_path / "weights.safetensors")
    assert parameters(network) == {name: array.shape for name, array in found.items()}


@pynative
@pytest.mark.parametrize("kin", ["deepseek_v3", "moonlight"])
def test_pynative_networks_with_latent_attention(kin: str, tmp_path: Path, mindspore: Any) -> None:
    from mindformers.models.deepseek3 import DeepseekV3Config
    from mindformers.models.deepseek3.modeling_deepseek_v3_pynative import PyNativeDeepseekV3ForCausalLM

    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    network = PyNativeDeepseekV3ForCausalLM(DeepseekV3Config(**KIN[kin][0], **YAML, **ROUTER))
    assert parameters(network) == converted(kin, tmp_path, pynative=True)
