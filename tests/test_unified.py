"""The folder that MindSpore's own `unified_safetensors` writes: of whole files, and of such without redundancy."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from recorded import read_tensors
from small_llama import shards, weights, write_mindspore, write_two_ranks_strategy

import mindformers_ckpt as mc
from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.strategy.files import merge_strategies

needs_mindspore = pytest.mark.skipif(importlib.util.find_spec("mindspore") is None, reason="MindSpore writes it")


def contents(path: Path) -> dict[str, Any]:
    with mc.open_checkpoint(path) as checkpoint:
        return {name: checkpoint[name][...] for name in checkpoint}


def unify(folder: Path, *, redundancy: bool, parts: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make one of the checkpoint of two ranks; MindSpore cuts into parts of 3 GB, here into `parts`."""
    import mindspore
    from mindspore.parallel import transform_safetensors

    for rank, tensors in shards(1).items():
        held = {**tensors, "global_step": np.array(7, np.int32)}
        if not redundancy and rank:
            held = {name: array for name, array in held.items() if array.ndim == 2}
        data = [{"name": name, "data": mindspore.Tensor(array)} for name, array in held.items()]
        (folder / f"ranks/rank_{rank}").mkdir(parents=True)
        file = str(folder / f"ranks/rank_{rank}/a_{rank}.safetensors")
        mindspore.save_checkpoint(data, file, format="safetensors")
    merge_strategies(write_two_ranks_strategy(folder / "strategy"), folder / "merged.ckpt")
    as_many = SimpleNamespace(**{**vars(math), "ceil": lambda number: parts})
    monkeypatch.setattr(transform_safetensors, "math", as_many)
    arguments = (str(folder / "ranks"), str(folder / "merged.ckpt"), str(folder / "unified"))
    mindspore.unified_safetensors(*arguments, merge_with_redundancy=redundancy, max_process_num=1)
    return folder / "unified"


@needs_mindspore
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # MindSpore leaves files open
@pytest.mark.parametrize(("redundancy", "parts"), [(True, 1), (True, 2), (False, 2)])
def test_what_mindspore_unified(redundancy: bool, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = unify(tmp_path, redundancy=redundancy, parts=parts, monkeypatch=monkeypatch)
    names = [*(f"part{number}.safetensors" for number in range(parts)), "hyper_param.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "param_name_map.json"])
    found = contents(folder)
    assert found.pop("global_step") == 7
    assert found.keys() == weights(1).keys()
    for name, array in weights(1).items():
        np.testing.assert_array_equal(found[name], array, name)
    assert find_source(folder).warnings == ()
    ranks = mc.transform(folder, tmp_path / "out", dst_strategy=tmp_path / "strategy")
    assert ranks.files == 2
    assert mc.verify(tmp_path / "out", tmp_path / "strategy", against=folder).ok
    assert read_tensors(tmp_path / "out/rank_1/checkpoint_1.safetensors").keys() == {*weights(1), "global_step"}


def mapped(folder: Path, hyper: dict[str, Any], *, flat: bool = False) -> Path:
    write_mindspore(folder / "part0.safetensors", weights(1))
    write_mindspore(folder / "hyper_param.safetensors", hyper)
    places = dict.fromkeys(weights(1), "part0.safetensors")
    (folder / "param_name_map.json").write_text(json.dumps(places if flat else {"weight_map": places}))
    return folder


def test_what_rank_0_had_of_other_tensors_is_said(tmp_path: Path) -> None:
    """A filter (`choice_func`) or a strategy without them puts slices of rank 0 there."""
    hyper = {"adam_m.lm_head.weight": np.zeros((6, 8), np.float32), "step": np.zeros(1, np.float32)}
    source = find_source(mapped(tmp_path, hyper))
    assert "what rank 0 had of adam_m.lm_head.weight[6, 8]; it is read as the whole tensor" in source.warnings[0]
    assert set(contents(tmp_path)) == {*weights(1), *hyper}


def test_buffers_that_no_checkpoint_needs_are_left_out(tmp_path: Path) -> None:
    source = find_source(mapped(tmp_path, {"accu_grads.lm_head.weight": np.zeros((6, 8), np.float32)}, flat=True))
    assert (source.warnings, [path.name for path in source.files]) == ((), ["part0.safetensors"])


def test_a_tensor_in_two_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"hyper_param\.safetensors repeats tensors(?s:.*)lm_head\.weight"):
        find_source(mapped(tmp_path, {"lm_head.weight": np.zeros((12, 8), np.float32)}))


def test_other_files_beside_it_are_left_aside(tmp_path: Path) -> None:
    write_mindspore(mapped(tmp_path, {}) / "part9.safetensors", {"w": np.zeros(1, np.float32)})
    assert "does not name them: part9.safetensors" in find_source(tmp_path).warnings[0]
