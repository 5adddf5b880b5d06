"""MindFormers' own networks with tiny sizes: what each family and naming is built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from tiny_models import MODELS

Values = dict[str, Any]
Build = Callable[[Values], Any]


class Case(NamedTuple):
    """A network, and the conversion that makes its weights.

    Attributes:
        family: what is converted; `model` is the model of `tiny_models` that it is, and `as_model` what `--model` says.
        naming: as the table calls it; `words` are the options of `convert` for it.
        build: makes the network of values like those of a yaml; `yaml` are those that config.json does not have.
        since: the first version of MindFormers that has it.
    """

    family: str
    model: str
    naming: str
    build: Build
    yaml: Mapping[str, Any] = {}
    words: Mapping[str, Any] = {}
    since: str = "1.7"
    as_model: str | None = None

    def __str__(self) -> str:
        return f"{self.family}-{self.naming}".replace(" ", "_")


def text_values(model: str) -> Values:
    """What config.json says of the network of the text, under the names of MODELS."""
    values = MODELS[model][1]
    return dict(values.get("text_config", values))


def own(folder: str, config: str, network: str) -> Build:
    """A network of one of MindFormers' folders of models."""

    def build(values: Values) -> Any:
        package = f"mindformers.models.{folder}"
        file, config_class = config.split(":")
        made = getattr(import_module(f"{package}.{file}"), config_class)(**values)
        file, network_class = network.split(":")
        return getattr(import_module(f"{package}.{file}"), network_class)(made)

    return build


def gpt_model(values: Values) -> Any:
    """MindFormers' GPTModel for training, with the settings of a model of which it has no class for training."""
    base = "mindformers.parallel_core"
    graph = f"{base}.training_graph.base_models.gpt"
    convert = import_module(f"{base}.transformer_config_utils").convert_to_transformer_config
    specs, model = import_module(f"{graph}.gpt_layer_specs"), import_module(f"{graph}.gpt_model")
    values = dict(values)
    options = {name: values.pop(name) for name in ("rotary_percent",) if name in values}
    config = convert(values)
    spec = specs.get_gpt_decoder_block_spec(config)
    predictions = specs.get_gpt_mtp_block_spec(config, spec) if config.mtp_num_layers else None
    return model.GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=10000,
        share_embeddings_and_output_weights=values.get("tie_word_embeddings", False),
        mtp_block_spec=predictions,
        **options,
    )


def legacy_llama(values: Values) -> Any:
    """LlamaForCausalLM, the network with legacy names, of which other families are settings."""
    folder = "mindformers.models.llama"
    renamed = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_position_embedding",
    }
    given = {renamed.get(name, name): value for name, value in values.items()}
    config = import_module(f"{folder}.llama_config").LlamaConfig(**given)
    return import_module(f"{folder}.llama").LlamaForCausalLM(config)


def legacy_glm(values: Values) -> Any:
    """ChatGLM2ForConditionalGeneration, the network with the legacy names of GLM4."""
    folder = "mindformers.models.glm2"
    config = import_module(f"{folder}.glm2_config").ChatGLM2Config(**values)
    return import_module(f"{folder}.glm2").ChatGLM2ForConditionalGeneration(config)


DEEPSEEK = own(
    "deepseek3",
    "configuration_deepseek_v3:DeepseekV3Config",
    "modeling_deepseek_v3_train:TrainingDeepseekV3ForCausalLM",
)
DEEPSEEK_PYNATIVE = own(
    "deepseek3",
    "configuration_deepseek_v3:DeepseekV3Config",
    "modeling_deepseek_v3_pynative:PyNativeDeepseekV3ForCausalLM",
)
QWEN3 = own("qwen3", "configuration_qwen3:Qwen3Config", "modeling_qwen3_train:TrainingQwen3ForCausalLM")
QWEN3_PYNATIVE = own(
    "qwen3", "configuration_qwen3:Qwen3Config", "modeling_qwen3_train_pynative:PyNativeQwen3ForCausalLM"
)
QWEN3_MOE = own(
    "qwen3_moe", "configuration_qwen3_moe:Qwen3MoeConfig", "modeling_qwen3_moe_train:TrainingQwen3MoeForCausalLM"
)
TELECHAT3 = own(
    "telechat3", "configuration_telechat3:TeleChat3Config", "modeling_telechat3_train:TrainingTeleChat3ForCausalLM"
)
TELECHAT3_MOE = own(
    "telechat3_moe",
    "configuration_telechat3_moe:TeleChat3MoeConfig",
    "modeling_telechat3_moe_train:TrainingTeleChat3MoeForCausalLM",
)
