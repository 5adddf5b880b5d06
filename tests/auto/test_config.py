"""The yaml keys: every key, its default, values as text, and what is refused."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.job.config import KEYS, Config, parse_bool
from mindformers_ckpt.job.misspelt import misspelt

DEFAULTS = {
    "load_checkpoint": "",
    "src_strategy_path_or_dir": "",
    "auto_trans_ckpt": False,
    "auto_trans_save": True,
    "transform_process_num": 1,
    "transform_by_rank": False,
    "output_dir": "./output",
    "use_parallel": True,
    "run_mode": "train",
    "resume_training": None,
    "only_save_strategy": False,
    "load_ckpt_format": "ckpt",
    "check_contents": "error",
    "verify_checkpoint": False,
    "share_reads": "auto",
    "transform_timeout": 7200.0,
}


def values_of(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in DEFAULTS}


def test_the_defaults() -> None:
    assert values_of(Config.from_mapping({})) == DEFAULTS
    assert values_of(Config()) == DEFAULTS


@pytest.mark.parametrize("key", DEFAULTS)
def test_a_key_without_a_value_has_its_default(key: str) -> None:
    assert values_of(Config.from_mapping({key: None})) == DEFAULTS


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("load_checkpoint", "/data/llama.ckpt", "/data/llama.ckpt"),
        ("load_checkpoint", Path("/data/model"), "/data/model"),
        ("load_checkpoint", "None", ""),
        ("src_strategy_path_or_dir", "", ""),
        ("src_strategy_path_or_dir", "~/strategy", str(Path("~/strategy").expanduser())),
        ("auto_trans_ckpt", True, True),
        ("auto_trans_ckpt", "True", True),
        ("auto_trans_ckpt", " false ", False),
        ("auto_trans_ckpt", "", False),
        ("auto_trans_ckpt", 1, True),
        ("transform_process_num", 2, 2),
        ("transform_process_num", "8", 8),
        ("transform_by_rank", "yes", True),
        ("output_dir", "/shared/out", "/shared/out"),
        ("output_dir", "", "./output"),
        ("use_parallel", "False", False),
        ("run_mode", "finetune", "finetune"),
        ("run_mode", "predict", "predict"),
        ("run_mode", "eval", "eval"),
        ("resume_training", "True", True),
        ("resume_training", False, False),
        ("resume_training", "llama_7b-3_150.ckpt", "llama_7b-3_150.ckpt"),
        ("resume_training", "llama_7b-3_150", "llama_7b-3_150"),
        ("only_save_strategy", "true", True),
        ("load_ckpt_format", "safetensors", "safetensors"),
        ("check_contents", "warn", "warn"),
        ("check_contents", "off", "off"),
        ("check_contents", False, "off"),  # what yaml reads of a bare off
        ("verify_checkpoint", "True", True),
        ("share_reads", "off", "off"),
        ("share_reads", False, "off"),
        ("transform_timeout", "90", 90.0),
    ],
)
def test_values_that_are_taken(key: str, value: Any, expected: Any) -> None:
    assert values_of(Config.from_mapping({key: value})) == {**DEFAULTS, key: expected}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("load_checkpoint", 7),
        ("load_checkpoint", ["a", "b"]),
        ("auto_trans_ckpt", "ture"),
        ("use_parallel", "Flase"),  # in a yaml of MindFormers 1.2 and 1.3, which reads it as true
        ("auto_trans_ckpt", 2),
        ("transform_process_num", 0),
        ("transform_process_num", -1),
        ("transform_process_num", True),
        ("transform_process_num", "two"),
        ("transform_process_num", 1.5),
        ("transform_by_rank", "maybe"),
        ("run_mode", "training"),
        ("run_mode", ["train"]),
        ("resume_training", "ture"),
        ("resume_training", 3),
        ("load_ckpt_format", "pt"),
        ("check_contents", "ignore"),
        ("check_contents", True),
        ("share_reads", "on"),
        ("share_reads", True),
        ("transform_timeout", 0),
        ("transform_timeout", "inf"),
        ("transform_timeout", "nan"),
        ("transform_timeout", "soon"),
        ("transform_timeout", True),
        ("transform_timeout", 10**400),
        ("transform_process_num", "9" * 5000),
    ],
)
def test_nonsense_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key}: .* was expected, not "):
        Config.from_mapping({key: value})


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_mapping({"auto_trans_ckpt": "ture", "transform_process_num": 0, "auto_trans_ckpts": True})
    text = str(caught.value)
    assert text.splitlines()[0] == "the checkpoint keys of the configuration are wrong"
    assert [line.split(":")[0] for line in text.splitlines()[1:]] == [
        "  - auto_trans_ckpt",
        "  - transform_process_num",
        "  - auto_trans_ckpts",
    ]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("load_checkpont", "load_checkpoint"),
        ("laod_checkpoint", "load_checkpoint"),
        ("load-checkpoint", "load_checkpoint"),
        ("loadCheckpoint", "load_checkpoint"),
        ("LOAD_CHECKPOINT", "load_checkpoint"),
        ("load_checkpoint ", "load_checkpoint"),
        ("load_ckpt", "load_checkpoint"),
        ("load_checkpoint_path", "load_checkpoint"),
        ("load_ckpt_dir", "load_checkpoint"),
        ("auto_trans_chpt", "auto_trans_ckpt"),
        ("auto_tran_ckpt", "auto_trans_ckpt"),
        ("auto_trans_checkpoint", "auto_trans_ckpt"),
        ("auto_transform_ckpt", "auto_trans_ckpt"),
        ("transform_process_nums", "transform_process_num"),
        ("trans_process_num", "transform_process_num"),
        ("transform_processes", "transform_process_num"),
        ("src_strategy", "src_strategy_path_or_dir"),
        ("src_strategy_path", "src_strategy_path_or_dir"),
        ("src_strategy_dir", "src_strategy_path_or_dir"),
        ("src_startegy_path_or_dir", "src_strategy_path_or_dir"),
        ("src_strategy_path_or_dirs", "src_strategy_path_or_dir"),
        ("only_save_startegy", "only_save_strategy"),
        ("use_paralel", "use_parallel"),
        ("resume_trainning", "resume_training"),
        ("load_ckpt_formats", "load_ckpt_format"),
        ("ouput_dir", "output_dir"),
        ("runmode", "run_mode"),
    ],
)
def test_misspelt_keys(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"{wrong}: did you mean {right}\\?"):
        Config.from_mapping({wrong: "1"})
    with pytest.raises(ConfigError, match=f"{wrong}: did you mean {right}\\?"):
        Config.from_mapping({wrong: "1", right: None})  # the right one beside it, as in MindFormers' own files


def test_every_slip_of_one_letter_is_noticed() -> None:
    """A letter lacking, doubled, wrong, or exchanged with the next one, at every place of every key."""
    for key in KEYS:
        for place in range(len(key)):
            before, letter, after = key[:place], key[place], key[place + 1 :]
            slips = {before + after, before + letter + letter + after, f"{before}x{after}"}
            slips.add(before + after[:1] + letter + after[1:])
            for slip in slips - {*KEYS, ""}:
                assert misspelt({slip: 1}, KEYS) == [f"{slip}: did you mean {key}?"]


def test_the_keys_of_mindformers_are_not_taken_for_misspelt_ones() -> None:
    lines = (Path(__file__).parents[1] / "data/mindformers_keys.txt").read_text(encoding="utf-8").splitlines()
    keys = [line for line in lines if not line.startswith("#")]
    assert len(keys) == 103
    assert misspelt(dict.fromkeys(keys), KEYS) == []


def test_keys_of_other_tools_are_not_taken_for_misspelt_ones() -> None:
    """Options that training scripts have: transformers, Megatron, ModelArts, MindFormers' conversion."""
    others = "save_strategy eval_strategy output_path output_url train_url data_url checkpoint_path ckpt_path mode"
    others += " save save_checkpoint save_ckpt_format load load_format resume resume_from_checkpoint model_path"
    others += " checkpoint parallel parallel_mode use_flash_attention num_processes gpu_num_per_node device_num"
    assert misspelt(dict.fromkeys(others.split()), KEYS) == []


