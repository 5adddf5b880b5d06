"""The scaling of every branch: PEFT's patterns, ranks, rsLoRA; and numbers that cannot be one."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from peft_patterns import KEYS, MODULES, Q0, Q1, UP1, V0, V1

from mindformers_ckpt.cli.main import cli
from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.lora_scaling import Scaling
from mindformers_ckpt.lora_settings import read_settings
from mindformers_ckpt.patterns import match_patterns

IN_FILE = tuple(f"base_model.model.{module}" for module in MODULES)


def alphas(scaling: Scaling, rank: int = 4) -> dict[str, float]:
    """Module -> its alpha, as it takes part in the scaling of factors of a rank."""
    resolved, _ = scaling.for_modules(IN_FILE)
    return {name: resolved.of(held, rank) * rank for name, held in zip(MODULES, IN_FILE)}


@pytest.mark.parametrize(("key", "modules"), KEYS.items(), ids=map(repr, KEYS))
def test_a_pattern_names_the_modules_that_it_names_in_peft(key: str, modules: tuple[str, ...]) -> None:
    found = alphas(Scaling(alpha=16, alphas={key: 64}))
    assert found == {name: 64 if name in modules else 16 for name in MODULES}


@pytest.mark.parametrize(("key", "modules"), KEYS.items(), ids=map(repr, KEYS))
def test_a_pattern_of_ranks(key: str, modules: tuple[str, ...]) -> None:
    resolved, _ = Scaling(alpha=16, rank=4, ranks={key: 8}).for_modules(IN_FILE)
    for name, held in zip(MODULES, IN_FILE):
        rank, other = (8, 4) if name in modules else (4, 8)
        assert resolved.of(held, rank) == 16 / rank
        with pytest.raises(ValueError, match=f"it is of rank {other}, not {rank}"):
            resolved.of(held, other)


def test_patterns_of_alphas_and_ranks_are_taken_apart() -> None:
    scaling = Scaling(alpha=16, rank=4, alphas={"q_proj": 8}, ranks={r".*\.layers\.0\..*": 2}, rank_stabilised=True)
    resolved, _ = scaling.for_modules(IN_FILE)
    assert [resolved.of(Q0, 2), resolved.of(V0, 2)] == [8 / math.sqrt(2), 16 / math.sqrt(2)]
    assert [resolved.of(Q1, 4), resolved.of(V1, 4), resolved.of(UP1, 4)] == [4, 8, 8]


def test_the_first_pattern_counts_and_is_named() -> None:
    scaling = Scaling(alpha=16, alphas={r"layers\.0\..*": 2, "q_proj": 8, "up_proj": 3}, origin="settings")
    resolved, notes = scaling.for_modules(IN_FILE)
    assert resolved.alphas == {Q0: 2, V0: 2, Q1: 8, UP1: 3}
    (note,) = notes
    assert note.startswith(
        f"settings: alpha_pattern: 'layers\\\\.0\\\\..*' and 'q_proj' both match {Q0}, with different"
    )


def test_patterns_of_one_value_are_no_question() -> None:
    assert Scaling(alpha=16, alphas={"q_proj": 8, ".*": 8}).for_modules(IN_FILE)[1] == ()


def test_a_name_that_is_no_regular_expression_for_itself() -> None:
    odd = "blocks.0.proj+x"
    resolved, _ = Scaling(alpha=16, alphas={odd: 8}).for_modules([odd])
    assert resolved.of(odd, 1) == 8


def test_a_scaling_that_is_given_is_that_of_all_modules() -> None:
    resolved, notes = Scaling(value=0.5, alphas={"(": 8}).for_modules(IN_FILE)
    assert (resolved.of(Q0, 4), notes) == (0.5, ())


def test_all_patterns_that_are_no_regular_expressions() -> None:
    scaling = Scaling(alpha=16, alphas={"(": 1, "q_proj": 2, "a{99999999999999}": 3}, ranks={"*": 4}, origin="settings")
    with pytest.raises(ConfigError) as failure:
        scaling.for_modules(IN_FILE)
    lines = str(failure.value).splitlines()
    assert lines[0] == "settings: patterns cannot be used"
    assert [line.partition(" is not a regular expression")[0] for line in lines[1:]] == [
        "  - '('",
        "  - 'a{99999999999999}'",
        "  - '*'",
    ]


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|aa)+c"])
def test_a_pattern_that_does_not_end_is_ended(pattern: str) -> None:
    names = ["a" * 64, "q_proj"]
    with pytest.raises(ConfigError, match="was not matched within 3 s") as failure:
        match_patterns(["q_proj", pattern, "other"], names, origin="settings", seconds=3)
    assert repr(pattern) in str(failure.value)


def test_a_pattern_that_asks_for_endless_depth() -> None:
    with pytest.raises(ConfigError, match="is not a regular expression: it is too large"):
        match_patterns(["(" * 50_000], ["q_proj"], origin="settings")


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, 1e39, -1e39, 10**400, 1e-300, True, "16", [16]])
def test_numbers_that_are_no_alpha(alpha: Any, tmp_path: Path) -> None:
    for given in ({"alpha": alpha}, {"value": alpha}, {"alphas": {"q_proj": alpha}}):
        with pytest.raises(ConfigError, match="not a scaling of LoRA"):
            Scaling(**given)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"r": 8, "lora_alpha": alpha, "alpha_pattern": {"v_proj": alpha}}))
    with pytest.raises(ConfigError) as failure:
        read_settings(path)
    expected = r"lora_alpha is .*\n.*alpha_pattern: 'v_proj' is |a number of 401 digits stands in it"
    assert re.search(expected, str(failure.value))


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "8", math.nan])
def test_numbers_that_are_no_rank(rank: Any, tmp_path: Path) -> None:
    for given in ({"rank": rank}, {"ranks": {"q_proj": rank}}):
        with pytest.raises(ConfigError, match="a whole number above 0 is expected"):
            Scaling(alpha=16, **given)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"r": rank, "lora_alpha": 16, "rank_pattern": {"v_proj": rank}}))
    with pytest.raises(ConfigError) as failure:
        read_settings(path)
    assert re.search(r"- r is .*\n.*rank_pattern: 'v_proj' is ", str(failure.value))


def test_an_alpha_whose_scaling_is_lost() -> None:
    with pytest.raises(ValueError, match=r"its scaling is 1\.3e-41, which single precision takes for zero"):
        Scaling(alpha=1.3e-38).of("q_proj", 1000)


@pytest.mark.parametrize("option", ["--alpha", "--lora_scaling"])
@pytest.mark.parametrize("text", ["nan", "inf", "1e39", "-1e39", "1e-300", "", " ", "x"])
def test_options_that_are_no_numbers(option: str, text: str, tmp_path: Path) -> None:
    arguments = ["--src_ckpt_path_or_dir", "x", "--dst_ckpt_dir", str(tmp_path / "out"), f"{option}={text}"]
    result = CliRunner().invoke(cli, ["merge-lora", *arguments])
    assert result.exit_code == 2
    assert "write it like" in result.output


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read: it is empty"),
        (b"[" * 100_000, "it is nested more than 64 deep"),
        (b"\xff\xfe{", "it is not UTF-8 text"),
        (b'{"r": ' + b"1" * 5000 + b"}", "adapter_config.json"),
        (b"[]", "a JSON object was expected"),
        (b'{"alpha_pattern": ["q_proj"]}', "alpha_pattern is"),
        (b'{"rank_pattern": "q_proj"}', "rank_pattern is 'q_proj'"),
        (b'{"use_rslora": "false"}', "use_rslora is 'false'"),
        (b'{"init_lora_weights": 1}', "init_lora_weights 1"),
        (b'{"bias": "all"}', "bias 'all'"),
        (b'{"modules_to_save": ["lm_head"]}', "modules_to_save"),
        (b'{"lora_bias": true}', "lora_bias"),
        (b'{"use_dora": true}', "use_dora (DoRA) is not supported"),
    ],
)
def test_settings_that_cannot_be_used(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_settings(path)
