"""JSON and yaml from outside: one typed error for whatever stands in them; what we write is UTF-8."""

from __future__ import annotations

import ast
import json
import os
import struct
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ckpt.convert.config import read_config
from mindformers_ckpt.errors import CheckpointError, ConfigError, FormatError, PlanError, StrategyError
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.job.config import Config
from mindformers_ckpt.lora_settings import read_settings
from mindformers_ckpt.planning.file import read_plan
from mindformers_ckpt.publish.manifest import read_manifests
from mindformers_ckpt.sources.find import find_source, is_huggingface_folder
from mindformers_ckpt.strategy.files import read_strategy
from mindformers_ckpt.text_files import (
    MAX_DEPTH,
    MAX_YAML_BYTES,
    check_structure,
    parse_json,
    parse_yaml,
    read_json,
    read_json_object,
    read_regular,
    read_yaml_mapping,
    write_json,
    write_records,
)

PACKAGE = Path(__file__).parent.parent / "mindformers_ckpt"
DEEP = b"[" * 100_000

BAD_JSON = {
    "empty": (b" \n", "it is empty"),
    "cut off": (b'{"a": [1, 2', "it is not valid JSON"),
    "nested": (b'{"a": ' + DEEP, "nested more than 64 deep"),
    "nested and closed": (b'{"a": ' + DEEP + b"]" * 100_000 + b"}", "nested more than 64 deep"),
    "nested objects": (b'{"a":' * 70 + b"1" + b"}" * 70, "nested more than 64 deep"),
    "nested after strings": (b'{"[\\"]": "]}", "b": ' + b"[" * 64 + b"]" * 64 + b"}", "nested more than 64 deep"),
    "infinite": (b'{"a": 1e999}', "the number 1e999 in it is too large"),
    "NaN": (b'{"a": NaN}', "NaN stands in it"),
    "Infinity": (b'{"a": -Infinity}', "-Infinity stands in it"),
    "5,000 digits": (b'{"a": ' + b"7" * 5000 + b"}", "a number of 5000 digits"),
    "101 digits": (b'{"a": ' + b"7" * 101 + b"}", "a number of 101 digits"),
    "a key twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands in it twice"),
    "Latin-1": (b'{"a": "\xe9"}', "it is not UTF-8 text"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "it is not UTF-8 text"),
    "half a character": (b'{"a": "\\ud800"}', "half of a surrogate pair"),
}


@pytest.mark.parametrize(("data", "reason"), BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_is_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(data)
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(FormatError, match=f"a.json cannot be read: .*{reason}"):
        read_json(tmp_path / "a.json", FormatError)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),  # a byte order mark, as editors on Windows write it
        (b'{"a": 1, "a": 1}', {"a": 1}),
        (b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, None),
        (b'{"a": "[[[' + b"[" * 100 + b'"}', None),
        (b'{"a": "\\"' + b"[" * 100 + b'"}', None),
        (b"[" + b"[]," * 1000 + b"[]]", None),
        (b'{"a": ' + b"7" * 100 + b"}", {"a": int("7" * 100)}),
        (b'{"a": "' + b"7" * 200 + b'"}', {"a": "7" * 200}),
        (b'{"a": 1e308}', {"a": 1e308}),
        (b'{"a": "\\ud83d\\ude00\\udcc4"}', {"a": "\U0001f600\udcc4"}),  # with a byte of a file name
    ],
)
def test_json_that_is_read(data: bytes, value: Any) -> None:
    assert parse_json(data) == (json.loads(data.decode("utf-8-sig")) if value is None else value)


NESTED = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**20), 10**20),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.sampled_from('[]{}"\\a,:\n\u202e模')),
    ),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.sampled_from('[]{}"\\ab')), inner),
)


@given(NESTED, st.integers(0, 5), st.booleans())
def test_json_is_read_as_python_reads_it(value: Any, extra: int, escaped: bool) -> None:
    for _ in range(extra):
        value = [value]
    assert parse_json(json.dumps(value, ensure_ascii=escaped).encode()) == value


