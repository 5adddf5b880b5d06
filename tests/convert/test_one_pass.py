"""Converting for a strategy in one pass gives the files of converting first and re-slicing then."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import huggingface as hf
import ml_dtypes
import numpy as np
import pytest

from mindformers_ckpt.convert.model import models
from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert
from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.execution.options import Options
from mindformers_ckpt.geometry.axes import runs
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.look.fingerprint import fingerprint
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.transform import transform

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        hf.random_tensors(hf.llama_shapes(), ml_dtypes.bfloat16),
        hf.decoder_config(),
    ),
    "mixtral": (
        hf.random_tensors(hf.mixtral_shapes(12)),
        hf.decoder_config(num_hidden_layers=1, num_local_experts=12),
    ),
    "deepseek": (hf.deepseek_tensors(), hf.DEEPSEEK_CONFIG),
    "bloom": (hf.random_tensors(hf.bloom_shapes()), {"n_layer": 2, "n_head": 2, "hidden_size": 8}),
    "glm-n": (
        hf.random_tensors(hf.chatglm_shapes()),
        {"model_type": "chatglm", "num_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4},
    ),
}
# The rows of two parts of one tensor change their order, those of the third do not.
SETTINGS: dict[str, dict[str, Any]] = {"glm-n": {"use_rearrange_rope": True}}


def random_layout(shape: tuple[int, ...], seed: str) -> Layout:
    """A layout on 8 ranks that cuts each dimension along axes that divide it, at times with an optimizer shard."""
    chance = random.Random(seed)
    axes = [2, 1, 0]
    chance.shuffle(axes)
    tensor_map: list[tuple[int, ...]] = []
    for extent in shape:
        count = chance.choice([0, 1, 1, 2])
        if extent % 2**count == 0 and count <= len(axes):
            tensor_map.append(tuple(axes.pop() for _ in range(count)))
        else:
            tensor_map.append(())
    used = sum(map(len, tensor_map))
    rows = 2 ** (len(tensor_map[0]) + 3 - used)
    optimizer = -1 if shape[0] % rows == 0 and chance.random() < 0.3 else 0
    return Layout((2, 2, 2), tuple(tensor_map), optimizer)


def random_strategy(weights: Path, stages: int, seed: str) -> Strategy:
    """Every tensor of the weights on one stage or replicated, as numbers are."""
    layouts: list[dict[str, Layout]] = [{} for _ in range(stages)]
    for name, array in hf.read_file(weights).items():
        chance = random.Random(name + seed)
        if array.ndim and chance.random() < 0.9:
            layouts[chance.randrange(stages)][name] = random_layout(array.shape, name + seed)
    return Strategy(tuple(layouts), 8, "a test")


@pytest.mark.parametrize(("case", "naming"), [(case, naming) for case in CASES for naming in models()[case].namings])
@pytest.mark.parametrize("stages", [1, 2])
def test_one_pass_equals_two_steps(case: str, naming: str, stages: int, tmp_path: Path) -> None:
    tensors, config = CASES[case]
    source = hf.write_folder(tmp_path / "source", tensors, config, shards=3)
    words = {"naming": naming.partition("+")[0], "qkv_concat": "+" in naming or None, **SETTINGS.get(case, {})}
    request = Request(case, source, **words)
    prints = Options(fingerprints=True)
    report = convert(request, tmp_path / "complete.ckpt", options=prints)
    whole, origin = report.fingerprints, fingerprint(source).digest
    assert whole == {".": fingerprint(tmp_path / "complete.ckpt").digest}
    assert report.source_fingerprint == origin
    for seed in "abcd":
        strategy = random_strategy(tmp_path / "complete.ckpt", stages, seed)
        two = tmp_path / f"two {seed}"
        transform(build_plan(Checkpoint(find_source(tmp_path / "complete.ckpt"), Strategy.complete()), strategy), two)
        one = tmp_path / f"one {seed}"
        report = convert(request, one, format="ckpt", target=strategy, options=prints)
        assert (report.fingerprints, report.source_fingerprint) == (whole, origin)
        files = sorted(path.relative_to(two) for path in two.glob("rank_*/*"))
        assert len(files) == 8 * stages
        assert files == sorted(path.relative_to(one) for path in one.glob("rank_*/*"))
        for file in files:
            assert (one / file).read_bytes() == (two / file).read_bytes(), (seed, file)


def test_one_pass_in_safetensors_and_another_type(tmp_path: Path) -> None:
    tensors, config = CASES["deepseek"]
    source = hf.write_folder(tmp_path / "source", tensors, config)
    request = Request("deepseek", source, naming="mcore", dtype="bf16")
    convert(request, tmp_path / "complete.ckpt")
    strategy = random_strategy(tmp_path / "complete.ckpt", 1, "x")
    complete = Checkpoint(find_source(tmp_path / "complete.ckpt"), Strategy.complete())
    transform(build_plan(complete, strategy, format="safetensors"), tmp_path / "two")
    convert(request, tmp_path / "one", target=strategy, format="safetensors")
    for rank in range(8):
        file = f"rank_{rank}/checkpoint_{rank}.safetensors"
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_what_is_known_of_a_source_that_is_converted_in_part(tmp_path: Path) -> None:
    """Of layers that are left out nothing is told; values that are cast were read, and so they are known."""
    tensors, config = CASES["llama"]
    tensors = {**tensors, "model.norm.weight": tensors["model.norm.weight"].astype(np.float32)}
    source = hf.write_folder(tmp_path / "source", tensors, config)
    known = {tensor.name: tensor.hex for tensor in fingerprint(source).tensors}
    request = Request("llama", source, qkv_concat=True, dtype="bf16", num_layers=1)
    out, options = tmp_path / "out", Options(fingerprints=True)
    assert convert(request, out, options=options).source_fingerprint == ""
    told = json.loads((out / "manifest.json").read_bytes())["source_fingerprint"]
    assert told["digest"] is None
    left = {name for name in known if ".layers.1." in name}
    assert {reason: set(names) for reason, names in told["not_counted"].items()} == {
        "the result does not have it": left
    }
    values = {name: entry["crc64nvme"] for name, entry in told["tensors"].items()}
    assert values == {name: known[name] for name in known.keys() - left}


def test_a_conversion_that_goes_on_knows_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindformers_ckpt.engine.tasks._SMALLEST_TASK", 400)
    monkeypatch.setattr("mindformers_ckpt.engine.tasks._LARGEST_TASK", 800)
    tensors, config = CASES["llama"]
    source = hf.write_folder(tmp_path / "source", tensors, config)
    request, out = Request("llama", source, qkv_concat=True), tmp_path / "out"
    tasks = iter(range(1000))

    def stop(done: int, total: int) -> None:
        if next(tasks) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(request, out, options=Options(fingerprints=True, resume=True), progress=stop)
    whole = fingerprint(source).digest
    for _ in range(2):  # what is left, and nothing
        report = convert(request, out, options=Options(fingerprints=True, resume=True))
        assert report.source_fingerprint == whole


def test_back_to_hugging_face_the_source_is_known_too(tmp_path: Path) -> None:
    """Fused weights are read in several boxes, each by a tensor of its own."""
    tensors, config = CASES["llama"]
    source = hf.write_folder(tmp_path / "source", tensors, config)
    fused = tmp_path / "fused.safetensors"
    convert(Request("llama", source, qkv_concat=True), fused)
    report = convert(
        Request("llama", fused, True, hf_config=source), tmp_path / "back", options=Options(fingerprints=True)
    )
    assert report.source_fingerprint == fingerprint(fused).digest
    assert report.fingerprints["."] == fingerprint(source).digest


def test_the_strategy_of_another_model_is_refused(tmp_path: Path) -> None:
    tensors, config = CASES["llama"]
    source = hf.write_folder(tmp_path / "source", tensors, config)
    layouts = {name: Layout.on({"mp": 2}, "mp", None) for name in ("model.no.weight", "model.neither.weight")}
    with pytest.raises(PlanError, match="lacks parameters") as caught:
        convert(Request("llama", source), tmp_path / "out", target=Strategy((layouts,), 2, "a strategy"))
    assert "model.no.weight" in str(caught.value)
    assert "model.neither.weight" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_runs_cover_a_range_in_order() -> None:
    """Every range of 2 · 3 · 4 indices is cut into boxes of the axes, in order and without gaps."""
    for first in range(24):
        for last in range(first + 1, 25):
            at = first
            for run in runs(first, last, (2, 3, 4), 0):
                volume = 1
                for start, stop in zip(run.start, run.stop):
                    volume *= stop - start
                assert run.first == at
                assert run.first == (run.start[0] * 3 + run.start[1]) * 4 + run.start[2]
                assert run.last - run.first == volume
                at = run.last
            assert at == last
