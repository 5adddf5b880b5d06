"""What a call of `install` or the environment sets: how long ranks wait, and what a checkpoint 2.0 may lack."""

from __future__ import annotations

import os
from collections.abc import Sequence

from mindformers_ckpt.errors import ConfigError, raise_problems
from mindformers_ckpt.job.cluster.environment import misspelt_names
from mindformers_ckpt.job.config import parse_seconds
from mindformers_ckpt.planning.missing import patterns_of

DEFAULT_TIMEOUT = 7200.0  # seconds; MindFormers waits so long for strategy files, and without end elsewhere
_TIMEOUT, _ALLOW_MISSING = "MINDFORMERS_CKPT_TIMEOUT", "MINDFORMERS_CKPT_ALLOW_MISSING"


def settings(
    timeout: float | str | None = None, allow_missing: bool | str | Sequence[str] | None = None
) -> tuple[float, tuple[str, ...]]:
    """Seconds and patterns: those given, else those of the environment. Raises ConfigError listing all faults."""
    seconds: float = DEFAULT_TIMEOUT
    allowed: tuple[str, ...] = ()
    problems = misspelt_names(os.environ)
    if timeout is None:
        timeout = os.environ.get(_TIMEOUT) or DEFAULT_TIMEOUT
    if allow_missing is None:
        allow_missing = os.environ.get(_ALLOW_MISSING) or ()
    try:
        seconds = parse_seconds(timeout)
    except ValueError as error:
        problems.append(f"timeout ({_TIMEOUT}): {error}")
    try:
        allowed = patterns_of(allow_missing)
    except ConfigError as error:
        problems.append(f"{error} ({_ALLOW_MISSING})")
    raise_problems(ConfigError, "the settings of install() or of the environment are wrong", problems)
    return seconds, allowed
