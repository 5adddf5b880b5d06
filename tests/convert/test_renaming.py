"""From one naming of MindSpore's weights to another, in one pass: what a detour over Hugging Face files gives."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import huggingface as hf
import ml_dtypes
import numpy as np
import pytest
from test_one_pass import random_strategy
from test_round_trips import CASES

from mindformers_ckpt.api.convert import convert as api_convert
from mindformers_ckpt.convert.composing import compose
from mindformers_ckpt.convert.config import LAYOUT_SETTINGS
from mindformers_ckpt.convert.model import find_model
from mindformers_ckpt.convert.planning import Converted, identity
from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert, plan_conversion
from mindformers_ckpt.errors import CheckpointError, ConfigError, PlanError
from mindformers_ckpt.execution.options import Options
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.look.fingerprint import fingerprint
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.planning.model import Place, Plan, Transfer, View
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.transform import transform

COUNTERS = {"global_step": np.array(7, np.int32), "loss_scale": np.array(64, np.float32)}
KINDS = ("adam_m.", "adam_v.")
# Three queries a group: the groups do not end where those of a tensor with all queries, keys and values would.
UNEVEN = {"num_attention_heads": 6, "head_dim": 2}
UNEVEN_SHAPES = {
    name: (12, 8) if "q_proj" in name else (4, 8) if "k_proj" in name or "v_proj" in name else shape
    for name, shape in hf.llama_shapes().items()
} | {f"model.layers.{n}.self_attn.o_proj.weight": (8, 12) for n in range(2)}
FAMILIES = {
    **CASES,
    "llama uneven": ("llama", hf.random_tensors(UNEVEN_SHAPES), hf.decoder_config(**UNEVEN)),
}
# Every layout of these becomes every other one; the slow test takes several minutes.
RENAMED = [
    *("llama", "llama tied bf16", "llama uneven", "qwen2", "qwen2_5_vl", "mistral", "deepseek"),
    *("deepseek without prediction layers", "mixtral", "qwen2_moe", "glm native", "chatglm", "qwen3_moe", "glm4_moe"),
    *("telechat3", "telechat3_moe", "deepseek_v32"),
]
_CONTIGUOUS = "mcore+use_contiguous_weight_layout_attention"
SOME = [
    ("llama", "legacy", "mcore"),
    ("llama", "mcore", "legacy"),
    ("llama uneven", "legacy+qkv_concat", _CONTIGUOUS),
    ("llama uneven", _CONTIGUOUS, "mcore"),
    ("qwen2", "legacy+qkv_concat", "mcore+no_use_interleaved_weight_layout_mlp"),
    ("deepseek", "legacy", "mcore"),
    ("deepseek", "mcore+mla_qkv_concat", "legacy"),
    ("deepseek", "mcore", "mcore+pynative"),
    ("mixtral", "legacy", "legacy+use_gmm_training"),
    ("glm native", "legacy+use_rearrange_rope", "legacy+no_qkv_concat"),
]


def layouts_of(name: str) -> list[str]:
    """The namings of a model, each also with every setting of the network that it has."""
    model = find_model(name)
    assert model is not None
    settings = [option for option in model.options if option in LAYOUT_SETTINGS]
    words = ["", *(f"+{'no_' if LAYOUT_SETTINGS[option] else ''}{option}" for option in settings)]
    return [naming + word for naming in model.namings for word in words]


def options_of(layout: str) -> dict[str, Any]:
    """The options of a conversion from Hugging Face to a layout."""
    naming, *settings = layout.split("+")
    return {"naming": naming, **{word.removeprefix("no_"): not word.startswith("no_") for word in settings}}


def in_full(layout: str) -> str:
    """A layout with the settings that must be said where neither names nor files tell them."""
    if not layout.startswith("legacy+qkv_concat"):
        return layout
    for option, word in (
        ("use_contiguous_weight_layout_attention", "no_use_contiguous_weight_layout_attention"),
        ("use_interleaved_weight_layout_mlp", "use_interleaved_weight_layout_mlp"),
    ):
        layout += "" if option in layout else f"+{word}"
    return layout


class Family:
    """A model: what a training leaves of it in each of its layouts, made over Hugging Face files."""

    def __init__(self, case: str, folder: Path) -> None:
        self.name, tensors, config = FAMILIES[case]
        self.folder = folder
        self.source = hf.write_folder(folder / "source", tensors, config)
        # States are converted as if they were weights, with numbers of their own.
        self._kinds = {"": self.source}
        for kind in KINDS:
            own = {key: hf.random_tensor(kind + key, array.shape) for key, array in tensors.items()}
            for copy, of in (("embed_tokens", "model.embed_tokens.weight"), ("shared_head.head", "lm_head.weight")):
                own |= {key: own[of] for key in own if key.endswith(f".2.{copy}.weight")}
            self._kinds[kind] = hf.write_folder(folder / f"source {kind}", own, config)
        self._known: dict[str, dict[str, Any]] = {}

    def tensors(self, layout: str) -> dict[str, Any]:
        """Weights, states and counters under the names of a layout. Raises ConfigError for one that cannot be."""
        if layout not in self._known:
            found: dict[str, Any] = {}
            for kind, source in self._kinds.items():
                path = self.folder / f"{layout}{kind}.safetensors"
                convert(Request(self.name, source, **options_of(layout)), path)
                found |= {kind + name: array for name, array in hf.read_file(path).items()}
            self._known[layout] = {**found, **COUNTERS}
        return self._known[layout]

    def write(self, layout: str, folder: Path) -> Path:
        """A file that says nothing of its layout."""
        path = folder / f"trained {layout}.safetensors"
        hf.write_safetensors(path, self.tensors(layout))
        return path

    def request(self, path: Path, old: str | None, new: str, **more: Any) -> Request:
        return Request(self.name, path, hf_config=self.source, from_naming=old, to_naming=new, **more)


@pytest.mark.parametrize(("case", "old", "new"), SOME)
def test_new_names_are_those_of_a_detour(case: str, old: str, new: str, tmp_path: Path) -> None:
    family = Family(case, tmp_path)
    source = family.write(old, tmp_path)
    report = convert(family.request(source, in_full(old), new), tmp_path / "new.safetensors")
    hf.assert_equal(hf.read_file(tmp_path / "new.safetensors"), family.tensors(new))
    assert report.naming == new
    assert not report.warnings


@pytest.mark.slow
@pytest.mark.parametrize("case", RENAMED)
def test_every_layout_becomes_every_other_one(case: str, tmp_path: Path) -> None:
    family = Family(case, tmp_path)
    layouts = []
    for layout in layouts_of(family.name):
        try:
            family.tensors(layout)
            layouts.append(layout)
        except ConfigError:
            continue  # settings that do not go together
    for number, (old, new) in enumerate(itertools.permutations(layouts, 2)):
        target = tmp_path / f"{number}.safetensors"
        convert(family.request(family.write(old, tmp_path), in_full(old), new), target)
        hf.assert_equal(hf.read_file(target), family.tensors(new))


def cut(path: Path, strategy: Strategy, folder: Path) -> Path:
    """Complete weights as the files of ranks."""
    transform(build_plan(Checkpoint(find_source(path), Strategy.complete()), strategy), folder)
    return folder


def ranks(folder: Path) -> dict[str, dict[str, Any]]:
    return {str(path.relative_to(folder)): hf.read_file(path) for path in sorted(folder.glob("rank_*/*"))}


@pytest.mark.parametrize(
    ("case", "old", "new", "stages", "seeds"),
    [
        ("llama", "legacy", "mcore", 1, "ab"),
        ("llama uneven", "mcore", "legacy", 2, "ab"),
        ("deepseek", "legacy", "mcore", 2, "c"),
        ("deepseek", "mcore", "legacy", 1, "d"),
    ],
)
def test_from_ranks_to_other_ranks(case: str, old: str, new: str, stages: int, seeds: str, tmp_path: Path) -> None:
    """States are cut in ways of their own, rows within groups of heads, and some by an optimizer shard."""
    family = Family(case, tmp_path)
    before, after = family.write(old, tmp_path), family.write(new, tmp_path)
    for seed in seeds:
        source, target = random_strategy(before, stages, seed), random_strategy(after, 3 - stages, seed)
        cut(before, source, tmp_path / f"source {seed}")
        request = family.request(tmp_path / f"source {seed}", old, new, src_strategy=source)
        convert(request, tmp_path / f"one {seed}", format="ckpt", target=target)
        expected = ranks(cut(after, target, tmp_path / f"two {seed}"))
        found = ranks(tmp_path / f"one {seed}")
        assert found.keys() == expected.keys()
        for file, tensors in expected.items():
            hf.assert_equal(found[file], tensors)


def rows(names: dict[str, Any], count: int) -> Strategy:
    """A strategy that names weights alone, and cuts those whose rows divide."""
    weights = {name: array for name, array in names.items() if not name.startswith(KINDS) and array.ndim}
    layouts = {
        name: Layout((count,), ((0,) if array.shape[0] % count == 0 else (), *((),) * (array.ndim - 1)))
        for name, array in weights.items()
    }
    return Strategy((layouts,), count, "a test")


def test_a_checkpoint_2_and_back(tmp_path: Path) -> None:
    """From rank files to MindFormers' own format under mcore names, and from there to rank files again."""
    family = Family("llama", tmp_path)
    old, new = family.tensors("legacy"), family.tensors("mcore")
    two, four = rows(old, 2), rows(new, 4)
    source = cut(family.write("legacy", tmp_path), two, tmp_path / "ranks")
    made = tmp_path / "checkpoint_2"
    convert(family.request(source, None, "mcore", src_strategy=two), made, format="checkpoint2", target=four)
    assert (made / "iteration_00000007" / "metadata.json").is_file()
    whole = {name: tensor.spec.shape for name, tensor in opened(made).tensors().items() if name not in COUNTERS}
    assert whole == {name: array.shape for name, array in new.items() if name not in COUNTERS}
    convert(family.request(made, None, "legacy"), tmp_path / "back", format="safetensors", target=two)
    found, expected = ranks(tmp_path / "back"), ranks(source)
    for file, tensors in found.items():
        # The file of text has a counter more, and its numbers as MindFormers 1.x writes them.
        left = {name: array for name, array in tensors.items() if name not in ("loss_scale", "epoch_num", "step_num")}
        name = file.replace("safetensors", "ckpt") if file not in expected else file
        hf.assert_equal(left, {key: array for key, array in expected[name].items() if key != "loss_scale"})
        assert tensors["loss_scale"] == 64


