"""What a conversion is asked for, and what the source, its config.json and its names add to that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mindformers_ckpt.convert.config import LAYOUT_SETTINGS, ModelConfig, read_config
from mindformers_ckpt.convert.model import Model, model_of_config, named_model
from mindformers_ckpt.convert.weights import Weights, config_folder
from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.objects.path import absolute
from mindformers_ckpt.strategy.model import Strategy

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Options that only some models have.
_OWN_OPTIONS = (
    *("is_pretrain", "telechat_type", "mlp_concat", "use_rearrange_rope", "use_gmm", "use_gmm_training"),
    *("use_contiguous_weight_layout_attention", "use_interleaved_weight_layout_mlp", "mla_qkv_concat", "pynative"),
)


@dataclass(frozen=True)
class Request:
    """What is to be converted, and how. Words are those of the command line.

    Attributes:
        model: name or alias; None for the model of the config.json.
        input_path: a Hugging Face folder or a file in it; with `reverse` a MindSpore file or folder.
        reverse: from MindSpore to Hugging Face.
        dtype: "fp32", "bf16" or "fp16" for all floating-point tensors; None keeps what they are.
        naming: "legacy" or "mcore" names on the MindSpore side; None for the model's default.
        qkv_concat: query, key and value, and gate and up, in one tensor each (legacy names); None for the
            model's usual.
        hf_config: folder of the model's config.json and tokenizer, if not the source's own.
        write_tied: write the output layer too where it is tied to the embedding.
        n_head, hidden_size, layers: what config.json may lack; a contradiction to it is an error.
        num_layers, num_nextn_predict_layers: convert only the first layers, and so many of the prediction layers.
        strip_prefix: what the names of the source have in front of what the model calls its tensors.
        is_pretrain, telechat_type: options of Swin and TeleChat.
        mlp_concat, use_rearrange_rope: settings of MindSpore's GLM4; use_gmm, use_gmm_training: of its Mixtral.
        use_contiguous_weight_layout_attention, use_interleaved_weight_layout_mlp: settings of its networks that have
            query, key and value, or gate and up, in one tensor.
        mla_qkv_concat, pynative: settings of its networks with latent attention.
        step: with `reverse` or `to_naming`, the file of a rank folder to read: its name, or an epoch and step like
            "3_150".
        to_naming: from other names of MindSpore to these, with no Hugging Face weights on either side; `from_naming`
            are those of the source, None where they tell themselves. Both as files record them: "legacy+use_gmm".
        src_strategy: with `to_naming`, the strategy of the source; None for complete weights.
        weights_only: with `to_naming`, leave optimizer states and counters aside.
        contents: with `to_naming`, what is done when samples of the source contradict its strategy: "error", "warn"
            or "off".
    """

    model: str | None
    input_path: Path
    reverse: bool = False
    dtype: str | None = None
    naming: str | None = None
    qkv_concat: bool | None = None
    hf_config: Path | None = None
    write_tied: bool = False
    n_head: int | None = None
    hidden_size: int | None = None
    layers: int | None = None
    num_layers: int | None = None
    num_nextn_predict_layers: int | None = None
    strip_prefix: str | None = None
    is_pretrain: bool | None = None
    telechat_type: str | None = None
    mlp_concat: bool | None = None
    use_rearrange_rope: bool | None = None
    use_gmm: bool | None = None
    use_gmm_training: bool | None = None
    use_contiguous_weight_layout_attention: bool | None = None
    use_interleaved_weight_layout_mlp: bool | None = None
    mla_qkv_concat: bool | None = None
    pynative: bool | None = None
    step: str | None = None
    to_naming: str | None = None
    from_naming: str | None = None
    src_strategy: Strategy | None = None
    weights_only: bool = False
    contents: str = "error"


def with_settings(request: Request, settings: Mapping[str, bool]) -> Request:
    """The request with those of a network's settings that its model has. Raises ConfigError for unknown models."""
    model = model_of(request, read_config(config_folder(absolute(request.input_path), request.hf_config)))
    has_fused_names = any(naming.endswith("+qkv_concat") for naming in model.namings)
    known = {*model.options, *(("qkv_concat",) if has_fused_names else ())}
    own: dict[str, Any] = {key: value for key, value in settings.items() if key in known}
    return replace(request, model=model.name, **own)


