"""Tables are checked when they are loaded: what could not be undone or told apart is refused."""

from __future__ import annotations

from typing import Any

import pytest

from mindformers_ckpt.convert.config import ModelConfig
from mindformers_ckpt.convert.model import find_model, model_of_config, models
from mindformers_ckpt.convert.rules import (
    Drop,
    Entry,
    Rule,
    check_table,
    flat,
    join,
    measure,
    parse_axes,
    rename,
    split,
)
from mindformers_ckpt.errors import ConfigError


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([rename("a.weight", "b"), rename("a.weight", "c")], "a.weight and a.weight can name the same"),
        ([rename("a", "c"), rename("b", "c")], "c and c can name the same"),
        (
            [rename("l.{n}.a", "x.{n}", over="layer"), rename("l.{m}.a", "y.{m}", over="layer")],
            "l.{n}.a and l.{m}.a can name the same",
        ),
        ([rename("l.0.a", "x.0.b"), rename("l.1.a", "y")], "can name the same"),
        ([Drop("a"), rename("a", "b")], "can name the same"),
        ([join("a", "(part x) y", ("b", 1), ("c", 1, "x z"))], "are not those of"),
        ([join("a", "(part x) y", ("b", 1), ("c", 1, "y"))], "are not those of"),
        ([join("a", "x y", ("b", 1), ("c", 1))], "several parts need the axis 'part'"),
        ([join("a", "(part x) x", ("b", 1, "x"))], "stands twice"),
        ([split("a", "(part x) y", ("b", 2, "x y"))], "takes 2 of an axis that it does not have"),
        ([join("a", "(part x y", ("b", 1))], "not of the form"),
        ([rename("l.{n}.a", "b", over="layer")], "b: is repeated over layer"),
        ([rename("l.{n}.a", "l.{n}.b")], "is repeated over nothing"),
        ([join("a", "expert x", ("b.{expert}", 1, "expert x"))], "a capture of its name must be an axis of the whole"),
        ([join("a", "(expert part) x", ("b.{expert}", 1, "x"), ("c", 1, "x"))], "a capture of its name"),
        ([rename("a", "b", when="tied x"), rename("a", "c", when="!tie !y")], "a and a can name the same"),
        ([join("a", "part x", ("b", 1), ("c", 1), ("b", 1))], "b: its parts do not follow each other"),
        ([join("a", "part x y", ("b", 1, "x y"), ("b", 1, "x y"))], "needs the axis 'part' and no captures"),
        (
            [join("a", "(part x y z)", ("b", 1, "(part z y x)"), ("b", 1, "(part y x z)"))],
            "the axes '(part y x z)' are neither '(part z y x)' nor those of the whole",
        ),
    ],
)
def test_a_table_that_cannot_be_right(table: list[Entry], said: str) -> None:
    with pytest.raises(ConfigError, match="cannot be right") as caught:
        check_table(tuple(table))
    assert said in str(caught.value)


def test_all_faults_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        check_table((rename("a", "b"), rename("a", "c"), join("d", "x", ("e", 1), ("f", 1))))
    assert len(str(caught.value).splitlines()) == 3


def test_conditions_that_exclude_each_other_may_share_names() -> None:
    check_table((rename("a", "b", when="tied"), rename("a", "c", when="!tied")))
    check_table((rename("a", "b", when="tied bias"), rename("a", "c", when="bias !tied")))


def test_every_model_is_found_by_all_its_names() -> None:
    for model in models().values():
        for name in (model.name, *model.aliases, model.name.upper(), model.name.replace("_", "-")):
            assert find_model(name) is model
        for kind in model.model_types:
            assert model_of_config(ModelConfig({"model_type": kind})) is model


def test_no_name_means_two_models() -> None:
    names = [name for model in models().values() for name in (model.name, *model.aliases)]
    kinds = [kind for model in models().values() for kind in model.model_types]
    assert len(set(names)) == len(names)
    assert len(set(kinds)) == len(kinds)


GUIDE = "llama glm-n qwen mixtral deepseek bloom gpt2 wizardcoder swin telechat"
ALIASES = "qwen3 qwen3_moe qwen3-moe glm4 qwen2 qwen2_5 deepseekv3 gpt"


@pytest.mark.parametrize("name", f"{GUIDE} {ALIASES}".split())
def test_the_guides_models_and_aliases_are_there(name: str) -> None:
    assert find_model(name) is not None


def test_extents_follow_from_the_shape_where_they_are_not_known() -> None:
    axes = parse_axes("(group part dim) hidden")
    known = {"group": 2, "part": 4, "dim": None, "hidden": None}
    assert measure(axes, (24, 7), known) == {"group": 2, "part": 4, "dim": 3, "hidden": 7}
    with pytest.raises(ValueError, match="part, dim are not known"):
        measure(axes, (24, 7), {"group": 2})
    with pytest.raises(ValueError, match="3 dimensions, 2 are expected"):
        measure(axes, (24, 7, 1), known)
    with pytest.raises(ValueError, match="25 does not go with group 2 · part 4"):
        measure(axes, (25, 7), known)


CONFIGS: dict[str, dict[str, Any]] = {
    "glm-n": {"model_type": "glm4", "num_attention_heads": 4, "head_dim": 4, "use_rearrange_rope": True},
    "swin": {"depths": [2, 2], "num_heads": [1, 2], "embed_dim": 4, "mlp_ratio": 2.0},
}
# Axes of which no config.json tells the extent.
FREE = {
    *("lora_rank", "offsets", "tokens", "others", "windows", "batch", "token", "classes"),
    *("pixels", "height", "columns", "patch_height", "patch_width"),
}


@pytest.mark.parametrize("name", sorted(models()))
def test_every_rule_of_every_table_says_a_shape_of_known_sizes(name: str) -> None:
    model = models()[name]
    config = ModelConfig({"num_hidden_layers": 2, "n_routed_experts": 4, **CONFIGS.get(name, {})})
    facts = model.facts(config)
    sizes = {*facts.sizes, *(axis for run in facts.runs.values() for captures in run for axis in captures)}
    for table in model.tables.values():
        for entry in table:
            if isinstance(entry, Rule):
                for tensor in (entry.whole, *entry.parts):
                    axes = entry.shape or tensor.axes
                    assert axes, tensor.name
                    assert set(flat(parse_axes(axes))) - {"part"} <= sizes | FREE, tensor.name