def in_stages(names: dict[str, Any], shared: str) -> tuple[Strategy, list[dict[str, Any]]]:
    """Two stages of a rank each, and what they hold: a layer each, and both an embedding that the first one names."""
    second = [name for name in names if "layers.1." in name or "final_layernorm" in name or "norm_out" in name]
    held = [{name: names[name] for name in names if name not in second}, {name: names[name] for name in second}]
    layouts = [{name: Layout((1,), ((),) * array.ndim) for name, array in stage.items()} for stage in held]
    return Strategy(tuple(layouts), 1, "a test"), [held[0], {**held[1], shared: names[shared]}]


def test_a_tied_embedding_goes_to_both_ends_of_a_pipeline(tmp_path: Path) -> None:
    family = Family("llama tied bf16", tmp_path)
    found = {layout: family.tensors(layout) for layout in ("legacy", "mcore")}
    plain = {layout: {name: array for name, array in found[layout].items() if array.ndim} for layout in found}
    source, held = in_stages(plain["legacy"], "model.tok_embeddings.embedding_weight")
    target, expected = in_stages(plain["mcore"], "embedding.word_embeddings.weight")
    for rank, tensors in enumerate(held):
        (tmp_path / f"ranks/rank_{rank}").mkdir(parents=True)
        hf.write_safetensors(tmp_path / f"ranks/rank_{rank}/a.safetensors", tensors)
    request = family.request(tmp_path / "ranks", None, "mcore", src_strategy=source)
    convert(request, tmp_path / "new", target=target)
    for rank, tensors in enumerate(expected):
        hf.assert_equal(hf.read_file(tmp_path / f"new/rank_{rank}/checkpoint_{rank}.safetensors"), tensors)


