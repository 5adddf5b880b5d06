"""Weights without the detour (`auto_trans_save: False`): a rank reads just its own boxes from the source.

Nothing is written. The main rank alone looks at the files of the source, thousands of them perhaps, and plans for all;
it tells every rank what that one takes, and each reads in its own process.

What is told goes through the coordinator, not through a file that ranks read: only ranks that have proved that they are
of this job can say something there, nothing is left behind when a rank is killed, a failure of the main rank reaches
those that wait for it, and it works on nodes that share no disk. A rank's share is 10 to 100 kB, and nobody gets those
of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mindformers_ckpt.disk.files import FileState
from mindformers_ckpt.disk.waiting import has_waited
from mindformers_ckpt.engine.buffers import Given, nothing_given
from mindformers_ckpt.engine.copier import Copier
from mindformers_ckpt.engine.fetcher import PAGE, Fetcher
from mindformers_ckpt.engine.into_memory import Fill, Piece, fill_arrays
from mindformers_ckpt.engine.pieces import Cuts, cuts_into, pieces_of
from mindformers_ckpt.engine.reader import Read, ShardReader
from mindformers_ckpt.engine.sinks import ArraySink
from mindformers_ckpt.engine.tasks import cut_into_tasks
from mindformers_ckpt.engine.views import in_bytes
from mindformers_ckpt.errors import TransferError
from mindformers_ckpt.formats import Header, Segment, TensorSpec
from mindformers_ckpt.formats.headers import heads_by_content, wrong_headers
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.job import MAIN_RANK
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.planning.model import Place, Plan, SourceFile, Transfer
from mindformers_ckpt.planning.source_states import check_unchanged, states_of

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.uint8]]

_ROUND_BYTES = 32 << 20  # of what all ranks are told at once


def hand_out_plans(cluster: Cluster, texts: Iterable[str] | None) -> str | None:
    """Tell every rank its text, which the main rank gives in rank order; the own one, None where there is none.

    In as many rounds as they take, so that the texts of thousands of ranks are never in memory together.
    """
    rounds = _rounds(texts or (), cluster.size) if cluster.rank == MAIN_RANK else None
    own, more = None, True
    while more:
        more, text = cluster.hand_out("own plan", None if rounds is None else next(rounds))
        own = text if own is None else own
    return own


def _rounds(texts: Iterable[str], size: int) -> Iterator[list[tuple[bool, str | None]]]:
    """What all ranks are told in a round: whether another one follows, and their text if it is their turn."""
    told: list[tuple[bool, str | None]] = [(True, None)] * size
    held = 0
    for rank, text in zip(range(size), texts):
        if held and held + len(text) > _ROUND_BYTES:
            yield told
            told, held = [(True, None)] * size, 0
        told[rank] = (True, text)
        held += len(text)
    yield [(False, text) for _, text in told]


def read_direct(
    plan: Plan,
    check: Callable[[], None],
    headers: Mapping[int, Header] | None = None,
    *,
    is_shared: bool = True,
    fill: Fill = fill_arrays,
    given: Given = nothing_given,
) -> Iterator[tuple[TensorSpec, np.ndarray[Any, Any]]]:
    """The tensors of the one target of `plan`, each as the bytes of its content, in memory of its own or what is given.

    `check` is called between blocks and may raise to stop. `headers` are those of sources that need not be read again.
    `is_shared`: other ranks of the node read the same files, often the same bytes, so the page cache is used. `fill`
    reads what is taken as it is, and may get it from elsewhere.
    Raises TransferError when reading fails, or a file is not what it was when the plan was made, or when reading began.
    """
    (target,) = plan.targets
    states = _states(plan.sources)
    sink = ArraySink(target, given)
    known = {number: file.header for number, file in enumerate(plan.sources) if file.header is not None}
    known.update(headers or {})
    heads = _Heads(known)
    with closing(Fetcher(is_shared=is_shared)) as fetcher:
        if has_waited():
            fetcher.open_early([file.path for file in plan.sources])
        _fill_sink(plan, sink, fetcher, known, heads, check, fill)
        wrong = heads.wrong()  # after the contents, as most heads came with them
        if wrong:
            _fill_sink(plan, sink, fetcher, {**known, **wrong}, _Heads({}), check, fill_arrays)
    check_unchanged(states)
    for spec in target.tensors:
        yield spec, sink.contents.pop(spec.name)


def _fill_sink(
    plan: Plan,
    sink: ArraySink,
    fetcher: Fetcher,
    headers: Mapping[int, Header],
    heads: _Heads,
    check: Callable[[], None],
    fill: Fill,
) -> None:
    """Fill the memory of a sink with what a plan takes."""
    is_plain = {(id(kind.sources), id(kind.targets)): _is_plain(kind) for kind, _ in plan.kinds}
    plain: list[Transfer] = []
    others: list[Transfer] = []
    for transfer in plan.transfers:
        (plain if is_plain[id(transfer.sources), id(transfer.targets)] else others).append(transfer)
    fill(fetcher, _pieces(plain, plan.sources, ShardReader(plan.sources, fetcher, headers), sink, heads), check)
    _copy_others(replace(plan, transfers=tuple(others)), sink, ShardReader(plan.sources, fetcher, headers), check)


class _Heads:
    """The heads of what is read of files whose headers are only likely: most stand before the contents, and come with
    these.
    """

    def __init__(self, headers: Mapping[int, Header]) -> None:
        self._likely = {number: header for number, header in headers.items() if header.is_likely}
        self._at = {number: heads_by_content(header.frames) for number, header in self._likely.items()}
        self._needed: dict[int, set[tuple[int, bytes]]] = {number: set() for number in self._likely}
        self._read: dict[int, list[tuple[tuple[int, bytes], Array]]] = {number: [] for number in self._likely}

    def before(self, file: int, segments: Sequence[Segment], first: Piece) -> Iterator[Piece]:
        """The head of the first segment of a tensor, if it is near to the first piece that is read."""
        if file not in self._likely:
            return
        heads = [self._at[file][segment.offset] for segment in segments]
        is_new, start = heads[0] not in self._needed[file], segments[0].offset
        self._needed[file].update(heads)
        if is_new and first.start - start <= PAGE:
            import numpy as np

            offset, head = heads[0]
            memory = np.empty(len(head), np.uint8)
            self._read[file].append((heads[0], memory))
            yield Piece(first.path, offset, start, memory)

    def wrong(self) -> dict[int, Header]:
        """The true headers of files that have other heads: those that came are compared, the others are read now.

        Raises FormatError where such a file cannot be read.
        """
        doubtful = {}
        for number, header in self._likely.items():
            read = self._read[number]
            if all(memory.tobytes() == head for (_, head), memory in read):
                left = self._needed[number].difference(found for found, _ in read)
                header = replace(header, frames=tuple(sorted(left)))
            if header.frames:
                doubtful[number] = header
        return wrong_headers(doubtful)


def _states(files: Iterable[SourceFile]) -> dict[Path, FileState]:
    """What the sources are now. Raises TransferError where one has not the size that it was planned with."""
    states = states_of(files)
    for file in files:
        if states[file.path].size != file.size:
            raise TransferError(
                f"{file.path} has {states[file.path].size} bytes, {file.size} when the work was planned: it was "
                "changed meanwhile"
            )
    return states


def _is_plain(transfer: Transfer) -> bool:
    """Whether the target tensor is made of boxes of source tensors as they are, with no view or computation."""
    return len(transfer.targets) == 1 and all(place.is_plain for place in (*transfer.sources, *transfer.targets))


def _pieces(
    transfers: Sequence[Transfer], files: Sequence[SourceFile], reader: ShardReader, sink: ArraySink, heads: _Heads
) -> Iterator[Piece]:
    """What transfers take of their sources, in the order of the files, and the heads before it."""
    known: dict[tuple[int, int, int], list[_Taken]] = {}  # of tensors that are cut alike
    reads: list[tuple[int, int, tuple[Segment, ...], _Taken, Array]] = []
    for name, dtype, _, sources, targets in transfers:
        content, key = sink.contents[name], (id(sources), id(targets), dtype.itemsize)
        if key not in known:
            known[key] = [*_taken(sources, targets[0].box, dtype.itemsize, content)]
        for taken in known[key]:
            segments = reader.segments(Read(taken.place, name, dtype, taken.part))
            reads.append((taken.place.file, segments[0].offset if segments else 0, segments, taken, content))
    for file, _, segments, taken, content in sorted(reads, key=itemgetter(0, 1)):
        pieces = pieces_of(files[file].path, segments, taken.cuts, taken.array(content))
        for first in islice(pieces, 1):
            yield from heads.before(file, segments, first)
            yield first
        yield from pieces


class _Taken(NamedTuple):
    """What a target takes of a place: a part of the tensor, and where that is in the bytes of the target's box."""

    place: Place
    part: Box
    shape: tuple[int, ...]
    slices: tuple[Any, ...]
    cuts: Cuts

    def array(self, content: Array) -> Array:
        """The bytes that are taken, in the content of the target."""
        taken: Array = content.reshape(self.shape)[self.slices]
        return taken


def _taken(sources: Sequence[Place], target: Box, itemsize: int, content: Array) -> Iterator[_Taken]:
    """`content` has the bytes of the target's box, as those of all tensors that are cut alike."""
    outer = in_bytes(target, itemsize)
    for place in sources:
        part = place.box.intersect(target)
        if part is not None:
            slices = in_bytes(part, itemsize).relative_to(outer).slices()
            cuts = cuts_into(place.box, part, itemsize, content.reshape(outer.shape)[slices])
            yield _Taken(place, part, outer.shape, slices, cuts)


def _copy_others(plan: Plan, sink: ArraySink, reader: ShardReader, check: Callable[[], None]) -> None:
    """Make the tensors that are put together, turned or computed, as in a file."""
    if not plan.transfers:
        return
    with closing(Copier(plan.sources, sink, reader=reader)) as copier:
        tasks = cut_into_tasks(plan)
        for task, following in zip_longest(tasks, tasks[1:]):
            copier.run(task, check, following)
