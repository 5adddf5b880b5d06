"""Options that several commands share, and their types."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from mindformers_ckpt.engine.page_cache import CAN_DROP
from mindformers_ckpt.errors import did_you_mean
from mindformers_ckpt.objects.path import as_path, is_url
from mindformers_ckpt.planning.model import DEFAULT_PREFIX
from mindformers_ckpt.sources.source import MODES

if TYPE_CHECKING:
    from mindformers_ckpt.api.request import Request
    from mindformers_ckpt.planning.file import Job

_SPAN = re.compile(r"(\d+)(?:-(\d+))?")

Command = TypeVar("Command", bound=Callable[..., Any])


class OneOf(click.Choice):  # type: ignore[type-arg]  # generic in newer versions of click only
    """One of a few words; the error suggests those that are like what was given."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            self.fail(f"{error.message}{did_you_mean(str(value), map(str, self.choices))}", param, ctx)


class TrueOrFalse(click.types.BoolParamType):
    """True or False, in the words that click knows; the error suggests the one that was meant."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            like = did_you_mean(str(value).capitalize(), ("True", "False"))
            self.fail(f"{str(value)!r} is not one of 'True', 'False'.{like}", param, ctx)


BOOL = TrueOrFalse()


class Whole(click.IntRange):
    """A whole number in a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not _is_number(int, value):
            self.fail(f"{str(value)!r} is not a whole number.", param, ctx)
        return super().convert(value, param, ctx)


