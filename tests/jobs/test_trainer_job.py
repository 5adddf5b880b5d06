"""examples/trainer.py as it stands, in real jobs: one goes on from another's checkpoint, equal to the digit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mindformers_ckpt as mc
from mindformers_ckpt.formats import read_header

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import quickstart  # noqa: E402

TRAINER = ROOT / "examples" / "trainer.py"
NAMES = {"up", "down", "moment1.up", "moment1.down", "moment2.up", "moment2.down"}

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("mindspore") is None, reason="runs MindSpore jobs"),
]


def train(folder: Path, ranks: int, steps: int, source: Path | None = None, **keys: object) -> str:
    """A job of so many ranks that goes on from `source`; the log of its first rank."""
    options = {"output_dir": folder, "use_parallel": ranks > 1, **keys}
    if source is not None:
        options |= {"load_checkpoint": source / "checkpoint", "auto_trans_ckpt": True}
        if (source / "strategy").is_dir():
            options["src_strategy_path_or_dir"] = source / "strategy"
    command = [str(TRAINER), *(f"--{key}={value}" for key, value in options.items())]
    start = [sys.executable]
    if ranks > 1:
        start = [str(Path(sys.executable).parent / "msrun"), f"--worker_num={ranks}", f"--local_worker_num={ranks}"]
        start += [f"--master_port={quickstart.free_port()}", "--join=True", f"--log_dir={folder}/log"]
    environment = {**quickstart.environment(), "STEPS": str(steps)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*start, *command], env=environment, cwd=folder.parent, capture_output=True, text=True, timeout=500, check=False
    )
    log = folder / "log" / "worker_0.log"
    text = log.read_text(encoding="utf-8") if ranks > 1 else done.stdout + done.stderr
    assert done.returncode == 0, text
    return text


def assert_equal(first: Path, second: Path) -> None:
    """Weights and states of the optimizer, as whole tensors under each job's own strategy, bit for bit."""
    strategies = [folder / "strategy" if (folder / "strategy").is_dir() else None for folder in (first, second)]
    found = mc.diff(first / "checkpoint", second / "checkpoint", *strategies)
    assert found.ok, found
    with mc.open_checkpoint(first / "checkpoint", strategies[0]) as checkpoint:
        assert set(checkpoint) >= NAMES
        assert checkpoint["moment1.up"].shape == (64, 32)
        assert checkpoint["moment1.up"][...].any()


@pytest.mark.slow
def test_one_card_goes_on_from_two_ranks(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train(first, 2, steps=3, resume_training=False)  # the states of an optimizer that starts anew are named, too
    assert mc.read_strategy(first / "strategy").names() == NAMES
    text = train(second, 1, steps=0, source=first)
    assert "10 parameters loaded" in text
    assert_equal(first, second)
    assert read_header(next((second / "checkpoint/rank_0").iterdir())).tensors.keys() >= NAMES


@pytest.mark.slow
def test_a_chain_of_strategies_trains_as_one_job(tmp_path: Path) -> None:
    """4 ranks, 2 ranks, one card: the losses are those of one card without a change, the states are carried on."""
    reference = train(tmp_path / "reference", 1, steps=9)
    texts, source = [], None
    for number, ranks in enumerate((4, 2, 1)):
        folder = tmp_path / f"job{number}"
        if source is not None:
            train(tmp_path / f"same{number}", ranks, steps=0, source=source)
            assert_equal(source, tmp_path / f"same{number}")
        texts.append(train(folder, ranks, steps=3, source=source))
        source = folder
    losses = [line for line in "\n".join(texts).splitlines() if line.startswith("step ")]
    expected = [line for line in reference.splitlines() if line.startswith("step ")]
    assert len(losses) == len(expected) == 9
    for line, other in zip(losses, expected):
        assert line.split(":")[0] == other.split(":")[0]
        assert float(line.split()[-1]) == pytest.approx(float(other.split()[-1]), abs=2e-6)


def test_the_page_shows_the_file() -> None:
    for page in ("docs/trainer.md", "docs/zh/trainer.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert f"```python\n{TRAINER.read_text(encoding='utf-8')}```" in text, page
        assert (TRAINER.with_suffix(".yaml")).read_text(encoding="utf-8") in text, page
