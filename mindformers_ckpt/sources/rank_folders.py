"""`model_dir/rank_x/*.ckpt`: the shards of a job, one folder a rank, and which file of each folder is taken.

Where nothing else is said that is the last by default sort of the names (guide). The files of all ranks must be of one
moment; ranks whose folder is empty, or whose last file is older, are absent: whether the others hold everything
between them is for the strategy to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mindformers_ckpt.disk.waiting import each
from mindformers_ckpt.errors import FormatError, PlanError, raise_problems
from mindformers_ckpt.formats.headers import are_sampled, look_quickly, read_headers
from mindformers_ckpt.sources.listing import Listing
from mindformers_ckpt.sources.parts import is_part
from mindformers_ckpt.sources.source import Kind, Source
from mindformers_ckpt.sources.steps import Moment, SavedName, alike, matching, moments, natural, parse
from mindformers_ckpt.words import shortened

_LISTED = 8
_ATTEMPTS = 10  # steps that are tried when the last ones are not whole

Choice = tuple[dict[int, Path], list[str]]  # a file for every rank that has one, and warnings


def read(listing: Listing, wanted: str | None = None) -> Source:
    """The source of a folder with rank folders; `wanted` names a file, or an epoch and step.

    Raises PlanError when no rank has a file, a folder holds several that could be meant, or files of several moments.
    """
    return _in_folders(listing, lambda held: _choice(listing.folder, held, wanted), wanted)


def choose(root: Path, held: Mapping[int, Sequence[Path]], wanted: str | None) -> Source:
    """The source that files of rank folders are, by their names alone; `read` for who has looked into all folders."""
    return _source(root, held, *_choice(root, held, wanted), wanted)


def read_to_resume(listing: Listing, unreadable: Callable[[Mapping[int, Path]], str | None] | None = None) -> Source:
    """The source that a job resumes from: the last step that all ranks have saved whole.

    Where MindFormers wrote a meta.json into the rank folders its `last_ckpt_file` is believed, else the last by name is
    taken; where such a file is cut off, or ranks are at different steps, an earlier step is, with a warning.
    `unreadable` says what keeps chosen files from being read, where that is not to be found out here.
    """

    def resumed(held: Mapping[int, Sequence[Path]]) -> Choice:
        found = each(lambda rank: recorded_file(listing.rank_folders[rank], held[rank]), list(held))
        return _resumed(listing.folder, held, dict(zip(held, found)), unreadable or _unreadable)

    return _in_folders(listing, resumed)


def choose_to_resume(
    root: Path,
    held: Mapping[int, Sequence[Path]],
    recorded: Mapping[int, Path | None],
    unreadable: Callable[[Mapping[int, Path]], str | None],
) -> Source:
    """`read_to_resume` for who has not looked into all folders.

    `recorded` are the files that meta.json names, `unreadable` says what keeps chosen files from being read.
    """
    return _source(root, held, *_resumed(root, held, recorded, unreadable))


def _choice(root: Path, held: Mapping[int, Sequence[Path]], wanted: str | None) -> Choice:
    chosen = _chosen(root, held, wanted)
    return chosen, [] if wanted else [*_unnatural(held, chosen), *_several_models(held, chosen)]


def _resumed(
    root: Path,
    held: Mapping[int, Sequence[Path]],
    recorded: Mapping[int, Path | None],
    unreadable: Callable[[Mapping[int, Path]], str | None],
) -> Choice:
    """The files that a job resumes from, with warnings."""

    def fault_of(files: Mapping[int, Path]) -> str | None:
        several = len({_moment(name) for name in moments(files).values()}) > 1
        return "the last files of the ranks are of different steps" if several else unreadable(files)

    last = _chosen(root, {rank: files for rank, files in held.items() if recorded[rank] is None}, None)
    named = {rank: file for rank, file in recorded.items() if file is not None}
    chosen = {**last, **named}
    fault = fault_of(chosen)
    if fault is None:
        return chosen, [] if named else [*_unnatural(held, chosen), *_several_models(held, chosen)]
    latest = min((name.moment for name in moments(named).values() if name is not None), default=None)
    earlier = _last_whole(held, latest, fault_of)
    if earlier is None:
        return chosen, []
    chosen, moment = earlier
    return chosen, [f"{root}: {fault}; {moment}, the last whole step that all ranks have, is resumed"]


def _chosen(root: Path, held: Mapping[int, Sequence[Path]], wanted: str | None) -> dict[int, Path]:
    """A file for every rank that has one. Raises PlanError that lists the folders in which several could be meant."""
    chosen, problems = {}, []
    for rank, files in held.items():
        try:
            file = named_file(files, wanted, rank) if wanted else last_file(files)
        except PlanError as error:
            problems.append(f"rank_{rank}: {error}")
            continue
        if file is not None and is_part(file.name):
            problems.append(f"rank_{rank}: {file.name} is one of several files of a model; one file a rank is read")
        elif file is not None:
            chosen[rank] = file
    raise_problems(PlanError, f"{root}: several files could be meant", problems)
    return chosen


def _in_folders(
    listing: Listing, choice: Callable[[Mapping[int, Sequence[Path]]], Choice], wanted: str | None = None
) -> Source:
    """The source of what is chosen of the files in all rank folders."""
    held = {rank: own.weight_files() for rank, own in listing.of_ranks.items()}
    chosen, warnings = choice(held)
    warnings = [*_beside(listing, chosen), *_almost(listing), *warnings]
    return _source(listing.folder, held, chosen, warnings, wanted, listing)


def _source(
    root: Path,
    held: Mapping[int, Sequence[Path]],
    chosen: Mapping[int, Path],
    warnings: list[str],
    wanted: str | None = None,
    listing: Listing | None = None,
) -> Source:
    """The source of the chosen files, without those of an earlier moment."""
    lacking = f"no file for {wanted!r}" if wanted else "no checkpoint file"
    folders = {} if listing is None else listing.rank_folders
    absent = {rank: f"{lacking} in {folders.get(rank, root / f'rank_{rank}')}" for rank in held if rank not in chosen}
    if listing is not None:
        absent.update((rank, what) for rank, what in listing.lost_ranks.items() if rank not in folders)
    older, advice = _older(root, held, chosen) if chosen else ({}, "")
    taken = {rank: (file,) for rank, file in chosen.items() if rank not in older}
    source = Source(
        root,
        taken,
        Kind.RANK_FOLDERS,
        absent={**absent, **older},
        advice=advice,
        warnings=(*_formats(taken), *_other_ranks(chosen), *warnings),
    )
    if not chosen:
        source.raise_absent()
    return source


def _formats(taken: Mapping[int, tuple[Path, ...]]) -> list[str]:
    """Warn of ranks whose files are of different formats: each can be read, but no job saves them so."""
    by_suffix: dict[str, list[int]] = {}
    for rank, (file,) in taken.items():
        by_suffix.setdefault(file.suffix, []).append(rank)
    if len(by_suffix) < 2:
        return []
    shown = "; ".join(f"{suffix}: ranks {ranks[:_LISTED]}" for suffix, ranks in sorted(by_suffix.items()))
    return [f"the files of the ranks are of different formats ({shown}); they are read as one checkpoint"]


def recorded_file(folder: Path, files: Sequence[Path]) -> Path | None:
    """The file that MindFormers' meta.json names as the last one saved, None where there is none (1.3 to 2.1)."""
    meta = Listing(folder).json("meta.json")
    name = meta.get("last_ckpt_file") if isinstance(meta, dict) else None
    return next((file for file in files if file.name == name), None)


