"""TeleChat3 with experts: DeepSeek-V3, under mcore names only."""

from dataclasses import replace

from mindformers_ckpt.convert.models import deepseek

MODEL = replace(
    deepseek.MODEL,
    name="telechat3_moe",
    aliases=(),
    model_types=("telechat3_moe",),
    tables={"mcore": deepseek.MCORE},
    options=("use_interleaved_weight_layout_mlp", deepseek.CONCAT),
)
