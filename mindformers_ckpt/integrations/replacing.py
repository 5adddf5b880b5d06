"""Names in the modules of another package, replaced wherever they have been imported."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def replace_everywhere(name: str, old: object, new: object) -> None:
    """Let `name` be `new` in all modules in which it is `old`."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and vars(module).get(name) is old:
            setattr(module, name, new)


def parameters_of(function: Callable[..., Any], *, is_wrapper: bool = False) -> list[tuple[str, Any]]:
    """The names and default values of a function's parameters, which tell whether it can be replaced.

    Of a wrapper those of what it wraps, unless it `is_wrapper` that matters.
    """
    parameters = inspect.signature(function, follow_wrapped=not is_wrapper).parameters.values()
    return [(parameter.name, parameter.default) for parameter in parameters]
