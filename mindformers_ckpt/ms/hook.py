"""The loader hook: compares the checkpoint's strategy with the job's, re-slices when they differ, loads.

hook = CheckpointHook.from_yaml("finetune.yaml")
hook.prepare()                      # before the network is compiled
...
params = hook.load(network, optimizer)
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.errors import ConfigError, PlanError, StrategyError, StrategySaved
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.job import MAIN_RANK
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.config import Config
from mindformers_ckpt.job.hyperparameters import from_command_line
from mindformers_ckpt.job.modelarts import Exchange, check_nodes, fetch_sources, nodes_by_number
from mindformers_ckpt.job.output_dir import OutputDir
from mindformers_ckpt.job.own_files import OwnFiles, find_own_files, holds_nothing
from mindformers_ckpt.job.reslice import Reslicing
from mindformers_ckpt.job.settings import check_alike
from mindformers_ckpt.job.shared_disk import not_shared, owners_of, wait_for_files
from mindformers_ckpt.log import log
from mindformers_ckpt.ms import live, weights
from mindformers_ckpt.ms.loading import Loading
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.strategy.files import MERGED_FILE, rank_file_name, read_strategy, strategy_of_job
from mindformers_ckpt.strategy.model import Strategy

if TYPE_CHECKING:
    from mindspore.nn import Cell


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
        self._owner = MAIN_RANK
        self._is_shared = True  # the output dir, by all nodes
        self._exchange: Exchange | None = None  # in its place, where an object storage is set
        self._settled = True  # no rank is compiling, which would write its strategy
        self._live: live.LiveFile
        self._source: Checkpoint | None = None  # what `prepare` has looked at
        self._own_files: OwnFiles | None = None  # and has found
        self._dry_run = False  # one process plays a rank, to compile
        _show_log()

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> CheckpointHook:
        """Read the keys from a training yaml; `overrides` win. Raises ConfigError listing all faults."""
        return cls(Config.from_yaml(path, overrides))

    @classmethod
    def from_args(cls, argv: Sequence[str] | None = None, yaml: str | os.PathLike[str] | None = None) -> CheckpointHook:
        """Read the hook's options of a command line (`sys.argv`) over the keys of a training yaml.

        ModelArts gives a job's hyperparameters to the training script in this way: `--auto_trans_ckpt=True`,
        or `--auto_trans_ckpt True`. Other options are left to the script. Raises ConfigError listing all faults.
        """
        options = from_command_line(argv)
        return cls(Config.from_mapping(options) if yaml is None else Config.from_yaml(yaml, options))

    @property
    def cluster(self) -> Cluster:
        """The ranks of the job. Raises ConfigError before `prepare`."""
        if self._cluster is None:
            raise ConfigError("call hook.prepare() before the network is compiled, then hook.load()")
        return self._cluster

    def prepare(self, network: Cell | None = None) -> None:
        """Get ready before the network is compiled: check, clear, have MindSpore save the live strategy.

        `network` is needed only when it is an `AutoParallel` cell. Call it after
        `mindspore.communication.init()`; in MindSpore's scheduler process it does nothing, and `init` does not return.
        """
        if os.environ.get("MS_ROLE") == "MS_SCHED" and self.config.use_parallel:
            log.info("this process is MindSpore's scheduler: the ranks load the weights")
            return
        self._dry_run = self.config.use_parallel and live.dry_run_rank() is not None
        env = os.environ if self.config.use_parallel else {}
        self._cluster = Cluster.from_environment(self.config.transform_timeout, env, self._output.root)
        if self.cluster.rank == MAIN_RANK and (nothing := self.config.nothing_to_load):
            log.warning("%s", nothing)
        self._settled, self._source, self._own_files = True, None, None
        with self._together("prepare"):
            check_alike(self.config, self.cluster, self._reslices)
            self._owner = self._find_owner()
            self.config = fetch_sources(self.config, self.cluster, self._output.root, self._owner)
            self._skip_first_start()
            self._check_sources()
            self.cluster.barrier("checked")
            if self.cluster.rank == self._owner and not self._dry_run:
                if self._clears:
                    self._output.clear()
                else:
                    self._output.restore()  # what a job that died has left
            self.cluster.barrier("cleared")
            self._settled = not self._is_parallel
            self._live = live.LiveFile(self.strategy_dir, live.dry_run_rank() or self.cluster.rank)
            if self._is_parallel or self._dry_run:
                self._live.save_at_compile(network)

    def declare(self, layouts: Mapping[str, Layout], stage: int = 0) -> None:
        """Write the live strategy from declared layouts, for a network whose parallelism is written by hand.

        Those of the weights are enough: `load` adds the states of the optimizer that it is given (adam_m.X, moment1.X,
        … of X), which are cut like their weights, and warns of states that have another shape.
        """
        with self._together("declare"):
            self.cluster.check()
            self._live.declare(layouts, stage)

    def load(self, network: Cell, optimizer: Cell | None = None) -> dict[str, Any]:
        """Load this rank's weights into the network (and the optimizer), and return them by name.

        The optimizer's state is loaded in training, unless `resume_training` is set to False. A parameter of the
        network that a checkpoint of this model should have, and that is not in it, is an error unless `allow_missing`
        names it. A load that is refused leaves the network as it is; one that fails while it reads leaves old and new
        values side by side, which is no network to train. Raises StrategySaved where `only_save_strategy` is set: the
        strategy is complete then, nothing is loaded, and the trainer is to stop; it never ends the process.
        """
        if self._dry_run:
            return self._end_dry_run()
        with self._together("load"):
            cells = self._cells(network, optimizer)
            parameters = weights.Parameters(cells)
            target = self._live_strategy(cells, optimizer, parameters)
            loaded: dict[str, Any] = {}
            transformed = False
            if self.config.load_checkpoint and not self.config.only_save_strategy:
                loading = Loading(
                    self.config,
                    self.cluster,
                    self._output,
                    self._exchange,
                    target,
                    self._whole_strategy,
                    parameters,
                    self._source,
                    self._own_files,
                )
                loaded = loading.load()
                transformed = loading.transformed
            if self._clears and self.cluster.rank == self._owner:
                self._output.keep(clear_transformed=self._reslices and not transformed)
            self.cluster.barrier("done")
            self._source = None  # headers of thousands of files, which the training need not carry
        self.cluster.close()
        if self.config.only_save_strategy:
            raise StrategySaved(f"only_save_strategy: the strategy is in {self.strategy_dir}; the job stops here")
        return loaded

    def _end_dry_run(self) -> dict[str, Any]:
        """A dry run compiles for one rank, and has no weights. Raises StrategyError when it saved no strategy."""
        if not self._live.is_written:
            raise StrategyError(
                f"the dry run (MS_SIMULATION_LEVEL) wrote no strategy to {self._live.path}: compile the network "
                "between hook.prepare() and hook.load()"
            )
        log.info("dry run: the strategy of rank %d is in %s; nothing is loaded", self._live.rank, self._live.path)
        if self.config.only_save_strategy:
            raise StrategySaved(f"only_save_strategy: the strategy is in {self._live.path}; the job stops here")
        return {}

    @property
    def _is_parallel(self) -> bool:
        return self.config.use_parallel and self.cluster.size > 1

    @property
    def _reslices(self) -> bool:
        """Whether the job compares and re-slices: then its ranks need one shared output dir."""
        config = self.config
        return config.auto_trans_ckpt and bool(config.load_checkpoint) and not config.only_save_strategy

    @property
    def _clears(self) -> bool:
        return self.config.only_save_strategy or self._reslices

    @contextmanager
    def _together(self, step: str) -> Iterator[None]:
        """A failure in here reaches all ranks, and the old strategy comes back.

        The rank that cleared puts it back, and if that one is dead, whoever survived it.
        """
        try:
            with _without_cycles(), self.cluster.step(step), self._output.explained():
                yield
        except BaseException:
            try:
                if self._clears:
                    self._output.restore(settled=self._settled)
            except OSError as error:
                log.warning("the old strategy is not put back yet, the next job will do it: %s", error)
            self.cluster.close()
            if self._exchange is not None and self.cluster.rank == MAIN_RANK:
                self._exchange.drop()
            raise

    def _find_owner(self) -> int:
        """The rank that clears the output dir as this rank sees it.

        Raises ConfigError on the main rank, which tells the others, if it must be shared but is not.
        """
        if not self._clears and not self.config.has_remote_source:
            return MAIN_RANK
        hosts = self.cluster.nodes
        if self.config.remote_save_url:
            self.cluster.nodes = nodes_by_number(self.cluster.size, self.config.npu_num_per_node)
        if len(set(self.cluster.nodes)) == 1 and len(set(hosts)) == 1:
            self._check_members()
            return MAIN_RANK
        owners = owners_of(self._output.root, self.cluster)
        if self.config.remote_save_url and self._clears and set(owners) != {MAIN_RANK}:
            check_nodes(self.config.npu_num_per_node, hosts, owners)
            self._is_shared = False
            self._exchange = Exchange.open(self.config, self.cluster)
            return owners[self.cluster.rank]
        self.cluster.nodes = hosts
        if self._reslices and self.cluster.rank == MAIN_RANK and set(owners) != {MAIN_RANK}:
            raise ConfigError(not_shared(self.config, self._output.root, self.cluster.nodes, owners))
        self._is_shared = all(owner == MAIN_RANK for owner in owners)
        self.cluster.barrier("shared disk")  # what rank 0 has to say of it comes first
        self._check_members()
        return owners[self.cluster.rank]

    def _check_members(self) -> None:
        """Where weights are read from a folder that another rank names, that must be a rank of this job."""
        if self._reslices and not self.config.remote_save_url:
            self.cluster.check_members()

    def _check_sources(self) -> None:
        """Find out what is wrong with the source before anything is cleared, and the network compiled."""
        config = self.config
        if self._reslices:
            reslicing = Reslicing(self.config, self.cluster, self._output, Strategy.complete())
            if self.cluster.rank == MAIN_RANK:
                self._output.check_apart(config.load_checkpoint, config.src_strategy_path_or_dir)
            reslicing.look()
            if self.cluster.rank == MAIN_RANK:
                source = self._source = reslicing.source
                source.tensors()
                files = [file for files in source.files.by_rank.values() for file in files]
                self._output.check_apart(config.load_checkpoint, config.src_strategy_path_or_dir, files)
        elif config.only_save_strategy:
            self._output.check_apart(config.load_checkpoint, config.src_strategy_path_or_dir, strategy_only=True)
        elif config.load_checkpoint:
            self._own_files = find_own_files(config, self.cluster)

    def _skip_first_start(self) -> None:
        """Start from the network's values where there is nothing to resume from yet (MindFormers' recovery)."""
        path = self.config.load_checkpoint
        if self.config.resume_training is not True or not path or not holds_nothing(path, self.cluster):
            return
        if self.cluster.rank == MAIN_RANK:
            log.info(
                "resume_training: True, but %s holds no checkpoint yet: this is a first start, nothing is loaded", path
            )
        self.config = replace(self.config, load_checkpoint="")

    def _live_strategy(self, cells: Sequence[Cell], optimizer: Cell | None, loaded: weights.Parameters) -> Strategy:
        """The strategy of this job; with a pipeline the files of all ranks are merged into one (guide).

        States of an optimizer that starts anew belong to it, too: the next job loads them. `loaded` are the parameters
        of the cells.
        """
        if not self._is_parallel:
            return Strategy.complete()
        trained, own = cells, loaded
        if self.config.for_training and optimizer is not None and all(cell is not optimizer for cell in cells):
            trained = [*cells, optimizer]
            own = weights.Parameters(trained)
        self._live.complete(trained, weights.own_shapes(own))
        told = self.cluster.gather("strategy written", [self._live.is_written, weights.are_cut(loaded)])
        self._settled = True
        lacking = [rank for rank, (written, _) in enumerate(told) if not written]
        if len(lacking) == len(told):
            if any(cut for _, cut in told):
                raise live.why_not_written(self._live.path, cells[0])
            return Strategy.complete()  # data parallel only: MindSpore saves no strategy, every rank is whole
        if lacking:
            raise PlanError(f"ranks {lacking[:16]} wrote no strategy to {self.strategy_dir}, the others did")
        if self._exchange is not None:
            return self._exchange.share_strategies(self.strategy_dir)
        if not self._clears or not self._is_shared:
            return self._strategy_of_a_part()
        strategy = None
        if self.cluster.rank == MAIN_RANK:
            files = [self.strategy_dir / rank_file_name(rank) for rank in range(self.cluster.size)]
            wait_for_files(files, check=self.cluster.check)
            strategy = strategy_of_job(self.strategy_dir, self.cluster.size)
        self.cluster.barrier("strategy merged")
        if strategy is not None:
            return strategy
        merged = self.strategy_dir / MERGED_FILE
        return read_strategy(merged) if merged.is_file() else self._live.strategy()

    def _whole_strategy(self) -> Strategy | None:
        """The strategy of the whole job as this rank can tell it, also where it did not have to be merged."""
        if not self._is_parallel or not self._live.is_written:
            return Strategy(({},), self.cluster.size, "whole on every rank")
        return live.whole_strategy(self._live, self.cluster.size)

    def _strategy_of_a_part(self) -> Strategy:
        """What can be done where the folder may hold the files of other jobs, or of one node only."""
        strategy = Strategy.complete()
        if self.cluster.rank == MAIN_RANK:
            try:
                strategy = strategy_of_job(self.strategy_dir, self.cluster.size)
            except StrategyError as error:
                log.info("the strategy files of this job are not merged: %s", error)
        return strategy

    def _cells(self, network: Cell, optimizer: Cell | None) -> list[Cell]:
        """What is loaded into."""
        if optimizer is None or not self.config.for_training:
            return [network]
        if self.config.resume_training is False:
            log.info("resume_training: False: the optimizer starts anew")
            return [network]
        return [network, optimizer]


def load_checkpoint(
    config: Config | str | os.PathLike[str],
    network: Cell,
    optimizer: Cell | None = None,
    compile: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """All in one call: prepare, compile the network, load. `config` is a Config or the path of a yaml.

    With `only_save_strategy` the process ends with exit code 0, as MindFormers' trainer does it; a program that
    wants to go on takes `CheckpointHook`, whose `load` raises StrategySaved.
    """
    hook = CheckpointHook(config if isinstance(config, Config) else Config.from_yaml(config))
    hook.prepare(network)
    if compile is not None:
        compile()
    try:
        return hook.load(network, optimizer)
    except StrategySaved as saved:
        log.info("%s", saved)
        raise SystemExit(0) from None


@contextmanager
def _without_cycles() -> Iterator[None]:
    """Have the interpreter not look for cycles: plans and headers have none, and are many objects."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _show_log() -> None:
    """Show the library's progress in the worker's log unless the program has set up logging itself."""
    if not log.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
