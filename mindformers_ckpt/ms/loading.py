"""The way that the weights of a rank take into its parameters: its own file, a re-sliced one, or parts of others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.engine.into_memory import Fill, fill_arrays
from mindformers_ckpt.engine.whole_files import read_files
from mindformers_ckpt.errors import CheckpointError, PlanError
from mindformers_ckpt.formats import TensorSpec, read_header
from mindformers_ckpt.job import MAIN_RANK
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.config import Config
from mindformers_ckpt.job.direct import read_direct
from mindformers_ckpt.job.find import find_checkpoint
from mindformers_ckpt.job.modelarts import Exchange
from mindformers_ckpt.job.names import names_of_all
from mindformers_ckpt.job.output_dir import OutputDir
from mindformers_ckpt.job.own_files import OwnFiles, find_own_files
from mindformers_ckpt.job.remote_reslice import RemoteReslicing
from mindformers_ckpt.job.reslice import Reslicing
from mindformers_ckpt.job.sharing.reads import filling
from mindformers_ckpt.log import log
from mindformers_ckpt.look.verify_files import verify_files
from mindformers_ckpt.ms import live, weights
from mindformers_ckpt.planning.build import Slices, compare_slices
from mindformers_ckpt.planning.missing import Missing, missing_names
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.planning.rank_plan import RankPlan
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.strategy.files import read_strategy
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.words import shortened

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Loading:
    """One load of a job. All ranks make one and call `load`.

    Attributes:
        target: the strategy of the job, complete weights where every rank is whole.
        whole_target: makes the strategy of the whole job on this rank, None where it cannot be told; asked where
            `target` may be that of the main rank alone.
        source: what has been looked at before, if anything.
        own_files: those of this rank, if they have been found before.
    """

    config: Config
    cluster: Cluster
    output: OutputDir
    exchange: Exchange | None
    target: Strategy
    whole_target: Callable[[], Strategy | None]
    parameters: weights.Parameters
    source: Checkpoint | None
    own_files: OwnFiles | None
    transformed: bool = False
    _said: tuple[str, ...] = ()  # remarks of a plan, which are in the log already

    def load(self) -> dict[str, Any]:
        """Load this rank's parameters; all that was loaded, by name. `transformed`: whether there is a new result."""
        if self.config.verify_checkpoint:
            self._verify()
        if not self.config.auto_trans_ckpt:
            loaded = self._load_own()
        elif self.config.auto_trans_save:
            return self._load_resliced()
        else:
            own = self._own_plan()
            loaded = self._read(None) if own is None else self._read_direct(own)
        self.cluster.barrier("loaded")
        return loaded

    def _own_plan(self) -> RankPlan | None:
        reslicing = self._reslicing()
        if self.cluster.rank != MAIN_RANK:  # these look at their parameters while they wait for its plan
            _ = self._own, self.parameters.memory
        return reslicing.own_plan()

    @cached_property
    def _own(self) -> dict[str, tuple[int, ...]]:
        """The shapes of this rank's parameters, by name."""
        return weights.own_shapes(self.parameters)

    def _verify(self) -> None:
        """Compare the files with what is recorded of them, each by one rank. Raises FormatError on all ranks."""
        if self.config.has_remote_source or self.exchange is not None:
            if self.cluster.rank == MAIN_RANK:
                log.warning("verify_checkpoint: files of an object storage are not checked; verify them before")
            return
        if self.config.auto_trans_ckpt:
            found = find_checkpoint(self.config).files if self.cluster.rank == MAIN_RANK else []
            told = self.cluster.gather("files to verify", [str(path) for path in found])[MAIN_RANK]
            paths, is_own = [Path(path) for path in told], False
        else:
            own = self._found_files()
            paths, is_own = list(own.files), own.sharded
        share = paths if is_own else paths[self.cluster.rank :: self.cluster.size]
        unrecorded = verify_files(share, self.cluster.check)
        if unrecorded:
            log.warning(
                "verify_checkpoint: nothing is recorded of %d of %d files that rank %d looked at, which were not "
                "checked (%s); transform --hash and save_checkpoint(crc_check=True) record it",
                *(len(unrecorded), len(share), self.cluster.rank, unrecorded[0]),
            )
        self.cluster.barrier("verified")

    def _reslicing(self) -> Reslicing:
        names = self._names()
        return Reslicing(self.config, self.cluster, self.output, self.target, names, self.source, self._check_plan)

    def _names(self) -> frozenset[str] | None:
        """The parameters that any rank of the job wants, None for all that the source has. All ranks call it."""
        if self.config.for_training:
            return None
        named = self.target.names()
        return named | names_of_all(self.cluster, self.parameters.keys() - named)

    def _load_resliced(self) -> dict[str, Any]:
        reslicing = self._reslicing()
        remote = self.exchange and RemoteReslicing(reslicing, self.exchange)
        with (remote or reslicing).resliced() as folder:
            self.transformed = folder is not None
            return self._read(folder)

    def _load_own(self) -> dict[str, Any]:
        """Load the files as they are; where they do not hold all that is there for this rank, by plan."""
        own = self._found_files()
        lacking = self.cluster.gather("parameters lacking", self._is_lacking(own))
        told = self._compare(own, any(lacking)).name if self.cluster.rank == MAIN_RANK else None
        if self.cluster.gather("slices", told)[MAIN_RANK] == Slices.SHARES.name:
            return self._load_shares()
        if not own.files:
            raise PlanError(f"{self.config.load_checkpoint} has no file for rank {self.cluster.rank}; {self._advice()}")
        return self._read(None)

    def _is_lacking(self, own: OwnFiles) -> bool:
        if not own.sharded or self.cluster.size == 1:
            return False
        return not own.files or bool(self._own.keys() - own.names())

    def _compare(self, own: OwnFiles, any_lacking: bool) -> Slices:
        """What the files of all ranks hold beside what the job needs. Raises PlanError for another strategy."""
        is_given = bool(self.config.src_strategy_path_or_dir) or own.brings_strategy
        is_known = is_given and not self.target.is_complete
        if not own.sharded or not (any_lacking or is_known):
            return Slices.SAME
        files = find_checkpoint(self.config)
        try:
            source, target = self._shares()
            if compare_slices(source, target) is not Slices.OTHER:
                return compare_slices(source, target)
            strategies = f"({source.strategy.describe()}) than this job's ({target.describe()})"
            raise PlanError(f"{files.root} was saved under another strategy {strategies}; set auto_trans_ckpt: True")
        except CheckpointError as error:
            if is_known or not _are_alike(files.by_rank):
                raise type(error)(f"{error}; {self._advice()}") from error
            return Slices.SAME  # whole on every rank, as data parallel jobs save them: other ranks hold no more

    def _shares(self, names: frozenset[str] | None = None) -> tuple[Checkpoint, Strategy]:
        """The files of all ranks under the strategy they were saved under, and the strategy of the job.

        `names` are the tensors to look at, beside those of the strategy; by default those of this rank's network.
        """
        target = self.whole_target()
        if target is None:
            raise PlanError("the strategy of the whole job is not known here")
        given = self.config.src_strategy_path_or_dir
        files = find_checkpoint(self.config)
        wanted = self.parameters.keys() if names is None else names
        looked_at = None if self.config.for_training else target.names().union(wanted)
        own = files.own_strategy
        return Checkpoint(files, own or (read_strategy(given) if given else target), looked_at), target

    def _load_shares(self) -> dict[str, Any]:
        names = self._names()
        reslicing = Reslicing(self.config, self.cluster, self.output, self.target, check=self._check_plan)
        if self.cluster.rank == MAIN_RANK:
            source, target = self._shares(names)
            log.info(
                "the files of %s hold each a part of what their ranks need (redundancy was removed when they were "
                "saved, or files are lost): every rank reads the rest from those of others",
                source.files.root,
            )
            reslicing = replace(reslicing, target=target, found=source)
        own = reslicing.own_plan()
        assert own is not None  # they are not the same slices
        return self._read_direct(own)

    def _found_files(self) -> OwnFiles:
        """This rank's files of the source as it is. All ranks call it."""
        if self.own_files is None:
            self.own_files = find_own_files(self.config, self.cluster)
        return self.own_files

    def _read(self, folder: Path | None) -> dict[str, Any]:
        """Load from this rank's file of a result, or its files of the source."""
        if folder is None:
            own = self._found_files()
        else:
            found = find_source(folder).by_rank
            own = OwnFiles(found[0 if set(found) == {0} else self.cluster.rank])
        wanted = None if self.config.for_training else self.parameters
        names: dict[Path, set[str]] = {}
        for file in own.files:
            held = {name for name in own.names_in(file) if wanted is None or name in wanted}
            twice = sorted(held.intersection(chain(*names.values())))
            if twice:
                raise PlanError(f"{file.parent} holds several checkpoints, {twice[0]} is in two; name the file")
            names[file] = held
        fill = self._fill() if folder is None else fill_arrays
        is_shared = not own.sharded and self._shares_node
        tensors = read_files(names, self.cluster.check, is_shared=is_shared, fill=fill, given=self._own_memory)
        return self._put(weights.tensors_of(tensors, self.parameters), own.files[0])

    def _fill(self) -> Fill:
        """What reads the source: all ranks use it once, and those that need the same bytes read them together."""
        root = Path(os.path.abspath(self.config.load_checkpoint))
        return filling(self.cluster, root, is_on=self.config.share_reads != "off")

    def _own_memory(self, specs: Sequence[TensorSpec]) -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
        """Memory of the network that tensors are read into; none where the load is going to be refused."""
        return {} if self._missing(spec.name for spec in specs).required else weights.own_memory(self.parameters, specs)

    @property
    def _shares_node(self) -> bool:
        """Whether other ranks of this node may read the same files."""
        return len(self.cluster.node_ranks) > 1

    def _read_direct(self, own: RankPlan) -> dict[str, Any]:
        if not self.config.for_training:
            own = own.only(self.parameters)  # what other stages want has no place here
        for warning in own.plan.warnings if self.cluster.rank == MAIN_RANK else ():
            log.warning("%s", warning)
        tensors = read_direct(
            own.plan,
            self.cluster.check,
            own.headers,
            is_shared=self._shares_node,
            fill=self._fill(),
            given=self._own_memory,
        )
        return self._put(weights.tensors_of(tensors, self.parameters), self.config.load_checkpoint)

    def _put(self, loaded: Mapping[str, Any], origin: object) -> dict[str, Any]:
        """Set the parameters of the network, and of the optimizer; all that was loaded, by name."""
        missing = self._missing(loaded)
        weights.check_fit(self.parameters, loaded, self._advice(), missing.required)
        held = weights.load_into(self.parameters, loaded)
        weights.check_loaded(self.parameters, loaded)
        if self.cluster.rank == MAIN_RANK:
            self._report(missing, loaded)
        log.info("rank %d: %d parameters loaded from %s", self.cluster.rank, len(held), origin)
        return held

    def _missing(self, held: Iterable[str]) -> Missing:
        return missing_names(self._own.keys(), set(held), self.config.allow_missing)

    def _check_plan(self, plan: Plan) -> None:
        """Before anything is written: this rank's boxes are as its parameters are, and all are there."""
        self._said = plan.warnings
        files = {target.rank: target for target in plan.targets}
        specs = files[min(self.cluster.rank, max(files))].tensors  # whole weights are alike on all ranks
        shapes = weights.shape_faults({spec.name: spec.shape for spec in specs}, self._own)
        weights.raise_unfit(shapes, (), self._missing(spec.name for spec in specs).required, self._advice())

    def _report(self, missing: Missing, loaded: Mapping[str, Any]) -> None:
        """What the user should know of a load that went well."""
        for note in missing.notes:
            if note not in self._said:
                log.warning("%s", note)
        if missing.allowed:
            names = shortened(missing.allowed, 20)
            log.warning("%d parameters keep their initial values (allow_missing): %s", len(missing.allowed), names)
        if self.config.for_training and "scale_sense" in loaded and "scale_sense" not in self._own:
            log.warning(
                "scale_sense, the loss scale, is a parameter of the train cell, which is not what was given to load: "
                "the loss scale starts anew"
            )
        if not self.config.for_training and weights.shares_stages(self.parameters):
            log.warning(
                "stages of the pipeline share parameters: call mindspore.parallel.sync_pipeline_shared_parameters("
                "network) before the first prediction"
            )

    def _advice(self) -> str:
        if live.saves_whole_optimizer_shards():
            return (
                "optimizer_weight_shard_aggregated_save is True: the strategy then says that optimizer shards are "
                "whole, which they are not in this job; set it to False."
            )
        if self.config.auto_trans_ckpt:
            return "is it the checkpoint of this model, and its strategy the right one?"
        return (
            "where it was saved under another parallel strategy set auto_trans_ckpt: True, and "
            "src_strategy_path_or_dir to the strategy of a sharded checkpoint."
        )


def _are_alike(by_rank: Mapping[int, Sequence[Path]]) -> bool:
    """Whether the files of all ranks hold the same names."""
    names = ({name for file in files for name in read_header(file).tensors} for files in by_rank.values())
    first = next(names)
    return all(held == first for held in names)
