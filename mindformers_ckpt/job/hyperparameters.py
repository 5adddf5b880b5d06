"""The hook's keys as options of a training script, which is how ModelArts hands on a job's hyperparameters."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from mindformers_ckpt.errors import ConfigError, describe_problems
from mindformers_ckpt.job.config import KEYS, Config, misspelt

log = logging.getLogger("mindformers_ckpt")


def from_command_line(argv: Sequence[str] | None = None) -> dict[str, str]:
    """The hook's options: `--key=value` or `--key value`, the last one counts. Without `argv`: of this process.

    A switch alone (`--auto_trans_ckpt`) is on. Other options are left alone, with a warning of those that
    look misspelt, and so is what follows `--`. Raises ConfigError for keys without the value they need.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--" in words:
        words = words[: words.index("--")]
    switches = {key: isinstance(getattr(Config, key), bool) for key in KEYS}
    found: dict[str, str] = {}
    others: dict[str, str] = {}
    problems = []
    for word, following in zip(words, [*words[1:], "--"]):
        if not word.startswith("--"):
            continue
        key, is_given, value = word[2:].partition("=")
        if key not in switches:
            others[key] = value
        elif is_given or not following.startswith("--"):
            found[key] = value if is_given else following
        elif switches[key]:
            found[key] = "True"
        else:
            problems.append(f"--{key}: no value is given; write --{key}=VALUE")
    if problems:
        raise ConfigError(describe_problems("hyperparameters are wrong", problems))
    for problem in misspelt({**found, **others}):
        log.warning("hyperparameter --%s", problem)
    return found
