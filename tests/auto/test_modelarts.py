"""Jobs on nodes with separate disks, whose strategies and weights go through an S3 server over HTTP."""

# ruff: noqa: F811 (fixtures of rank_jobs)
from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
from rank_jobs import Source, assert_loaded, expected, old_results, results, run, source  # noqa: F401
from recorded import read_ranks, recorded, slices_of, write_ranks, write_tensors
from s3_server import BUCKET, Fault, FlakyProxy, environment, s3_server

from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.job.hyperparameters import from_command_line
from mindformers_ckpt.job.modelarts import check_nodes, nodes_by_number
from mindformers_ckpt.job.object_store import S3Store
from mindformers_ckpt.job.remote_reslice import makers_of
from mindformers_ckpt.objects.client import forget_clients
from mindformers_ckpt.objects.listing import look_again
from mindformers_ckpt.objects.path import ObjectPath
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.publish.manifest import read_manifests
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.strategy.files import read_strategy
from mindformers_ckpt.transform import transform

TWO_NODES = ("alpha", "alpha", "beta", "beta")
TARGET = rank_jobs.TARGET
RUN = re.compile(r"auto_trans/(\d{8}-\d{6}-[0-9a-f]{8})/")


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture(scope="module")
def proxies(server: int) -> Iterator[FlakyProxy]:
    proxy = FlakyProxy(server)
    yield proxy
    proxy.close()


@pytest.fixture
def proxy(proxies: FlakyProxy, monkeypatch: pytest.MonkeyPatch) -> FlakyProxy:
    """The proxy without faults; clients started from here on go through it."""
    proxies.faults.clear()
    proxies.requests.clear()
    for name, value in environment(proxies.port).items():
        monkeypatch.setenv(name, value)
    return proxies


