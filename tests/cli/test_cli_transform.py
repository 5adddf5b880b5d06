"""`transform`, its script and its shell script, called as the guide calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recorded import assert_ranks, read_tensors, write_tensors
from toy import MODEL, TOOLS, Result, command, listing, mp2pp2, shell

from mindformers_ckpt.formats import read_header
from mindformers_ckpt.formats.ckpt_crc import verify_crc

SCRIPT = TOOLS / "transform_checkpoint.py"
SHELL_SCRIPT = TOOLS / "transform_checkpoint.sh"


def test_complete_to_sharded_by_the_script_of_the_guide(toy: Path) -> None:
    result = shell(
        f"""python {SCRIPT} \\
            --src_checkpoint {toy}/full.ckpt \\
            --dst_checkpoint_dir {toy}/out/ \\
            --dst_strategy {toy}/mp2pp2/ \\
            --prefix "checkpoint_"
        """,
        toy,
    )
    assert result.code == 0, result
    assert "4 files" in result.out
    assert_ranks(_without_manifest(toy / "out"), mp2pp2())
    assert (toy / "out/rank_3/checkpoint_3.ckpt").is_file()


def test_complete_to_sharded_by_the_other_spelling_of_the_guide(toy: Path) -> None:
    result = shell(
        f"python {SCRIPT} --src_checkpoint full.ckpt --dst_checkpoint ./output/toy_mp2pp2 --dst_strategy ./mp2pp2", toy
    )
    assert result.code == 0, result
    assert_ranks(_without_manifest(toy / "output/toy_mp2pp2"), mp2pp2())


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_complete_to_sharded_by_the_shell_script_of_the_guide(toy: Path, processes: int) -> None:
    """3 processes do not divide 4 ranks."""
    result = shell(f'bash {SHELL_SCRIPT} {toy}/full.ckpt None out mp2pp2 4 {processes} "checkpoint_"', toy)
    assert result.code == 0, result
    assert_ranks(_without_manifest(toy / "out"), mp2pp2())
    assert sorted(listing(toy / "out")) == sorted(
        ["manifest.json", *(f"rank_{r}" for r in range(4)), *(f"rank_{r}/checkpoint_{r}.ckpt" for r in range(4))]
    )


def test_shell_script_without_a_prefix_and_with_strategies_on_both_sides(toy: Path) -> None:
    result = shell(f"bash {SHELL_SCRIPT} sharded dp2mp2/ckpt_strategy_rank_0.ckpt out mp2pp2 4 2", toy)
    assert result.code == 0, result
    assert_ranks(_without_manifest(toy / "out"), mp2pp2())


def test_shell_script_to_complete_weights_with_blanks_in_paths(toy: Path) -> None:
    (toy / "sharded").rename(toy / "my source")
    result = shell(f'bash {SHELL_SCRIPT} "my source" dp2mp2 "my result" None 1 1 "llama "', toy)
    assert result.code == 0, result
    assert read_tensors(toy / "my result/rank_0/llama 0.ckpt").keys() == MODEL.keys()


def test_shell_script_over_an_earlier_result(toy: Path) -> None:
    """The guide's examples write to one folder: the refusal names an option, which the script takes, too."""
    script = f"bash {SHELL_SCRIPT} full.ckpt None out mp2pp2 4 2"
    assert shell(script, toy).code == 0
    refused = shell(script, toy)
    assert refused.code == 1, refused
    assert "--overwrite" in refused.err
    for options in ("--overwrite", "checkpoint_ --overwrite --quiet"):
        done = shell(f"{script} {options}", toy)
        assert done.code == 0, done
    assert_ranks(_without_manifest(toy / "out"), mp2pp2())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("full.ckpt None out mp2pp2 4 2 --overwrit", 2, "No such option"),
        ("full.ckpt None out mp2pp2 8 2", 1, "world_size is 8, but the target strategy is for 4 ranks"),
        ("absent.ckpt None out mp2pp2 4 2", 1, "there is no checkpoint at"),
        ("full.ckpt None out mp2pp2 4 two", 2, "'two' is not a whole number"),
        ("full.ckpt None out mp2pp2 4", 2, "usage:"),
        ("full.ckpt None out mp2pp2 4 2 checkpoint_ more", 2, "usage:"),
    ],
)
def test_shell_script_fails_with_the_command(toy: Path, arguments: str, code: int, message: str) -> None:
    result = shell(f"bash {SHELL_SCRIPT} {arguments}", toy)
    assert result.code == code, result
    assert message in result.err
    assert not (toy / "out").exists()


