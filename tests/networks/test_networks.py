"""MindFormers' own networks against what `convert` writes: names, shapes and, where the forward runs, logits.

`bash tools/test_networks.sh` makes the models (with transformers) and runs these under several versions of MindFormers.
"""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ascend
import huggingface as hf
import numpy as np
import pytest
from built_networks import Case
from network_cases import CASES, values_of

from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert
from mindformers_ckpt.integrations import mindformers as replacement
from mindformers_ckpt.state_names import find_states

try:
    VERSION = version("mindformers")
except PackageNotFoundError:
    pytest.skip("MindFormers is not installed; bash tools/test_networks.sh runs these", allow_module_level=True)
if "NETWORKS" not in os.environ:
    pytest.skip("NETWORKS names no folder of models; bash tools/test_networks.sh makes it", allow_module_level=True)

MODELS = Path(os.environ["NETWORKS"])
# Logits are about one here. MindFormers computes attention in half precision, whatever the yaml says.
MOST = 4e-3
pytestmark = [pytest.mark.networks, pytest.mark.timeout(1200), pytest.mark.filterwarnings("ignore")]


def is_there(case: Case) -> bool:
    """Whether this version of MindFormers has the network."""
    numbers = [[int(part) for part in text.split(".")[:2]] for text in (VERSION, case.since)]
    return numbers[0] >= numbers[1]


@pytest.fixture
def mindspore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(os.environ, "LOG_MF_PATH", str(tmp_path / "log"))
    import mindspore

    mindspore.set_device("CPU")
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    return mindspore


def converted(case: Case, folder: Path, **words: Any) -> dict[str, Any]:
    weights = folder / f"{'-'.join(words) or 'weights'}.safetensors"
    convert(Request(case.as_model, MODELS / case.model, **{**case.words, **words}), weights)
    return hf.read_file(weights)


def build(case: Case, replace: Any) -> Any:
    """The network of a case, on operators that a CPU has."""
    from mindformers.parallel_core.training_graph.transformer import utils

    legacy = case.naming.startswith("legacy")
    replace(utils, "is_legacy_model", lambda: legacy)  # `use_legacy` of the yaml
    ascend.install(replace)
    return case.build(values_of(case))


def weights_of(network: Any) -> dict[str, Any]:
    """The parameters of a network, without what it counts or keeps between steps."""
    found = {parameter.name: parameter for parameter in network.get_parameters()}
    aside = find_states(found, found).names()
    return {name: parameter for name, parameter in found.items() if name not in aside}


def set_weights(network: Any, tensors: hf.Tensors, mindspore: Any) -> None:
    theirs = weights_of(network)
    for name, array in tensors.items():
        theirs[name].set_data(mindspore.Tensor(array))


def difference(case: Case, network: Any, mindspore: Any) -> float:
    """How far the logits of the network are from those that transformers computes."""
    with np.load(MODELS / f"{case.model}.npz") as known:
        tokens, expected = known["tokens"], known["logits"]
    network.set_train(False)
    getattr(network, "model", network).mtp_process = False  # prediction layers make a loss, and no logits
    inputs = {"input_ids": mindspore.Tensor(tokens, mindspore.int32)}
    if VERSION.startswith("1.7") and not case.naming.startswith("legacy"):
        inputs["labels"] = inputs["input_ids"]  # which it looks at, whatever it gives
    given = network(**inputs)
    logits = given[0] if isinstance(given, tuple) else given  # some networks give more
    return float(np.abs(logits.asnumpy().reshape(expected.shape) - expected).max())


