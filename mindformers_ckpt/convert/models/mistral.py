"""Mistral: Llama. Whether attention looks back over a window only is no matter of the weights."""

from dataclasses import replace

from mindformers_ckpt.convert.models import llama

MODEL = replace(llama.MODEL, name="mistral", aliases=(), model_types=("mistral",))
