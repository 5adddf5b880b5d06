"""What in a checkpoint is not as in an ordinary one, a line each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mindformers_ckpt.look.parameters import Parameter
from mindformers_ckpt.objects.path import names_of
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.source import Kind, Source
from mindformers_ckpt.words import counted, shortened, spans


def odd_things(source: Source, files: Checkpoint, parameters: Sequence[Parameter], is_known: bool) -> Iterator[str]:
    """What is not as in an ordinary checkpoint."""
    for reason, ranks in _by_reason(source.absent).items():
        yield f"ranks without a file that is read: {spans(ranks)} ({reason})"
    lost = [rank for rank in files.lost_ranks if rank not in source.absent]
    if lost:
        yield f"ranks of the strategy that have no folder: {spans(lost)}"
    leftovers = _leftovers(source)
    if leftovers:
        yield f"further files in the rank folders, which are not read: {shortened(leftovers, 5)}"
    if not is_known or not source.sharded:
        return
    several = [one for one in parameters if len(one.stages) > 1]
    named = files.strategy.names()
    tied = [one.name for one in several if one.name in named]
    free = [one.name for one in parameters if one.name not in named]
    fewer = [one for one in parameters if len(one.ranks) < one.expected and not lost and not source.absent]
    missing = [f"{one.name} {one.missing[0]}" for one in parameters if one.missing]
    if missing:
        yield f"boxes that no file holds, of {counted(len(missing), 'tensor')}: {shortened(missing, 5)}"
    if tied:
        yield f"tied, held by several stages: {shortened(tied, 5)}"
    if free and len(named) > 0:
        yield f"whole on every rank, since the strategy does not name them: {shortened(free, 5)}"
    if fewer:
        some = shortened([f"{one.name} on {len(one.ranks)} of {one.expected}" for one in fewer], 3)
        count = "1 tensor is" if len(fewer) == 1 else f"{len(fewer):,} tensors are"
        need = "it" if len(fewer) == 1 else "them"
        yield f"saved without redundancy: {count} not on all ranks that need {need} ({some})"


def _by_reason(absent: Mapping[int, str]) -> dict[str, list[int]]:
    """Ranks by why they are left out; reasons that name a rank's own folder are one."""
    found: dict[str, list[int]] = {}
    for rank, reason in sorted(absent.items()):
        found.setdefault(reason.partition(" in /")[0], []).append(rank)
    return found


def _leftovers(source: Source) -> list[str]:
    """Files of weights that are in rank folders beside those that are read."""
    if source.kind is not Kind.RANK_FOLDERS:
        return []
    found = []
    for rank, taken in source.by_rank.items():
        own = {path.name for path in taken}
        try:
            names = list(names_of(taken[0].parent))
        except OSError:
            continue
        for name in sorted(names):
            if name not in own and name.endswith((".ckpt", ".safetensors")) and not name.startswith("."):
                found.append(f"rank_{rank}/{name}")
    return found