def _unreadable(chosen: Mapping[int, Path]) -> str | None:
    """What keeps one of the files from being read. One that is cut off has another size than the others."""
    files = list(chosen.values())
    headers = look_quickly(files) if are_sampled(files) else read_headers(files)
    return next((str(found) for _, found in headers if isinstance(found, FormatError)), None)


def _last_whole(
    held: Mapping[int, Sequence[Path]],
    latest: Moment | None,
    fault_of: Callable[[Mapping[int, Path]], str | None],
) -> tuple[dict[int, Path], Moment] | None:
    """The files of the last moment (up to `latest`) of which all ranks have one that can be read."""
    by_moment = {
        rank: {name.moment: file for file in files if (name := parse(file.name)) is not None and not name.moment.mark}
        for rank, files in held.items()
        if files
    }
    common = set.intersection(*map(set, by_moment.values())) if by_moment else set()
    for moment in sorted((moment for moment in common if latest is None or moment <= latest), reverse=True)[:_ATTEMPTS]:
        files = {rank: of_rank[moment] for rank, of_rank in by_moment.items()}
        if fault_of(files) is None:
            return files, moment
    return None


def last_file(files: Sequence[Path]) -> Path | None:
    """The last by default sort of the names (guide), None when there is none.

    Raises PlanError where .ckpt and .safetensors files are there: neither has precedence (MindSpore refuses them, too).
    """
    last = {file.suffix: file.name for file in files}
    if len(last) > 1:
        names = ", ".join(name for _, name in sorted(last.items()))
        raise PlanError(
            f".ckpt and .safetensors files are there ({names}); name the file or its step, or keep those of one format"
        )
    return files[-1] if files else None


