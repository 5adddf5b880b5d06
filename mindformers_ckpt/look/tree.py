"""Parameters as a tree of the parts of their names, weights first, in natural order.

Layers that are alike are one branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from mindformers_ckpt.look.parameters import KINDS, Parameter
from mindformers_ckpt.sources.steps import natural
from mindformers_ckpt.words import short_spans

_WIDEST_NAME = 60


@dataclass
class _Node:
    """A part of names: what is below it, and the parameters that end in it (several where layers are joined)."""

    children: dict[str, _Node] = field(default_factory=dict)
    own: list[Parameter] = field(default_factory=list)
    form: int = 0  # the same number in nodes that can be shown as one


def tree(parameters: Iterable[Parameter], amount: Callable[[float], str]) -> Iterator[str]:
    """The lines of a tree; `amount` puts a number of bytes into words."""
    root = _Node()
    for parameter in sorted(parameters, key=lambda one: (KINDS.index(one.kind), natural(one.name))):
        node = root
        for part in parameter.name.split("."):
            node = node.children.setdefault(part, _Node())
        node.own.append(parameter)
    rows = list(_rows(_joined(root, {}), 0))
    width = min(_WIDEST_NAME, max((len(label) for label, _ in rows), default=0))
    for label, own in rows:
        yield f"{label:<{width}}  {_described(own, amount)}" if own else label


def _rows(node: _Node, depth: int) -> Iterator[tuple[str, list[Parameter]]]:
    for name, child in node.children.items():
        while len(child.children) == 1 and not child.own:  # a part without a choice is shown with the next
            ((part, below),) = child.children.items()
            name, child = f"{name}.{part}", below
        yield "  " * depth + name, child.own
        yield from _rows(child, depth + 1)


def _joined(node: _Node, forms: dict[object, int]) -> _Node:
    """The tree, with neighbouring numbers made one branch where what is below them is alike.

    `forms` numbers what must be equal in such nodes, so that no tree is compared with another.
    """
    children: dict[str, _Node] = {}
    group: list[tuple[str, _Node]] = []
    for name, child in node.children.items():
        child = _joined(child, forms)
        if group and not _goes_on(group, name, child):
            children.update([_as_one(group)])
            group = []
        group.append((name, child))
    if group:
        children.update([_as_one(group)])
    own = [(one.dtype.name, one.shape, one.cut, one.kind) for one in node.own[:1]]
    form = tuple(own), tuple([(name, child.form) for name, child in children.items()])
    node.children, node.form = children, forms.setdefault(form, len(forms))
    return node


def _goes_on(group: Sequence[tuple[str, _Node]], name: str, child: _Node) -> bool:
    last = group[-1][0]
    return last.isdecimal() and name.isdecimal() and int(name) == int(last) + 1 and child.form == group[0][1].form


def _as_one(group: Sequence[tuple[str, _Node]]) -> tuple[str, _Node]:
    if len(group) == 1:
        return group[0]
    return f"{group[0][0]}-{group[-1][0]}", _overlaid([node for _, node in group])


def _overlaid(nodes: Sequence[_Node]) -> _Node:
    if len(nodes) == 1:
        return nodes[0]
    children = {name: _overlaid([node.children[name] for node in nodes]) for name in nodes[0].children}
    return _Node(children, [parameter for node in nodes for parameter in node.own], nodes[0].form)


def _described(own: Sequence[Parameter], amount: Callable[[float], str]) -> str:
    """Element type, shape, bytes, cut and ranks of parameters that are alike."""
    first = own[0]
    ranks = sorted(set().union(*{parameter.ranks for parameter in own}))
    size = ("" if len(own) == 1 else f"{len(own)} x ") + amount(first.nbytes)
    text = f"{first.dtype.name} {list(first.shape)}  {size}"
    if first.expected > 1 or len(ranks) > 1:
        text += f"  {first.cut}, on {'rank' if len(ranks) == 1 else 'ranks'} {short_spans(ranks)}"
    elif first.told is not None and len(first.told.shards) > 1:
        text += f"  {first.cut}"
    return text