def opened(path: Path) -> Checkpoint:
    source = find_source(path)
    return Checkpoint(source, source.strategy(Strategy.complete()))


def planned(family: Family, source: Path, new: str, **more: Any) -> Plan:
    return plan_conversion(family.request(source, None, new, **more), source.parent / "new.safetensors")


def test_the_names_of_a_strategy_tell_settings(tmp_path: Path) -> None:
    family = Family("deepseek", tmp_path)
    target = rows(family.tensors("mcore+mla_qkv_concat"), 2)
    report = convert(family.request(family.write("legacy", tmp_path), None, "mcore"), tmp_path / "new", target=target)
    assert report.naming == "mcore+mla_qkv_concat"


def test_weights_only(tmp_path: Path) -> None:
    family = Family("llama", tmp_path)
    plan = planned(family, family.write("legacy", tmp_path), "mcore", weights_only=True)
    weights = {name for name in family.tensors("mcore") if not name.startswith(KINDS)} - COUNTERS.keys()
    assert {spec.name for spec in plan.targets[0].tensors} == weights
    assert not plan.warnings


def test_pieces_that_follow_each_other_are_one_place(tmp_path: Path) -> None:
    """Experts that are stacked on both sides, rows that keep their order; plain tensors stay plain."""
    family = Family("deepseek", tmp_path)
    plan = planned(family, family.write("legacy", tmp_path), "mcore+mla_qkv_concat")
    places = {transfer.name: transfer.sources for transfer in plan.transfers}
    experts = places["adam_m.decoder.layers.1.mlp.experts.weight1"]
    assert [place.tensor for place in experts] == ["adam_m.model.layers.1.feed_forward.routed_experts.ffn.w1"]
    # Rotary rows alone, two pairs of halves, change their order.
    rows = places["decoder.layers.0.self_attention.linear_qkv.weight"]
    names = [place.tensor.rpartition(".attention.")[2] for place in rows]
    assert names == ["q2l_proj.weight", "kv2l_latent_kv.weight", "kv2l_k_pe.weight", "kv2l_k_pe.weight"]
    (norm,) = places["decoder.final_layernorm.weight"]
    assert norm.view is None


