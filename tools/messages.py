"""What the library can say: the texts of errors, warnings and reports, collected from the source.

A text is a literal of at least three words, or one of two that is raised; `…` stands for what is filled in.
Docstrings, help texts and patterns do not count.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from rooms import files_of, room_of

# Errors that reach the user by their own name; others are the cause in the message of one of these.
PUBLIC = (
    *("ConfigError", "StrategyError", "FormatError", "PlanError", "TransferError", "PublishError", "ClusterError"),
    *("StrategySaved", "UsageError", "BadParameter"),
)
CAUSE, NOTICE, LINE = "cause", "notice", "line"
_NOTICES = {"warn", "warning", "info", "debug", "error", "say", "complain", "announce"}
_RAISING = {"raise_problems", "system_errors"}  # by the class that is their first argument
# Arguments that are no messages: help of options, patterns.
_NOT_SAID = {"help", "epilog", "metavar", "short_help", "pattern"}
_WORD = re.compile(r"(?<!\S)[(\"'`]*[^\W\d_]+(?:[-'][^\W\d_]+)*[)\"'`.,:;?!]*(?!\S)")


class Message(NamedTuple):
    """A text that the library can say.

    Attributes:
        room: the room of the package that says it.
        file: the file, relative to the package.
        kind: the class of a public error; "cause" for what stands in one, "notice" for warnings and logs, else "line":
            of a list of problems, or of a report.
        text: the text; `…` stands for what is filled in, `\\n` for a new line.
    """

    room: str
    file: str
    kind: str
    text: str


@lru_cache
def messages_of(root: Path) -> tuple[Message, ...]:
    """All texts of the package in the order of its files; each once a file."""
    found: dict[Message, None] = {}
    for file in files_of(root):
        name = file.relative_to(root / "mindformers_ckpt").as_posix()
        for kind, text in _texts(ast.parse(file.read_text(encoding="utf-8"))):
            found[Message(room_of(file, root), name, kind, text)] = None
    return tuple(found)


def explained_by(message: Message, heading: str) -> bool:
    """Whether a heading of the page on troubleshooting, with `…` for what is filled in, is of this message."""
    pattern = ".*".join(re.escape(piece.strip()) for piece in heading.split("…"))
    return re.search(pattern, message.text, re.DOTALL) is not None


def _texts(tree: ast.Module) -> Iterator[tuple[str, str]]:
    raised = _raised_names(tree)
    for node, kind in _literals(tree, LINE, raised):
        text = re.sub(r"%(?:[sdrg]|\.\d[fg])", "…", _rendered(node)).strip()
        if "{" not in text and len(_WORD.findall(text.replace("…", " "))) >= (3 if kind in (LINE, CAUSE) else 2):
            yield kind, text


def _raised_names(tree: ast.Module) -> dict[str, str]:
    """Names whose value becomes the message of an error: name -> kind."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            kind, said = _kind_of_error(node.exc), node.exc
        elif isinstance(node, ast.Call) and _name(node.func) in _RAISING:
            kind, said = _kind_of_error(node.args[0]), node
        else:
            continue
        for inner in ast.walk(said):
            if isinstance(inner, ast.Name) and kind != CAUSE:
                names.setdefault(inner.id, kind)
    return names


def _name(called: ast.expr) -> str:
    return called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""


def _kind_of_error(raised: ast.expr) -> str:
    name = _name(raised.func if isinstance(raised, ast.Call) else raised)
    return name if name in PUBLIC else CAUSE


def _literals(node: ast.AST, kind: str, raised: dict[str, str]) -> Iterator[tuple[ast.expr, str]]:
    """The texts below a node, joined where the source joins them, each with its kind."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return  # a docstring
    if isinstance(node, ast.keyword) and node.arg in _NOT_SAID:
        return
    if isinstance(node, (ast.Constant, ast.JoinedStr)) or _is_joined(node):
        if not isinstance(node, ast.Constant) or isinstance(node.value, str):
            assert isinstance(node, ast.expr)
            yield node, kind
        return
    if isinstance(node, ast.Raise) and node.exc is not None:
        kind = _kind_of_error(node.exc)
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        kind = raised.get(node.targets[0].id, kind)
    elif isinstance(node, ast.Call):
        name = _name(node.func)
        if name in ("compile", "search", "fullmatch", "match", "sub", "option", "getLogger", "counted"):
            return
        if name in _RAISING or name in PUBLIC:
            kind = _kind_of_error(node.args[0] if name in _RAISING else node)
        kind = "UsageError" if name == "fail" else NOTICE if name in _NOTICES and kind == LINE else kind
    for child in ast.iter_child_nodes(node):
        yield from _literals(child, kind, raised)


def _is_joined(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and any(map(_is_text, (node.left, node.right)))


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _rendered(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else "…"
    if isinstance(node, ast.JoinedStr):
        return "".join(_rendered(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return _rendered(node.left) + _rendered(node.right)
    return "…"
