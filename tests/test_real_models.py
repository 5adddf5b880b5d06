"""Real models on their true shapes: tools/real_models.py, and the yaml files of configs/ that go with its jobs."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from real_models import CONFIGS, JOBS, WHOLE, axes_of
from real_shapes import huggingface_shapes

from mindformers_ckpt.job.config import Config

ROOT = Path(__file__).resolve().parent.parent
# The numbers of parameters that the models are known by.
SIZES = {"llama3_1_8b": 8_030_261_248, "qwen2_5_7b": 7_615_616_512, "deepseek_v3": 671_026_419_200}


def config_of(model: str) -> dict[str, Any]:
    content = json.loads((CONFIGS / model / "config.json").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize("model", SIZES)
def test_the_shapes_add_up_to_the_size_of_the_model(model: str) -> None:
    config = {**config_of(model), "num_nextn_predict_layers": 0}
    shapes = huggingface_shapes(config)
    count = sum(math.prod(shape) for name, (_, shape) in shapes.items() if not name.endswith("_scale_inv"))
    assert count == SIZES[model]


@pytest.mark.parametrize("model", SIZES)
def test_the_yaml_files_are_those_of_the_jobs(model: str) -> None:
    jobs = WHOLE.get(model, JOBS[model])
    meshes = []
    for path in sorted((CONFIGS / model).glob("*.yaml")):
        config = Config.from_yaml(path)
        assert config.auto_trans_ckpt
        parallel = yaml.safe_load(path.read_text(encoding="utf-8"))["parallel_config"]
        mesh = dict(zip(("dp", "mp", "pp"), parallel.values()))
        (ranks,) = re.findall(r"_(\d+)\.yaml", path.name)
        assert int(ranks) == mesh["dp"] * mesh["mp"] * mesh["pp"]
        meshes.append(mesh)
    assert all(mesh in meshes for mesh in jobs[:2])


def test_what_cuts_a_weight() -> None:
    """Rows by the first dimension, columns by the last, experts over the data-parallel ranks."""
    layer = "model.layers.0."
    assert axes_of(layer + "attention.wq.weight", 2) == ("mp", None)
    assert axes_of(layer + "attention.wq.bias", 1) == ("mp",)
    assert axes_of(layer + "attention.wo.weight", 2) == (None, "mp")
    assert axes_of(layer + "feed_forward.shared_experts.w2.weight", 2) == (None, "mp")
    assert axes_of(layer + "feed_forward.routed_experts.ffn.w1", 3) == ("dp", None, "mp")
    assert axes_of(layer + "attention.wq.mindpet_delta_lora_a", 2) == (None, None)
    assert axes_of(layer + "attention.wq.mindpet_delta_lora_b", 2) == ("mp", None)
    assert axes_of(layer + "attention_norm.weight", 1) == (None,)


def run(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools/real_models.py"), *words, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("llama3_1_8b", "17 tensors came back bit for bit, 4 with their adapters merged"),
        ("qwen2_5_7b", "23 tensors came back bit for bit, 4 with their adapters merged"),
        ("deepseek_v3", "53 tensors came back bit for bit, 0 with"),
    ],
)
def test_two_layers_through_all_jobs(model: str, said: str, tmp_path: Path) -> None:
    assert said in run(tmp_path, model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", SIZES)
def test_the_whole_model_is_planned(model: str, tmp_path: Path) -> None:
    """In the memory of a laptop, and without any of its bytes."""
    text = run(tmp_path, model, "--whole")
    assert text.count(" MB ") == 3
    assert "Nothing was copied." in text
