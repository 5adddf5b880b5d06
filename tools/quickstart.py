"""Show the library at work: one training goes through four jobs, each with another strategy.

    python tools/quickstart.py

Runs real jobs on CPU, compares what they log, prints a table, and exits 1 if anything does not hold.
Everything is written under ./output/quickstart; each run starts it anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import checkout

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
CONFIGS = ROOT / "configs" / "tiny_llama"
# The same weights give the same loss but for the order of sums in float32.
LOAD_TOLERANCE = 1.0e-5
# Over some steps of training those differences grow.
TRAINING_TOLERANCE = 1.0e-3
LOG_LINES = 40
# MindSpore's own log lines, which hide the interesting ones of a failed worker.
NATIVE_LOG = re.compile(r"^\[(WARNING|INFO)\] ")


class Job(NamedTuple):
    """One training job. Without workers it is a plain process on one card."""

    name: str
    title: str
    config: str
    workers: int
    options: tuple[str, ...] = ()


STEPS = 10
REFERENCE = Job(
    "0_reference",
    "reference: one card, no change",
    "pretrain_dp2mp2.yaml",
    0,
    ("--use_parallel", "False", "--runner_config.steps", str(4 * STEPS)),
)
CHAIN = (
    Job("1_dp2mp2", "4 cards, dp2 mp2, from random weights", "pretrain_dp2mp2.yaml", 4),
    Job("2_mp4", "4 cards, mp4 (sharded -> sharded)", "resume_mp4.yaml", 4),
    Job("3_one_card", "one card (sharded -> complete)", "resume_one_card.yaml", 0),
    Job("4_dp2mp2", "4 cards, dp2 mp2 (complete -> sharded)", "resume_dp2mp2.yaml", 4),
)


class JobFailedError(RuntimeError):
    """A job ended with an error; the message holds the end of the log that shows it."""


class Record(NamedTuple):
    """What a job logged: its losses by global step, and the evaluations at its ends."""

    losses: dict[int, float]
    after_load: float | None
    before_save: float


class Finding(NamedTuple):
    """One comparison: what, the largest relative difference, how much is allowed."""

    what: str
    difference: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the difference is allowed; a loss that is not a number never is."""
        return self.difference <= self.allowed


def main() -> int:
    """Run the reference and the chain, compare, print the summary; 1 if anything does not hold."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    checkout.need("mindspore", extra="mindspore")
    # The yaml files name the folders of the quickstart relative to the root of the project.
    os.chdir(ROOT)
    output = Path("output", "quickstart")
    began = time.monotonic()
    jobs = (REFERENCE, *CHAIN)
    records: list[Record] = []
    for number, job in enumerate(jobs):
        print(f"[{number + 1}/{len(jobs)}] {job.title}", flush=True)
        try:
            records.append(run_job(job, output / job.name))
        except JobFailedError as error:
            print(f"\n{error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nstopped; all workers have been ended", file=sys.stderr)
            return 130
    findings = compare(records[0], dict(zip(CHAIN, records[1:], strict=True)))
    print(f"\n{summary(jobs, records)}\n")
    for finding in findings:
        verdict = "holds" if finding.holds else "DOES NOT HOLD"
        amounts = f"difference {finding.difference:.1e}, allowed {finding.allowed:.0e}"
        print(f"{verdict}: {finding.what}: {amounts}")
    print(f"\n{time.monotonic() - began:.0f} s; checkpoints, strategies and logs are in {output}")
    return 0 if all(finding.holds for finding in findings) else 1


def run_job(job: Job, folder: Path, timeout: float = 600.0) -> Record:
    """Run one job with `folder` as its output_dir and return what it logged.

    Removes an older `folder` first. Raises JobFailedError when the job fails or takes more than
    `timeout` seconds.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    logs = folder / "msrun_log"
    began = time.monotonic()
    with (folder / "console.log").open("wb") as console:
        process = subprocess.Popen(
            command(job, folder, logs), stdout=console, stderr=subprocess.STDOUT, env=environment()
        )
    try:
        follow(process, folder / "losses.jsonl", began + timeout)
    except BaseException:
        stop(process)
        raise
    if process.poll() is None:
        stop(process)
        raise JobFailedError(f"{job.name} was stopped after {timeout:.0f} s.\n{failing_log(folder)}")
    if process.returncode:
        raise JobFailedError(f"{job.name} failed (exit code {process.returncode}).\n{failing_log(folder)}")
    record = read_record(folder / "losses.jsonl")
    print(f"    {time.monotonic() - began:.0f} s", flush=True)
    return record


def command(job: Job, folder: Path, logs: Path) -> list[str]:
    """Return the command line of a job: msrun through the launcher, or the script itself."""
    script = [str(TOOLS / "run_mindformer.py"), "--config", str(CONFIGS / job.config), "--run_mode", "train"]
    script += ["--output_dir", str(folder), *job.options]
    if not job.workers:
        return [sys.executable, *script]
    quoted = " ".join(f'"{word}"' for word in script)
    launcher = ["bash", str(TOOLS / "msrun_launcher.sh"), quoted]
    # Port, log folder, join (wait for the end), seconds that the workers wait for each other.
    return [*launcher, str(job.workers), str(free_port()), str(logs), "True", "300"]