def test_keys_in_a_section_have_no_effect() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_mapping({"trainer": {"load_checkpoint": "/a", "type": "x"}, "model": {"auto_trans_ckpt": True}})
    assert str(caught.value).splitlines()[1:] == [
        "  - load_checkpoint: it has no effect in the section trainer; put it at the top, without indentation",
        "  - auto_trans_ckpt: it has no effect in the section model; put it at the top, without indentation",
    ]
    values = {"load_checkpoint": "/b", "folders": {"load_checkpoint": "/a"}, "model": {"run_mode": "x"}}
    assert Config.from_mapping(values).load_checkpoint == "/b"


@pytest.mark.parametrize(
    ("values", "asking"),
    [
        ({"auto_trans_ckpt": True}, "auto_trans_ckpt: True has no effect"),
        ({"auto_trans_ckpt": True, "load_checkpoint": "None"}, "auto_trans_ckpt: True has no effect"),
        ({"src_strategy_path_or_dir": "/s"}, "src_strategy_path_or_dir has no effect"),
        ({"resume_training": True}, "resume_training: True has no effect"),
        ({"auto_trans_ckpt": True, "src_strategy_path_or_dir": "/s"}, "src_strategy_path_or_dir have no effect"),
        ({}, None),
        ({"auto_trans_ckpt": True, "load_checkpoint": "/a"}, None),
        ({"auto_trans_ckpt": True, "only_save_strategy": True}, None),
        ({"resume_training": False}, None),
    ],
)
def test_a_job_with_nothing_to_load(values: dict[str, Any], asking: str | None) -> None:
    warning = Config.from_mapping(values).nothing_to_load
    assert (warning is None) if asking is None else (warning is not None and warning.endswith(asking))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", ""),
        ("None", ""),
        ("${SET}/llama", "/data/llama"),
        ("$SET/llama", "/data/llama"),
        ("$SET", "/data"),
        ("${UNSET:-/other}/llama", "/other/llama"),
        ("${EMPTY:-/other}/llama", "/other/llama"),
        ("${UNSET:-}", ""),
        ("/costs/5$/a$SET", "/costs/5$/a$SET"),
    ],
)
def test_paths_of_variables(value: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET", "/data")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)
    assert Config.from_mapping({"load_checkpoint": value}).load_checkpoint == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("${UNSET}", "the environment variable UNSET is not set; set it, or write ${UNSET:-default}"),
        ("$UNSET", "the environment variable UNSET is not set"),
        ("/data/${UNSET}/llama", "the environment variable UNSET is not set"),
        ("/data/$UNSET/llama", "the environment variable UNSET is not set"),
        ("${EMPTY}", "the environment variable EMPTY is empty"),
        ("$EMPTY/llama", "the environment variable EMPTY is empty"),
        ("  ", "a path was expected, not '  '"),
        ("/data/\0", "it holds a NUL character"),
    ],
)
def test_paths_without_a_value(value: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)
    with pytest.raises(ConfigError, match=f"load_checkpoint: .*{re.escape(text)}"):
        Config.from_mapping({"load_checkpoint": value})