def test_states_that_cannot_be_rearranged_are_named(tmp_path: Path) -> None:
    """Of one part of a fused tensor alone, and of other shapes than their weights'; those of plain tensors are kept."""
    family = Family("llama", tmp_path)
    tensors = dict(family.tensors("legacy"))
    del tensors["adam_m.model.layers.0.attention.wv.weight"]
    tensors["exp_avg_sq_row_model.layers.0.attention.wo.weight"] = np.arange(8, dtype=np.float32)
    tensors["exp_avg_sq_row_model.layers.0.feed_forward.w1.weight"] = np.arange(6, dtype=np.float32)
    hf.write_safetensors(tmp_path / "trained.safetensors", tensors)
    report = convert(family.request(tmp_path / "trained.safetensors", None, "mcore"), tmp_path / "new.safetensors")
    (told,) = report.warnings
    assert told == (
        "left aside, as no states under mcore names can be made of them: "
        "adam_m.model.layers.0.attention.wk.weight, adam_m.model.layers.0.attention.wq.weight, "
        "exp_avg_sq_row_model.layers.0.feed_forward.w1.weight"
    )
    found = hf.read_file(tmp_path / "new.safetensors")
    assert "adam_m.decoder.layers.0.self_attention.linear_qkv.weight" not in found
    assert "adam_v.decoder.layers.0.self_attention.linear_qkv.weight" in found
    kept = found["exp_avg_sq_row_decoder.layers.0.self_attention.linear_proj.weight"]
    assert kept.tolist() == list(range(8))