def named_file(files: Sequence[Path], wanted: str, rank: int) -> Path | None:
    """The file that `wanted` names, None when there is none. Raises PlanError when there are several."""
    found = matching(files, wanted, rank)
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:_LISTED])
        raise PlanError(f"{wanted!r} could be {names}; give the name of one")
    return found[0] if found else None


def _older(root: Path, held: Mapping[int, Sequence[Path]], chosen: Mapping[int, Path]) -> tuple[dict[int, str], str]:
    """The ranks whose file is of an earlier moment than the newest, with why they are left out, and what to do.

    Raises PlanError where that is not all: several models or kinds of names, or a newest file that was saved when its
    rank failed.
    """
    parsed = moments(chosen)
    if not any(parsed.values()):
        _check_alike(root, held, chosen)
    if len({_moment(name) for name in parsed.values()}) < 2 and len({_prefix(name) for name in parsed.values()}) < 2:
        return {}, ""
    dated = {rank: name.moment for rank, name in parsed.items() if name is not None}
    prefixes = {_prefix(name) for name in parsed.values()}
    newest = max(dated.values(), default=None)
    if newest is None or len(dated) < len(parsed) or len(prefixes) > 1 or newest.mark:
        raise PlanError(f"{root}: {mixed_moments(held, parsed)}")
    older = {rank: moment for rank, moment in dated.items() if moment != newest}
    if any(newest in _moments_of(held[rank]) for rank in older):
        raise PlanError(f"{root}: {mixed_moments(held, parsed)}")
    return {
        rank: f"its last file, {chosen[rank].name}, is of an earlier step than those of the others ({newest})"
        for rank in older
    }, mixed_moments(held, parsed)


def _check_alike(root: Path, held: Mapping[int, Sequence[Path]], chosen: Mapping[int, Path]) -> None:
    """Refuse files whose names tell no step and say that they do not belong together."""
    choice = any(len(held[rank]) > 1 for rank in chosen)
    if not alike({rank: file.stem for rank, file in chosen.items()}, choice=choice):
        names = [f"rank_{rank}/{file.name}" for rank, file in chosen.items()]
        raise PlanError(
            f"{root}: the last files of the ranks have different names ({shortened(names)}); name the file to load, or "
            "remove the files that do not belong together"
        )


