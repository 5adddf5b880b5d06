"""The names of what a training run keeps beside the weights of its model: optimizer states, counters and buffers."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from typing import NamedTuple

from mindformers_ckpt.words import shortened

# What the checkpoint callbacks of MindSpore and MindFormers, and their optimizers, save beside the weights.
COUNTERS = frozenset(
    {
        *("epoch_num", "step_num", "global_step", "global_batch_size", "learning_rate", "loss_scale", "scale_sense"),
        *("current_iterator_step", "last_overflow_iterator_step", "beta1_power", "beta2_power", "momentum"),
        *("scale_window", "scale_window_up_count", "scale_window_down_count", "consumed_samples"),
    }
)
_NEVER_SAVED = ("accu_grads.",)
_CACHES = frozenset({"key_cache", "value_cache"})
_GROUP_COUNTER = re.compile(r"(?:learning_rate|weight_decay)(?:_group)?_\d+")
# "<word>.<weight>": the states that the optimizers of MindSpore, mint and MindFormers (Muon, CAME) keep of a weight,
# gradients that are summed up over steps, and copies of the weights in single precision.
_STATE_WORDS = (
    *("adam_m", "adam_v", "muon_m", "lamb_m", "lamb_v", "moment", "moments", "moment1", "moment2", "vhat", "accum"),
    *("accum_update", "stat", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"),
    *("exp_avg_insta_row", "exp_avg_insta_col", "exp_inf", "mean_grad", "mean_square", "momentum_buf", "linear"),
    *("ax", "prev", "step_size", "accu_grads", "fp32", "fp32_params", "master", "master_params", "main_params"),
)
# CAME joins the word to the name with "_".
_STATE = re.compile(rf"({'|'.join(sorted(_STATE_WORDS, key=len, reverse=True))})[._](.+)")
# As PyTorch nests them: "optim.state.<weight>.exp_avg".
_TORCH_STATE = re.compile(r"(?:.+\.)?optim(?:izer)?s?(?:_\d+)?\.state\..+\.(\w+)")
_PLACEHOLDER = re.compile(r"(?:muon_m|adam_m|adam_v)\.placeholder\.\d+")
# What MindFormers' networks count or keep between steps.
_BUFFER = re.compile(
    r"(?:.+\.)?(?:"
    r"\w*dropout\.(?:\w+\.)*(?:seed|offset)\w*"
    r"|fi_accu|fi_parameter\w*|expert_load|expert_load_history|expert_load_history_cnt"
    r"|(?:global_|num_)?tokens_per_expert"
    r"|key_cache|value_cache|key_cache_grad|value_cache_grad|zeros_k_pe|zeros_k_nope|zeros_value_states"
    r")"
    r"|_device_local_(?:norm|loss)\w*"
)


class State(NamedTuple):
    """A state: what it is ("adam_m"), and the name of the weight that it is one of."""

    kind: str
    weight: str


class States(NamedTuple):
    """Names of states by what they are."""

    optimizer: list[str]
    counters: list[str]
    buffers: list[str]

    def __str__(self) -> str:
        """ "6 optimizer states (adam_m.*, adam_v.*), 2 counters (epoch_num, step_num)" """
        words = list(dict.fromkeys(map(_words, self.optimizer)))
        endings = list(dict.fromkeys(name.rpartition(".")[2] for name in self.buffers))
        kinds = (
            (self.optimizer, "optimizer states", words),
            (self.counters, "counters", self.counters),
            (self.buffers, "buffers", endings),
        )
        return ", ".join(f"{len(names)} {kind} ({shortened(shown, 8)})" for names, kind, shown in kinds if names)

    def __bool__(self) -> bool:
        return any(self)

    def names(self) -> set[str]:
        return {name for names in self for name in names}


def find_states(names: Iterable[str], weights: Container[str]) -> States:
    """Which of the names are not weights but states of a training run, given the names of the model's weights."""
    found = States([], [], [])
    for name in names:
        if name in COUNTERS or _GROUP_COUNTER.fullmatch(name):
            found.counters.append(name)
        elif _BUFFER.fullmatch(name):
            found.buffers.append(name)
        elif _PLACEHOLDER.fullmatch(name) or _TORCH_STATE.fullmatch(name) or _is_known_state(name, weights):
            found.optimizer.append(name)
    return found


def state_of(name: str, weights: Container[str], *, known: bool = False) -> State | None:
    """The state that a name is of one of the weights, None when it is none.

    That of an optimizer nobody knows is one, too ("<word>.<weight>"), unless only `known` ones count: for who leaves
    states out, since what stands before a weight may also say that it is another copy of the weights.
    """
    match = _STATE.fullmatch(name)
    if match is not None and match[2] in weights:
        return State(match[1], match[2])
    word, _, weight = name.partition(".")
    return State(word, weight) if weight in weights and not known else None


def is_never_saved(name: str) -> bool:
    """Whether a parameter is in no checkpoint: MindSpore makes it anew as it needs it."""
    return name.startswith(_NEVER_SAVED) or name.rpartition(".")[2] in _CACHES


def _is_known_state(name: str, weights: Container[str]) -> bool:
    match = _STATE.fullmatch(name)
    of_a_buffer = match is not None and _BUFFER.fullmatch(match[2]) is not None
    return of_a_buffer or state_of(name, weights, known=True) is not None


def _words(name: str) -> str:
    """ "adam_m.*" or "*.exp_avg": what a state is called for any weight."""
    match = _TORCH_STATE.fullmatch(name)
    if match is not None:
        return f"*.{match[1]}"
    match = _STATE.fullmatch(name)
    return f"{match[1] if match else name}.*"
