"""Arguments of a call, checked as the command line checks its options: a wrong one is not taken for another."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from mindformers_ckpt.errors import ConfigError, did_you_mean, raise_problems
from mindformers_ckpt.execution.options import Options, affordable_processes
from mindformers_ckpt.sources.source import MODES


def check_arguments(**given: Any) -> None:
    """Raise ConfigError that lists all arguments whose value cannot be; None is one that was left out."""
    found = ((name, _RULES[name](value)) for name, value in given.items() if value is not None)
    problems = [f"{name}: {fault}" for name, fault in found if fault]
    raise_problems(ConfigError, "arguments of the call are wrong", problems)


def options_of(processes: int, sign: str | os.PathLike[str] | None, **chosen: bool) -> Options:
    """How to run a plan, with as many of the wanted processes as there is memory for."""
    return Options(processes=affordable_processes(processes), sign=None if sign is None else Path(sign), **chosen)


def _one_of(words: Collection[str]) -> Callable[[Any], str]:
    def fault(value: Any) -> str:
        if value in tuple(words):
            return ""
        return f"one of {', '.join(words)} was expected, not {value!r:.80}.{did_you_mean(str(value), words)}".rstrip(
            "."
        )

    return fault


def _dtype(value: Any) -> str:
    from mindformers_ckpt.convert.request import DTYPES  # which re-slicing does without

    return _one_of(DTYPES)(value)


def _number_from(least: int) -> Callable[[Any], str]:
    def fault(value: Any) -> str:
        is_number = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return "" if is_number else f"a whole number of at least {least} was expected, not {value!r:.80}"

    return fault


def _text(value: Any) -> str:
    return "" if isinstance(value, str) else f"text was expected, not {value!r:.80}"


def _prefix(value: Any) -> str:
    return _text(value) or ("a prefix of file names cannot hold a /" if "/" in value or "\0" in value else "")


def _path(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)):
        return f"a path was expected, not {value!r:.80}"
    # A Path is "." where its text was empty; one in an object storage has no text of the system.
    is_empty = isinstance(value, str) and not value.strip()
    return "the path is empty; is a variable not set?" if is_empty else ""


_RULES: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(("src", "dst", "adapter", "hf_config", "like", "sign"), _path),
    **dict.fromkeys(("processes", "num_layers"), _number_from(1)),
    "num_nextn_predict_layers": _number_from(0),
    "format": _one_of(("ckpt", "safetensors", "checkpoint2")),
    "dtype": _dtype,
    "contents": _one_of(MODES),
    "prefix": _prefix,
    "step": _text,
}