def test_sharded_to_complete_gives_the_bytes_of_the_complete_file(toy: Path) -> None:
    result = command(["transform", "--src-checkpoint", "sharded", "--src-strategy", "dp2mp2",
                      "--dst-checkpoint-dir", "out"], toy)  # fmt: skip
    assert result.code == 0, result
    assert (toy / "out/rank_0/checkpoint_0.ckpt").read_bytes() == (toy / "full.ckpt").read_bytes()


@pytest.mark.parametrize("no_strategy", ["", "None"])
@pytest.mark.parametrize("dashes", ["-", "_"])
def test_no_strategy_and_both_spellings(toy: Path, no_strategy: str, dashes: str) -> None:
    names = ("src_checkpoint", "src_strategy", "dst_checkpoint_dir", "dst_strategy", "transform_process_num")
    values = ("full.ckpt", no_strategy, "out", "mp2pp2", "1")
    options = [f"--{name.replace('_', dashes)}={value}" for name, value in zip(names, values)]
    result = command(["transform", *options], toy)
    assert result.code == 0, result
    assert_ranks(_without_manifest(toy / "out"), mp2pp2())


@pytest.mark.parametrize("value", ["True", "true", "1", "False", "false", "0"])
def test_booleans_are_words(toy: Path, value: str) -> None:
    result = _transform(toy, "--transform_by_rank", value)
    assert result.code == 0, result
    assert_ranks(_without_manifest(toy / "out"), mp2pp2())


@pytest.mark.parametrize("value", ["maybe", "2", "None"])
def test_a_boolean_of_no_sense_is_refused(toy: Path, value: str) -> None:
    result = _transform(toy, "--transform_by_rank", value)
    assert result.code == 2, result
    assert f"Invalid value for '--transform-by-rank': '{value}' is not one of 'True', 'False'." in result.err
    assert not (toy / "out").exists()


def test_parts_of_processes_that_are_started_by_hand_make_the_whole(toy: Path) -> None:
    """As the incumbent's shell script starts them: rank_id = i * (WORLD_SIZE / PROCESS_NUM), in the background."""
    result = shell(
        f"""
        for i in 0 1; do
            python {SCRIPT} --src_checkpoint=full.ckpt --dst_checkpoint_dir=out --src_strategy= \\
                --dst_strategy=mp2pp2 --prefix=checkpoint_ --rank_id=$((i * 4 / 2)) --world_size=4 \\
                --transform_process_num=2 --transform_by_rank=True &
            parts+=($!)
        done
        for part in "${{parts[@]}}"; do wait "$part" || exit 1; done
        """,
        toy,
    )
    assert result.code == 0, result
    assert sorted(path.name for path in (toy / "out").glob("*.json")) == [
        "manifest_rank_0-1.json",
        "manifest_rank_2-3.json",
    ]
    assert_ranks(_without_manifest(toy / "out"), mp2pp2())
    assert not [path for path in listing(toy) if "staging" in path]


@pytest.mark.parametrize(("rank_id", "ranks"), [(0, [0]), (1, [1]), (2, [2, 3])])
def test_shares_that_do_not_divide_the_ranks(toy: Path, rank_id: int, ranks: list[int]) -> None:
    """The incumbent's rank_id is i * (4 / 3) in whole numbers; the last share takes the rest."""
    result = _transform(toy, "--rank_id", rank_id, "--transform_process_num", 3, "--json")
    assert json.loads(result.out)["ranks"] == ranks


def test_a_rank_id_that_begins_no_share(toy: Path) -> None:
    result = _transform(toy, "--rank_id", 1, "--transform_process_num", 2)
    assert result.code == 1
    assert "rank_id 1 begins no share: 2 processes for 4 ranks begin at 0, 2" in result.err


def test_ranks_of_two_nodes_one_after_the_other(toy: Path) -> None:
    first = _transform(toy, "--ranks", "0-1")
    assert first.code == 0, first
    assert sorted(path.name for path in (toy / "out").iterdir()) == ["manifest_rank_0-1.json", "rank_0", "rank_1"]
    again = _transform(toy, "--ranks", "1,2")
    assert again.code == 1
    assert "already holds rank_1; allow to replace them with --overwrite" in again.err
    second = _transform(toy, "--ranks", "2,3")
    assert second.code == 0, second
    assert_ranks(_without_manifest(toy / "out"), mp2pp2())


