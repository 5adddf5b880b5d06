"""Which names are those of states: one answer for who converts, who compares and who looks for what is missing."""

from __future__ import annotations

import pytest

from mindformers_ckpt.planning.missing import missing_names
from mindformers_ckpt.state_names import State, find_states, state_of

WEIGHTS = {"model.w", "v"}


@pytest.mark.parametrize(
    ("name", "state", "is_known"),
    [
        ("adam_m.model.w", State("adam_m", "model.w"), True),
        ("exp_avg_sq_row_model.w", State("exp_avg_sq_row", "model.w"), True),  # CAME
        ("exp_avg_sq.v", State("exp_avg_sq", "v"), True),
        ("of_its_own.model.w", State("of_its_own", "model.w"), False),
        ("ema.v", State("ema", "v"), False),
        ("adam_m.model.other", None, False),
        ("model.w", None, False),
        ("v", None, False),
    ],
)
def test_states_of_weights(name: str, state: State | None, is_known: bool) -> None:
    assert state_of(name, WEIGHTS) == state
    assert state_of(name, WEIGHTS, known=True) == (state if is_known else None)
    assert find_states([name], WEIGHTS).optimizer == ([name] if is_known else [])


def test_states_that_a_checkpoint_of_weights_lacks() -> None:
    """CAME's too, whose words are joined with "_": they are no weights that the job would start without."""
    states = {f"{word}_{weight}" for word in ("exp_avg_sq_row", "exp_avg_sq_col") for weight in WEIGHTS}
    found = missing_names(WEIGHTS | states, WEIGHTS)
    assert found.required == []
    assert [note.partition(" (")[0] for note in found.notes] == [
        "the source holds no exp_avg_sq_col.*",
        "the source holds no exp_avg_sq_row.*",
    ]