@pytest.fixture
def url(request: pytest.FixtureRequest, proxy: FlakyProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """The remote_save_url of one test."""
    monkeypatch.setattr(rank_jobs, "PROGRAM", Path(__file__).with_name("remote_rank.py"))
    return f"s3://{BUCKET}/{re.sub('[^a-z_0-9]', '-', request.node.name)}"


@pytest.fixture
def folders(tmp_path: Path, source: Source) -> dict[str, Path]:
    """The disks of two nodes, each with results of an earlier job, and a copy of the source."""
    disks = {"alpha": tmp_path / "a", "beta": tmp_path / "b"}
    for disk in disks.values():
        old_results(disk / "output")
        shutil.copytree(source.folder, disk / "llama")
    return disks


def keys(source: Source, url: str, **others: Any) -> dict[str, Any]:
    own = {"load_checkpoint": "llama", "output_dir": "output", "remote_save_url": url, "npu_num_per_node": "2"}
    return {**source.keys, **own, **others}


def objects(url: str) -> dict[str, bytes]:
    """What is below a URL: key without the run's name -> content."""
    return {RUN.sub("", key): path_of(url, key).read_bytes() for key in S3Store(url).list("")}


def path_of(url: str, key: str) -> ObjectPath:
    """An object as it is now, asked for through the proxy of this test."""
    forget_clients()
    look_again()
    return ObjectPath(url) / key


def local_files(source: Source, folder: Path) -> dict[str, bytes]:
    """What the transform on one machine makes: path below the checkpoint's folder -> content."""
    checkpoint = Checkpoint(find_source(source.folder), read_strategy(source.strategy))
    transform(build_plan(checkpoint, recorded(TARGET).strategy), folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.ckpt")}


def transformed(output: Path) -> dict[str, bytes]:
    root = output / "transformed_checkpoint" / "llama"
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.ckpt")}


def assert_failed(outcomes: Sequence[rank_jobs.Outcome], pattern: str, but: Sequence[int] = ()) -> None:
    for rank, outcome in enumerate(outcomes):
        if rank not in but:
            assert outcome.code == 1, outcome.log
            assert re.search(pattern, outcome.error), outcome.error


def assert_untouched(folders: Mapping[str, Path]) -> None:
    for disk in folders.values():
        found = results(disk / "output")
        assert len(found) == 2
        assert all(content == f"old {name}".encode() for name, content in found.items())
        assert not list((disk / "output").glob(".transformed_checkpoint.staging*"))


# ------------------------------------------------------------------------------------------ whole jobs


def test_two_nodes(
    run: Any,
    source: Source,
    url: str,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    outcomes = run(keys(source, url), nodes=TWO_NODES, folders=folders).outcomes()
    assert_loaded(outcomes, expected(TARGET, source.tensors))

    wanted = local_files(source, tmp_path / "local")
    assert len(wanted) == 4
    own = {"alpha": (0, 1), "beta": (2, 3)}
    for name, ranks in own.items():
        output = folders[name] / "output"
        paths = [f"rank_{rank}/checkpoint_{rank}.ckpt" for rank in ranks]
        assert transformed(output) == {path: wanted[path] for path in paths}
        manifest = read_manifests(output / "transformed_checkpoint").get("manifest.json")
        assert manifest is not None
        assert [file["path"] for file in manifest["files"]] == [f"llama/{path}" for path in paths]
        strategies = {path.name for path in (output / "strategy").iterdir()}
        written = range(4) if name == "alpha" else ranks
        assert strategies == {f"ckpt_strategy_rank_{rank}.ckpt" for rank in written} | {"merged_ckpt_strategy.ckpt"}
        assert {path.name for path in output.glob("[!.]*")} == {"strategy", "transformed_checkpoint"}
        assert not list(output.glob(".transformed_checkpoint.staging*"))

    sent = objects(url)
    for path, content in wanted.items():
        assert sent[f"transformed_checkpoint/llama/{path}"] == content
    files = json.loads(sent["manifest.json"])["files"]
    assert {file["path"]: file["bytes"] for file in files} == {
        f"llama/{path}": len(content) for path, content in wanted.items()
    }
    merged = (folders["alpha"] / "output" / "strategy" / "merged_ckpt_strategy.ckpt").read_bytes()
    assert sent["strategy/whole/merged_ckpt_strategy.ckpt"] == merged


def test_no_pipeline_and_complete_weights(
    run: Any,
    source: Source,
    url: str,
    folders: dict[str, Path],
) -> None:
    config = recorded("mp4_infer")
    tensors = rank_jobs.model_of(config)
    for disk in folders.values():
        write_tensors(disk / "whole.safetensors", tensors)
    wanted = {"load_checkpoint": "whole.safetensors", "src_strategy_path_or_dir": "", "run_mode": "predict"}
    about = {"live": "mp4_infer", "names": list(tensors)}
    outcomes = run(keys(source, url, **wanted), nodes=TWO_NODES, folders=folders, **about).outcomes()
    assert_loaded(outcomes, expected("mp4_infer", tensors))
    assert "strategy/whole/ckpt_strategy_rank_0.ckpt" in objects(url)


def test_equal_strategies_leave_nothing_in_the_storage(
    run: Any,
    source: Source,
    url: str,
    folders: dict[str, Path],
) -> None:
    config = recorded(TARGET)
    tensors = rank_jobs.model_of(config)
    parts = slices_of(config, tensors, replicated=("global_step",))
    for disk in folders.values():
        write_ranks(disk / "same", parts)
    wanted = {"load_checkpoint": "same", "src_strategy_path_or_dir": config.folder}
    outcomes = run(keys(source, url, **wanted), nodes=TWO_NODES, folders=folders).outcomes()
    assert_loaded(outcomes, expected(TARGET, tensors))
    assert objects(url) == {}
    assert not (folders["beta"] / "output" / "transformed_checkpoint").exists()


def test_only_save_strategy(run: Any, source: Source, url: str, folders: dict[str, Path]) -> None:
    outcomes = run(keys(source, url, only_save_strategy=True), nodes=TWO_NODES, folders=folders).outcomes()
    assert [outcome.code for outcome in outcomes] == [0] * 4
    sent = objects(url)
    assert {name for name in sent if "rank_" in name} == {f"strategy/ckpt_strategy_rank_{n}.ckpt" for n in range(4)}
    assert read_strategy(folders["beta"] / "output" / "strategy" / "merged_ckpt_strategy.ckpt").rank_count == 4


def test_direct_way_sends_strategies_only(run: Any, source: Source, url: str, folders: dict[str, Path]) -> None:
    outcomes = run(keys(source, url, auto_trans_save=False), nodes=TWO_NODES, folders=folders).outcomes()
    assert_loaded(outcomes, expected(TARGET, source.tensors))
    assert {name.partition("/")[0] for name in objects(url)} <= {"nodes", "strategy"}


def test_shared_disk_needs_no_storage(run: Any, source: Source, url: str, tmp_path: Path, proxy: FlakyProxy) -> None:
    output = tmp_path / "output"
    wanted = keys(source, url, load_checkpoint=source.folder, output_dir=output, npu_num_per_node=8)
    outcomes = run(wanted, nodes=TWO_NODES).outcomes()
    assert_loaded(outcomes, expected(TARGET, source.tensors))
    assert len(read_ranks(output / "transformed_checkpoint" / "llama")) == 4
    assert proxy.requests == []


def test_source_in_the_storage(run: Any, source: Source, url: str, tmp_path: Path) -> None:
    store = S3Store(url)
    for root, name in ((source.folder, "llama"), (source.strategy, "strategy")):
        for path in root.rglob("*.ckpt"):
            store.put(path, f"in/{name}/{path.relative_to(root)}", lambda: None)
    output = tmp_path / "output"
    (output / "fetched" / "load_checkpoint" / "llama" / "rank_99").mkdir(parents=True)  # of an earlier job
    places = {"load_checkpoint": f"{url}/in/llama", "src_strategy_path_or_dir": f"{url}/in/strategy/"}
    outcomes = run({"auto_trans_ckpt": True, **places, "output_dir": output}).outcomes()
    assert_loaded(outcomes, expected(TARGET, source.tensors))
    assert not (output / "fetched" / "load_checkpoint" / "llama" / "rank_99").exists()


# ------------------------------------------------------------------------------------------ what goes wrong


def test_passing_faults_are_got_over(
    run: Any, source: Source, url: str, folders: dict[str, Path], proxy: FlakyProxy
) -> None:
    """A node without the source fetches its weights over a bad connection; nothing is read before the manifest."""
    shutil.rmtree(folders["beta"] / "llama")
    proxy.faults += [
        Fault("500", "PUT", "/nodes/"),
        Fault("500", "PUT", "ckpt_strategy_rank_3"),
        Fault("refuse", "PUT", "checkpoint_0.ckpt"),
        Fault("503", "GET", "merged_ckpt_strategy"),
        Fault("corrupt", "GET", "checkpoint_2.ckpt"),
        Fault("cut", "GET", "checkpoint_3.ckpt", times=2),
    ]
    outcomes = run(keys(source, url), nodes=TWO_NODES, folders=folders).outcomes()
    assert_loaded(outcomes, expected(TARGET, source.tensors))
    assert [fault.times for fault in proxy.faults] == [0] * 6
    assert "node_1 has no llama: the weights of its ranks come from the other nodes" in outcomes[2].log
    assert "checkpoint_2.ckpt did not arrive as it was sent: other contents; attempt 2 of 6 follows" in outcomes[2].log
    assert {Path(path).parent.name for path in transformed(folders["alpha"] / "output")} == {"rank_0", "rank_1"}

    requests = [request.split("?")[0] for request in proxy.requests]
    puts = [n for n, text in enumerate(requests) if re.match("PUT .*/transformed_checkpoint/", text)]
    gets = [n for n, text in enumerate(requests) if re.match("GET .*/transformed_checkpoint/.*ckpt$", text)]
    (published,) = (n for n, text in enumerate(requests) if re.search(r"^PUT .*\d-[0-9a-f]{8}/manifest.json$", text))
    assert {requests[n][-17:] for n in gets} == {"checkpoint_2.ckpt", "checkpoint_3.ckpt"}
    assert max(puts) < published < min(gets)


def test_lasting_fault(run: Any, source: Source, url: str, folders: dict[str, Path], proxy: FlakyProxy) -> None:
    proxy.faults.append(Fault("500", "PUT", "checkpoint_3.ckpt", times=99))
    outcomes = run(keys(source, url), nodes=TWO_NODES, folders=folders).outcomes()
    assert_failed(outcomes, r"sending \S*checkpoint_3.ckpt to s3://\S*checkpoint_3.ckpt.*given up after 6 attempts")
    assert all("rank 2 failed in step 'load'" in outcomes[rank].error for rank in (0, 1, 3))
    assert_untouched(folders)
    assert "manifest.json" not in objects(url)


def test_killed_node(run: Any, source: Source, url: str, folders: dict[str, Path]) -> None:
    shutil.rmtree(folders["beta"] / "llama")
    outcomes = run(keys(source, url), nodes=TWO_NODES, folders=folders, faults={2: "killed while fetching"}).outcomes()
    assert_failed(outcomes, r"rank 2\b.* died", but=(2,))
    again = run(keys(source, url), nodes=TWO_NODES, folders=folders).outcomes()
    assert_loaded(again, expected(TARGET, source.tensors))


def test_node_that_never_sends(run: Any, source: Source, url: str, folders: dict[str, Path]) -> None:
    wanted = keys(source, url, transform_timeout=12)
    outcomes = run(wanted, nodes=TWO_NODES, folders=folders, faults={2: "sends no strategy"}).outcomes()
    pattern = r"step 'strategy files sent': rank 2 has not arrived within 12 s \(on beta"
    assert_failed(outcomes, pattern)
    assert_untouched(folders)


def test_other_source_on_a_node(run: Any, source: Source, url: str, folders: dict[str, Path]) -> None:
    other = rank_jobs.model_of(recorded("dp2mp2pp2"))
    del other["global_step"]
    shutil.rmtree(folders["beta"] / "llama")
    write_ranks(folders["beta"] / "llama", slices_of(recorded("dp2mp2pp2"), other))
    outcomes = run(keys(source, url), nodes=TWO_NODES, folders=folders).outcomes()
    assert_failed(outcomes, "node_1: other source files or strategies than on node_0")
    assert_untouched(folders)


def test_npu_num_per_node_must_agree_with_the_disks(
    run: Any,
    source: Source,
    url: str,
    folders: dict[str, Path],
) -> None:
    wanted = keys(source, url)
    del wanted["npu_num_per_node"]
    outcomes = run(wanted, nodes=TWO_NODES, folders=folders).outcomes()
    assert_failed(outcomes, r"npu_num_per_node: 8 ranks a node do not agree.*Set npu_num_per_node=2,")
    assert_untouched(folders)


def test_check_nodes() -> None:
    hosts = ["a:1"] * 3 + ["b:2"] * 3 + ["c:3"]
    assert nodes_by_number(7, 3) == ("node_0",) * 3 + ("node_1",) * 3 + ("node_2",)
    check_nodes(3, hosts, [0, 0, 0, 3, 3, 3, 6])
    for number in (1, 2, 4, 8):
        with pytest.raises(ConfigError, match=r"a has ranks 0-2; b has ranks 3-5; c has rank 6.*npu_num_per_node=3"):
            check_nodes(number, hosts, [0, 0, 0, 3, 3, 3, 6])


def test_makers() -> None:
    nodes = ["a", "a", "b", "b", "c", "c", "d"]
    assert makers_of(nodes, ["a", "b", "c", "d"]) == nodes
    assert makers_of(nodes, ["a", "c"]) == ["a", "a", "a", "c", "c", "c", "a"]


# ------------------------------------------------------------------------------------------ hyperparameters


def test_hyperparameters_over_the_yaml(tmp_path: Path) -> None:
    from mindformers_ckpt import CheckpointHook

    yaml = tmp_path / "finetune.yaml"
    yaml.write_text("auto_trans_ckpt: False\ntransform_process_num: 1\noutput_dir: ./here\nremote_save_url: 'None'\n")
    argv = ["--config", "x.yaml", "--auto_trans_ckpt=True", "--transform_process_num", "2", "--npu_num_per_node=16"]
    config = CheckpointHook.from_args([*argv, "--batch_size=3", "word"], yaml=yaml).config
    assert (config.auto_trans_ckpt, config.transform_process_num, config.npu_num_per_node) == (True, 2, 16)
    assert (config.output_dir, config.remote_save_url) == ("./here", "")
    assert CheckpointHook.from_args([], yaml=yaml).config.npu_num_per_node == 8
    assert CheckpointHook.from_args(["--npu_num_per_node=3"]).config.npu_num_per_node == 3


def test_hyperparameters_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--transform_by_rank", "--run_mode=predict", "--run_mode=eval"])
    assert from_command_line() == {"transform_by_rank": "True", "run_mode": "eval"}


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["--auto_trans_ckpt", "--other", "1"], {"auto_trans_ckpt": "True"}),
        (["--auto_trans_ckpt"], {"auto_trans_ckpt": "True"}),
        (["--src_strategy_path_or_dir=None"], {"src_strategy_path_or_dir": "None"}),
        (["--load_checkpoint=a=b"], {"load_checkpoint": "a=b"}),
        (["auto_trans_ckpt=True", "-v", "-", "--src_path=x"], {}),
        (["--use_parallel=False", "--", "--auto_trans_ckpt=True"], {"use_parallel": "False"}),
    ],
)
def test_forms_of_options(argv: list[str], found: dict[str, str]) -> None:
    assert from_command_line(argv) == found


