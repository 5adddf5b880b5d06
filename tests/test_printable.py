"""Names from outside cannot give orders to a terminal, forge a line of a log, or break the printing of a message."""

from __future__ import annotations

import json
import logging
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ckpt.errors import CheckpointError, FormatError, PlanError, TransferError, describe_problems
from mindformers_ckpt.log import log
from mindformers_ckpt.printable import ascii_json, printable, shortened
from mindformers_ckpt.text_files import readable_json


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0.weight", "model.layers.0.weight"),
        ("模型/微调　一.ckpt", "模型/微调　一.ckpt"),
        ("a\\x1b", "a\\x1b"),  # an escape that is written out stays, so that applying it twice does no harm
        ("\x1b]0;owned\x07\x1b[2J", r"\x1b]0;owned\x07\x1b[2J"),
        ("a\nerror: forged", r"a\nerror: forged"),
        ("a\n error: forged", r"a\n error: forged"),
        ("a\r\tb\x00\x7f\x85\x9b31m", r"a\r\tb\x00\x7f\x85\x9b31m"),
        ("gpj\u202etpkc.", r"gpj\u202etpkc."),
        ("\u2066a\u2069\u200b\u200e\ufeff\xad", r"\u2066a\u2069\u200b\u200e\ufeff\xad"),
        ("a\u2028b\u2029c\x0bd\x0c", r"a\u2028b\u2029c\x0bd\x0c"),
        ("\U000e0041", r"\U000e0041"),
        ("\udcc4\udca3", r"\xc4\xa3"),  # bytes of a file name
        ("\ud800", r"\ud800"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_the_lines_of_our_own_messages_stay() -> None:
    message = describe_problems("wrong", ["a\nb", describe_problems("inner", ["c"])])
    assert printable(message).splitlines() == ["wrong", r"  - a\nb", "  - inner", "  - c"]


@given(st.text())
def test_nothing_else_reaches_the_terminal(text: str) -> None:
    shown = printable(text)
    assert printable(shown) == shown
    shown.encode()
    first, *others = shown.split("\n")
    assert all(line.startswith("  ") for line in others)
    assert all(c.isprintable() or c in "\xa0\u3000" for line in (first, *others) for c in line)


@pytest.mark.parametrize("kind", [FormatError, TransferError])
def test_every_error_is_printable(kind: type[CheckpointError]) -> None:
    error = kind("a.ckpt: the tensor \x1b[2J\nerror: forged")
    assert str(error) == r"a.ckpt: the tensor \x1b[2J\nerror: forged"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # as it comes from a worker
    assert f"{error}" == str(error)


def test_every_record_of_the_log_is_printable(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, log.name):
        log.info("%s of %d", "\x1b[2J\nWARNING forged \udcc4", 3)
        log.warning("100%")
    assert [record.getMessage() for record in caplog.records] == [r"\x1b[2J\nWARNING forged \xc4 of 3", "100%"]


NAMES = st.dictionaries(st.text(st.characters()), st.text(st.characters()))


@given(NAMES)
def test_json_for_programs_is_ascii_and_exact(names: dict[str, str]) -> None:
    text = ascii_json(names)
    assert text.isascii()
    assert text.isprintable()
    assert json.loads(text) == names


@given(NAMES)
def test_json_files_are_utf8_without_control_characters_and_exact(names: dict[str, str]) -> None:
    text = readable_json(names, indent=1)
    text.encode()
    assert not {c for c in text if (ord(c) < 32 and c != "\n") or 126 < ord(c) < 160 or c in "\u202e\u2028\ufeff"}
    assert json.loads(text) == names


def test_json_files_show_chinese_as_it_is() -> None:
    assert readable_json({"模型": "a\udcc4\x7f\U000e0001"}) == '{"模型": "a\\udcc4\\u007f\\udb40\\udc01"}'


def test_messages_can_be_read_to_their_end() -> None:
    """Other libraries quote whole files, and names may have 65,535 characters."""
    long, path = "x" * 65_535, "/" + "p" * 4_094
    shown = str(FormatError(f"{path}: {long}; copy it again"))
    assert shown.startswith(path) and shown.endswith("; copy it again")
    assert len(shown) < 7_000
    many = str(PlanError(describe_problems("these differ", [long] * 20)))
    assert many.startswith("these differ") and many.endswith("  … and more")
    assert len(many) < 20_000
    assert shortened("a\n  b\n") == "a\n  b\n"