def test_buffers_are_left_aside_and_types_of_weights_change(tmp_path: Path) -> None:
    family = Family("llama", tmp_path)
    seed = {"model.layers.0.attention.hidden_states_dropout.seed": np.zeros(2, np.int32)}
    hf.write_safetensors(tmp_path / "trained.safetensors", {**family.tensors("legacy"), **seed})
    request = family.request(tmp_path / "trained.safetensors", "legacy", "mcore", dtype="bf16")
    report = convert(request, tmp_path / "new.safetensors")
    (told,) = report.warnings
    assert told == "left aside, as they are not weights of the model: 1 buffers (seed)"
    expected = {
        name: array if name.startswith(KINDS) or name in COUNTERS else array.astype(ml_dtypes.bfloat16)
        for name, array in family.tensors("mcore").items()
    }
    hf.assert_equal(hf.read_file(tmp_path / "new.safetensors"), expected)


def refusal(family: Family, source: Path, old: str | None, new: str, **more: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert(family.request(source, old, new, **more), source.parent / "new.safetensors")
    assert not (source.parent / "new.safetensors").exists()
    return str(caught.value)


def test_wrong_namings_are_refused(tmp_path: Path) -> None:
    family = Family("llama", tmp_path)
    source = family.write("legacy", tmp_path)
    for old in (None, "legacy"):
        assert "has legacy names already; for another strategy" in refusal(family, source, old, "legacy")
    assert refusal(family, source, "mcore", "legacy").endswith(
        "are legacy, not mcore; leave --from out to have them told by the names"
    )
    assert refusal(family, source, None, "megatron") == (
        "llama has no megatron names; it has legacy, mcore, legacy+qkv_concat"
    )
    assert refusal(family, source, None, "mcore+mla_qkv_concat").startswith(
        "--to mcore+mla_qkv_concat: 'mla_qkv_concat' is not a setting of the model llama with mcore names; there are "
    )
    assert "--from legacy+use_gmm: 'use_gmm' is not a setting" in refusal(family, source, "legacy+use_gmm", "mcore")
    assert "--to is empty; is a variable not set?" in refusal(family, source, None, "")
    fused = family.write("legacy+qkv_concat", tmp_path)
    assert "give --from legacy+qkv_concat+no_use_contiguous_weight_layout_attention+" in refusal(
        family, fused, None, "mcore"
    )


def test_a_model_with_one_naming_is_refused(tmp_path: Path) -> None:
    family = Family("qwen3_moe", tmp_path)
    assert (
        refusal(family, family.write("mcore", tmp_path), None, "legacy")
        == "qwen3_moe has no legacy names; it has mcore"
    )


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    family = Family("llama", tmp_path)
    assert "is a Hugging Face model" in refusal(family, family.source, None, "mcore")
    hf.write_safetensors(tmp_path / "hf.safetensors", hf.random_tensors(hf.llama_shapes()))
    told = refusal(family, tmp_path / "hf.safetensors", None, "mcore")
    assert told.endswith("holds Hugging Face weights, by the names of its tensors; give --naming in place of --to")
    cut(family.write("legacy", tmp_path), rows(family.tensors("legacy"), 2), tmp_path / "ranks")
    assert "no source strategy is given" in refusal(family, tmp_path / "ranks", None, "mcore")
    adapter = {"model.layers.0.attention.wq.tk_delta_lora_a": np.zeros((2, 8), np.float32)}
    adapter["model.layers.0.attention.wq.tk_delta_lora_b"] = np.zeros((16, 2), np.float32)
    hf.write_safetensors(tmp_path / "lora.safetensors", {**family.tensors("legacy"), **adapter})
    told = refusal(family, tmp_path / "lora.safetensors", None, "mcore")
    assert "adapters are merged before (mindformers-ckpt merge-lora)" in told
    assert "model.layers.0.attention.wq.tk_delta_lora_a" in told


def test_what_had_to_be_computed_is_refused(tmp_path: Path) -> None:
    family = Family("llama", tmp_path)
    name, config = "model.layers.0.feed_forward.w2.weight", family.source / "config.json"
    quantised = {**FAMILIES["llama"][2], "quantization_config": {"weight_block_size": [4, 4]}}  # type: ignore[dict-item]
    config.write_text(json.dumps(quantised), encoding="utf-8")
    tensors = {**family.tensors("legacy"), name: np.zeros((8, 6), ml_dtypes.float8_e4m3fn)}
    tensors[f"{name}_scale_inv"] = np.ones((2, 2), np.float32)
    hf.write_safetensors(tmp_path / "fp8.safetensors", tensors)
    told = refusal(family, tmp_path / "fp8.safetensors", None, "mcore")
    assert "holds FP8 weights, whose elements would have to be computed" in told
    assert "model.layers.0.mlp.down_proj.weight" in told


def test_views_without_common_axes_cannot_be_composed() -> None:
    """Rows of 6 in steps of 2 that are in steps of 3 in the middle."""

    def turned(tensor: str, shape: tuple[int, int]) -> Converted:
        whole, view = Box.whole(shape), View(shape[::-1], Box.whole(shape[::-1]), (1, 0))
        spec = TensorSpec("w", by_name("float32"), (6,))
        return Converted(spec, Transfer("w", spec.dtype, shape, (Place(0, whole, tensor, view),), ()), (2,))

    assert compose(turned("w", (3, 2)), {"w": turned("s", (2, 3))}, {"s": (6,)}).transfer.sources[0].view is None
    with pytest.raises(ValueError, match="in steps of 3 on one side and 2 on the other"):
        compose(turned("w", (3, 2)), {"w": turned("s", (3, 2))}, {"s": (6,)})
    empty = identity(TensorSpec("w", by_name("float32"), (0, 4)), "w")
    with pytest.raises(ValueError, match="w has no elements"):
        compose(empty, {"w": empty}, {"w": (0, 4)})


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"reverse": True}, "--reversed goes to Hugging Face, --to to other names"),
        ({"naming": "mcore", "mlp_concat": False}, "--naming, --mlp_concat cannot be given with --to: say it there"),
        ({"num_layers": 1}, "--num_layers cannot be given with --to"),
        ({"to_naming": None, "weights_only": True}, "--from, --weights_only cannot be given without --to"),
    ],
)
def test_options_that_do_not_go_together(more: dict[str, Any], told: str, tmp_path: Path) -> None:
    words: dict[str, Any] = {"to_naming": "mcore", "from_naming": "legacy", **more}
    with pytest.raises(ConfigError, match=told):
        convert(Request("llama", tmp_path, **words), tmp_path / "new")


