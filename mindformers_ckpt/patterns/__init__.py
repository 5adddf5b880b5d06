"""Regular expressions from outside, as PEFT writes them into adapter_config.json, matched in bounded time.

Python's `re` tries all ways to match, so a pattern like "(a+)+b" takes longer than anyone waits, and nothing can
interrupt it in its own thread. So patterns are matched in a process of their own (about 30 ms), which is killed when
the time is up. Another matcher that is linear would refuse or understand otherwise some patterns that PEFT takes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mindformers_ckpt.errors import ConfigError, raise_problems

SECONDS = 10.0
_WORKER = Path(__file__).with_name("worker.py")
_SHOWN = 120  # characters of a pattern in a message


def match_patterns(
    patterns: Sequence[str], names: Sequence[str], *, origin: str, seconds: float = SECONDS
) -> Mapping[str, list[str]]:
    """Pattern -> the module names that it matches as PEFT matches them: whole, or behind a dot.

    `origin` says in messages where the patterns come from. Raises ConfigError that lists all patterns that are no
    regular expressions, or names the one that was not done in `seconds` for all.
    """
    if not patterns:
        return {}
    answers, end = _answers(patterns, names, seconds)
    found: dict[str, list[str]] = {}
    problems = []
    for pattern, answer in zip(patterns, answers):
        if isinstance(answer, str):
            problems.append(f"{_short(pattern)} is not a regular expression: {answer}")
        else:
            found[pattern] = [names[number] for number in answer]
    if len(answers) < len(patterns):
        problems.append(f"{_short(patterns[len(answers)])} {end}; write it without nested repetitions")
    raise_problems(ConfigError, f"{origin}: patterns cannot be used", problems)
    return found


def _answers(patterns: Sequence[str], names: Sequence[str], seconds: float) -> tuple[list[list[int] | str], str]:
    """What the worker said of each pattern, in order, as far as it came, and how the next one ended it."""
    import subprocess  # only where there are patterns

    task = json.dumps({"patterns": list(patterns), "names": list(names)}).encode()
    command = [sys.executable, "-I", "-S", str(_WORKER)]
    try:
        done = subprocess.run(command, input=task, capture_output=True, timeout=seconds, check=False)
        output, end = done.stdout, f"ended the process that matches it (exit code {done.returncode})"
    except subprocess.TimeoutExpired as error:
        output, end = error.stdout or b"", f"was not matched within {seconds:g} s"
    except OSError as error:
        raise ConfigError(f"patterns cannot be matched: {sys.executable} does not start: {error.strerror}") from error
    whole = output[: output.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], end


def _short(pattern: str) -> str:
    shown = repr(pattern)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
