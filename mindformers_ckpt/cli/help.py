"""What every `--help` has: required options in the usage line, examples, the page that tells more, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import click

from mindformers_ckpt.cli.folding import folded_command, width_of
from mindformers_ckpt.errors import did_you_mean

_PAGES = "docs/{} of the project"
EXIT_CODES = (
    "0 done, 1 wrong input or failed (of verify and diff: a difference), 2 usage, 130 interrupted (143 by SIGTERM, 129 "
    "by SIGHUP)"
)
# command -> (page, examples)
_HELP = {
    "transform": (
        "offline.md",
        (
            "transform --src-checkpoint llama.ckpt --dst-checkpoint-dir llama_8 --dst-strategy output/strategy",
            "transform --src-checkpoint llama_8 --src-strategy output/strategy --dst-checkpoint-dir llama_complete",
        ),
    ),
    "plan": (
        "offline.md",
        ("plan --src-checkpoint llama_8 --src-strategy old/strategy --dst-strategy new/strategy --out plan.json",),
    ),
    "convert": (
        "conversion.md",
        (
            "convert --input-path Qwen2.5-7B --output-path qwen.ckpt --dtype bf16",
            "convert --reversed --input-path qwen.ckpt --output-path Qwen2.5-7B-tuned --hf-config Qwen2.5-7B",
        ),
    ),
    "merge-lora": (
        "lora.md",
        ("merge-lora --src-ckpt-path-or-dir llama_lora.ckpt --dst-ckpt-dir merged --lora-scaling 2",),
    ),
    "merge-strategy": ("offline.md", ("merge-strategy output/strategy merged_ckpt_strategy.ckpt",)),
    "inspect": (
        "look.md",
        ("inspect llama_8 --strategy output/strategy", "inspect llama_8 --name layers.3.attention.wq --rank 7"),
    ),
    "show": (
        "look.md",
        (
            "show layers.0.wq.weight --src-checkpoint llama_8 --src-strategy output/strategy",
            "show --plan plan.json --html plan.html",
        ),
    ),
    "doctor": ("look.md", ("doctor", "doctor /shared/checkpoints/llama_8")),
    "verify": ("trust.md", ("verify llama_8", "verify llama_8 --against llama.ckpt")),
    "diff": ("trust.md", ("diff llama.ckpt llama_8",)),
    "fingerprint": ("trust.md", ("fingerprint llama.ckpt",)),
}
# What a command cannot do without, where click does not know it since a plan file may stand for it.
_NEEDED = {"transform": "--src-checkpoint PATH --dst-checkpoint-dir PATH", "plan": "--src-checkpoint PATH"}


class Formatter(click.HelpFormatter):
    """Help that fits the terminal: the names of an option, too, which click leaves in one line."""

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        fitting = [(self._folded(names), text) for names, text in rows]
        super().write_dl(fitting, col_max, col_spacing)

    def _folded(self, names: str) -> str:
        lines: list[str] = []
        for name in names.split(", "):
            if lines and self.current_indent + len(lines[-1]) + len(name) + 3 <= self.width:
                lines[-1] += f", {name}"
            else:
                lines.append(name)
        return f",\n{'':>{self.current_indent + 4}}".join(lines)


class Context(click.Context):
    """A context whose help fits the terminal."""

    formatter_class = Formatter


def complete_help(name: str, command: click.Command) -> None:
    """Add examples, link and exit codes to the help of a command, and its required options to the usage line."""
    page, examples = _HELP.get(name, ("offline.md", ()))
    width = width_of(sys.stdout)
    shown = [line for each in examples for line in folded_command(f"  mindformers-ckpt {each}", width and width - 2)]
    lines = ["\b", "Examples:", *shown, ""] if examples else []
    command.epilog = "\n".join([*lines, f"More: {_PAGES.format(page)}.", "", f"Exit codes: {EXIT_CODES}."])
    required = [
        f"{parameter.opts[0]} {parameter.type.name.upper()}"
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.required
    ]
    needed = _NEEDED.get(name) or " ".join(required)
    command.context_class = Context
    command.options_metavar = f"{needed} [OPTIONS]" if needed else "[OPTIONS]"


def what_is_missing(error: click.MissingParameter) -> str:
    """The message that names all that a call lacks; click stops at the first."""
    context, first = error.ctx, error.param
    if context is None or first is None:
        return error.format_message()
    lacking = [each for each in context.command.params if each.required and each.name not in context.params]
    if lacking in ([], [first]):
        return error.format_message()
    arguments = [each.human_readable_name for each in lacking if isinstance(each, click.Argument)]
    options = [each.opts[0] for each in lacking if isinstance(each, click.Option)]
    return missing(arguments, options)


def no_such_option(error: click.NoSuchOption) -> str:
    """The message for a misspelt option, as that for a misspelt command."""
    known = [] if error.ctx is None else [name for each in error.ctx.command.params for name in each.opts]
    return f"No such option {error.option_name!r}.{did_you_mean(error.option_name, known)}"


def what_is_wrong(error: click.UsageError) -> str:
    """The message of click; where it met paths that belong behind options, with what is to be given."""
    message, context = error.format_message(), error.ctx
    if context is None or not message.startswith("Got unexpected extra argument"):
        return message
    command = context.command
    if any(isinstance(each, click.Argument) for each in command.params) or not isinstance(command, click.Command):
        return message
    needed = (command.options_metavar or "").removesuffix("[OPTIONS]").strip()
    return f"{message}. Paths are given by options here{': ' if needed else ''}{needed}"


def missing(arguments: Sequence[str], options: Sequence[str]) -> str:
    """The message for arguments and options that a call lacks."""
    named = [
        f"{kind}{'s' if len(names) > 1 else ''} {' and '.join(map(repr, names))}"
        for kind, names in (("argument", arguments), ("option", options))
        if names
    ]
    return f"Missing {', '.join(named)}."
