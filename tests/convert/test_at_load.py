"""`load_checkpoint` may be a downloaded Hugging Face folder: it is converted and re-sliced in one pass, at load."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import huggingface as hf
import numpy as np
import pytest

from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.config import Config
from mindformers_ckpt.job.direct import read_direct
from mindformers_ckpt.job.output_dir import OutputDir
from mindformers_ckpt.job.reslice import Reslicing
from mindformers_ckpt.sources.find import is_huggingface_folder
from mindformers_ckpt.strategy.model import Strategy

SHAPES = hf.llama_shapes()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return hf.write_folder(tmp_path / "llama-hf", hf.random_tensors(SHAPES), hf.decoder_config(), shards=2)


def strategy_of(model: Path, tmp_path: Path) -> Strategy:
    """Rows over two ranks where they divide, names as the conversion gives them."""
    convert(Request(None, model), tmp_path / "complete.ckpt")
    layouts = {
        name: Layout.on({"mp": 2}, "mp" if array.shape[0] % 2 == 0 else None, *[None] * (array.ndim - 1))
        for name, array in hf.read_file(tmp_path / "complete.ckpt").items()
    }
    return Strategy.of_stages((layouts,), "mp2")


def reslicing(model: Path, tmp_path: Path, target: Strategy) -> Reslicing:
    config = Config(load_checkpoint=str(model), auto_trans_ckpt=True, output_dir=str(tmp_path / "output"))
    return Reslicing(config, Cluster(0, 1, ("here",), 10, None), OutputDir(tmp_path / "output"), target)


def test_a_job_gets_what_the_command_makes(model: Path, tmp_path: Path) -> None:
    target = strategy_of(model, tmp_path)
    convert(Request(None, model), tmp_path / "ranks", target=target)
    with reslicing(model, tmp_path, target).resliced() as folder:
        assert folder is not None
        made = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.ckpt")}
    expected = {
        path.relative_to(tmp_path / "ranks"): path.read_bytes() for path in (tmp_path / "ranks").rglob("*.ckpt")
    }
    assert made == expected
    assert len(made) == 2


def test_the_same_without_the_detour(model: Path, tmp_path: Path) -> None:
    target = strategy_of(model, tmp_path)
    convert(Request(None, model), tmp_path / "ranks", target=target)
    own = reslicing(model, tmp_path, target).own_plan()
    assert own is not None
    expected = hf.read_file(tmp_path / "ranks" / "rank_0" / "checkpoint_0.ckpt")
    found = {spec.name: content for spec, content in read_direct(own.plan, lambda: None, own.headers)}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def test_what_is_a_huggingface_folder(model: Path, tmp_path: Path) -> None:
    assert is_huggingface_folder(model)
    (model / "config.json").write_text("{}")
    assert not is_huggingface_folder(model)
    assert not is_huggingface_folder(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ({"model": {"model_config": {"use_rearrange_rope": True, "type": "ChatGLM2Config"}}}, "use_rearrange_rope"),
        ({"model": {"model_config": {"mlp_concat": False, "use_gmm": True}}}, "mlp_concat"),
    ],
)
def test_the_settings_of_the_network_in_the_yaml(yaml: dict[str, Any], words: str, tmp_path: Path) -> None:
    """A setting that the model does not have (use_gmm) is left aside."""
    value = yaml["model"]["model_config"][words]
    model = hf.write_folder(tmp_path / "glm", hf.random_tensors(hf.chatglm_shapes()), hf.CHATGLM_CONFIG)
    made = job_makes(model, tmp_path, yaml, Request(None, model, **{words: value}))
    assert made != job_makes(model, tmp_path, {}, Request(None, model))


def test_fused_names_and_turned_experts_from_the_yaml(model: Path, tmp_path: Path) -> None:
    fused = {"model": {"model_config": {"qkv_concat": True}}}
    made = job_makes(model, tmp_path, fused, Request(None, model, qkv_concat=True))
    assert any("w_qkv" in name for name in made)
    config = hf.decoder_config(model_type="mixtral", num_hidden_layers=1, num_local_experts=4)
    experts = hf.write_folder(tmp_path / "mixtral", hf.random_tensors(hf.mixtral_shapes(4)), config)
    for yaml in ({"moe_config": {"use_gmm": True}}, {"model": {"model_config": {"moe_config": {"use_gmm": True}}}}):
        job_makes(experts, tmp_path, yaml, Request(None, experts, use_gmm=True))


def job_makes(model: Path, tmp_path: Path, yaml: dict[str, Any], request: Request) -> dict[str, bytes]:
    """The tensors that a job with this yaml loads; they must be those of the command."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    convert(request, folder / "complete.ckpt")
    expected = hf.read_file(folder / "complete.ckpt")
    layouts = {name: Layout.on({"mp": 1}, *[None] * array.ndim) for name, array in expected.items()}
    target = Strategy.of_stages((layouts,), "one")
    config = Config.from_mapping({**yaml, "load_checkpoint": str(model), "auto_trans_ckpt": True})
    own = Reslicing(config, Cluster(0, 1, ("here",), 10, None), OutputDir(folder), target).own_plan()
    assert own is not None
    found = {spec.name: content.tobytes() for spec, content in read_direct(own.plan, lambda: None, own.headers)}
    assert found == {name: np.ascontiguousarray(array).tobytes() for name, array in expected.items()}
    return found
