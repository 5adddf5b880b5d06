"""The loader hook: compares the checkpoint's strategy with the job's, re-slices when they differ, loads.

hook = CheckpointHook.from_yaml("finetune.yaml")
hook.prepare()                      # before the network is compiled
...
params = hook.load(network, optimizer)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.engine.reader import read_file
from mindformers_ckpt.errors import CheckpointError, ConfigError, PlanError, StrategyError
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.job import MAIN_RANK
from mindformers_ckpt.job.cluster.cluster import Cluster, RankError
from mindformers_ckpt.job.config import Config
from mindformers_ckpt.job.find import find_checkpoint
from mindformers_ckpt.job.hyperparameters import from_command_line
from mindformers_ckpt.job.modelarts import Exchange, check_nodes, fetch_sources, nodes_by_number
from mindformers_ckpt.job.output_dir import OutputDir
from mindformers_ckpt.job.remote_reslice import RemoteReslicing
from mindformers_ckpt.job.reslice import Reslicing
from mindformers_ckpt.job.shared_disk import not_shared, owners_of, wait_for_files
from mindformers_ckpt.log import log
from mindformers_ckpt.planning.build import holds_same_slices
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.sources.source import Kind
from mindformers_ckpt.strategy.files import MERGED_FILE, merge_strategies, rank_file_name, read_strategy
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
        self._source: Checkpoint | None = None  # what `prepare` has looked at
        self._old_file: tuple[int, int] | None = None  # of the own strategy file before the network is compiled
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
        `mindspore.communication.init()`.
        """
        self._cluster = self._join()
        if self.cluster.rank == MAIN_RANK and (nothing := self.config.nothing_to_load):
            log.warning("%s", nothing)
        self._settled, self._source = True, None
        with self._together("prepare"):
            self._owner = self._find_owner()
            self.config = fetch_sources(self.config, self.cluster, self._output.root, self._owner)
            self._check_sources()
            self.cluster.barrier("checked")
            if self.cluster.rank == self._owner:
                if self._clears:
                    self._output.clear()
                else:
                    self._output.restore()  # what a job that died has left
            self.cluster.barrier("cleared")
            self._settled = not self._is_parallel
            self._old_file = _state_of(self._own_strategy_file)
            if self._is_parallel:
                from mindformers_ckpt.ms import live

                live.save_at_compile(self.strategy_dir, self.cluster.rank, network)

    def declare(self, layouts: Mapping[str, Layout], stage: int = 0) -> None:
        """Write the live strategy from declared layouts, for a network whose parallelism is written by hand."""
        from mindformers_ckpt.ms import live

        with self._together("declare"):
            self.cluster.check()
            live.declare(layouts, self.strategy_dir, self.cluster.rank, stage)

    def load(self, network: Cell, optimizer: Cell | None = None) -> dict[str, Any]:
        """Load this rank's weights into the network (and the optimizer), and return them by name.

        The optimizer's state is loaded in training, unless `resume_training` is set to False.
        With `only_save_strategy` the strategy is completed and the process exits with 0.
        """
        with self._together("load"):
            target = self._live_strategy()
            loaded: dict[str, Any] = {}
            transformed = False
            if self.config.load_checkpoint and not self.config.only_save_strategy:
                cells = self._cells(network, optimizer)
                plan = self._direct_plan(target, cells)
                if plan is not None:
                    loaded = self._read_direct(plan, cells)
                    self.cluster.barrier("loaded")
                else:
                    with self._weights_for(target, cells) as folder:
                        transformed = folder is not None
                        loaded = self._read(folder, cells)
            if self._clears and self.cluster.rank == self._owner:
                self._output.keep(clear_transformed=self._reslices and not transformed)
            self.cluster.barrier("done")
        self.cluster.close()
        self._source = None  # headers of thousands of files, which the training need not carry
        if self.config.only_save_strategy:
            log.info("only_save_strategy: the strategy is in %s; stopping here", self.strategy_dir)
            raise SystemExit(0)
        return loaded

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

    @property
    def _own_strategy_file(self) -> Path:
        return self.strategy_dir / rank_file_name(self.cluster.rank)

    def _join(self) -> Cluster:
        env = os.environ if self.config.use_parallel else {}
        return Cluster.from_environment(self.config.transform_timeout, env)

    @contextmanager
    def _together(self, step: str) -> Iterator[None]:
        """A failure in here reaches all ranks, and the old strategy comes back.

        The rank that cleared puts it back, and if that one is dead, whoever survived it.
        """
        try:
            with self.cluster.step(step):
                try:
                    yield
                except CheckpointError:
                    self._check_others()
                    raise
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

    def _check_others(self) -> None:
        """Raise the failure of another rank, if there was one before: that is the cause of what happened here."""
        try:
            self.cluster.check()
        except RankError as error:
            if error.rank != self.cluster.rank:
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
        return owners[self.cluster.rank]

    def _check_sources(self) -> None:
        """Find out what is wrong with the source before anything is cleared, and the network compiled."""
        config = self.config
        if self._reslices:
            if self.cluster.rank == MAIN_RANK:
                self._output.check_apart(config.load_checkpoint, config.src_strategy_path_or_dir)
                source = self._look_at_source()
                files = [file for files in source.files.by_rank.values() for file in files]
                self._output.check_apart(config.load_checkpoint, config.src_strategy_path_or_dir, files)
            elif not config.auto_trans_save:
                # Every rank will plan for itself, and has nothing to do now. What is wrong the main rank tells.
                with suppress(CheckpointError):
                    self._look_at_source()
        elif config.only_save_strategy:
            self._output.check_apart(config.load_checkpoint, config.src_strategy_path_or_dir, strategy_only=True)
        elif config.load_checkpoint:
            self._own_files(None)

    def _look_at_source(self) -> Checkpoint:
        """Read the headers of the source and its strategy, and keep them for `load`. Raises what `Checkpoint` does."""
        source = Reslicing(self.config, self.cluster, self._output, Strategy.complete()).source()
        source.tensors()
        self._source = source
        return source

    def _live_strategy(self) -> Strategy:
        """The strategy of this job; with a pipeline the files of all ranks are merged into one (guide)."""
        if not self._is_parallel:
            return Strategy.complete()
        is_written = _state_of(self._own_strategy_file) != self._old_file
        written = self.cluster.gather("strategy written", is_written)
        self._settled = True
        if not any(written):
            return Strategy.complete()  # data parallel only: MindSpore saves no strategy, every rank is whole
        lacking = [rank for rank, there in enumerate(written) if not there]
        if lacking:
            raise PlanError(f"ranks {lacking[:16]} wrote no strategy to {self.strategy_dir}, the others did")
        if self._exchange is not None:
            return self._exchange.share_strategies(self.strategy_dir)
        if not self._clears or not self._is_shared:
            return self._strategy_of_a_part()
        strategy = None
        if self.cluster.rank == MAIN_RANK:
            wait_for_files([self.strategy_dir / rank_file_name(rank) for rank in range(self.cluster.size)])
            strategy = self._merge()
        self.cluster.barrier("strategy merged")
        if strategy is not None:
            return strategy
        merged = self.strategy_dir / MERGED_FILE
        return read_strategy(merged if merged.is_file() else self._own_strategy_file)

    def _merge(self) -> Strategy:
        """Read the files of all ranks and merge those of a pipeline. Raises StrategyError if they are not all."""
        strategy = read_strategy(self.strategy_dir)
        if strategy.rank_count != self.cluster.size:
            raise StrategyError(
                f"the strategy in {self.strategy_dir} is for {strategy.rank_count} ranks, but this job has "
                f"{self.cluster.size}"
            )
        if len(strategy.stages) > 1:
            merge_strategies(self.strategy_dir, self.strategy_dir / MERGED_FILE)
        return strategy

    def _strategy_of_a_part(self) -> Strategy:
        """What can be done where the folder may hold the files of other jobs, or of one node only."""
        strategy = Strategy.complete()
        if self.cluster.rank == MAIN_RANK:
            try:
                strategy = self._merge()
            except StrategyError as error:
                log.info("the strategy files of this job are not merged: %s", error)
        return strategy

    def _direct_plan(self, target: Strategy, cells: Sequence[Cell]) -> Plan | None:
        """With `auto_trans_save: False` what this rank reads from the source, None when it is loaded as it is."""
        if self.config.auto_trans_save or not self.config.auto_trans_ckpt:
            return None
        return self._reslicing(target, cells).own_plan()

    def _reslicing(self, target: Strategy, cells: Sequence[Cell]) -> Reslicing:
        from mindformers_ckpt.ms import weights

        names = None if self._for_training else target.names() | weights.wanted_names(cells)
        return Reslicing(self.config, self.cluster, self._output, target, names, self._source)

    @contextmanager
    def _weights_for(self, target: Strategy, cells: Sequence[Cell]) -> Iterator[Path | None]:
        """The folder of the re-sliced checkpoint, None when the source is loaded as it is."""
        reslicing = self._reslicing(target, cells)
        if self.config.auto_trans_ckpt:
            remote = self._exchange and RemoteReslicing(reslicing, self._exchange)
            with (remote or reslicing).resliced() as folder:
                yield folder
            return
        if self.cluster.rank == MAIN_RANK and self.config.src_strategy_path_or_dir and not target.is_complete:
            source = reslicing.source()
            if source.files.sharded and not holds_same_slices(source, target):
                raise PlanError(
                    f"{source.files.root} was saved under another strategy ({source.strategy.describe()}) than this "
                    f"job's ({target.describe()}); set auto_trans_ckpt: True"
                )
        yield None
        self.cluster.barrier("loaded")

    @property
    def _for_training(self) -> bool:
        return self.config.run_mode in ("train", "finetune")

    def _cells(self, network: Cell, optimizer: Cell | None) -> list[Cell]:
        """What is loaded into."""
        if optimizer is None or not self._for_training:
            return [network]
        if self.config.resume_training is False:
            log.info("resume_training: False: the optimizer starts anew")
            return [network]
        return [network, optimizer]

    def _read(self, folder: Path | None, cells: Sequence[Cell]) -> dict[str, Any]:
        from mindformers_ckpt.ms import weights

        files = self._own_files(folder)
        names = None if self._for_training else weights.wanted_names(cells)
        loaded: dict[str, Any] = {}
        for file in files:
            found = weights.tensors_of(read_file(file, names))
            twice = sorted(found.keys() & loaded.keys())
            if twice:
                raise PlanError(f"{files[0].parent} holds several checkpoints, {twice[0]} is in two; name the file")
            loaded.update(found)
        return self._put(loaded, cells, files[0])

    def _read_direct(self, plan: Plan, cells: Sequence[Cell]) -> dict[str, Any]:
        from mindformers_ckpt.job.direct import read_direct
        from mindformers_ckpt.ms import weights

        for warning in plan.warnings if self.cluster.rank == MAIN_RANK else ():
            log.warning("%s", warning)
        loaded = weights.tensors_of(read_direct(plan, self.cluster.check))
        return self._put(loaded, cells, self.config.load_checkpoint)

    def _put(self, loaded: Mapping[str, Any], cells: Sequence[Cell], origin: object) -> dict[str, Any]:
        """Set the parameters of the network, and of the optimizer; all that was loaded, by name."""
        from mindformers_ckpt.ms import weights

        weights.check_fit(cells, loaded, self._advice())
        parameters = weights.load_into(cells, loaded)
        log.info("rank %d: %d parameters loaded from %s", self.cluster.rank, len(parameters), origin)
        return parameters

    def _own_files(self, folder: Path | None) -> tuple[Path, ...]:
        rank = self.cluster.rank
        source = find_source(folder) if folder is not None else find_checkpoint(self.config)
        if source.kind is Kind.HUGGING_FACE:
            raise PlanError(
                f"{self.config.load_checkpoint} is a Hugging Face model: set auto_trans_ckpt: True to have it "
                "converted at load, or convert it with mindformers-ckpt convert"
            )
        for warning in source.warnings if rank == MAIN_RANK else ():
            log.warning("%s", warning)
        source.raise_absent()
        files = source.by_rank.get(0 if set(source.by_rank) == {0} else rank)
        if files is None:
            raise PlanError(f"{source.root} has no folder rank_{rank} for this rank; {self._advice()}")
        return files

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


def _state_of(file: Path) -> tuple[int, int] | None:
    """What changes when a file is written anew; None when there is no file."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


def _show_log() -> None:
    """Show the library's progress in the worker's log unless the program has set up logging itself."""
    if not log.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
