"""TeleChat3: Llama, under mcore names only."""

from mindformers_ckpt.convert.model import Model
from mindformers_ckpt.convert.models import decoder

MODEL = Model(
    name="telechat3",
    model_types=("telechat3",),
    tables={"mcore": decoder.MCORE},
    facts=decoder.facts,
    options=decoder.FUSED_OPTIONS,
)