def test_a_folder_that_mindspore_cannot_write_to() -> None:
    """A source may have any name; the output dir is handed to MindSpore, which takes UTF-8 only."""
    name = os.fsdecode("/data/模型".encode("gbk"))
    assert Config.from_mapping({"load_checkpoint": name}).load_checkpoint == name
    with pytest.raises(ConfigError, match="output_dir: MindSpore cannot write to a folder whose name is not UTF-8"):
        Config.from_mapping({"output_dir": name})


def test_settings_of_the_network() -> None:
    network = {"type": "LlamaConfig", "qkv_concat": "False", "moe_config": {"use_gmm": True}}
    assert Config.from_mapping({"model": {"model_config": network}}).layout_settings == (
        ("qkv_concat", False),
        ("use_gmm", True),
    )
    with pytest.raises(ConfigError, match="qkv_concat of the network: True or False was expected, not 'Flase'"):
        Config.from_mapping({"model": {"model_config": {"qkv_concat": "Flase"}}})


def test_a_large_value_is_told_in_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_mapping({"auto_trans_ckpt": "x" * 10_000, "load_checkpoint": [[1] * 1000] * 1000})
    assert max(map(len, str(caught.value).splitlines())) < 500


def test_other_keys_of_a_training_yaml_are_left_alone() -> None:
    others: dict[Any, Any] = {
        "seed": 0,
        "runner_config": {"epochs": 2},
        "trainer": {"type": "CausalLanguageModelingTrainer"},
        "remove_redundancy": False,
        "save_ckpt_format": "ckpt",
        "ckpt_remark": "x",
        "src_ip": "10.0.0.1",
        5: "a key that is not text",
    }
    assert values_of(Config.from_mapping(others)) == DEFAULTS


