"""What one rank tells the others of a plan: every rank gets its own share, and takes nothing else for it."""

from __future__ import annotations

import base64
import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded import Tensor, random_model, recorded, slices_of, write_ranks, write_tensors
from test_cluster import Starter, address, close_all, join_all, run_ranks, start  # noqa: F401

from mindformers_ckpt.errors import CheckpointError, PlanError, TransferError
from mindformers_ckpt.formats import Header, read_header
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.job import direct, names
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.cluster.messages import Address
from mindformers_ckpt.job.cluster.rendezvous import RankError
from mindformers_ckpt.job.direct import hand_out_plans, read_direct
from mindformers_ckpt.job.names import names_of_all
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.planning.computations import Cast, Constant, Dequantise
from mindformers_ckpt.planning.model import Place, Plan, SourceFile, TargetFile, Transfer, View
from mindformers_ckpt.planning.rank_plan import decode_rank, encode_ranks
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.strategy.files import read_strategy

# ------------------------------------------------------------------------------------------- handing out


def test_every_rank_is_handed_its_own(address: Address) -> None:  # noqa: F811
    def work(cluster: Any) -> list[Any]:
        values = [{"of": rank} for rank in range(3)] if cluster.rank == 1 else None
        return [cluster.hand_out("own", values), cluster.gather("next", cluster.rank)]

    assert run_ranks(address, 3, work) == [[{"of": rank}, [0, 1, 2]] for rank in range(3)]


def test_one_rank_collects(address: Address) -> None:  # noqa: F811
    def work(cluster: Any) -> list[Any]:
        return [cluster.collect("all", [cluster.rank], here=cluster.rank == 2), cluster.gather("next", cluster.rank)]

    assert run_ranks(address, 3, work) == [[told, [0, 1, 2]] for told in (None, None, [[0], [1], [2]])]
    with Cluster(0, 1, ("here",), 10, None) as alone:
        assert alone.collect("all", (1, 2), here=True) == [[1, 2]]


def test_two_ranks_cannot_collect_at_once(address: Address) -> None:  # noqa: F811
    errors = run_ranks(address, 2, lambda cluster: cluster.collect("all", here=True))
    assert all("a message of an unknown form" in str(error) for error in errors)


