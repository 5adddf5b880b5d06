"""The errors of the library, one tree.

    CheckpointError
    ├── ConfigError      a yaml key, option or hyperparameter is wrong
    ├── StrategyError    a strategy file cannot be read, or says something impossible
    ├── FormatError      a checkpoint file is damaged, foreign or encrypted
    ├── PlanError        source, strategies and target do not fit together
    ├── TransferError    reading or writing bytes failed, or a worker died
    ├── PublishError     a result cannot be put in its place
    └── ClusterError     another rank failed, died or did not answer in time

Every message says what is wrong, where, and what to do next.
Where one input has several faults they are collected and raised together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

from mindformers_ckpt.printable import printable, shortened


class CheckpointError(Exception):
    """Base of all errors that a user can act on; the command line prints them without a traceback.

    The text of an error is printable, and can be read to its end, whatever names from outside are in it.
    """

    def __str__(self) -> str:
        return shortened(printable(super().__str__()))


class ConfigError(CheckpointError, ValueError):
    """A yaml key, a command-line option or a hyperparameter is wrong."""


class StrategyError(CheckpointError, ValueError):
    """A strategy file cannot be read, or contradicts itself or its neighbours."""


class FormatError(CheckpointError, ValueError):
    """A checkpoint file is truncated, damaged, encrypted or no checkpoint at all."""


class PlanError(CheckpointError, ValueError):
    """Source, strategies and target do not fit together."""


class TransferError(CheckpointError, OSError):
    """Bytes could not be read or written, or a worker process died."""


class PublishError(CheckpointError, OSError):
    """A finished result cannot be put in its place."""


class ClusterError(CheckpointError, RuntimeError):
    """Another rank failed, died, or did not answer in time."""


class StrategySaved(Exception):
    """`only_save_strategy` is set: the strategy of the job is saved, nothing was loaded, and the job is to stop."""


def describe_problems(headline: str, problems: Iterable[str], limit: int = 20) -> str:
    """Join several faults of one input into one message: the headline, then a line each, at most `limit`."""
    lines = list(problems)
    shown = [f"  - {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  … and {len(lines) - limit} more")
    return "\n".join([headline, *shown])


@contextmanager
def system_errors(kind: type[CheckpointError], what: str) -> Iterator[None]:
    """Raise an error of this kind in the place of one of the system: what failed, and why by the system's words."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror}") from error


def raise_problems(kind: type[CheckpointError], headline: str, problems: Collection[str]) -> None:
    """Raise an error that lists the faults of one input; do nothing where there are none."""
    if problems:
        raise kind(describe_problems(headline, problems))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" where something known is like the word, else nothing."""
    import difflib

    like = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, like))}?" if like else ""