@given(NESTED, st.booleans(), st.sampled_from([None, 1]))
def test_the_keys_of_all_objects_are_counted(value: Any, escaped: bool, indent: int | None) -> None:
    def keys(inner: Any) -> int:
        if isinstance(inner, dict):
            return len(inner) + sum(map(keys, inner.values()))
        return sum(map(keys, inner)) if isinstance(inner, list) else 0

    text = json.dumps(value, ensure_ascii=escaped, indent=indent).encode()
    assert check_structure(text, None) == keys(value)


@given(st.binary(max_size=60))
def test_any_bytes_give_a_value_or_a_reason(data: bytes) -> None:
    for parse in (parse_json, parse_yaml):
        try:
            parse(data)
        except ValueError as error:
            assert str(error)


@given(st.text(st.sampled_from("&a*<!:-[]{}|>'\"#%@`? \n\t01e.+b"), max_size=40))
def test_any_yaml_gives_a_value_or_a_reason(text: str) -> None:
    try:
        parse_yaml(text.encode())
    except ValueError as error:
        assert str(error)


def test_a_recursion_limit_that_a_program_has_lifted_is_no_danger() -> None:
    """The parser of CPython would exhaust the stack of the process."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10**7)
    try:
        with pytest.raises(ValueError, match="nested more than 64 deep"):
            parse_json(b"[" * 5_000_000)
    finally:
        sys.setrecursionlimit(before)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.mkdir()


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "reason"), [(_fifo, "not a regular file"), (_device, "not a regular file"), (_folder, "a folder")]
)
@pytest.mark.timeout(20)
def test_what_is_no_file_does_not_hang(make: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    make(tmp_path / "a")
    with pytest.raises(FormatError, match=f"a cannot be read: it is {reason}"):
        read_json(tmp_path / "a", FormatError)
    with pytest.raises(ConfigError, match=f"a: the configuration cannot be read: it is {reason}"):
        read_yaml_mapping(tmp_path / "a", ConfigError)


def test_files_have_a_bounded_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"[" + b" " * 98 + b"]")
    assert read_regular(tmp_path / "a", 100) == (tmp_path / "a").read_bytes()
    with pytest.raises(FormatError, match="a cannot be read: it has more than 99 bytes"):
        read_json(tmp_path / "a", FormatError, limit=99)
    os.truncate(tmp_path / "a", MAX_YAML_BYTES + 1)
    with pytest.raises(ConfigError, match="it has more than 4,194,304 bytes"):
        read_yaml_mapping(tmp_path / "a", ConfigError)
    with pytest.raises(ValueError, match="it has more than"):
        read_regular("/proc/self/maps", 10)  # says that it has no bytes


def test_lists_are_counted_before_they_are_made(tmp_path: Path) -> None:
    """Three bytes of text are seventy in memory."""
    data = b'{"a":[' + b"[]," * 5_000_000 + b"0]}"
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"it has more than 4,194,304 lists and objects"):
        parse_json(data)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(data)) + data)
    with pytest.raises(FormatError, match="it has more than 1,000 lists and objects"):
        read_header(tmp_path / "x.safetensors")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * len(data)


def test_an_object_is_wanted(tmp_path: Path) -> None:
    for text, kind in {"[]": "an array", "3": "a number", '"a"': "a text", "null": "null", "true": "true"}.items():
        (tmp_path / "a").write_text(text)
        with pytest.raises(PlanError, match=f"a cannot be read: a JSON object was expected, not {kind}"):
            read_json_object(tmp_path / "a", PlanError)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGE_BOMB = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12)
)
BAD_YAML = {
    "alias bomb": (BOMB, "its aliases stand for more than 100,000 values"),
    "merge bomb": (MERGE_BOMB, "its aliases stand for more than 100,000 values"),
    "an alias to itself": ("a: &a [*a]", "an alias leads to itself"),
    "a chain of aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 100)),
        "nested more than 64 deep",
    ),
    "nested": ("a: " + "[" * 10_000, "nested more than 64 deep"),
    "nested blocks": ("".join(" " * n + f"a{n}:\n" for n in range(100)), "nested more than 64 deep"),
    "code": ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
    "a tag of no one": ("a: !foo 1", "could not determine a constructor"),
    "a text as integer": ("a: !!int x", "invalid literal for int"),
    "a text as truth": ("a: !!bool x", "a value does not fit its tag"),
    "a text as time": ("a: !!timestamp x", "a value does not fit its tag"),
    "a text as bytes": ("a: !!binary é", "failed to convert"),
    "5,000 digits": ("a: " + "7" * 5000, "a number of 5000 digits"),
    "a key twice": ("a: 1\nb:\n  c: 1\n  c: 2\n", r"the key 'c' stands twice \(line 4\)"),
    "a list as key": ("? [a]\n: 1", "unhashable key"),
    "two documents": ("a: 1\n---\nb: 1\n", "expected a single document|but found another document"),
    "control characters": ("a: \x07", "special characters are not allowed"),
    "a tab": ("a:\n\tb: 1", r"cannot start any token \(line 2\)"),
}


@pytest.mark.parametrize(("text", "reason"), BAD_YAML.values(), ids=BAD_YAML)
def test_yaml_that_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"a.yaml: the configuration cannot be read: .*({reason})") as caught:
        Config.from_yaml(tmp_path / "a.yaml")
    assert len(str(caught.value).splitlines()) == 1


def test_yaml_that_is_read() -> None:
    text = "\ufeffdate: 2024-01-01\nbad: 2024-13-45\nall: &all {a: 1, b: 2}\nsome: {<<: *all, b: 3}\n1: x\n"
    assert parse_yaml(text.encode()) == {
        "date": "2024-01-01",  # a folder may have such a name
        "bad": "2024-13-45",
        "all": {"a": 1, "b": 2},
        "some": {"a": 1, "b": 3},
        1: "x",
    }
    assert parse_yaml(b"# nothing\n") is None


# ------------------------------------------------------------------------------- the readers that users meet


def _strategy(folder: Path, data: bytes) -> None:
    (folder / "strategy.json").write_bytes(data)
    read_strategy(folder / "strategy.json")


def _adapter(folder: Path, data: bytes) -> None:
    (folder / "adapter_config.json").write_bytes(data)
    read_settings(folder / "adapter_config.json")


def _config(folder: Path, data: bytes) -> None:
    (folder / "config.json").write_bytes(data)
    read_config(folder)


def _index(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors.index.json").write_bytes(data)
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"")
    find_source(folder)


def _plan(folder: Path, data: bytes) -> None:
    (folder / "plan.json").write_bytes(data)
    read_plan(folder / "plan.json")


READERS = {"strategy": (_strategy, StrategyError), "adapter": (_adapter, ConfigError), "config": (_config, ConfigError)}
READERS |= {"index": (_index, PlanError), "plan": (_plan, PlanError)}


@pytest.mark.parametrize("data", [data for data, _ in BAD_JSON.values()], ids=BAD_JSON)
@pytest.mark.parametrize(("read", "kind"), READERS.values(), ids=READERS)
def test_every_reader_has_one_typed_error(
    read: Callable[[Path, bytes], None], kind: type[CheckpointError], data: bytes, tmp_path: Path
) -> None:
    if read in (_config, _adapter) and (b"1e999" in data or b"NaN" in data or b"Infinity" in data):
        read(tmp_path, data)  # as transformers writes it; numbers that are used are checked by name
        return
    with pytest.raises(kind):
        read(tmp_path, data)


@pytest.mark.parametrize("data", [data for data, _ in BAD_JSON.values()], ids=BAD_JSON)
def test_a_manifest_that_cannot_be_read_is_none(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    assert read_manifests(tmp_path).get("manifest.json") is None


def test_a_deep_config_is_no_huggingface_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"model_type": "llama", "a": ' + DEEP)
    assert not is_huggingface_folder(tmp_path)


def test_written_files_are_utf8_and_read_back(tmp_path: Path) -> None:
    value = {"模型": "a\udcc4\x1b\u202e", "b": [1, 2.5, None]}
    write_json(tmp_path / "a.json", value, indent=1)
    assert (tmp_path / "a.json").read_bytes() == (
        '{\n "模型": "a\\udcc4\\u001b\\u202e",\n "b": [\n  1,\n  2.5,\n  null\n ]\n}\n'.encode()
    )
    assert read_json(tmp_path / "a.json", FormatError) == value


def test_records_have_a_line_each(tmp_path: Path) -> None:
    value = {
        "made": "b\u202e",
        "tensors": {"w": {"shape": [2, 3], "crc": "0f"}, "v": {"shape": [], "crc": "1"}},
        "files": [{"path": "模型", "bytes": 7}, {"path": "n", "inner": {"a": {}, "b": [[1], {}]}}],
        "numbers": [1, 2],
        "empty": {},
        "many": {str(number): number for number in range(9)},
    }
    write_records(tmp_path / "a.json", value)
    assert (tmp_path / "a.json").read_text(encoding="utf-8").splitlines() == [
        "{",
        ' "made": "b\\u202e",',
        ' "tensors": {',
        '  "w": {"shape": [2, 3], "crc": "0f"},',
        '  "v": {"shape": [], "crc": "1"}',
        " },",
        ' "files": [',
        '  {"path": "模型", "bytes": 7},',
        "  {",
        '   "path": "n",',
        '   "inner": {',
        '    "a": {},',
        '    "b": [',
        "     [1],",
        "     {}",
        "    ]",
        "   }",
        "  }",
        " ],",
        ' "numbers": [1, 2],',
        ' "empty": {},',
        ' "many": {',
        *(f'  "{number}": {number},' for number in range(8)),
        '  "8": 8',
        " }",
        "}",
    ]


@given(NESTED)
def test_records_say_what_the_values_are(value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_records(Path(folder, "a.json"), {"value": value})
        assert json.loads(Path(folder, "a.json").read_bytes()) == {"value": value}


# ------------------------------------------------------------------------------- rules that hold for all code

# Who parses JSON without `text_files`: what processes of one job send each other, the journal of a run, and the headers
# of .safetensors files, which have bounds of their own.
OWN_JSON = {
    "text_files.py",
    "formats/safetensors.py",
    "publish/journal.py",
    "job/cluster/messages.py",
    "job/cluster/cluster.py",
}
OWN_JSON |= {"patterns/__init__.py", "patterns/worker.py"}
PRINTERS = {"cli/notices.py", "cli/progress.py", "integrations/launch.py", "patterns/worker.py"}
FILES = sorted(PACKAGE.rglob("*.py"))


def _calls(file: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_the_single_places_are_used(file: Path) -> None:
    """Text files name their encoding; JSON, yaml and the terminal have one place each."""
    own = str(file.relative_to(PACKAGE))
    for call in _calls(file):
        name = ast.unparse(call.func)
        keywords = {keyword.arg for keyword in call.keywords}
        where = f"{own}:{call.lineno}: {name}"
        if name.endswith((".read_text", ".write_text")):
            assert "encoding" in keywords, where
        if name == "open" or (name.endswith(".open") and name not in ("os.open", "Exchange.open")):
            modes = [ast.literal_eval(mode) for mode in call.args if isinstance(mode, ast.Constant)]
            assert "encoding" in keywords or any("b" in str(mode) for mode in modes) or not modes, where
        if name in ("json.loads", "json.load"):
            assert own in OWN_JSON, where
        if name.startswith("yaml."):
            assert own == "text_files.py", where
        if name in ("print", "click.echo", "click.secho"):
            assert own in PRINTERS, where
        if name == "logging.getLogger" and call.args:
            assert own == "log.py", where