class Number(click.FloatRange):
    """A number in a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not _is_number(float, value):
            self.fail(f"{str(value)!r} is not a number.", param, ctx)
        return super().convert(value, param, ctx)


def _is_number(kind: Callable[[Any], float], value: Any) -> bool:
    try:
        kind(value)
    except ValueError:
        return False
    return True


class LocalPath(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A path on a disk. An empty one is that of a variable that is not set; as a Path it would be this folder."""

    name = "path"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if isinstance(value, Path):
            return value
        if not value.strip():
            self.fail("the path is empty; is a variable not set? Give a path, or leave the option out", param, ctx)
        return self.found(value, param, ctx)

    def found(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if is_url(value):
            self.fail(f"{value} is in an object storage, a path on a disk is expected; copy it first", param, ctx)
        return Path(value)


class AnyPath(LocalPath):
    """A path on a disk, or the URL of an object storage."""

    def found(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return as_path(value)


class StrategyPath(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A strategy file or folder; "None" and "" stand for complete weights, as the guide writes them."""

    name = "path"

    def convert(
        self, value: str | Path | None, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | None:
        if value is None or str(value) in ("", "None"):
            return None
        return as_path(value)


class Ranks(click.ParamType):  # type: ignore[type-arg]
    """Rank numbers and spans of them: "0-7,12"."""

    name = "ranks"

    def convert(
        self, value: str | tuple[int, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        ranks: set[int] = set()
        for part in value.split(","):
            match = _SPAN.fullmatch(part.strip())
            if match is None:
                self.fail(f"{value!r} is not a list of ranks; write it like 0-7,12", param, ctx)
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                self.fail(f"{part.strip()!r} ends before it begins", param, ctx)
            ranks.update(range(first, last + 1))
        return tuple(sorted(ranks))


def _check_prefix(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if "/" in value or "\0" in value:
        raise click.BadParameter("a prefix of file names cannot hold a /")
    return value


CONTENTS = click.option(
    "--contents",
    type=OneOf(MODES),
    default="error",
    show_default=True,
    help="When samples of the source contradict its strategy: refuse, warn and go on, or do not look.",
)
ALLOW_MISSING = click.option(
    "--allow-missing",
    is_flag=True,
    help="Leave out parameters of the target strategy that are not in the source, instead of refusing.",
)
PREFIX = click.option(
    "--prefix",
    default=DEFAULT_PREFIX,
    show_default=True,
    callback=_check_prefix,
    help="Target files are rank_<n>/<prefix><n>.ckpt.",
)
_REQUEST_OPTIONS = (
    click.option(
        "--src-checkpoint",
        "--src-ckpt-path-or-dir",
        "src_checkpoint",
        type=AnyPath(),
        help="File of complete weights, a folder of such files, or the folder that holds rank_<n> folders.",
    ),
    click.option(
        "--src-strategy",
        "--src-ckpt-strategy",
        "src_strategy",
        type=StrategyPath(),
        help="Strategy of the source: file, merged file or folder. None, or left out, for complete weights.",
    ),
    click.option(
        "--dst-strategy",
        "--dst-ckpt-strategy",
        "dst_strategy",
        type=StrategyPath(),
        help="Strategy of the target. None, or left out, for complete weights.",
    ),
    PREFIX,
    click.option(
        "--format",
        "--save-format",
        "format",
        type=OneOf(["ckpt", "safetensors", "checkpoint2"]),
        help="Format of the target files; checkpoint2 is MindFormers' own, which its 2.x releases resume from.  "
        "[default: safetensors if all source files are, else ckpt]",
    ),
    click.option("--ranks", type=Ranks(), help="Make these target ranks only, like 0-7,12."),
    click.option("--world-size", type=Whole(min=1), help="Ranks of the target; checked against its strategy."),
    click.option(
        "--rank-id",
        type=Whole(min=0),
        help="For --transform-process-num processes that are started by hand: the first rank of this one's share. Of 8 "
        "ranks and 2 processes, 0 makes ranks 0-3 and 4 makes ranks 4-7.",
    ),
    ALLOW_MISSING,
    click.option(
        "--weights-only",
        is_flag=True,
        help="Leave states of the optimizer and counters of the training aside.",
    ),
    CONTENTS,
    click.option(
        "--like",
        type=AnyPath(),
        metavar="CHECKPOINT_OR_HF_CONFIG",
        help="Refuse a source with other full shapes than this: complete weights, rank folders with a folder "
        "`strategy` in or beside them, or the config.json (or folder) of a Hugging Face model.",
    ),
)

STEP = click.option(
    "--step",
    help="Of several files: the epoch and step to read, like 3_150, or a file's name.  [default: in rank folders the "
    "last by default sort of the names]",
)
DESTINATION = click.option(
    "--dst-checkpoint-dir",
    "--dst-checkpoint",
    "--dst-ckpt-dir",
    "destination",
    type=AnyPath(),
    help="Folder for the result.",
)


def processes_option(*, help: str) -> Callable[[Command], Command]:
    """How many processes there are for the work, and what they do."""
    return click.option(
        "--transform-process-num",
        "--process-num",
        "processes",
        type=Whole(min=1),
        default=1,
        show_default=True,
        help=help,
    )


PROCESSES = processes_option(help="Processes that copy.")


def request_options(command: Command) -> Command:
    """Add the options that say what to make of what: the fields of a `Request`."""
    for option in reversed((*_REQUEST_OPTIONS[:1], DESTINATION, STEP, *_REQUEST_OPTIONS[1:], PROCESSES)):
        command = option(command)
    return command


def request_of(asked: Mapping[str, Any]) -> Request:
    """What the options of `request_options` ask for. Raises UsageError for options that do not go together."""
    from mindformers_ckpt.api.request import Request

    if asked["src_checkpoint"] is None:
        raise click.UsageError("Missing option '--src-checkpoint'.")
    if asked["ranks"] is not None and asked["rank_id"] is not None:
        raise click.UsageError("--ranks and --rank-id both say which ranks to make; give one of them.")
    if asked["format"] == "checkpoint2" and (asked["ranks"] is not None or asked["rank_id"] is not None):
        raise click.UsageError("A checkpoint 2.0 is made of all ranks at once; leave --ranks and --rank-id out.")
    return Request(**asked)


def planned(plan_file: Path, free: Container[str]) -> Job:
    """The job of a plan file. Refuses options that it has decided already, all but those of `free`."""
    from mindformers_ckpt.api.request import Request
    from mindformers_ckpt.planning.file import read_plan

    context = click.get_current_context()
    decided = [
        f"--{name.replace('_', '-')}"
        for name in Request.__dataclass_fields__
        if name not in free and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if decided:
        raise click.UsageError(f"the plan decides {', '.join(decided)}; make another plan, or leave --plan out")
    return read_plan(plan_file)


FINGERPRINT = click.option(
    "--fingerprint",
    "fingerprints",
    is_flag=True,
    help="Record the fingerprints of result and source, which are counted while the result is made.",
)
SIGN = click.option(
    "--sign",
    type=LocalPath(),
    metavar="KEY",
    help="Sign the fingerprint of the result with a private key (PEM); see docs/trust.md.",
)
HASH = click.option("--hash", "hashes", is_flag=True, help="Record xxh3-128 of every written tensor in the manifest.")
FSYNC = click.option("--fsync", is_flag=True, help="Force the result to the disk before it gets its name.")
CRC_CHECK = click.option(
    "--crc-check", is_flag=True, help="Verify the CRC-32 that source .ckpt files store, and append one to target files."
)
RESUME = click.option(
    "--resume", is_flag=True, help="Go on after what an interrupted run of the same command has done."
)


def _drops(ctx: click.Context, param: click.Parameter, value: str) -> bool:
    if value == "drop" and not CAN_DROP:
        raise click.BadParameter("this system cannot be told to forget pages; leave the option out")
    return value == "drop"


CACHE = click.option(
    "--cache",
    "drop_cache",
    type=OneOf(["keep", "drop"]),
    default="keep",
    show_default=True,
    callback=_drops,
    help="Whether what is read and written may stay in the page cache; `drop` spares the pages of other programs.",
)


OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an earlier result of this program.")
OVERWRITE_ANYTHING = click.option(
    "--overwrite-anything", is_flag=True, help="Replace whatever is there, also what this program did not make."
)


@contextlib.contextmanager
def resumable(destination: Path) -> Iterator[None]:
    """Say, when the body is interrupted, that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {destination} is as it was. The same command with --resume goes on from here"
        ) from None


DRY_RUN = click.option("--dry-run", is_flag=True, help="Say what would be done, and write nothing.")

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON report on stdout, notices on stderr."
)