def model_of(request: Request, config: ModelConfig) -> Model:
    """The model that is asked for, or that of the config.json. Raises ConfigError where there is none."""
    if request.model is None:
        return model_of_config(config)
    return named_model(request.model)


def completed(
    model: Model, request: Request, config: ModelConfig, source: Weights
) -> tuple[ModelConfig, tuple[str, ...]]:
    """The configuration with the model's own options, and what must be counted where nothing tells it."""
    values = dict(config.values)
    for option in (*_OWN_OPTIONS, *({"qkv_concat"} & set(model.options))):
        value = getattr(request, option)
        if value is not None and option not in model.options:
            raise ConfigError(f"--{option} is not an option of the model {model.name}")
        if value is not None:
            values[option] = value
    if config.path is not None:
        return ModelConfig(values, config.path), ()
    counted = {key: value for key, value in model.counted(source.tensors).items() if key not in values}
    told = ", ".join(f"{key} {value}" for key, value in counted.items())
    warnings = [f"{source.folder} has no config.json; by the names of the tensors: {told}"] if counted else []
    if request.reverse and request.to_naming is None:
        warnings.append("the result has no config.json, which from_pretrained needs; give its folder with --hf_config")
    return ModelConfig({**counted, **values}), tuple(warnings)


def as_recorded(request: Request, recorded: str) -> Request:
    """The request, with what a source says of its own layout where no option says it: "legacy+use_gmm"."""
    naming, *settings = recorded.split("+")
    values: dict[str, Any] = {"naming": naming}
    for option in LAYOUT_SETTINGS:
        if option in settings or f"no_{option}" in settings:
            values[option] = option in settings
    return replace(request, **{key: value for key, value in values.items() if getattr(request, key) is None})


def as_told(request: Request, told: Mapping[str, bool | None]) -> Request:
    """The request, with what names tell where no option says it."""
    values = {key: value for key, value in told.items() if value is None or getattr(request, key) is None}
    own: dict[str, Any] = values
    return replace(request, **own)


def layout_name(naming: str, model: Model, request: Request) -> str:
    """The naming, and the settings by which its tensors differ from the usual ones: "legacy+use_gmm"."""
    for option, usual in LAYOUT_SETTINGS.items():
        if option in model.options and getattr(request, option) not in (None, usual):
            naming += f"+{option}" if not usual else f"+no_{option}"
    return naming


def with_layout(request: Request, model: Model, layout: str, option: str) -> Request:
    """The request for weights of a layout like "legacy+use_gmm", which an option names.

    Raises ConfigError where the model has no such names or settings.
    """
    naming, *settings = layout.split("+")
    if not naming:
        raise ConfigError(
            f"{option} is empty; is a variable not set? {model.name} has {', '.join(model.namings)} names"
        )
    model.naming(naming, False)
    known = {*model.options} & {*LAYOUT_SETTINGS}
    known |= {"qkv_concat"} if f"{naming}+qkv_concat" in model.namings else set()
    strange = [setting for setting in settings if setting.removeprefix("no_") not in known]
    if strange:
        listed = ", ".join(sorted(known)) or "none"
        raise ConfigError(
            f"{option} {layout}: {strange[0]!r} is not a setting of the model {model.name} with {naming} names; there "
            f"are {listed}, each with no_ in front for false"
        )
    return as_recorded(request, layout)


def ask_for_rows(path: Path, request: Request) -> None:
    """Two layouts have had these names, and nothing in the file tells which it is. Raises ConfigError."""
    attention, mlp = "use_contiguous_weight_layout_attention", "use_interleaved_weight_layout_mlp"
    if None not in (getattr(request, attention), getattr(request, mlp)):
        return
    if request.to_naming is None:
        usual, old = f"--{attention} False --{mlp} True", f"--{attention} True --{mlp} False"
    else:
        usual, old = (f"--from legacy+qkv_concat+{said}" for said in (f"no_{attention}+{mlp}", f"{attention}+no_{mlp}"))
    raise ConfigError(
        f"{path} does not say how query, key and value, and gate and up, lie in its fused tensors; give {usual} for "
        f"files of MindFormers 1.4 and later (by groups of heads, and row by row in turn), {old} for those of 1.3 and "
        "before (one behind the other)"
    )
