"""The loader hook: compares the checkpoint's strategy with the job's, re-slices when they differ, loads.

hook = CheckpointHook.from_yaml("finetune.yaml")
hook.prepare()                      # before the network is compiled
...
params = hook.load(network, optimizer)
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.auto.cluster import Cluster
from mindformers_ckpt.auto.config import Config
from mindformers_ckpt.auto.output_dir import OutputDir
from mindformers_ckpt.auto.reslice import Reslicing
from mindformers_ckpt.errors import ConfigError, PlanError
from mindformers_ckpt.layout import Layout
from mindformers_ckpt.shard_io import read_file
from mindformers_ckpt.source_files import find_source
from mindformers_ckpt.strategy.files import MERGED_FILE, merge_strategies, rank_file_name, read_strategy
from mindformers_ckpt.strategy.model import Strategy

if TYPE_CHECKING:
    from mindspore.nn import Cell

log = logging.getLogger("mindformers_ckpt")

MAIN_RANK = 0  # the rank that clears, merges and publishes


class CheckpointHook:
    """Loads the weights of one rank of a training job, as the yaml keys say.

    All ranks of the job make the same calls in the same order. A failure on one rank is raised on all of
    them, within `transform_timeout` seconds.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.strategy_dir = config.strategy_dir.absolute()
        self.transformed_dir = config.transformed_dir.absolute()
        self._output = OutputDir(Path(config.output_dir))
        self._cluster: Cluster | None = None
        _show_log()

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> CheckpointHook:
        """Read the keys from a training yaml; `overrides` win. Raises ConfigError listing all faults."""
        return cls(Config.from_yaml(path, overrides))

    @property
    def cluster(self) -> Cluster:
        """The ranks of the job. Raises ConfigError before `prepare`."""
        if self._cluster is None:
            raise ConfigError("call hook.prepare() before the network is compiled, then hook.load()")
        return self._cluster

    def prepare(self, network: Cell | None = None) -> None:
        """Get ready before the network is compiled: check, clear, have MindSpore save the live strategy.

        `network` is needed only when it is an `AutoParallel` cell. Call it after
        `mindspore.communication.init()`.
        """
        self._cluster = self._join()
        with self._together("prepare"):
            if self._clears:
                self._check_sources()
            self._check_shared_disk()
            if self._clears and self.cluster.rank == MAIN_RANK:
                self._output.clear()
            self.cluster.barrier("cleared")
            if self._is_parallel:
                from mindformers_ckpt.strategy import live

                live.save_at_compile(self.strategy_dir, self.cluster.rank, network)

    def declare(self, layouts: Mapping[str, Layout], stage: int = 0) -> None:
        """Write the live strategy from declared layouts, for a network whose parallelism is written by hand."""
        from mindformers_ckpt.strategy import live

        with self._together("declare"):
            live.declare(layouts, self.strategy_dir, self.cluster.rank, stage)

    def load(self, network: Cell, optimizer: Cell | None = None) -> dict[str, Any]:
        """Load this rank's weights into the network (and the optimizer), and return them by name.

        With `only_save_strategy` the strategy is completed and the process exits with 0.
        """
        with self._together("load"):
            target = self._live_strategy()
            loaded: dict[str, Any] = {}
            transformed = False
            if self.config.load_checkpoint and not self.config.only_save_strategy:
                folder = self._weights_for(target)
                transformed = folder is not None
                loaded = self._read(folder, network, optimizer)
            self.cluster.barrier("loaded")
            if self._clears and self.cluster.rank == MAIN_RANK:
                self._output.keep(transformed)
            self.cluster.barrier("done")
        self.cluster.close()
        if self.config.only_save_strategy:
            log.info("only_save_strategy: the strategy is in %s; stopping here", self.strategy_dir)
            raise SystemExit(0)
        return loaded

    @property
    def _is_parallel(self) -> bool:
        return self.config.use_parallel and self.cluster.size > 1

    @property
    def _clears(self) -> bool:
        return self.config.only_save_strategy or (self.config.auto_trans_ckpt and bool(self.config.load_checkpoint))

    def _join(self) -> Cluster:
        env = os.environ if self.config.use_parallel else {}
        return Cluster.from_environment(self.config.transform_timeout, env)

    @contextmanager
    def _together(self, step: str) -> Iterator[None]:
        """A failure in here reaches all ranks, and the old strategy comes back."""
        try:
            with self.cluster.step(step):
                yield
        except BaseException:
            if self.cluster.rank == MAIN_RANK:
                self._output.restore()
            self.cluster.close()
            raise

    def _check_sources(self) -> None:
        config = self.config
        self._output.check_apart(config.load_checkpoint, config.src_strategy_path_or_dir)

    def _check_shared_disk(self) -> None:
        """See that all nodes share the output dir: a file that the main rank makes must be there for all."""
        if len(set(self.cluster.nodes)) == 1:
            return
        token = self.cluster.gather("token", secrets.token_hex(8))[MAIN_RANK]
        probe = self._output.root / f".shared-disk-{token}"
        if self.cluster.rank == MAIN_RANK:
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
        self.cluster.barrier("probe made")
        seen = self.cluster.gather("probe seen", probe.exists())
        if self.cluster.rank == MAIN_RANK:
            probe.unlink()
        if not all(seen):
            blind = [rank for rank, sees in enumerate(seen) if not sees]
            raise ConfigError(
                f"the output dir {self._output.root} is not shared by all nodes: ranks {blind[:16]} do not see what "
                f"rank {MAIN_RANK} writes. Put output_dir on a shared disk, or convert offline: run once with "
                "only_save_strategy: True, collect the strategy files of all nodes in one folder, then\n  "
                f"mindformers-ckpt transform --src_checkpoint {self.config.load_checkpoint} "
                f"--src_strategy {self.config.src_strategy_path_or_dir or None} --dst_checkpoint_dir DIR "
                "--dst_strategy FOLDER\nand copy each node the rank_<n> folders of its ranks"
            )

    def _live_strategy(self) -> Strategy:
        """The strategy of this job; with a pipeline the files of all ranks are merged into one (guide)."""
        if not self._is_parallel:
            return Strategy.complete()
        own = self.strategy_dir / rank_file_name(self.cluster.rank)
        written = self.cluster.gather("strategy written", own.is_file())
        if not any(written):
            return Strategy.complete()  # data parallel only: MindSpore saves no strategy, every rank is whole
        lacking = [rank for rank, there in enumerate(written) if not there]
        if lacking:
            raise PlanError(f"ranks {lacking[:16]} wrote no strategy to {self.strategy_dir}, the others did")
        if self.cluster.rank == MAIN_RANK:
            strategy = read_strategy(self.strategy_dir)
            if len(strategy.stages) > 1:
                merge_strategies(self.strategy_dir, self.strategy_dir / MERGED_FILE)
        self.cluster.barrier("strategy merged")
        return read_strategy(self.strategy_dir)

    def _weights_for(self, target: Strategy) -> Path | None:
        """The folder of the re-sliced checkpoint, None when the source can be loaded as it is."""
        if not self.config.auto_trans_ckpt:
            return None
        reslicing = Reslicing(self.config, self.cluster, self._output, target)
        return reslicing.run()

    def _read(self, folder: Path | None, network: Cell, optimizer: Cell | None) -> dict[str, Any]:
        from mindformers_ckpt.auto import weights

        file = self._own_file(folder)
        for_training = self.config.run_mode in ("train", "finetune")
        cells = [network] if optimizer is None or not for_training else [network, optimizer]
        names = None if for_training else weights.wanted_names(network, None)
        loaded = weights.parameters_of(read_file(file, names))
        weights.check_shapes(cells, loaded, self._advice())
        weights.load_into(cells, loaded)
        log.info("rank %d: %d parameters loaded from %s", self.cluster.rank, len(loaded), file)
        return loaded

    def _own_file(self, folder: Path | None) -> Path:
        rank = self.cluster.rank
        source = find_source(folder or self.config.load_checkpoint, None if folder else self.config.step_file)
        files = source.by_rank.get(0 if set(source.by_rank) == {0} else rank)
        if files is None:
            raise PlanError(f"{source.root} has no folder rank_{rank} for this rank. {self._advice()}")
        if len(files) > 1:
            raise PlanError(f"{source.root} holds several files; name the one to load, or set auto_trans_ckpt: True")
        return files[0]

    def _advice(self) -> str:
        if self.config.auto_trans_ckpt:
            return "is it the checkpoint of this model, and its strategy the right one?"
        return (
            "where it was saved under another parallel strategy set auto_trans_ckpt: True, and "
            "src_strategy_path_or_dir to the strategy of a sharded checkpoint"
        )


def load_checkpoint(
    config: Config | str | os.PathLike[str],
    network: Cell,
    optimizer: Cell | None = None,
    compile: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """All in one call: prepare, compile the network, load. `config` is a Config or the path of a yaml."""
    hook = CheckpointHook(config if isinstance(config, Config) else Config.from_yaml(config))
    hook.prepare(network)
    if compile is not None:
        compile()
    return hook.load(network, optimizer)


def _show_log() -> None:
    """Show the library's progress in the worker's log unless the program has set up logging itself."""
    if not log.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
