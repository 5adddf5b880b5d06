"""The command `mindformers-ckpt`: finds the subcommand, prints errors, sets the exit code.

Exit codes: 0 done, 1 wrong input or failed, 2 usage, 130 interrupted, 143 ended by SIGTERM, 129 by SIGHUP.
"""

from __future__ import annotations

import gc

from mindformers_ckpt.cli import signals

if signals.is_program():
    signals.quiet_start()
    gc.disable()  # as `main` does it; the modules that are imported from here on are a tenth of the work

import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Iterator
from typing import IO, Any

import click

from mindformers_ckpt import __version__
from mindformers_ckpt.cli.help import EXIT_CODES, Context, complete_help, no_such_option, what_is_missing, what_is_wrong
from mindformers_ckpt.cli.notices import complain, escape_what_the_locale_lacks, notice, open_closed_streams, say_json
from mindformers_ckpt.cli.verbosity import add_verbosity
from mindformers_ckpt.errors import CheckpointError, did_you_mean
from mindformers_ckpt.printable import printable

# command -> (module of the command, one line of help). Modules are imported when their command runs.
_COMMANDS = {
    "transform": ("transform", "Re-slice a checkpoint for another parallel strategy."),
    "plan": ("plan", "Say what transform would do; write nothing."),
    "convert": ("convert", "Convert weights between Hugging Face and MindSpore."),
    "merge-lora": ("merge_lora", "Fold LoRA branches into the weights."),
    "inspect": ("inspect", "Say what is at a path: checkpoint, model, adapter, strategy, plan or result."),
    "show": ("show", "Draw how a tensor is cut before and after, or the whole plan as a page."),
    "doctor": ("doctor", "Say what this machine, its libraries and a file system are like."),
    "merge-strategy": ("merge_strategy", "Merge the strategy files of all ranks into one."),
    "verify": ("verify", "Check a result by its manifest, or against its source."),
    "diff": ("diff", "Compare two checkpoints as whole tensors."),
    "fingerprint": ("fingerprint", "Print what stays the same when a checkpoint is re-sliced."),
}


# Of threads that cannot be started, of libraries that cannot be loaded, of processes.
_WORDS_OF_SHORT_MEMORY = ("can't start new thread", "failed to map segment", "annot allocate memory")

# numpy's algebra library starts a thread a core when it is loaded; copying needs none. Workers inherit it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


class _Failure(click.ClickException):
    """A known error: one message on stderr."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        complain(self.message, self.__cause__)


class _WrongCall(click.UsageError):
    """A call that is not as the command wants it: its usage, and the error in the style of all others."""

    def show(self, file: IO[Any] | None = None) -> None:
        if self.ctx is not None:
            notice("", f"{self.ctx.get_usage()}\nTry '{self.ctx.command_path} --help' for help.\n")
        complain(self.format_message())


class _Interrupted(_Failure):
    exit_code = property(lambda self: signals.exit_code())  # a constant there


class _LazyGroup(click.Group):
    """A group that imports only the command that is called."""

    as_json = False
    context_class = Context

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = cmd_name.replace("_", "-")
        if name not in _COMMANDS:
            return None
        module = importlib.import_module(f"mindformers_ckpt.cli.{_COMMANDS[name][0]}")
        command: click.Command = module.command
        complete_help(name, command)
        add_verbosity(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0].replace("_", "-") not in _COMMANDS:
            raise click.UsageError(f"No such command {args[0]!r}.{did_you_mean(args[0], _COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def main(self, args: Any = None, *further: Any, **settings: Any) -> Any:
        arguments = sys.argv[1:] if args is None else list(args)
        self.as_json = "--json" in arguments
        return super().main(arguments, *further, **settings)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with self._told(), _printable_usage_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with self._told(), _as_failures(), signals.work(), _printable_usage_errors():
            return super().invoke(ctx)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Tell programs of an error on stdout, where they asked for JSON; people read it on stderr in any case."""
        try:
            yield
        except click.ClickException as error:
            if self.as_json:
                kind = type(error.__cause__ or error).__name__.lstrip("_")
                say_json({"error": {"kind": kind, "message": error.message, "exit_code": error.exit_code}})
            raise


@contextlib.contextmanager
def _as_failures() -> Iterator[None]:
    """Turn errors that a user can act on into those that click shows; what was behind one is its cause."""
    try:
        yield
    except CheckpointError as error:
        raise _Failure(_with_advice(str(error))) from error
    except KeyboardInterrupt as error:
        raise _Interrupted(" ".join(error.args) or "interrupted") from error
    except (MemoryError, OSError, RuntimeError, ImportError) as error:
        message = _said_of(error)
        if message is None:
            raise
        raise _Failure(message) from error


def _said_of(error: Exception) -> str | None:
    """The message for an error of the system, None for one that shows a fault of the program."""
    short = next(filter(_is_of_short_memory, _causes(error)), None)
    if short is not None:
        return (
            f"the memory is not enough ({' '.join(str(short).split()) or 'out of memory'}); close other programs, "
            "raise the limit of the process (ulimit -v), or start fewer processes"
        )
    if not isinstance(error, OSError) or error.errno == errno.EPIPE:  # a closed pipe is click's business
        return None
    file = error.filename2 or error.filename
    said = f"{file}: {error.strerror}" if file is not None else f"the system reports: {error.strerror or error}"
    return _with_advice(said)


def _with_advice(message: str) -> str:
    """A message, with what to do where the system has refused a file; faults that are listed have no cause to ask."""
    if os.strerror(errno.EACCES) not in message:
        return message
    mark = "\n  " if "\n" in message else "; "
    return f"{message}{mark}this user may not: change the rights, or ask the owner (ls -l names it)"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those behind it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_of_short_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in _WORDS_OF_SHORT_MEMORY)


@contextlib.contextmanager
def _printable_usage_errors() -> Iterator[None]:
    """What click says of wrong options repeats what was given. A command without any gets its help, which is ours."""
    try:
        yield
    except click.ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # from click 8.2 on
            raise
        if isinstance(error, click.UsageError):
            message = what_is_wrong(error)
            if isinstance(error, click.MissingParameter):
                message = what_is_missing(error)
            elif isinstance(error, click.NoSuchOption):
                message = no_such_option(error)
            raise _WrongCall(printable(message), error.ctx) from error
        vars(error)["message"] = printable(error.message)  # click calls it final
        raise


def _with_hyphens(token: str) -> str:
    """The guide writes options with underscores: --src_checkpoint is --src-checkpoint."""
    return token.replace("_", "-")


@click.group(
    cls=_LazyGroup,
    epilog=f"Exit codes: {EXIT_CODES}.",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": _with_hyphens,
        "max_content_width": 120,
    },
)
@click.version_option(__version__, prog_name="mindformers-ckpt")
def cli() -> None:
    """Re-slice MindSpore checkpoints between parallel strategies.

    Options may be written with hyphens or underscores.
    """


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line and exit with its code; a known error is one message on stderr."""
    signals.handle()
    open_closed_streams()
    # Plans are millions of tuples without cycles, and looking for cycles in them took a third of the planning.
    gc.disable()
    escape_what_the_locale_lacks()
    try:
        cli.main(arguments, prog_name="mindformers-ckpt")
    finally:
        if signals.is_program():
            gc.freeze()  # what is left is not looked through for cycles when the interpreter ends