def note(case: Case, count: int, largest: float) -> None:
    """Keep a row of the table that the script prints."""
    row = [case.family, case.naming, VERSION, count, largest]
    with (MODELS / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


@pytest.mark.parametrize("case", [case for case in CASES if is_there(case)], ids=str)
def test_network(case: Case, tmp_path: Path, mindspore: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = converted(case, tmp_path)
    with monkeypatch.context() as patch:
        network = build(case, patch.setattr)
        theirs = {name: parameter.shape for name, parameter in weights_of(network).items()}
        assert theirs == {name: array.shape for name, array in ours.items()}
        set_weights(network, ours, mindspore)
        largest = difference(case, network, mindspore)
    note(case, len(ours), largest)
    assert largest < MOST


@pytest.mark.parametrize(
    ("name", "words", "part"),
    [
        ("Qwen3-mcore", {"use_contiguous_weight_layout_attention": True}, "linear_qkv"),
        ("Qwen3-mcore", {"use_interleaved_weight_layout_mlp": False}, "linear_fc1"),
        ("DeepSeek-V3.2-mcore,_concatenated", {"pynative": True}, ".indexer."),
    ],
)
def test_rows_in_another_order_give_other_logits(
    name: str, words: dict[str, Any], part: str, tmp_path: Path, mindspore: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the table shows would be seen, if it were otherwise."""
    case = next(case for case in CASES if str(case) == name)
    if not is_there(case):
        pytest.skip(f"MindFormers {VERSION} has no such network")
    ours = converted(case, tmp_path)
    others = {name: array for name, array in converted(case, tmp_path, **words).items() if part in name}
    assert (
        others
        and {name: array.shape for name, array in others.items()}.items()
        <= {name: array.shape for name, array in ours.items()}.items()
    )
    with monkeypatch.context() as patch:
        network = build(case, patch.setattr)
        set_weights(network, {**ours, **others}, mindspore)
        assert difference(case, network, mindspore) > 10 * MOST


@pytest.mark.skipif(VERSION.startswith("1.7"), reason="loads checkpoints 2.0 in another way")
@pytest.mark.parametrize("engine", ["theirs", "ours"])
@pytest.mark.parametrize(
    ("source", "target", "to_naming"),
    [
        ("Llama-legacy", "Llama-mcore", "mcore"),
        ("Qwen2-legacy,_qkv_concat", "Qwen2-mcore", "mcore"),
        ("Moonlight-mcore,_separate", "Moonlight-mcore,_concatenated", "mcore+mla_qkv_concat"),
        ("Qwen3-mcore,_contiguous,_halves", "Qwen3-PyNative", "mcore"),
    ],
)
def test_load_checkpoint_loads_what_was_renamed(
    source: str,
    target: str,
    to_naming: str,
    engine: str,
    tmp_path: Path,
    mindspore: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MindFormers' own function, by its own code and with ours installed: the weights are those of the conversion from
    Hugging Face, and the network computes the same logits with them.
    """
    old, new = (next(case for case in CASES if str(case) == name) for name in (source, target))
    if not is_there(new):
        pytest.skip(f"MindFormers {VERSION} has no such network")
    folder = tmp_path / "checkpoint2"
    convert(Request(old.as_model, MODELS / old.model, **old.words), tmp_path / "old.safetensors")
    renaming = Request(old.model, tmp_path / "old.safetensors", hf_config=MODELS / old.model, to_naming=to_naming)
    convert(renaming, folder, format="checkpoint2")
    with monkeypatch.context() as patch:
        network = build(new, patch.setattr)
        load(folder, network, engine, patch.setattr)
        loaded = {name: parameter.asnumpy() for name, parameter in weights_of(network).items()}
        expected = converted(new, tmp_path)
        assert loaded.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(loaded[name], array, name)
        assert difference(new, network, mindspore) < MOST


def load(folder: Path, network: Any, engine: str, replace: Any) -> None:
    """Load a checkpoint 2.0 as a training does; with ours, MindFormers' own reader must not be called."""
    from mindformers.checkpoint import checkpoint

    def read(loader: Any) -> None:
        raise AssertionError("MindFormers' own code reads")

    if engine == "ours":
        replace(checkpoint.ReshardLoader, "load", read)
        replacement.install()
    try:
        checkpoint.load_checkpoint(str(folder), network)
    finally:
        replacement.uninstall()
