"""The training job: build, load through the hook, train, save."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from numpy.typing import NDArray

from mindformers_ckpt import CheckpointHook, StrategySaved
from mindformers_ckpt.geometry.layout import Layout

from . import data
from .model import TinyLlama
from .parallel import Axes, MeanOfReplicas, Mesh, start_mesh, use_cpu
from .settings import ScheduleSettings, Settings, build_settings, merge, read_yaml


class TrainStep(nn.Cell):  # type: ignore[misc]
    """One optimizer step on this rank's part of a global batch; returns the loss of the global batch."""

    def __init__(self, network: TinyLlama, optimizer: nn.Optimizer, mesh: Mesh) -> None:
        # Without a prefix, so that parameters and moments keep their names.
        super().__init__(auto_prefix=False)
        self.network, self.optimizer = network, optimizer
        self.loss_and_gradients = ms.value_and_grad(network, None, weights=optimizer.parameters)
        self.mean_of_replicas = MeanOfReplicas(mesh)

    def construct(self, tokens: Tensor) -> Tensor:
        loss, gradients = self.loss_and_gradients(tokens)
        loss, gradients = self.mean_of_replicas(loss, gradients)
        self.optimizer(gradients)
        return loss


class Journal:
    """Prints events and, on rank 0, appends them to `<output_dir>/losses.jsonl`, one JSON object a line."""

    def __init__(self, output_dir: Path, rank: int) -> None:
        self.file = output_dir / "losses.jsonl" if rank == 0 else None
        output_dir.mkdir(parents=True, exist_ok=True)

    def write(self, event: str, **fields: Any) -> None:
        """Record one event; floats keep all their digits in the file."""
        shown = [
            f"{name} {value:.6f}" if isinstance(value, float) else f"{name} {value}" for name, value in fields.items()
        ]
        print(f"[{event}]", ", ".join(shown), flush=True)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"event": event, **fields}) + "\n")


def run(config: Path, overrides: Mapping[str, Any]) -> None:
    """Train the tiny model as the yaml says; `overrides` are command-line keys that go before the yaml's."""
    settings = build_settings(merge(read_yaml(config), overrides))
    use_cpu()
    mesh = start_mesh(settings.parallel, settings.use_parallel)
    journal = Journal(settings.output_dir, mesh.rank)
    journal.write("job", rank=mesh.rank, workers=mesh.dp * mesh.mp, **mesh.sizes)

    network = TinyLlama(settings, mesh)
    rates = learning_rates(settings.schedule)
    optimizer = nn.Adam(network.trainable_params(), learning_rate=Tensor(rates))

    # The integration: this part, with `declare` in the place of MindSpore's own compilation.
    hook = CheckpointHook.from_yaml(config, overrides=overrides)
    hook.prepare()
    if settings.use_parallel:
        hook.declare(declared_layouts(network.axes, mesh))
    began = time.perf_counter()
    try:
        loaded = hook.load(network, optimizer)
    except StrategySaved as saved:  # only_save_strategy: nothing is to be trained
        print(saved, flush=True)
        return

    job = Job(settings, mesh, network, optimizer, journal)
    if loaded:
        seconds = time.perf_counter() - began
        journal.write("load", parameters=len(loaded), global_step=job.global_step, seconds=seconds)
        job.evaluate("after load")
    job.train()


def learning_rates(schedule: ScheduleSettings) -> NDArray[np.float32]:
    """Return the learning rate of each global step, float32 [total_steps]."""
    steps = np.arange(schedule.total_steps)
    warmup = np.minimum(1.0, (steps + 1) / max(1, schedule.warmup_steps))
    decay = 0.55 + 0.45 * np.cos(np.pi * steps / schedule.total_steps)
    rates: NDArray[np.float32] = (schedule.learning_rate * warmup * decay).astype(np.float32)
    return rates


def declared_layouts(axes: Mapping[str, Axes], mesh: Mesh) -> dict[str, Layout]:
    """Return the layout of each parameter and of its two Adam moments, which are cut alike.

    What is in no layout (global_step, beta powers, learning rate) is whole on every rank.
    """
    layouts = {name: Layout.on(mesh.sizes, *cut) for name, cut in axes.items()}
    moments = ("moment1", "moment2")
    return layouts | {f"{moment}.{name}": layouts[name] for moment in moments for name in layouts}


class Job:
    """Steps, evaluations and saves of one run."""

    def __init__(
        self, settings: Settings, mesh: Mesh, network: TinyLlama, optimizer: nn.Optimizer, journal: Journal
    ) -> None:
        self.settings, self.mesh, self.journal = settings, mesh, journal
        self.network, self.optimizer = network, optimizer
        self.train_step = TrainStep(network, optimizer, mesh)

    @property
    def global_step(self) -> int:
        """Steps that the optimizer has made since the first job of the chain."""
        return int(self.optimizer.global_step.asnumpy()[0])

    def train(self) -> None:
        """Make this run's steps and save at the end, and every `save_checkpoint_steps` on the way."""
        first = self.global_step
        last = first + self.settings.runner.steps
        every = self.settings.save.save_checkpoint_steps or last + 1
        for step in range(first + 1, last + 1):
            tokens = Tensor(data.local_batch(self.settings, step, self.mesh.dp_index))
            began = time.perf_counter()
            loss = float(self.train_step(tokens).asnumpy())
            self.journal.write("step", global_step=step, loss=loss, seconds=time.perf_counter() - began)
            if step % every == 0 and step != last:
                self.save()
        self.save()

    def evaluate(self, when: str) -> None:
        """Record the loss on the fixed evaluation batch; every rank takes the whole batch."""
        tokens = Tensor(data.global_batch(self.settings, data.EVALUATION_STEP))
        loss = float(self.network(tokens).asnumpy())
        self.journal.write("evaluation", when=when, global_step=self.global_step, loss=loss)

    def save(self) -> None:
        """Save this rank's slices with the optimizer's state, named and placed as MindFormers does."""
        self.evaluate("before save")
        epoch, step, rank = self.settings.runner.epochs, self.global_step, self.mesh.rank
        folder = self.settings.output_dir / "checkpoint" / f"rank_{rank}"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.settings.save.prefix}_rank_{rank}-{epoch}_{step}.ckpt"
        ms.save_checkpoint(self.train_step, str(file), append_dict={"epoch_num": epoch, "step_num": step})
        self.journal.write("save", global_step=step, file=str(file))