def test_ranks_are_not_put_beside_those_of_another_target(toy: Path) -> None:
    assert _transform(toy, "--ranks", "0-1").code == 0
    other = command(["transform", "--src-checkpoint", "full.ckpt", "--dst-strategy", "dp2mp2",
                     "--dst-checkpoint-dir", "out", "--ranks", "2-3", "--overwrite"], toy)  # fmt: skip
    assert other.code == 1, other
    assert "holds ranks of another source or target" in other.err
    (toy / "out2").mkdir()
    (toy / "out2/notes.txt").write_text("mine")
    foreign = _transform(toy, "--ranks", "0-1", "--overwrite", destination="out2")
    assert foreign.code == 1
    assert "holds something else" in foreign.err
    assert listing(toy / "out2") == ["notes.txt"]


@pytest.mark.parametrize(
    ("value", "message"),
    [("3-1", "ends before it begins"), ("a", "not a list of ranks"), ("", "not a list of ranks"), ("1-", "not a list")],
)
def test_a_list_of_ranks_of_no_sense(toy: Path, value: str, message: str) -> None:
    result = _transform(toy, "--ranks", value)
    assert result.code == 2
    assert message in result.err


def test_ranks_that_the_target_does_not_have(toy: Path) -> None:
    result = _transform(toy, "--ranks", "3-5")
    assert result.code == 1
    assert "ranks [4, 5] are not among the 4 ranks of the target strategy" in result.err


def test_a_report_for_programs(toy: Path) -> None:
    result = _transform(toy, "--json", "--transform_process_num", 2)
    assert result.code == 0, result
    report = json.loads(result.out)
    assert report["destination"] == str(toy / "out")
    assert (report["files"], report["ranks"], report["resumed_bytes"]) == (4, [0, 1, 2, 3], 0)
    content = sum(len(tensor.bits.tobytes()) for rank in mp2pp2().values() for tensor in rank.values())
    assert report["bytes_written"] == content


def test_quiet_says_nothing(toy: Path) -> None:
    result = _transform(toy, "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")


@pytest.mark.parametrize("format", ["ckpt", "safetensors"])
def test_the_format_is_asked_for(toy: Path, format: str) -> None:
    assert _transform(toy, "--format", format).code == 0
    assert_ranks(_without_manifest(toy / "out"), mp2pp2())
    assert (toy / f"out/rank_0/checkpoint_0.{format}").is_file()


def test_hashes_are_those_of_the_content(toy: Path) -> None:
    import xxhash

    assert _transform(toy, "--hash", "--fsync").code == 0
    files = json.loads((toy / "out/manifest.json").read_bytes())["files"]
    assert len(files) == 4
    for file in files:
        tensors = read_tensors(toy / "out" / file["path"])
        assert file["xxh3_128"] == {
            name: xxhash.xxh3_128(tensor.bits.tobytes()).hexdigest() for name, tensor in tensors.items()
        }


def test_crcs_are_written_and_verified(toy: Path) -> None:
    first = _transform(toy, "--crc-check", "--resume")
    assert first.code == 0, first
    assert "store no CRC-32 to verify" in first.err
    for rank in range(4):
        verify_crc(read_header(toy / f"out/rank_{rank}/checkpoint_{rank}.ckpt"))
    back = ["transform", "--src-checkpoint", "out", "--src-strategy", "mp2pp2", "--crc-check"]
    good = command([*back, "--dst-checkpoint-dir", "back"], toy)
    assert good.code == 0, good
    assert "CRC" not in good.err
    for rank in (1, 2):
        _flip_a_bit(toy / f"out/rank_{rank}/checkpoint_{rank}.ckpt", -40)
    bad = command([*back, "--dst-checkpoint-dir", "again"], toy)
    assert bad.code == 1
    assert "rank_1/checkpoint_1.ckpt: damaged" in bad.err
    assert "rank_2/checkpoint_2.ckpt: damaged" in bad.err
    assert not (toy / "again").exists()


