"""Which files of a checkpoint a rank loads as they are: each rank looks into its own folder, then all compare.

So a job of a thousand ranks lists a thousand folders, not a million, and its nodes need not share a disk. The choice
is that of `sources.rank_folders`, made from the names that the ranks share.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.errors import FormatError, PlanError
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.job import MAIN_RANK
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.cluster.messages import name_ranks
from mindformers_ckpt.job.config import Config
from mindformers_ckpt.job.find import find_checkpoint
from mindformers_ckpt.log import log
from mindformers_ckpt.sources import checkpoint2
from mindformers_ckpt.sources.listing import Listing
from mindformers_ckpt.sources.rank_folders import choose, choose_to_resume, recorded_file
from mindformers_ckpt.sources.source import SUFFIXES, TORCH_SUFFIXES, Kind, Source

_SHARED = 100  # names of files that a rank shares: the last ones
_TEXT = 500  # characters of what is wrong with a file


class OwnFiles(NamedTuple):
    """The files of this rank.

    Attributes:
        files: empty where the rank has no file of the step that the others are at.
        source: the complete weights that they are of; None for those that are this rank's alone.
        brings_strategy: whether the checkpoint has its own layouts (checkpoint 2.0).
    """

    files: tuple[Path, ...]
    source: Source | None = None
    brings_strategy: bool = False

    @property
    def sharded(self) -> bool:
        """Whether they are this rank's alone."""
        return self.source is None

    def names(self) -> set[str]:
        """The names of the tensors that are read from them. Raises FormatError for damaged files."""
        return {name for file in self.files for name in self.names_in(file)}

    def names_in(self, file: Path) -> list[str]:
        """The names of the tensors that are read from one of them."""
        held = read_header(file).tensors
        return [name for name in held if self.source is None or self.source.assigns(name, file)]


def find_own_files(config: Config, cluster: Cluster) -> OwnFiles:
    """The files of this rank in a job's checkpoint; all ranks call it.

    Raises PlanError on all ranks when no rank has a file, their files are of different runs, epochs and steps, or the
    checkpoint is a Hugging Face model.
    """
    if cluster.size == 1:
        return _only_rank(config, cluster)
    root = Path(config.load_checkpoint).absolute()
    own, is_sharded = _own_folder(root, cluster.rank)
    names: list[str] | None = None
    recorded = None
    if is_sharded:
        files = [] if own is None else Listing(own).weight_files()
        names = [file.name for file in files[-_SHARED:]]
        found = None if own is None or config.resume_training is not True else recorded_file(own, files)
        recorded = None if found is None else found.name
    told = cluster.gather("own files", {"names": names, "recorded": recorded})
    if all(about["names"] is None for about in told):
        source = _mindspore(config)
        if cluster.rank == MAIN_RANK:
            _report(source, cluster)
        if source.sharded:
            brings = source.own_strategy is not None
            return OwnFiles(source.by_rank.get(cluster.rank, ()), brings_strategy=brings)
        return OwnFiles(source.by_rank[0], source)
    held = {rank: [root / f"rank_{rank}" / name for name in about["names"] or ()] for rank, about in enumerate(told)}
    if config.resume_training is True:
        recorded_files = {
            rank: next((file for file in held[rank] if file.name == about["recorded"]), None)
            for rank, about in enumerate(told)
        }
        source = choose_to_resume(root, held, recorded_files, lambda files: _unreadable(own, files, cluster))
    else:
        source = choose(root, held, config.step_file)
    if cluster.rank == MAIN_RANK:
        _report(source, cluster)
    chosen = source.by_rank.get(cluster.rank, ())
    return OwnFiles(tuple(own / file.name for file in chosen) if own is not None else ())


def holds_nothing(path: str, cluster: Cluster) -> bool:
    """Whether a folder is there, but no rank finds a checkpoint in it. All ranks call it.

    Raises PlanError on all ranks when some find one and the main rank does not.
    """
    root = Path(path)
    here = root.is_dir() and not _has_weights(root, cluster.rank, everywhere=cluster.rank == MAIN_RANK)
    told = cluster.gather("checkpoint is empty", here)
    if told[MAIN_RANK] and not all(told):
        others = [rank for rank, empty in enumerate(told) if not empty]
        raise PlanError(f"{path} holds no checkpoint on the node of rank {MAIN_RANK}, but one for {name_ranks(others)}")
    return bool(told[MAIN_RANK])


def _own_folder(root: Path, rank: int) -> tuple[Path | None, bool]:
    """The folder of a rank, None when there is none; and whether the checkpoint has rank folders at all."""
    own = root / f"rank_{rank}"
    if own.is_dir():
        if rank == MAIN_RANK:
            _ = Listing(root).rank_folders  # which raises where two are of one rank
        return own, True
    folders = Listing(root).rank_folders if root.is_dir() else {}
    if set(folders) == {0}:
        return folders[0], True  # complete weights, as one card saves them
    return folders.get(rank), bool(folders)


def _only_rank(config: Config, cluster: Cluster) -> OwnFiles:
    """The files of the only rank of a job, which may look into all folders.

    Raises PlanError where ranks of the source have no file: there is nobody to read their parts.
    """
    source = _mindspore(config)
    _report(source, cluster)
    source.raise_absent()
    return OwnFiles(source.by_rank.get(MAIN_RANK, ()), None if source.sharded else source)


def _mindspore(config: Config) -> Source:
    source = find_checkpoint(config)
    if source.kind is Kind.HUGGING_FACE:
        raise PlanError(
            f"{config.load_checkpoint} is a Hugging Face model: set auto_trans_ckpt: True to have it converted at "
            "load, or convert it with mindformers-ckpt convert"
        )
    return source


def _unreadable(own: Path | None, files: Mapping[int, Path], cluster: Cluster) -> str | None:
    """What keeps one of the files from being read: each rank looks at that in its own folder."""
    file = files.get(cluster.rank)
    faults = cluster.gather("is readable", None if own is None or file is None else _fault_of(own / file.name))
    return next((str(fault) for fault in faults if fault is not None), None)


def _fault_of(file: Path) -> str | None:
    try:
        read_header(file)
    except FormatError as error:
        return str(error)[:_TEXT]
    return None


def _report(source: Source, cluster: Cluster) -> None:
    for warning in source.warnings:
        log.warning("%s", warning)
    lost = [rank for rank in range(cluster.size) if source.sharded and rank not in source.by_rank]
    if lost:
        reason = next(iter(source.absent.values()), "")
        log.warning("%s has no file for %s (%s)", source.root, name_ranks(lost), reason)


def _has_weights(root: Path, rank: int, *, everywhere: bool) -> bool:
    """Whether a checkpoint's file is in the folder, or in a rank's folder: the own one, or any."""
    listing = Listing(root)
    if checkpoint2.is_checkpoint(listing):
        return True
    folders = listing.rank_folders
    others = folders.values() if everywhere else [folders[rank]] if rank in folders else []
    listings = [listing, *map(Listing, others)]
    return any(found.weight_files((*SUFFIXES, *TORCH_SUFFIXES)) for found in listings)