def test_wrong_hyperparameters() -> None:
    from mindformers_ckpt import CheckpointHook

    with pytest.raises(ConfigError, match=r"--load_checkpoint: no value.*\n.*--npu_num_per_node: no value"):
        from_command_line(["--load_checkpoint", "--npu_num_per_node"])
    for wrong in ("0", "-8", "8.5", "eight"):
        with pytest.raises(ConfigError, match="npu_num_per_node: a whole number of at least 1"):
            CheckpointHook.from_args([f"--npu_num_per_node={wrong}"])
    for wrong in ("/tmp/x", "http://a/b", "obs://", "s3:/a"):
        with pytest.raises(ConfigError, match="remote_save_url: obs://bucket/folder or"):
            CheckpointHook.from_args([f"--remote_save_url={wrong}"])
    with pytest.raises(ConfigError, match="output_dir: a local folder was expected"):
        CheckpointHook.from_args(["--output_dir=obs://bucket/x"])


def test_hyperparameters_that_would_not_reach_the_hook() -> None:
    """They would silently start a training from random weights. All are told at once."""
    argv = ["--load_checkpont", "/data/a", "-auto_trans_ckpt=True", "\u2013\u2013use_parallel=True"]
    empty = "the value is empty, is a variable not set? Leave the option out"
    argv += ["--load-checkpoint=/data/a", "--load_checkpoint=", "--run_mode", " "]
    with pytest.raises(ConfigError) as caught:
        from_command_line(argv)
    assert str(caught.value).splitlines() == [
        "hyperparameters are wrong",
        "  - -auto_trans_ckpt: write --auto_trans_ckpt",
        "  - \u2013\u2013use_parallel: write --use_parallel",
        f"  - --load_checkpoint: {empty}, or write --load_checkpoint=None",
        f"  - --run_mode: {empty}",
        "  - --load_checkpont: did you mean load_checkpoint?",
        "  - --load-checkpoint: did you mean load_checkpoint?",
    ]


def test_a_right_key_does_not_hide_a_misspelt_one(tmp_path: Path) -> None:
    """MindFormers' yaml files hold every key, so that the right one is always there."""
    from mindformers_ckpt import CheckpointHook

    yaml = tmp_path / "finetune.yaml"
    yaml.write_text("load_checkpoint: ''\n")
    with pytest.raises(ConfigError, match="--load_checkpont: did you mean load_checkpoint"):
        CheckpointHook.from_args(["--load_checkpont=/data/a"], yaml=yaml)