def environment() -> dict[str, str]:
    """Return the environment of a job: msrun and python of this interpreter, MindSpore's log at errors."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {"GLOG_v": "3", "OMP_NUM_THREADS": "1", **os.environ, "PATH": path}


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def follow(process: subprocess.Popen[bytes], journal: Path, deadline: float) -> None:
    """Print the events of a running job until it ends or the deadline passes."""
    seen = 0
    while True:
        ended = process.poll() is not None
        events = list(read_events(journal))
        for event in events[seen:]:
            show(event)
        seen = len(events)
        if ended or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    if sys.stdout.isatty():
        print("\r\033[K", end="")


def show(event: dict[str, object]) -> None:
    """Print one event; on a terminal the steps overwrite each other, elsewhere every tenth is shown."""
    kind, step = event["event"], event.get("global_step")
    line = ""
    if kind == "step":
        line = f"    step {step}: loss {event['loss']:.6f}"
    elif kind == "load":
        line = f"    loaded {event['parameters']} parameters at step {step} in {event['seconds']:.1f} s"
    elif kind == "evaluation":
        line = f"    evaluation {event['when']}: loss {event['loss']:.6f}"
    if not line:
        return
    if sys.stdout.isatty():
        print(f"\r\033[K{line}", end="" if kind == "step" else "\n", flush=True)
    elif kind != "step" or int(str(step)) % 10 == 0:
        print(line, flush=True)


def read_events(journal: Path) -> Iterator[dict[str, object]]:
    """Yield the events of a losses.jsonl, of the complete lines only: a job may be writing the last one."""
    if journal.exists():
        for line in journal.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def read_record(journal: Path) -> Record:
    """Read a finished job's losses.jsonl; JobFailedError when it holds no steps or no last evaluation."""
    losses: dict[int, float] = {}
    evaluations: dict[object, float] = {}
    for event in read_events(journal):
        if event["event"] == "step":
            losses[int(str(event["global_step"]))] = float(str(event["loss"]))
        elif event["event"] == "evaluation":
            evaluations[event["when"]] = float(str(event["loss"]))
    if not losses or "before save" not in evaluations:
        raise JobFailedError(f"{journal}: the job ended without an error, but logged no steps or no save")
    return Record(losses, evaluations.get("after load"), evaluations["before save"])


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a job and all its workers. The workers have sessions of their own; msrun ends them on SIGINT."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()


def failing_log(folder: Path) -> str:
    """Return the end of the log that shows why a job failed, without MindSpore's warnings."""
    workers = sorted((folder / "msrun_log").glob("worker_*.log"), key=lambda log: log.stat().st_mtime)
    texts = {log: log.read_text(encoding="utf-8", errors="replace") for log in [*workers, folder / "console.log"]}
    # The rank that failed first may show a traceback, where the others only repeat its error.
    signs = (r"^Traceback", r"^error:")
    guilty = [log for sign in signs for log in workers if re.search(sign, texts[log], re.MULTILINE)]
    chosen = guilty[0] if guilty else folder / "console.log"
    lines = [line for line in texts[chosen].splitlines() if not NATIVE_LOG.match(line)]
    return "\n".join([f"The end of {chosen}:", *(f"  | {line}" for line in lines[-LOG_LINES:])])


def relative_difference(value: float | None, expected: float) -> float:
    """Return |value - expected| / |expected|; infinite when the value is missing."""
    if value is None or value != value:
        return float("inf")
    return abs(value - expected) / abs(expected)


def compare(reference: Record, chain: dict[Job, Record]) -> list[Finding]:
    """Compare each load with the save before it, and the losses of the chain with those of the reference."""
    findings = []
    jobs = list(chain)
    for earlier, later in itertools.pairwise(jobs):
        difference = relative_difference(chain[later].after_load, chain[earlier].before_save)
        what = f"evaluation loss of {later.name} after the load = of {earlier.name} before the save"
        findings.append(Finding(what, difference, LOAD_TOLERANCE))
    losses = {step: loss for record in chain.values() for step, loss in record.losses.items()}
    # The steps are those of the reference, each once: the global step was carried on.
    whole = sum(len(record.losses) for record in chain.values()) == len(losses)
    whole = whole and losses.keys() == reference.losses.keys()
    shifts = {step: relative_difference(losses.get(step), loss) for step, loss in reference.losses.items()}
    for job, record in list(chain.items())[1:]:
        steps = range(min(reference.losses), max(record.losses) + 1)
        worst = max(shifts.get(step, float("inf")) for step in steps) if whole else float("inf")
        what = f"losses of steps {steps[0]}-{steps[-1]} up to {job.name} = without a change of strategy"
        findings.append(Finding(what, worst, TRAINING_TOLERANCE))
    return findings


def summary(jobs: Sequence[Job], records: Sequence[Record]) -> str:
    """Return a table: job, steps, evaluation loss after the load and before the save."""
    rows = [("job", "steps", "loss after load", "loss before save")]
    for job, record in zip(jobs, records, strict=True):
        loaded = "-" if record.after_load is None else f"{record.after_load:.7f}"
        steps = f"{min(record.losses)}-{max(record.losses)}"
        rows.append((job.title, steps, loaded, f"{record.before_save:.7f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