def test_more_than_the_ranks_may_be_told_at_once_goes_in_rounds(
    address: Address,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(direct, "_ROUND_BYTES", 1000)
    texts = [letter * 400 for letter in "abcdefg"]
    assert run_ranks(address, 7, lambda cluster: hand_out_plans(cluster, iter(texts))) == texts
    assert run_ranks(address, 2, lambda cluster: hand_out_plans(cluster, None)) == [None, None]


def test_who_plans_and_dies_ends_the_wait_of_the_others(start: Starter) -> None:  # noqa: F811
    body = "__import__('time').sleep(60) if rank == 0 else cluster.hand_out('own')"
    members = [start(rank, 3, body) for rank in range(3)]
    for member in members:
        assert "joined" in member.hear()
    members[0].process.kill()
    for member in members[1:]:
        assert re.match(r"rank 0.* died", member.hear()["text"])


def test_a_failure_of_who_plans_is_told(address: Address) -> None:  # noqa: F811
    def work(cluster: Any) -> Any:
        with cluster.step("load"):
            if cluster.rank == 0:
                raise PlanError("no such checkpoint")
            return cluster.hand_out("own")

    errors = run_ranks(address, 3, work)
    assert [str(error) for error in errors[1:]] == ["rank 0 failed in step 'load': no such checkpoint"] * 2


def test_values_for_other_than_all_ranks_end_the_job(address: Address) -> None:  # noqa: F811
    clusters = join_all(address, 2)
    with pytest.raises(RankError, match="unknown form"):
        clusters[1].hand_out("own", [1])
    with pytest.raises(RankError, match="unknown form"):
        clusters[0].hand_out("own")
    close_all(clusters)


def test_names_of_all_ranks(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(names, "MAX_VALUES", 4 * 40)
    own = [{"a", "b"}, {"a", "b"}, {"c" * 30, "d" * 30, "\udcff"}, set()]
    found = run_ranks(address, 4, lambda cluster: names_of_all(cluster, own[cluster.rank]))
    assert found == [{"a", "b", "c" * 30, "d" * 30, "\udcff"}] * 4


# ------------------------------------------------------------------------------------------- what is told


@pytest.fixture
def source(tmp_path: Path) -> tuple[Checkpoint, dict[str, Tensor]]:
    config = recorded("dp2mp2pp2")
    shapes = {name: item.full_shape for name, item in config.parameters.items() if "accu_grads" not in name}
    model = random_model({**shapes, "global_step": (1,)})
    folder = write_ranks(tmp_path / "source", slices_of(config, model, replicated=("global_step",)))
    return Checkpoint(find_source(folder), read_strategy(config.folder)), model


def texts_of(source: Checkpoint, target: str = "pp4") -> tuple[Plan, list[str]]:
    plan = build_plan(source, read_strategy(recorded(target).folder))
    return plan, list(encode_ranks(plan, source.files.root, source.header))


def test_what_is_told_is_what_the_rank_would_plan(source: tuple[Checkpoint, dict[str, Tensor]], tmp_path: Path) -> None:
    checkpoint, model = source
    plan, texts = texts_of(checkpoint)
    moved = tmp_path / "seen elsewhere"
    moved.symlink_to(checkpoint.files.root)
    wanted = slices_of(recorded("pp4"), model, replicated=("global_step",))
    for rank, text in enumerate(texts):
        own = decode_rank(text, moved)
        assert all(file.path.is_relative_to(moved) for file in own.plan.sources)
        assert len(own.plan.sources) < len(plan.sources)
        assert own.plan.targets == (plan.targets[rank],)
        alone = plan.for_targets([rank])
        assert {part._replace(sources=(), targets=()) for part in own.plan.transfers} == {
            part._replace(sources=(), targets=()) for part in alone.transfers
        }
        assert len(own.plan.transfers) == len(alone.transfers)
        found = {spec.name: content.tobytes() for spec, content in read_direct(own.plan, lambda: None, own.headers)}
        assert found == {name: tensor.bits.tobytes() for name, tensor in wanted[rank].items()}


def test_no_header_is_read_again(source: tuple[Checkpoint, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, _ = source
    own = decode_rank(texts_of(checkpoint)[1][0], checkpoint.files.root)
    monkeypatch.setattr("mindformers_ckpt.formats.tensor_file.scan", None)
    assert len(list(read_direct(own.plan, lambda: None, own.headers))) == len(own.plan.targets[0].tensors)


@pytest.mark.parametrize("when", ["before it is told", "after it was told", "while it is read"])
def test_a_file_that_is_written_meanwhile(source: tuple[Checkpoint, dict[str, Tensor]], when: str) -> None:
    checkpoint, _ = source
    checkpoint.tensors()
    file = checkpoint.files.by_rank[0][0]
    size = file.stat().st_size

    def write(content: bytes) -> None:
        file.write_bytes(content)
        os.utime(file, ns=(1, 1))

    if when == "before it is told":
        write(bytes(size))
        with pytest.raises(TransferError, match="was written after the job looked at it"):
            texts_of(checkpoint)
        return
    own = decode_rank(texts_of(checkpoint)[1][0], checkpoint.files.root)
    if when == "after it was told":
        write(bytes(size + 1))
        with pytest.raises(TransferError, match=f"has {size + 1} bytes, {size} when the work was planned"):
            next(read_direct(own.plan, lambda: None, own.headers))
        return
    with pytest.raises(TransferError, match="were written or replaced while they were read"):
        next(read_direct(own.plan, lambda: write(bytes(size)), own.headers))


def test_views_and_computations_are_told(tmp_path: Path) -> None:
    scale = Tensor(by_name("float32"), random_model({"s": (2, 2)})["s"].bits)
    file = write_tensors(tmp_path / "höhe.safetensors", {"w": random_model({"w": (4, 6)})["w"], "s": scale})
    whole = Box.whole((6, 4))
    view = View((4, 6), Box.whole((4, 6)), (1, 0))
    fp8 = Dequantise(by_name("float32"), 0, "s", (4, 6), (2, 3), by_name("float32"))
    for compute in (None, Cast(by_name("float32")), fp8):
        place = Place(0, whole, "w", view, compute)
        specs = (read_header(file).tensors["w"].spec._replace(name="turned", shape=(6, 4)),)
        transfer = Transfer("turned", specs[0].dtype, (6, 4), (place,), (Place(0, whole, "", view),))
        target = TargetFile("rank_0/checkpoint_0.ckpt", 0, "ckpt", specs)
        plan = Plan((SourceFile(file, file.stat().st_size),), (target,), (transfer,))
        (text,) = encode_ranks(plan, file, read_header)  # the root is a file
        own = decode_rank(text, file)
        assert own.plan == plan
        assert own.headers[0].tensors.keys() == ({"w", "s"} if compute is fp8 else {"w"})


def test_a_constant_is_told_of_no_file(tmp_path: Path) -> None:
    file = write_tensors(tmp_path / "a.ckpt", random_model({"w": (2,)}))
    spec = read_header(file).tensors["w"].spec._replace(name="step_num")
    box = Box.whole(spec.shape)
    content = bytes(range(spec.nbytes))
    place = Place(0, box, compute=Constant(spec.dtype, content))
    transfer = Transfer(spec.name, spec.dtype, spec.shape, (place,), (Place(0, box),))
    target = TargetFile("rank_0/checkpoint_0.ckpt", 0, "ckpt", (spec,))
    plan = Plan((SourceFile(file, file.stat().st_size),), (target,), (transfer,))
    own = decode_rank(next(encode_ranks(plan, tmp_path, read_header)), tmp_path)
    assert own.plan == Plan((), plan.targets, plan.transfers)
    assert [(found, held.tobytes()) for found, held in read_direct(own.plan, lambda: None, own.headers)] == [
        (spec, content)
    ]


def changed(text: str, change: Callable[[dict[str, Any]], None]) -> str:
    body = json.loads(zlib.decompress(base64.b64decode(text)))
    change(body)
    return base64.b64encode(zlib.compress(json.dumps(body).encode())).decode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda body: body.pop("files"), "lacks 'files'"),
        (lambda body: body["files"][0].__setitem__(1, "../../etc/passwd"), "is not one of"),
        (lambda body: body["files"][0].__setitem__(1, "/etc/passwd"), "is not one of"),
        (lambda body: body["files"][0].__setitem__(2, -1), "a number must stand"),
        (lambda body: body["files"][0].__setitem__(3, 10**6), "out of range"),
        (lambda body: body["files"][0].__setitem__(3, -1), "a number must stand"),
        (lambda body: body["held"][0][0].append(1), "in rows of 4"),
        (lambda body: body["held"][0][0].__setitem__(3, 1), "is not where it should be"),
        (lambda body: body["held"][0][0].__setitem__(1, 10**6), "out of range"),
        (lambda body: body["alike"][0][0].__setitem__(0, True), "a number must stand"),
        (lambda body: body["alike"][0][0].__setitem__(0, -1), "a number must stand"),
        (lambda body: body["alike"][0][0].__setitem__(1, 10**6), "out of range"),
        (lambda body: body["alike"][0][0].append(0), "in rows of 2"),
        (lambda body: body["alike"][0].pop(), "must stand"),
        (lambda body: body["names"].__setitem__(0, "a\0"), "a text must stand"),
        (lambda body: body["alike"][0].__setitem__(1, []), "are in no source file"),
        (lambda body: body["alike"][0][1][0].__setitem__(0, 10**6), "lacks 1000000"),
        (lambda body: body["alike"][0][2][0].__setitem__(0, 1), "lacks 1"),
        (lambda body: body["alike"][0][1][0].extend([None] * 9), "a place of"),
        (lambda body: body["kinds"][0].__setitem__(0, "float7"), "float7"),
        (lambda body: body["kinds"][0].__setitem__(1, [1 << 62, 4]), "overflows"),
    ],
)
def test_what_is_told_is_checked(
    source: tuple[Checkpoint, dict[str, Tensor]], change: Callable[[dict[str, Any]], None], words: str
) -> None:
    checkpoint, _ = source
    text = texts_of(checkpoint)[1][0]
    with pytest.raises(PlanError, match=words):
        decode_rank(changed(text, change), checkpoint.files.root)


@pytest.mark.parametrize("text", ["", "garbage", "~~~~", base64.b64encode(zlib.compress(b"{}")[:-3]).decode()])
def test_what_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="another rank told"):
        decode_rank(text, tmp_path)


def test_a_header_knows_when_its_file_was_written(tmp_path: Path) -> None:
    file = write_tensors(tmp_path / "a.ckpt", random_model({"w": (2,)}))
    header = read_header(file)
    assert header.modified == file.stat().st_mtime_ns
    assert header == Header(header.path, header.format, header.size, header.tensors, {}, None, header.frames)
