"""TeleChat3: Llama, under mcore names only."""

from mindformers_ckpt.convert.model import Model
from mindformers_ckpt.convert.models import decoder

_NOTE = "MindFormers' network of TeleChat3 has no biases of feed-forward layers and of the attention's output: left out"
_TABLE = decoder.without(decoder.without(decoder.MCORE, "mlp_bias", _NOTE), "output_bias", _NOTE)

MODEL = Model(
    name="telechat3",
    model_types=("telechat3",),
    tables={"mcore": tuple(_TABLE)},
    facts=decoder.facts,
    options=decoder.FUSED_OPTIONS,
)