def test_parameters_that_the_source_lacks_may_be_left_out(toy: Path) -> None:
    write_tensors(toy / "part.ckpt", {name: MODEL[name] for name in ("embedding.weight", "layers.0.weight")})
    arguments = ["transform", "--src-checkpoint", "part.ckpt", "--dst-strategy", "dp2mp2",
                 "--dst-checkpoint-dir", "out"]  # fmt: skip
    refused = command(arguments, toy)
    assert refused.code == 1
    assert "layers.1.weight" in refused.err
    assert "norm.bias" in refused.err
    allowed = command([*arguments, "--allow-missing"], toy)
    assert allowed.code == 0, allowed
    assert read_tensors(toy / "out/rank_2/checkpoint_2.ckpt").keys() == {"embedding.weight", "layers.0.weight"}


def test_a_result_is_replaced_only_when_that_is_allowed(toy: Path) -> None:
    assert _transform(toy).code == 0
    before = (toy / "out/manifest.json").read_bytes()
    refused = _transform(toy, "--prefix", "new_")
    assert refused.code == 1
    assert "is not empty" in refused.err
    assert (toy / "out/manifest.json").read_bytes() == before
    replaced = _transform(toy, "--prefix", "new_", "--overwrite")
    assert replaced.code == 0, replaced
    assert (toy / "out/rank_0/new_0.ckpt").is_file()
    assert not (toy / "out/rank_0/checkpoint_0.ckpt").exists()
    assert not [path for path in listing(toy) if "staging" in path]


def test_resume_of_a_finished_run_does_nothing(toy: Path) -> None:
    assert _transform(toy).code == 0
    times = {path: path.stat().st_mtime_ns for path in (toy / "out").rglob("*")}
    again = _transform(toy, "--resume")
    assert again.code == 0, again
    assert "nothing to do" in again.out
    assert {path: path.stat().st_mtime_ns for path in (toy / "out").rglob("*")} == times


PATHS = ("--src-checkpoint", "full.ckpt", "--dst-checkpoint-dir", "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing options '--src-checkpoint' and '--dst-checkpoint-dir'"),
        (["--src-checkpoint", "full.ckpt"], "Missing option '--dst-checkpoint-dir'"),
        ([*PATHS, "--prefix", "../x"], "cannot hold a /"),
        ([*PATHS, "--format", "pickle"], "'pickle' is not one of"),
        ([*PATHS, "--ranks", "0", "--rank-id", "0"], "give one of them"),
        ([*PATHS, "--transform_process_num", "0"], "0 is not in the range"),
        ([*PATHS, "--unknown", "1"], "No such option"),
    ],
)
def test_wrong_usage(toy: Path, arguments: list[str], message: str) -> None:
    result = command(["transform", *arguments], toy)
    assert result.code == 2, result
    assert message in result.err


def test_merge_strategy_gives_what_the_folder_gives(toy: Path) -> None:
    merged = command(["merge-strategy", "mp2pp2", "merged/merged_ckpt_strategy.ckpt"], toy)
    assert merged.code == 0, merged
    assert "2 stages of 2 ranks, 4 parameters" in merged.out
    result = command(["transform", "--src-checkpoint", "full.ckpt", "--dst-strategy",
                      "merged/merged_ckpt_strategy.ckpt", "--dst-checkpoint-dir", "out"], toy)  # fmt: skip
    assert result.code == 0, result
    assert_ranks(_without_manifest(toy / "out"), mp2pp2())
    (toy / "mp2pp2/ckpt_strategy_rank_3.ckpt").unlink()
    (toy / "mp2pp2/ckpt_strategy_rank_2.ckpt").unlink()
    (toy / "mp2pp2/ckpt_strategy_rank_0.ckpt").write_bytes(b"nothing")
    failed = command(["merge-strategy", "mp2pp2", "merged/merged_ckpt_strategy.ckpt"], toy)
    assert failed.code == 1
    assert "ckpt_strategy_rank_0.ckpt is not a strategy file" in failed.err


def _transform(toy: Path, *options: object, destination: str = "out") -> Result:
    return command(
        ["transform", "--src-checkpoint", "full.ckpt", "--dst-strategy", "mp2pp2", "--dst-checkpoint-dir", destination,
         *map(str, options)],
        toy,
    )  # fmt: skip


def _without_manifest(folder: Path) -> Path:
    """Results have manifests beside the rank folders, and nothing else."""
    assert all(path.name.startswith(("rank_", "manifest")) for path in folder.iterdir())
    return folder


def _flip_a_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