def test_the_call(tmp_path: Path) -> None:
    family = Family("llama", tmp_path)
    strategy = rows(family.tensors("legacy"), 2)
    source = cut(family.write("legacy", tmp_path), strategy, tmp_path / "ranks")
    words: dict[str, Any] = {"model": "llama", "hf_config": family.source, "src_strategy": strategy}
    report = api_convert(source, tmp_path / "new.safetensors", to_naming="mcore", from_naming="legacy", **words)
    assert report.naming == "mcore"
    hf.assert_equal(hf.read_file(tmp_path / "new.safetensors"), family.tensors("mcore"))


def test_the_source_has_the_fingerprint_that_it_has_alone(tmp_path: Path) -> None:
    """States, too, of one file and of the files of two ranks."""
    family = Family("llama", tmp_path)
    whole = family.write("legacy", tmp_path)
    options = Options(fingerprints=True)
    report = convert(family.request(whole, "legacy", "mcore"), tmp_path / "new", options=options)
    assert report.source_fingerprint == fingerprint(whole).digest
    strategy = rows(family.tensors("legacy"), 2)
    request = family.request(cut(whole, strategy, tmp_path / "ranks"), "legacy", "mcore", src_strategy=strategy)
    again = convert(request, tmp_path / "from ranks", options=options)
    assert (again.source_fingerprint, again.fingerprints) == (report.source_fingerprint, report.fingerprints)
    told = json.loads((tmp_path / "from ranks/manifest.json").read_bytes())["source_fingerprint"]
    assert not told["not_counted"]


def test_lost_shards_are_named(tmp_path: Path) -> None:
    family = Family("llama", tmp_path)
    strategy = rows(family.tensors("legacy"), 2)
    source = cut(family.write("legacy", tmp_path), strategy, tmp_path / "ranks")
    (path,) = (source / "rank_1").iterdir()
    path.unlink()
    (source / "rank_1").rmdir()
    with pytest.raises(PlanError, match="none of whose files is there"):
        convert(family.request(source, None, "mcore", src_strategy=strategy), tmp_path / "new")
