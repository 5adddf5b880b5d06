#!/usr/bin/env python3
"""Write docs/options.md and docs/keys.md, and their Chinese twins, from the commands and the configuration.

    python tools/option_pages.py             # write them
    python tools/option_pages.py --check     # exit with 1 when they are not what the code says

What an option or a key means stands in the code, in English; the Chinese page of keys takes it from the table of
docs/zh/automatic.md. Heads and headings are in page_texts.yaml. Needs no MindSpore.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from generated_pages import FOLDERS, ROOT, main, table_head, texts_of

_ENVIRONMENT = re.compile(r"\"((?:MINDFORMERS_CKPT|MS|AWS|RANK)_[A-Z_]+|NO_COLOR)\"")
_ROLES = {"MS_SCHED"}  # values of MS_ROLE


def pages() -> dict[Path, str]:
    """The four pages by their files. Raises KeyError for a variable of the code that is not described."""
    _check_variables()
    made = {folder / "options.md": _options(language) for language, folder in FOLDERS.items()}
    return {**made, **{folder / "keys.md": _keys(language) for language, folder in FOLDERS.items()}}


def _options(language: str) -> str:
    import click

    from mindformers_ckpt.cli.main import cli

    texts = texts_of("options")
    parts = [texts["head"][language]]
    group = click.Context(cli, info_name="mindformers-ckpt", **cli.context_settings)
    for name in cli.list_commands(group):
        command = cli.get_command(group, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=group)
        usage = " ".join(command.get_usage(context).partition("Usage: ")[2].split())
        # The first line of the help; what follows is layout for a terminal.
        about = (command.help or "").partition("\n")[0]
        records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
        rows = [f"| `{_cell(option)}` | {_prose(meaning)} |" for option, meaning in filter(None, records) if meaning]
        head = f"## `{name}`\n\n{about}\n\n```text\n{usage}\n```\n\n{table_head(texts['columns'][language])}\n"
        parts.append(head + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _prose(text: str) -> str:
    """Text outside of code: a name in angle brackets is no element of HTML."""
    return _cell(text).replace("<", "&lt;")


def _keys(language: str) -> str:
    from mindformers_ckpt.job.config import KEYS, Config

    texts = texts_of("keys")
    meanings = _meanings_in_english() if language == "en" else _meanings_in_chinese()
    defaults = {field.name: field.default for field in fields(Config)}
    keys, variables, mindspore = texts["titles"][language]
    lines = [texts["head"][language], f"## {keys}\n", table_head(texts["columns"][language])]
    lines += [f"| `{key}` | {_default(defaults[key])} | {meanings[key]} |" for key in KEYS]
    for title, described in ((variables, texts["variables"]), (mindspore, texts["mindspore"])):
        lines += [f"\n## {title}\n", table_head(texts["variable_columns"][language])]
        lines += [f"| `{name}` | {meaning[language]} |" for name, meaning in described.items()]
    return "\n".join(lines) + "\n"


def _default(value: object) -> str:
    return "–" if value in ("", None, ()) else f"`{value}`"


def _meanings_in_english() -> dict[str, str]:
    """What the configuration's docstring says of each key."""
    from mindformers_ckpt.job.config import Config

    block = (inspect.getdoc(Config) or "").partition("Attributes:\n")[2]
    found = re.findall(r"^ {4}(\w+): ((?:.|\n {8})+)", block, re.MULTILINE)
    return {key: _prose(text[0].upper() + text[1:]) for key, text in found}


def _meanings_in_chinese() -> dict[str, str]:
    """What the first table of the Chinese page on jobs says of each key."""
    page = (FOLDERS["zh"] / "automatic.md").read_text(encoding="utf-8").replace("](#", "](automatic.md#")
    return dict(re.findall(r"^\| `(\w+)` \| [^|]* \| (.*) \|$", page, re.MULTILINE))


def _check_variables() -> None:
    texts = texts_of("keys")
    described, read = {*texts["variables"], *texts["mindspore"]}, set(_variables_of_the_code())
    if unknown := read - described:
        raise KeyError(f"variables that tools/page_texts.yaml does not describe: {sorted(unknown)}")
    if gone := described - read:
        raise KeyError(f"variables of tools/page_texts.yaml that the code does not read: {sorted(gone)}")


def _variables_of_the_code() -> Iterator[str]:
    for file in (ROOT / "mindformers_ckpt").rglob("*.py"):
        found = _ENVIRONMENT.findall(file.read_text(encoding="utf-8"))
        yield from (name for name in found if name not in _ROLES)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(__doc__, pages, sys.argv[1:]))
