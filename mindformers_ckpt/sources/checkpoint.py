"""A checkpoint: files on disk and the strategy they were saved under, seen as whole tensors and their shards."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mindformers_ckpt.errors import PlanError, StrategyError, raise_problems
from mindformers_ckpt.formats import Header, TensorRecord, TensorSpec
from mindformers_ckpt.formats.headers import HeaderReader, sound_headers, wrong_headers
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.sources import checkpoint2, shards
from mindformers_ckpt.sources.shards import LogicalTensor, Shard
from mindformers_ckpt.sources.source import Kind, Source
from mindformers_ckpt.sources.stage_files import StageFiles
from mindformers_ckpt.state_names import state_of
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.words import shortened


@dataclass
class Checkpoint:
    """Files by rank under a strategy. Headers are read when they are needed, contents never.

    With `names` other tensors in the files are left aside. Raises PlanError when files and strategy do not
    belong together.
    """

    files: Source
    strategy: Strategy
    names: Container[str] | None = None
    _headers: dict[Path, Header] = field(default_factory=dict)
    _reader: HeaderReader = field(default_factory=HeaderReader)
    _tensors: dict[str, LogicalTensor] | None = None
    _by_rank: dict[int, Mapping[str, tuple[Path, TensorRecord]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks, count = set(self.files.by_rank), self.strategy.rank_count
        if not self.files.sharded and count > 1:
            raise PlanError(
                f"{self.files.root} is complete weights, but its strategy ({self.strategy.origin}) is for {count} "
                "ranks; give the folder that holds the rank_<n> folders, or leave the source strategy out if these are "
                "the whole weights"
            )
        if self.files.sharded and self.strategy.is_complete and len(ranks | set(self.files.absent)) > 1:
            from mindformers_ckpt.strategy.nearby import strategy_near  # reads strategies: protobuf

            near = strategy_near(self.files.root, max(ranks) + 1)
            raise PlanError(
                f"{self.files.root} holds the shards of {len(ranks)} ranks, but no source strategy is given; "
                "name the strategy file or folder they were saved under"
                + (f", which could be {near.origin} (it is for as many ranks)" if near is not None else "")
            )
        named = len(ranks | set(self.files.absent))
        if self.files.kind is Kind.CHECKPOINT2 and self.files.metadata is None and named != count:
            raise PlanError(
                f"{self.files.root} has no metadata.json, and files of {named} ranks by their names, but the strategy "
                f"{self.strategy.origin} is for {count} ranks; where redundancy was removed the numbers are not those "
                "of ranks: copy metadata.json from where the checkpoint was saved"
            )
        surplus = sorted(rank for rank in ranks if rank >= count)
        if surplus:
            raise PlanError(
                f"{self.files.root} holds files of ranks {surplus[:8]}, but the strategy {self.strategy.origin} is "
                f"for {count} ranks; it is not the strategy these files were saved under"
            )

    @property
    def lost_ranks(self) -> list[int]:
        """The ranks of the strategy that have no file here."""
        return [rank for rank in range(self.strategy.rank_count) if rank not in self.files.by_rank]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know of the choice of files."""
        absent, root = self.files.absent, self.files.root
        found = list(self.files.warnings)
        if absent:
            ranks = sorted(absent)
            left = f"{root}: ranks {shortened(ranks, 8)} are left aside, the others hold everything between them"
            found.append(f"{left}: {absent[ranks[0]]}")
        lost = [rank for rank in self.lost_ranks if rank not in absent]
        if lost and self.files.kind is Kind.RANK_FOLDERS:
            found.append(
                f"{root}: ranks {shortened(lost, 8)} of the strategy have no folder; what is needed of theirs is taken "
                "from the others"
            )
        return tuple(found)

    def only(self, names: Container[str] | None) -> Checkpoint:
        """The same files with all tensors but `names` left aside (None for all); headers that were read are shared."""
        return self if names is None else replace(self, names=names, _tensors=None)

    def tensors(self) -> dict[str, LogicalTensor]:
        """All tensors by name, in the order of the files of ascending ranks.

        Raises FormatError for damaged files, and PlanError that lists all tensors whose shards contradict
        each other or the strategy.
        """
        if self._tensors is None:
            self._tensors = self._find_tensors()
        return self._tensors

    def whole_tensors(self) -> dict[str, LogicalTensor]:
        """All tensors, as `tensors`. Raises PlanError that lists what of them no file holds, too."""
        tensors = self.tensors()
        lost = [line for tensor in tensors.values() for line in tensor.lost()]
        raise_problems(PlanError, f"{self.files.root}: of some tensors not all is there", lost)
        return tensors

    def _find_tensors(self) -> dict[str, LogicalTensor]:
        self._headers.update(sound_headers(self.unread()))
        self._raise_other_content()
        if self.files.tensors is not None:
            told = self.files.tensors.items()
            return {name: tensor for name, tensor in told if self.names is None or name in self.names}
        found: dict[str, LogicalTensor] = {}
        problems: list[str] = []
        for stage in range(len(self.strategy.stages)):
            files = self._files_of(stage)
            for name in files.names:
                try:
                    tensor = self._tensor(name, stage, files)
                    found[name] = _merged(found[name], tensor) if name in found else tensor
                except (PlanError, StrategyError) as error:
                    problems.append(f"{name}: {error}")
        headline = f"{self.files.root} does not fit the strategy it is read with ({self.strategy.describe()})"
        raise_problems(PlanError, headline, problems)
        if any(tensor.missing for tensor in found.values()):
            self.files.raise_absent()
        return found

    def header_of(self, rank: int) -> dict[str, tuple[Path, TensorSpec]]:
        """The tensors in the files of a rank: name -> (file, spec)."""
        return {name: (path, record.spec) for name, (path, record) in self.records_of(rank).items()}

    def records_of(self, rank: int) -> Mapping[str, tuple[Path, TensorRecord]]:
        """The tensors in the files of a rank, and where they lie in them: name -> (file, record)."""
        if rank not in self._by_rank:
            self._by_rank[rank] = self._read_headers(rank)
        return self._by_rank[rank]

    def _read_headers(self, rank: int) -> Mapping[str, tuple[Path, TensorRecord]]:
        tensors: dict[str, tuple[Path, TensorRecord]] = {}
        if self.files.tensors is not None:
            return self._in_one_piece(self.files.tensors)
        paths = self.files.by_rank[rank]
        if len(paths) == 1 and self.files.owners is None:
            return _OneFile(self.header(paths[0]))
        for path in paths:
            for name, record in self.header(path).tensors.items():
                if not self.files.assigns(name, path):
                    continue
                if name in tensors:
                    raise PlanError(
                        f"{path} and {tensors[name][0]} both hold {name}: these are several checkpoints, not one; "
                        "name the file to read"
                    )
                tensors[name] = (path, record)
        return tensors

    def _in_one_piece(self, told: Mapping[str, LogicalTensor]) -> dict[str, tuple[Path, TensorRecord]]:
        """Those of the tensors that are whole in one of the files."""
        found = {}
        for name, tensor in told.items():
            if len(tensor.shards) == 1:
                shard = tensor.shards[0]
                record = self.header(shard.path).tensors[shard.tensor or name]
                found[name] = (shard.path, record._replace(spec=tensor.spec))
        return found

    def holds(self, rank: int, name: str) -> bool:
        """Whether the files of a rank are there and hold a tensor."""
        return rank in self.files.by_rank and name in self.records_of(rank)

    def offset_of(self, shard: Shard) -> int:
        """Where in its file the first byte of a shard is that has a name there; 0 of one without elements."""
        segments = self.header(shard.path).tensors[shard.tensor].segments
        return segments[0].offset if segments else 0

    def size_of(self, path: Path) -> int:
        """The size of a file, in bytes, as its header was read."""
        return self.header(path).size

    def used_files(self, tensors: Mapping[str, LogicalTensor]) -> list[Path]:
        """The files that hold the chosen replicas, in order."""
        cuts = {id(tensor.shards): tensor.shards for tensor in tensors.values()}  # many tensors share theirs
        return sorted({shard.path for shards in cuts.values() for shard in shards})

    def header(self, path: Path) -> Header:
        """The header of one of the files, as it was when it was read first."""
        if path not in self._headers:
            self._headers[path] = self._reader.read(path)
        return self._headers[path]

    def unread(self) -> list[Path]:
        """The files whose headers have not been read yet."""
        return [path for path in self.files.files if path not in self._headers]

    def look_quickly(self) -> None:
        """Read most headers at samples only; whoever reads contents has to check the headers that are likely."""
        self._headers.update(sound_headers(self.unread(), likely=True))

    def take_headers(self, headers: Mapping[Path, Header]) -> None:
        """Take headers that somebody has read of these files; they are as those of `look_quickly`."""
        self._headers.update(headers)

    def look_closely(self) -> bool:
        """Compare all heads of the files that were looked at quickly; whether one was not what it was taken for."""
        likely = {path: header for path, header in self._headers.items() if header.is_likely}
        wrong = wrong_headers(likely)
        self._headers.update({path: replace(header, is_likely=False) for path, header in likely.items()} | wrong)
        self._by_rank.clear()
        return bool(wrong)

    def _raise_other_content(self) -> None:
        """Compare the files with what the source itself records of them. Raises PlanError that lists what differs."""
        problems = []
        if self.files.tensors is not None:
            problems = shards.contradictions(self.files.tensors.values(), self._headers)
        elif self.files.metadata is not None:
            for path in self.files.files:
                held = {name: record.spec.shape for name, record in self.header(path).tensors.items()}
                problems += checkpoint2.contradictions(self.files.metadata, path, held)
        headline = f"{self.files.root}: files and their metadata do not belong together; copy the checkpoint again"
        raise_problems(PlanError, headline, problems)

    def _ranks(self, stage: int) -> list[int]:
        first = stage * self.strategy.stage_size
        return [rank for rank in range(first, first + self.strategy.stage_size) if rank in self.files.by_rank]

    def _files_of(self, stage: int) -> StageFiles:
        """The files of a stage. Raises PlanError where several of a rank hold the same tensor."""
        files: list[tuple[int, Header]] = []
        for rank in self._ranks(stage):
            records = self.records_of(rank)
            for path in self.files.by_rank[rank]:
                header = self.header(path)
                if self.files.owners is not None:
                    own = {name: record for name, (file, record) in records.items() if file == path}
                    header = replace(header, tensors=own)
                files.append((rank, header))
        return StageFiles(stage * self.strategy.stage_size, files, self.names)

    def _tensor(self, name: str, stage: int, files: StageFiles) -> LogicalTensor:
        spec, paths = files.held(name)
        layout = self.layout_of(name, stage, spec)
        if layout is not None:
            spec = TensorSpec(name, spec.dtype, layout.full_shape(spec.shape))
        shards, missing = files.cut(paths, layout, spec.shape)
        return LogicalTensor(spec, shards, missing, layout, (stage,))

    def layout_of(self, name: str, stage: int, shard: TensorSpec) -> Layout | None:
        """The layout of a tensor on a stage, fitted to the shape of its shards; None for one that is whole."""
        if not any(self.strategy.stages):
            return None
        return self._layout(name, stage, shard) or self._layout_of_weight(name, stage, shard)

    def _layout(self, name: str, stage: int, shard: TensorSpec) -> Layout | None:
        """The layout of a tensor on a stage, fitted to the shape of its shards."""
        layout = self.strategy.layout(name, stage)
        if layout is None:
            return None
        if name in self.strategy.stages[stage]:
            return layout.for_shard(shard.shape)
        return self._shared_layout(name, layout, shard)

    def _layout_of_weight(self, name: str, stage: int, shard: TensorSpec) -> Layout | None:
        """The layout of a state that no strategy names ("adam_m.<weight>"): that of its weight.

        MindFormers leaves some out of metadata.json and reads them so; a strategy that was declared, or saved for the
        weights alone, leaves out all. Those of another shape than the weight's slice are whole (counters, and
        placeholders of one element).
        """
        metadata = self.files.metadata
        state = state_of(name, self.strategy.stages[stage], known=metadata is None)
        if state is None:
            return None
        if metadata is None:
            holding = (rank for rank in self._ranks(stage) if self.holds(rank, state.weight))
            spec = next((self.header_of(rank)[state.weight][1] for rank in holding), None)
            return self._layout(state.weight, stage, spec) if spec is not None and spec.shape == shard.shape else None
        layout, recorded = self.strategy.stages[stage][state.weight], metadata.tensors.get(state.weight)
        return layout if recorded is not None and layout.box(recorded.shape, 0).shape == shard.shape else None

    def _shared_layout(self, name: str, layout: Layout, shard: TensorSpec) -> Layout | None:
        """The layout of a parameter shared with another stage, whose layout alone is recorded.

        `layout` is the likely one. The shape tells whether the shard is cut like those of the other stage
        (an optimizer shard), or not at all.
        """
        owner = next(number for number, layouts in enumerate(self.strategy.stages) if name in layouts)
        ranks = self._ranks(owner)
        specs = (self.header_of(rank).get(name) for rank in ranks)
        reference = next((spec for spec in specs if spec is not None), None)
        if reference is None:
            return layout.for_shard(shard.shape)
        owners_layout = self.strategy.stages[owner][name].for_shard(reference[1].shape)
        full = owners_layout.full_shape(reference[1].shape)
        for candidate in (layout.for_whole(full), owners_layout):
            if candidate.full_shape(shard.shape) == full:
                return candidate
        return None if shard.shape == full else layout.for_shard(shard.shape)


class _OneFile(Mapping[str, "tuple[Path, TensorRecord]"]):
    """The tensors of a rank that has one file."""

    def __init__(self, header: Header) -> None:
        self._header = header

    def __getitem__(self, name: str) -> tuple[Path, TensorRecord]:
        return self._header.path, self._header.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._header.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._header.tensors)

    def __len__(self) -> int:
        return len(self._header.tensors)


def _merged(first: LogicalTensor, second: LogicalTensor) -> LogicalTensor:
    """One tensor from the copies on two stages: the first whole one is read."""
    if (first.spec.dtype, first.spec.shape) != (second.spec.dtype, second.spec.shape):
        raise PlanError(
            f"stage {first.stages[0]} holds it as {first.spec.dtype.name}{list(first.spec.shape)}, "
            f"stage {second.stages[0]} as {second.spec.dtype.name}{list(second.spec.shape)}"
        )
    best = second if first.missing and not second.missing else first
    layout = first.layout or second.layout
    return best._replace(stages=first.stages + second.stages, layout=layout)
