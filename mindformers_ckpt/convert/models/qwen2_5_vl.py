"""The text part of Qwen2.5-VL: Qwen2. Its vision part is left out.

Names are those of the published files ("model.layers.0…", "visual.…"); newer versions of transformers write
"model.language_model.layers.0…" and "model.visual.…".
"""

from dataclasses import replace

from mindformers_ckpt.convert.config import ModelConfig
from mindformers_ckpt.convert.model import Facts
from mindformers_ckpt.convert.models import qwen2
from mindformers_ckpt.convert.rules import Drop

_NOTE = "the vision part (visual.…) has no place in MindFormers' network of Qwen2, which is that of the text: left out"


def facts(config: ModelConfig) -> Facts:
    """Those of Qwen2; newer config.json files have them in a section of their own."""
    text = config.values.get("text_config")
    values = {**(text if isinstance(text, dict) else {}), **config.values}
    return qwen2.facts(replace(config, values=values))


def canonical(name: str) -> str:
    """The name of the published files."""
    for nested, plain in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(nested):
            return plain + name[len(nested) :]
    return name


MODEL = replace(
    qwen2.MODEL,
    name="qwen2_5_vl",
    aliases=(),
    model_types=("qwen2_5_vl",),
    tables={naming: (*table, Drop("visual.*", note=_NOTE)) for naming, table in qwen2.MODEL.tables.items()},
    facts=facts,
    canonical={**qwen2.MODEL.canonical, "hf": canonical},
)
