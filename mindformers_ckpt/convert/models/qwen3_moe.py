"""Qwen3 with experts, under mcore names."""

from dataclasses import replace

from mindformers_ckpt.convert.config import ModelConfig
from mindformers_ckpt.convert.model import Facts, Model
from mindformers_ckpt.convert.models import decoder
from mindformers_ckpt.convert.models.qwen3 import ATTENTION, QK_NORMS
from mindformers_ckpt.convert.rules import rename


def facts(config: ModelConfig) -> Facts:
    """Those of a decoder; which layers have experts is said by `decoder_sparse_step` and `mlp_only_layers`."""
    found = decoder.facts(config)
    step, dense = config.integer("decoder_sparse_step") or 1, config.values.get("mlp_only_layers") or []
    layers = found.runs["layer"]
    sparse = [layer for layer in layers if layer["n"] not in dense and (layer["n"] + 1) % step == 0]
    runs = {**found.runs, "sparse": sparse, "dense": [layer for layer in layers if layer not in sparse]}
    return replace(found, runs=runs)


MODEL = Model(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    tables={
        "mcore": (
            *decoder.MCORE_START,
            *decoder.layers([*ATTENTION, *QK_NORMS], decoder.MCORE_LAYER),
            *decoder.layers(decoder.MCORE_FFN, decoder.MCORE_LAYER, over="dense"),
            *decoder.layers(
                [rename("mlp.gate.weight", "mlp.router.weight", "expert hidden"), *decoder.MCORE_EXPERTS],
                decoder.MCORE_LAYER,
                over="sparse",
            ),
            *decoder.MCORE_END,
        )
    },
    facts=facts,
    options=decoder.FUSED_OPTIONS,
)
