#!/usr/bin/env python3
"""Write docs/api.md and docs/zh/api.md from the docstrings of the public names.

    python tools/api_page.py             # write them
    python tools/api_page.py --check     # exit with 1 when they are not what the code says

Head and order are in this file, those in Chinese in page_texts.yaml; all else is signatures and docstrings. Needs no
MindSpore.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from generated_pages import FOLDERS, ROOT, main, texts_of

_HEAD = """# The Python API

```python
import mindformers_ckpt as mc
```

Everything below works without MindSpore, but for `CheckpointHook` and `load_checkpoint`. The command line is a skin
over these functions. Importing the package imports no heavy library; names are imported when they are first used.

A `PathLike` is a str or a `pathlib.Path`, a `StrategyLike` the same, a `Strategy`, or None for complete weights. A
`Progress` is a function that is told the bytes done and the bytes in all. An `Array` is a `numpy.ndarray`.

This page is made from the docstrings: `python tools/api_page.py`.

## What you can rely on

- Public is what is in `mindformers_ckpt.__all__`: the names on this page, with their arguments, attributes and errors.
  Everything else, also modules without an underscore, may change in any version.
- Public names are not removed or changed incompatibly within a minor version (0.1.x). Before one goes, it warns with a
  DeprecationWarning that names its successor, for a minor version at least.
- New arguments are keywords with a default. Reports and tensors may get new attributes.
- Options of the command line, yaml keys, exit codes and the keys of `--json` follow the same rule.
- Files that a version has written (plans, manifests) are read by later ones of the same minor version. A plan file of
  another version is refused, never misread.
- Every error that a user can act on is a `CheckpointError`.
"""

_SECTIONS = (
    ("Look", ("open_checkpoint", "Checkpoint", "Tensor", "Shard", "inspect", "Inspection", "read_strategy")),
    ("Trust", ("verify", "Verification", "Difference", "diff", "Diff", "TensorDiff", "fingerprint", "Fingerprint")),
    ("Make", ("plan", "Job", "transform", "Report", "convert", "ConversionReport", "merge_lora")),
    ("Strategies", ("Strategy", "Layout", "write_strategy")),
    ("In a training job", ("CheckpointHook", "load_checkpoint", "StrategySaved")),
    (
        "Errors",
        (
            *("CheckpointError", "ConfigError", "StrategyError", "FormatError", "PlanError", "TransferError"),
            *("PublishError", "ClusterError"),
        ),
    ),
)
# A block of a docstring that begins with one of these is a list of names.
_LISTS = ("Args:", "Attributes:")
_WIDTH = 100


def page(head: str = _HEAD, titles: Mapping[str, str] | None = None) -> str:
    """The text of the page, `titles` in place of the headings of its sections.

    Raises KeyError for a public name without a docstring, and a heading that `titles` does not know.
    """
    package = importlib.import_module("mindformers_ckpt")
    names = [name for name in package.__all__ if name != "__version__"]
    listed = {name for _, section in _SECTIONS for name in section}
    homeless = [name for name in names if name not in listed]
    parts = [head]
    sections = [*_SECTIONS, ("Other", tuple(homeless))]
    for title, section in sections:
        present = [name for name in section if name in names]
        if present:
            parts.append(f"## {title if titles is None else titles[title]}\n")
            parts += [_described(name, getattr(package, name)) for name in present]
    return "\n".join(parts)


def _described(name: str, value: Any) -> str:
    if not inspect.isclass(value):
        return f"### `{name}`\n\n```python\n{_call(name, value)}\n```\n\n{_text(value)}"
    if issubclass(value, Exception):
        return f"### `{name}`\n\n{_text(value)}"
    lines = [f"### `{name}`\n\n{_text(value)}"]
    lines += [f"- {entry}" for entry in _members(value)]
    return "\n".join(lines) + ("\n" if len(lines) > 1 else "")


def _members(value: type) -> Iterator[str]:
    """The public methods and properties, in the order of the source; fields are in the docstring."""
    fields = {field.name for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
    fields |= set(getattr(value, "_fields", ()))
    for name, member in vars(value).items():
        if (name.startswith("_") and name not in ("__getitem__",)) or name in fields:
            continue
        if isinstance(member, (property, functools.cached_property)):
            yield f"`{name}`: {_summary(member)}"
        elif isinstance(member, classmethod) or callable(member):
            function = member.__func__ if isinstance(member, classmethod) else member
            prefix = f"{value.__name__}." if isinstance(member, classmethod) else ""
            yield f"`{prefix}{name}{_signature(function, drop_first=True)}`: {_summary(function)}"


def _call(name: str, function: Any) -> str:
    """A function's signature; one argument a line where it does not fit on one."""
    text = name + _signature(function)
    if len(text) <= _WIDTH:
        return text
    signature = inspect.signature(function)
    lines, starred = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            lines.append("*")
            starred = True
        lines.append(_unquoted(str(parameter)))
    returned = _unquoted(str(signature.replace(parameters=[]))).partition(" -> ")[2]
    return f"{name}(\n" + "".join(f"    {line},\n" for line in lines) + f") -> {returned}"


def _signature(function: Any, *, drop_first: bool = False) -> str:
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[1 if drop_first else 0 :]
    return _unquoted(str(signature.replace(parameters=parameters)))


def _unquoted(text: str) -> str:
    """Annotations without their quotes; those of defaults stay."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)


def _summary(member: Any) -> str:
    """The first paragraph of a docstring. Raises KeyError where there is none."""
    text = inspect.getdoc(member)
    if not text:
        raise KeyError(f"{getattr(member, '__qualname__', member.fget.__qualname__)} has no docstring")
    return " ".join(text.split("\n\n")[0].split())


def _text(value: Any) -> str:
    """A docstring as Markdown: lists of names become lists, indented blocks code."""
    text = inspect.getdoc(value)
    if not text:
        raise KeyError(f"{value.__name__} has no docstring")
    blocks = []
    for block in text.split("\n\n"):
        head, _, rest = block.partition("\n")
        if head in _LISTS:
            blocks.append(_as_list(inspect.cleandoc(rest)))
        elif block.startswith("    "):
            blocks.append(f"```python\n{textwrap.dedent(block)}\n```")
        else:
            blocks.append(block)
    return "\n\n".join(blocks) + "\n"


def _as_list(text: str) -> str:
    """`name: what it is` lines as a list; further lines of one are indented."""
    entries: list[str] = []
    for line in text.splitlines():
        match = re.match(r"([\w, ]+): (.*)", line)
        if match and not line.startswith(" "):
            named = ", ".join(f"`{name.strip()}`" for name in match[1].split(","))
            entries.append(f"- {named}: {match[2]}")
        else:
            entries.append(f"  {line.strip()}")
    return "\n".join(entries)


def pages() -> dict[Path, str]:
    """The two pages by their files."""
    texts = texts_of("api")
    chinese = page(texts["head"]["zh"], texts["sections"])
    return {FOLDERS["en"] / "api.md": page(), FOLDERS["zh"] / "api.md": chinese}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(__doc__, pages, sys.argv[1:]))