def mixed_moments(held: Mapping[int, Sequence[Path]], parsed: Mapping[int, SavedName | None]) -> str:
    """The message for files that do not belong together, with the last step that all ranks have."""
    groups: dict[str, list[int]] = {}
    several = len({_prefix(name) for name in parsed.values()}) > 1
    for rank, name in parsed.items():
        text = "no step" if name is None else f"{name.prefix} " * several + str(name.moment)
        groups.setdefault(text, []).append(rank)
    listed = "; ".join(f"{moment}: ranks {ranks[:_LISTED]}" for moment, ranks in groups.items())
    of_ranks = ({moment for moment in _moments_of(files) if not moment.mark} for files in held.values())
    common = set.intersection(*of_ranks)
    if common:
        last = max(common)
        way = f"the last step that all ranks have is {last}: --step {last.epoch}_{last.step} takes it"
    else:
        way = "name the file to load, or remove the files that do not belong together"
    return f"the last files of the ranks are of different epochs and steps ({listed}); {way}"


def _moment(name: SavedName | None) -> Moment | None:
    return None if name is None else name.moment


def _prefix(name: SavedName | None) -> str | None:
    return None if name is None else name.prefix


def _moments_of(files: Sequence[Path]) -> set[Moment]:
    return {name.moment for name in map(parse, (file.name for file in files)) if name is not None}


def _beside(listing: Listing, chosen: Mapping[int, Path]) -> list[str]:
    """Warn of files beside the rank folders, but not of a second name of a chosen file: merge-lora makes one."""
    beside = [file for file in listing.weight_files() if not any(_is_same(file, own) for own in chosen.values())]
    if not beside:
        return []
    names = ", ".join(file.name for file in beside[:_LISTED])
    return [f"{listing.folder} holds rank folders, which are read; left aside are the files beside them: {names}"]


def _is_same(file: Path, other: Path) -> bool:
    try:
        return file.samefile(other)
    except OSError:  # a link that leads nowhere
        return False


def _almost(listing: Listing) -> list[str]:
    """Warn of what has almost the name of a weight file: it could be the last one."""
    found = [f"{own.folder.name}/{name}" for own in listing.of_ranks.values() for name in own.almost_weights]
    return [f"left aside, since their names are not those of weight files: {shortened(found)}"] if found else []


def _other_ranks(chosen: Mapping[int, Path]) -> list[str]:
    """Warn of files that name another rank than their folder."""
    strange = [
        str(file.relative_to(file.parent.parent))
        for rank, file in chosen.items()
        if (name := parse(file.name)) is not None and name.rank not in (None, rank)
    ]
    if not strange:
        return []
    return [f"files name another rank than their folder does, which is taken: {', '.join(strange[:_LISTED])}"]


def _several_models(held: Mapping[int, Sequence[Path]], chosen: Mapping[int, Path]) -> list[str]:
    """One warning where folders hold files of several prefixes: the last by name is one of another model, maybe."""
    for rank, taken in chosen.items():
        others = [file for file in held[rank] if _prefix(parse(file.name)) != _prefix(parse(taken.name))]
        if others:
            left = shortened([file.name for file in others])
            used = f"{taken.name} is used, the last by default sort of the names, and not {left}"
            return [f"rank_{rank} holds files of several names; {used}; name the file to take another"]
    return []


def _unnatural(held: Mapping[int, Sequence[Path]], chosen: Mapping[int, Path]) -> list[str]:
    """One warning where the last by name is not the one with the highest numbers."""
    better = {rank: max(held[rank], key=lambda file: natural(file.stem)) for rank in chosen}
    differing = [rank for rank, file in better.items() if file != chosen[rank]]
    if not differing:
        return []
    rank = differing[0]
    others = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
    warning = (
        f"rank_{rank}{others} holds several files; {chosen[rank].name} is used, the last by default sort of the names, "
        f"although {better[rank].name} has the higher numbers; name the step to take another"
    )
    return [warning]
