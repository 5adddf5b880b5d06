"""The shapes that a config.json gives are those that conversion makes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import huggingface as hf
import pytest
from test_round_trips import CASES, runs

from mindformers_ckpt.convert.prepare import prepare
from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.shapes import shapes_of_config
from mindformers_ckpt.sources.shapes import agrees


@pytest.mark.parametrize(("case", "naming"), [run for run in runs() if CASES[run.values[0]][2] is not None])
def test_every_model_and_naming(case: str, naming: str, tmp_path: Path) -> None:
    name, tensors, config = CASES[case]
    assert config is not None
    config = {"model_type": {"telechat": "telechat", "glm-n": "chatglm"}.get(name, name), **config}
    folder = hf.write_folder(tmp_path / "source", tensors, config)
    words: dict[str, Any] = {"naming": naming.partition("+")[0], "qkv_concat": "+" in naming or None}
    made = prepare(dataclasses.replace(Request(name, folder), **words)).conversion.tensors
    actual = {converted.spec.name: converted.spec.shape for converted in made}
    told = shapes_of_config(folder, actual)
    assert {name for name in actual if name not in told} == set()
    assert {name: (shape, told[name]) for name, shape in actual.items() if not agrees(shape, told[name])} == {}
