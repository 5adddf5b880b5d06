"""The campaign and the fuzzers notice what must not happen."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from campaign import Campaign
from child import build
from fuzz_inputs import inputs
from fuzz_oracles import compare
from make_broken import entry, record, safetensors

from mindformers_ckpt.errors import CheckpointError
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.formats.tensor_file import Segment

ROOT = Path(__file__).parents[1]
SPOILT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from cases import Bench, cases, write_inputs
from child import Act, Event, Lacks
folder = Path(sys.argv[1])
write_inputs(folder)
bench = Bench(cases(folder)["overwrite"], Lacks.NOTHING)
bench.reset()
assert bench.run(bench.case.words, Event(Act.KILL, 20, 20)).code == -9
assert bench.settle(resume=False) == []
bench.reset()
next(bench.case.out.rglob("*.ckpt")).write_bytes(b"half")
(bench.work / ".out.lost").touch()
print(*bench.settle(resume=False), sep="\\n")
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the shim is compiled with gcc")
def test_a_mixture_and_strays_are_noticed(tmp_path: Path) -> None:
    environment = {**os.environ, "LD_PRELOAD": str(build(tmp_path)), "PYTHONPATH": str(ROOT)}
    script = [sys.executable, "-c", SPOILT, str(tmp_path), str(ROOT / "tests" / "kills")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mixture, left = done.stdout.splitlines()
    assert mixture.startswith("neither the old nor the new result")
    assert left == "left after the same command []: ['.out.lost']"


def test_a_round_again(tmp_path: Path) -> None:
    counts = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        campaign = Campaign(1, tmp_path / name, None)
        campaign.run("readers", 0, 7)
        assert campaign.fault_count == 0
        counts.append(dict(campaign.counts["readers"]))
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) == 500


def test_a_round_that_the_process_does_not_survive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its seed is that of the last round that was begun."""
    campaign = Campaign(1, tmp_path, None)
    said = [{"begin": 5}, {"what": "ckpt", "executions": 9, "faults": [], "seed": 5}, {"begin": 6}]
    campaign.gather("readers", "\n".join(map(json.dumps, said)), "Traceback …\nMemoryError", 1)
    assert campaign.faults["readers"] == [("the process itself", 6, "MemoryError")]
    assert "--only readers --round 6\n" in capsys.readouterr().out


def test_without_a_compiler_kinds_are_skipped_and_named(tmp_path: Path) -> None:
    campaign = Campaign(1, tmp_path, None)
    campaign.run("kills", 1)
    assert "kills      skipped: there is no gcc" in campaign.table()
    assert campaign.fault_count == 0


WHOLE = {
    "ckpt": record(b"w", [2], b"Int8", b"ab") + record(b"v", [], b"Float32", b"1234"),
    "safetensors": safetensors({"w": entry([2], 0, 8), "v": entry([], 8, 12)}, b"0123456789ab"),
}


@pytest.mark.parametrize("reader", list(WHOLE))
def test_the_oracles_notice_other_contents(reader: str, tmp_path: Path) -> None:
    file, data = tmp_path / f"x.{reader}", WHOLE[reader]
    file.write_bytes(data)
    header = read_header(file)
    compare(reader, data, header)
    name, record = next((name, record) for name, record in header.tensors.items() if record.spec.nbytes)
    (segment,) = record.segments
    moved = record._replace(segments=(Segment(segment.offset - 1, segment.length),))
    with pytest.raises(AssertionError):
        compare(reader, data, replace(header, tensors={**header.tensors, name: moved}))


@pytest.mark.parametrize("reader", ["ckpt", "safetensors", "torch"])
def test_many_inputs_are_whole(reader: str, tmp_path: Path) -> None:
    """What is never accepted is never compared."""
    chance, accepted = random.Random(1), 0
    for number, data in enumerate(itertools.islice(inputs(chance, reader), 200)):
        file = tmp_path / f"{number}.{reader.replace('torch', 'bin')}"
        file.write_bytes(data)
        try:
            read_header(file)
        except CheckpointError:
            continue
        accepted += 1
    assert accepted >= 10
