"""The hook's keys as options of a training script, which is how ModelArts hands on a job's hyperparameters."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from mindformers_ckpt.errors import ConfigError, raise_problems
from mindformers_ckpt.job.config import KEYS, Config
from mindformers_ckpt.job.misspelt import misspelt

_PATHS = ("load_checkpoint", "src_strategy_path_or_dir")
_DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # text processors make others of two hyphens


def from_command_line(argv: Sequence[str] | None = None) -> dict[str, str]:
    """The hook's options: `--key=value` or `--key value`, the last one counts. Without `argv`: of this process.

    A switch alone (`--auto_trans_ckpt`) is on. Other options are left alone, and so is what follows `--`.
    Raises ConfigError listing all keys without the value they need, and all options that look like keys of ours
    and are none. An empty value counts as none: it comes from a variable that is not set.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--" in words:
        words = words[: words.index("--")]
    switches = {key: isinstance(getattr(Config, key), bool) for key in KEYS}
    found: dict[str, str] = {}
    others: dict[str, str] = {}
    problems = list(_wrong_dashes(words))
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
    problems += [
        f"--{key}: the value is empty, is a variable not set? Leave the option out"
        + (f", or write --{key}=None" if key in _PATHS else "")
        for key, value in found.items()
        if not value.strip()
    ]
    problems += [f"--{line}" for line in misspelt(others, KEYS)]
    raise_problems(ConfigError, "hyperparameters are wrong", problems)
    return found


def _wrong_dashes(words: Sequence[str]) -> Iterator[str]:
    """A line for each option that is one of ours but for the dashes before it."""
    for word in words:
        name = word.lstrip(_DASHES).partition("=")[0]
        dashes = word[: len(word) - len(word.lstrip(_DASHES))]
        if name in KEYS and dashes not in ("", "--"):
            yield f"{dashes}{name}: write --{name}"
