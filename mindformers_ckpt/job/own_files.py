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
from mindformers_ckpt.sources.rank_folders import choose, last_file, recorded_file
from mindformers_ckpt.sources.source import SUFFIXES, TORCH_SUFFIXES, Kind, Source
from mindformers_ckpt.sources.steps import moments, parse

_SHARED = 100  # names of files that a rank shares: the last ones
_ATTEMPTS = 10  # steps that are tried when the last ones are not whole


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
        held = _to_resume(held, {rank: about["recorded"] for rank, about in enumerate(told)}, cluster)
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
            Listing(root).check_rank_folders()
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


def _to_resume(
    held: Mapping[int, list[Path]], recorded: Mapping[int, str | None], cluster: Cluster
) -> dict[int, list[Path]]:
    """The files to choose among when a job goes on: of the last step that all ranks have saved whole.

    MindFormers' meta.json is believed where it is there. Each rank looks whether its own file is whole.
    """
    by_name = {
        rank: [file for file in files if recorded[rank] in (None, file.name)] for rank, files in held.items() if files
    }
    last = {rank: file for rank, files in by_name.items() if (file := last_file(files)) is not None}
    steps = {None if name is None else name.moment for name in moments(last).values()}
    if len(steps) <= 1 and all(cluster.gather("is whole", _is_whole(last.get(cluster.rank)))):
        return {rank: [last[rank]] if rank in last else [] for rank in held}
    latest = min((name.moment for rank in last if recorded[rank] and (name := parse(last[rank].name))), default=None)
    of_ranks = [
        {name.moment: file for file in files if (name := parse(file.name)) is not None and not name.moment.mark}
        for files in held.values()
        if files
    ]
    common = set.intersection(*map(set, of_ranks)) if of_ranks else set()
    for moment in sorted((moment for moment in common if latest is None or moment <= latest), reverse=True)[:_ATTEMPTS]:
        files = {rank: of_rank[moment] for rank, of_rank in zip((rank for rank in held if held[rank]), of_ranks)}
        if all(cluster.gather(f"is {moment} whole", _is_whole(files.get(cluster.rank)))):
            if cluster.rank == MAIN_RANK:
                log.warning(
                    "the last files are cut off or of different steps; step %s is resumed, which is whole", moment
                )
            return {rank: [files[rank]] if rank in files else [] for rank in held}
    return dict(held)


def _is_whole(file: Path | None) -> bool:
    try:
        return file is None or not file.is_file() or bool(read_header(file).tensors)
    except FormatError:
        return False


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
