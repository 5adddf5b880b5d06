"""Adapters that PEFT trains and saves, over the weights of a small Llama that transformers builds."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from peft_patterns import KEYS, MODULES

from mindformers_ckpt.cli.main import cli
from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert
from mindformers_ckpt.lora_settings import read_settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason="torch is not installed; bash tools/test_transformers.sh runs these")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    safetensors_torch = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


class Run:
    """A base model and an adapter on disk, and the merged model as PEFT makes it."""

    def __init__(self, folder: Path, dtype: str, targets: list[str], *, biased: bool = False, **settings: Any) -> None:
        self.targets = targets
        self.dtype, self.base, self.adapter = getattr(torch, dtype), folder / "base", folder / "adapter"
        torch.manual_seed(3)
        config = transformers.LlamaConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
            vocab_size=128, attention_bias=biased,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).to(self.dtype)
        model.save_pretrained(self.base)
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=12, target_modules=targets, **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.05)
                elif "modules_to_save" in name:
                    parameter.copy_(torch.randn_like(parameter))
        model.save_pretrained(self.adapter)
        self.wrapped = {name: value.clone() for name, value in model.state_dict().items()}
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
    if "qkv_concat" in naming:  # a .ckpt records nothing of its fused tensors, so the way back has to be told
        words |= {"use_contiguous_weight_layout_attention": False, "use_interleaved_weight_layout_mlp": True}
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
    as_folder(run, tmp_path)
    run.assert_equal(tmp_path / "back")


def small_model() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16,
        vocab_size=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def layers_of(model: Any) -> dict[str, Any]:
    """The modules of `MODULES` after PEFT has given them branches."""
    return {name: model.get_submodule(f"base_model.model.{name}") for name in MODULES}


@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize(("key", "modules"), KEYS.items(), ids=map(repr, KEYS))
def test_patterns(key: str, modules: tuple[str, ...], use_rslora: bool, tmp_path: Path) -> None:
    """The table of patterns is what PEFT does, and the scaling of its settings is that of its layers."""
    settings = peft.LoraConfig(
        r=4, lora_alpha=16, alpha_pattern={key: 64}, rank_pattern={key: 2}, use_rslora=use_rslora,
        target_modules=r".*\.(0\.self_attn\.[qv]_proj|1\.self_attn\.[qv]_proj|1\.mlp\.up_proj)",
    )  # fmt: skip
    model = peft.get_peft_model(small_model(), settings)
    layers = layers_of(model)
    assert tuple(name for name in MODULES if layers[name].lora_alpha["default"] == 64) == modules
    model.save_pretrained(tmp_path)
    scaling, _ = read_settings(tmp_path / "adapter_config.json").for_modules(
        f"base_model.model.{name}" for name in MODULES
    )
    for name, layer in layers.items():
        assert scaling.of(f"base_model.model.{name}", layer.r["default"]) == layer.scaling["default"]


def test_the_order_of_patterns_is_that_of_the_file(tmp_path: Path) -> None:
    """PEFT sorts patterns when it saves them, so that a loaded adapter may be scaled otherwise than the trained one."""
    patterns = {"q_proj": 64, r"layers\.0\..*": 32}
    settings = peft.LoraConfig(
        r=4, lora_alpha=16, alpha_pattern=patterns, target_modules=["q_proj", "v_proj", "up_proj"]
    )
    model = small_model()
    model.save_pretrained(tmp_path / "base")
    trained = peft.get_peft_model(model, settings)
    trained.save_pretrained(tmp_path / "adapter")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    loaded = layers_of(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    found = read_settings(tmp_path / "adapter/adapter_config.json")
    scaling, notes = found.for_modules(f"base_model.model.{name}" for name in MODULES)
    assert {name: scaling.of(name, 4) for name in MODULES} == {
        name: layer.scaling["default"] for name, layer in loaded.items()
    }
    assert layers_of(trained)[MODULES[0]].scaling["default"] == 16 != scaling.of(MODULES[0], 4)
    assert len(notes) == 1


def test_an_adapter_of_before_safetensors(tmp_path: Path) -> None:
    run = Run(tmp_path, "float32", ["q_proj", "v_proj"])
    tensors = safetensors_torch.load_file(run.adapter / "adapter_model.safetensors")
    torch.save(tensors, run.adapter / "adapter_model.bin")
    (run.adapter / "adapter_model.safetensors").unlink()
    run.merge(run.base, tmp_path / "merged")
    as_folder(run, tmp_path)
    run.assert_equal(tmp_path / "back")


def as_folder(run: Run, folder: Path) -> None:
    """The merged file as a Hugging Face folder, "back"."""
    (folder / "back").mkdir()
    (folder / "merged/merged_lora.safetensors").rename(folder / "back/model.safetensors")
    (folder / "back/config.json").write_bytes((run.base / "config.json").read_bytes())


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}], ids=["plain", "modules_to_save"])
def test_a_model_that_is_still_wrapped(settings: dict[str, Any], prefix: str, tmp_path: Path) -> None:
    """The state dict of the whole model, as FSDP and DeepSpeed runs save it."""
    run = Run(tmp_path, "float32", ["q_proj", "down_proj"], **settings)
    state = {f"{prefix}{name}": value.clone() for name, value in run.wrapped.items()}
    safetensors_torch.save_file(state, tmp_path / "wrapped.safetensors", metadata={"format": "pt"})
    arguments = ("--src_ckpt_path_or_dir", tmp_path / "wrapped.safetensors", "--dst_ckpt_dir", tmp_path / "merged")
    result = CliRunner().invoke(cli, ["merge-lora", *map(str, arguments), "--alpha", "12"])
    assert result.exit_code == 0, result.output
    assert ("trained copies (modules_to_save) are taken" in result.output) == bool(settings)
    found = safetensors_torch.load_file(tmp_path / "merged/merged_lora.safetensors")
    expected = run.merged.state_dict()
    assert set(found) == set(expected)
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, rtol=1e-5, atol=1e-6), name


REFUSED: dict[str, dict[str, Any]] = {
    "use_dora (DoRA)": {"use_dora": True},
    "bias 'lora_only'": {"bias": "lora_only"},
    "bias 'all'": {"bias": "all"},
    "modules_to_save (modules that were trained as a whole)": {"modules_to_save": ["lm_head"]},
    "lora_bias (biases in the factors)": {"lora_bias": True},
    "trainable_token_indices (rows of an embedding that were trained)": {"trainable_token_indices": [1, 2]},
}


@pytest.mark.parametrize(("said", "settings"), REFUSED.items(), ids=[next(iter(value)) for value in REFUSED.values()])
@pytest.mark.parametrize("with_settings", [True, False])
def test_adapters_that_are_refused(said: str, settings: dict[str, Any], with_settings: bool, tmp_path: Path) -> None:
    """By their settings, and without these by the names of what they hold."""
    run = Run(tmp_path, "float32", ["q_proj"], biased="bias" in str(settings), **settings)
    if not with_settings:
        (run.adapter / "adapter_config.json").unlink()
        said = "cannot be merged"
    arguments = ("--src_ckpt_path_or_dir", run.base, "--dst_ckpt_dir", tmp_path / "out", "--adapter", run.adapter)
    result = CliRunner().invoke(cli, ["merge-lora", *map(str, arguments), "--alpha", "12"])
    assert result.exit_code == 1
    assert said in result.output
    assert not (tmp_path / "out").exists()
    if with_settings:
        assert len(result.output.strip().splitlines()) == 2
