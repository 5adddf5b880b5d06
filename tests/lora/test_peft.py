"""Adapters that PEFT trains and saves, over the weights of a small Llama that transformers builds."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mindformers_ckpt.cli.main import cli
from mindformers_ckpt.convert.run import Request, convert

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


class Run:
    """A base model and an adapter on disk, and the merged model as PEFT makes it."""

    def __init__(self, folder: Path, dtype: str, targets: list[str], **settings: Any) -> None:
        self.targets = targets
        self.dtype, self.base, self.adapter = getattr(torch, dtype), folder / "base", folder / "adapter"
        torch.manual_seed(3)
        config = transformers.LlamaConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
            vocab_size=128, attention_bias="bias" in settings,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).to(self.dtype)
        model.save_pretrained(self.base)
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=12, target_modules=targets, **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(self.adapter)
        self.merged = model.merge_and_unload()

    def merge(self, source: Path, destination: Path, *arguments: str | Path) -> None:
        options = ["--src_ckpt_path_or_dir", source, "--dst_ckpt_dir", destination, "--adapter", self.adapter]
        result = CliRunner().invoke(cli, ["merge-lora", *map(str, (*options, *arguments))])
        assert result.exit_code == 0, result.output

    def assert_equal(self, folder: Path) -> None:
        """Compare a Hugging Face folder with PEFT's model: all weights, and the logits."""
        found = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=self.dtype)
        expected, tolerance = self.merged.state_dict(), TOLERANCE[str(self.dtype).partition(".")[2]]
        base = transformers.LlamaForCausalLM.from_pretrained(self.base, dtype=self.dtype)
        changed = 0
        for name, weight in found.state_dict().items():
            assert torch.allclose(weight, expected[name], rtol=tolerance, atol=tolerance / 10), name
            changed += not torch.allclose(base.state_dict()[name], weight, rtol=tolerance, atol=tolerance / 10)
        assert changed == 2 * len(self.targets)  # layers
        tokens = torch.arange(1, 24).reshape(1, 23)
        with torch.no_grad():
            logits, wanted = found(tokens).logits, self.merged(tokens).logits
        assert torch.allclose(logits, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("naming", ["legacy", "mcore", "legacy with qkv_concat"])
def test_over_converted_weights(naming: str, dtype: str, tmp_path: Path) -> None:
    run = Run(tmp_path, dtype, LINEAR)
    words: dict[str, Any] = {"naming": naming.partition(" ")[0], "qkv_concat": "qkv_concat" in naming}
    convert(Request("llama", run.base, **words), tmp_path / "base.ckpt")
    run.merge(tmp_path / "base.ckpt", tmp_path / "merged", "--hf_config", run.base)
    request = Request("llama", tmp_path / "merged/merged_lora.ckpt", reverse=True, hf_config=run.base, **words)
    convert(request, tmp_path / "back")
    run.assert_equal(tmp_path / "back")


def test_the_name_of_the_model_is_enough_where_nothing_is_fused(tmp_path: Path) -> None:
    run = Run(tmp_path, "float32", ["q_proj", "v_proj"])
    convert(Request("llama", run.base), tmp_path / "base.safetensors")
    run.merge(tmp_path / "base.safetensors", tmp_path / "merged", "--model", "llama3")
    request = Request("llama", tmp_path / "merged/merged_lora.safetensors", reverse=True, hf_config=run.base)
    convert(request, tmp_path / "back")
    run.assert_equal(tmp_path / "back")


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 20, r"layers\.1\.self_attn\.q_proj": 4}},
                 {"rank_pattern": {"q_proj": 2}}], ids=["plain", "rslora", "alphas", "ranks"]
)  # fmt: skip
def test_over_weights_with_hugging_face_names(settings: dict[str, Any], tmp_path: Path) -> None:
    run = Run(tmp_path, "float32", ["q_proj", "v_proj", "down_proj"], **settings)
    run.merge(run.base, tmp_path / "merged")
    (tmp_path / "back").mkdir()
    (tmp_path / "merged/merged_lora.safetensors").rename(tmp_path / "back/model.safetensors")
    (tmp_path / "back/config.json").write_bytes((run.base / "config.json").read_bytes())
    run.assert_equal(tmp_path / "back")


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}])
def test_adapters_that_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    run = Run(tmp_path, "float32", ["q_proj"], **settings)
    arguments = ("--src_ckpt_path_or_dir", run.base, "--dst_ckpt_dir", tmp_path / "out", "--adapter", run.adapter)
    result = CliRunner().invoke(cli, ["merge-lora", *map(str, arguments)])
    assert result.exit_code == 1
    assert "dora" in result.output.lower() or "trained parameters besides LoRA branches" in result.output
    assert not (tmp_path / "out").exists()