YAML = """
seed: 0
folders: &folders
  load_checkpoint: ${BASE}/llama
  src_strategy_path_or_dir: ${STRATEGY:-/data/strategy}
checkpoint: &checkpoint
  <<: *folders
  auto_trans_ckpt: &on True
<<: *checkpoint
transform_by_rank: *on
output_dir: './output' # as MindFormers writes it
resume_training: False
load_ckpt_format: "ckpt"
parallel_config:
  data_parallel: 2
"""


def test_a_yaml_with_anchors_merge_keys_and_environment_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "finetune.yaml"
    file.write_text(YAML)
    monkeypatch.setenv("BASE", "/data")
    monkeypatch.delenv("STRATEGY", raising=False)
    expected = {
        **DEFAULTS,
        "load_checkpoint": "/data/llama",
        "src_strategy_path_or_dir": "/data/strategy",
        "auto_trans_ckpt": True,
        "transform_by_rank": True,
        "resume_training": False,
    }
    assert values_of(Config.from_yaml(file)) == expected
    changed = Config.from_yaml(file, {"auto_trans_ckpt": "False", "transform_process_num": "2"})
    assert values_of(changed) == {**expected, "auto_trans_ckpt": False, "transform_process_num": 2}
    monkeypatch.delenv("BASE")
    with pytest.raises(ConfigError, match="load_checkpoint: the environment variable BASE is not set"):
        Config.from_yaml(file)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"load_checkpoint: [", "cannot be read"),
        (b"- a\n- b\n", "a mapping of keys was expected, not list"),
        (b"\xff\xfe\x00", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes | None, text: str) -> None:
    file = tmp_path / "a.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"a.yaml: .*{text}"):
        Config.from_yaml(file)


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").touch()
    assert values_of(Config.from_yaml(tmp_path / "a.yaml")) == DEFAULTS


def test_the_folders_of_the_guide() -> None:
    config = Config(output_dir="/out", resume_training="a-1_2.ckpt")
    assert config.strategy_dir == Path("/out/strategy")
    assert config.transformed_dir == Path("/out/transformed_checkpoint")
    assert config.step_file == "a-1_2.ckpt"
    assert Config(resume_training=True).step_file is None


def test_truth_as_text() -> None:
    assert [parse_bool(text) for text in ("True", "yes", "on", "1")] == [True] * 4
    assert [parse_bool(text) for text in ("False", "no", "off", "0", "")] == [False] * 5
    with pytest.raises(ValueError, match="True or False was expected"):
        parse_bool("t")


@pytest.mark.parametrize(
    ("value", "patterns"),
    [
        *zip((True, "True", "yes", ["true"]), [("*",)] * 4),
        *zip((False, "False", "", None, []), [()] * 5),
        (["head.*", "norm"], ("head.*", "norm")),
        ("head.*, norm", ("head.*", "norm")),
    ],
)
def test_names_that_may_be_missing(value: object, patterns: tuple[str, ...]) -> None:
    assert Config.from_mapping({"allow_missing": value}).allow_missing == patterns


@pytest.mark.parametrize("value", [3, ["a", 3], [""], "a,,b", {"a": 1}])
def test_what_names_that_may_be_missing_cannot_be(value: object) -> None:
    with pytest.raises(ConfigError, match="allow_missing: True, False or a list of parameter names was expected"):
        Config.from_mapping({"allow_missing": value})
