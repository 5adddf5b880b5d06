"""A value that an option cannot take: one style of message in all commands, a suggestion, and exit code 2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from toy import command

from mindformers_ckpt.cli.main import _COMMANDS, cli

COMMANDS = {name: cli.get_command(click.Context(cli), name) for name in _COMMANDS}
_CHECKED = (click.Choice, click.IntRange, click.FloatRange, click.types.BoolParamType)


def options() -> Iterator[tuple[str, click.Option]]:
    """The options of all commands that take a word out of some, True or False, or a number in a range."""
    for name, found in COMMANDS.items():
        assert found is not None
        for option in found.params:
            if isinstance(option, click.Option) and not option.is_flag and isinstance(option.type, _CHECKED):
                yield name, option


@pytest.mark.parametrize(
    ("name", "option"), [pytest.param(*each, id=f"{each[0]}{each[1].opts[0]}") for each in options()]
)
def test_every_option_says_what_it_takes(name: str, option: click.Option) -> None:
    with pytest.raises(click.BadParameter) as raised:
        option.type.convert("wrong", option, None)
    said = raised.value.message
    words = ("'wrong' is not one of '", "'wrong' is not a whole number.", "'wrong' is not a number.")
    assert said.startswith(words), said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", "--reversed", "Treu"], "'--reversed': 'Treu' is not one of 'True', 'False'. Did you mean 'True'?"),
        (
            ["convert", "--qkv_concat", "flase"],
            "'--qkv-concat': 'flase' is not one of 'True', 'False'. Did you mean 'False'?",
        ),
        (
            ["convert", "--naming", "legasy"],
            "'--naming': 'legasy' is not one of 'legacy', 'mcore'. Did you mean 'legacy'?",
        ),
        (
            ["diff", "a", "b", "--contents", "eror"],
            "'eror' is not one of 'error', 'warn', 'off'. Did you mean 'error' or",
        ),
        (["inspect", "a", "--rank", "two"], "'--rank': 'two' is not a whole number."),
        (["diff", "a", "b", "--tolerance", "little"], "'--tolerance': 'little' is not a number."),
    ],
)
def test_a_misspelt_value(arguments: list[str], said: str, tmp_path: Path) -> None:
    found = command([*arguments, "--json"], tmp_path)
    assert found.code == 2, found
    assert said.split(" or")[0] in found.err.splitlines()[-1]
    told = json.loads(found.out)["error"]
    assert (told["exit_code"], told["kind"]) == (2, "BadParameter")
    assert said.split(" or")[0] in told["message"]
