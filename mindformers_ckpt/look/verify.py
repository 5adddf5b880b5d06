"""Is a result what it should be: by its own manifest, or by the source that it was made of?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mindformers_ckpt.checksums.digest import digest_of
from mindformers_ckpt.engine.pool import Workers
from mindformers_ckpt.errors import CheckpointError, ConfigError, FormatError, PlanError, PublishError, system_errors
from mindformers_ckpt.look.verify_manifest import (
    Choose,
    Manifest,
    check_files,
    check_hashes,
    check_ranks,
    check_texts,
    check_trailers,
    has_manifest,
    read_result,
    sampler,
)
from mindformers_ckpt.look.verify_model import Difference, Verification
from mindformers_ckpt.look.verify_replicas import verify_checksums
from mindformers_ckpt.look.whole import checkpoint_at
from mindformers_ckpt.objects.path import PathLike, absolute, as_path
from mindformers_ckpt.progress import Progress
from mindformers_ckpt.publish.fingerprints import folder_of, recorded_checksums
from mindformers_ckpt.publish.signature import BUNDLE_FILE, check_signature
from mindformers_ckpt.sources import checkpoint2
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import instead
from mindformers_ckpt.sources.listing import Listing
from mindformers_ckpt.sources.source import Kind, Source
from mindformers_ckpt.strategy.given import StrategyLike, as_strategy, strategy_or_none
from mindformers_ckpt.strategy.model import Strategy, origin_of

_FINGERPRINTS = "fingerprints: "  # of what is not checked


def verify(
    path: PathLike,
    strategy: StrategyLike = None,
    *,
    against: PathLike | None = None,
    src_strategy: StrategyLike = None,
    step: str | None = None,
    sample: float = 1.0,
    contents: str = "error",
    public_key: PathLike | None = None,
    processes: int = 1,
    may_fork: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Check a result, by its manifest or against a source.

    By the manifest: itself, files and their sizes, texts beside them, ranks, and all that was recorded of the contents:
    hashes (`--hash`), CRC-32 trailers (`--crc-check`), fingerprints (`--fingerprint`); replicas are compared.
    `strategy` is that of the result, by default the one that its manifest names. With `against`, a checkpoint under
    `src_strategy` (`step` chooses among several files): every rank of the result is compared with what the source gives
    it, bit by bit.

    `sample` is the share of tensors whose contents are read. `contents` says what samples of the source that contradict
    its strategy are: "error", "warn" or "off". With `public_key`, a PEM file, the fingerprint must be signed with the
    key that belongs to it, and hold. `processes` compare with a source; with `may_fork` they are forked where that is
    safe, and start sooner. `progress` is told bytes read and the total.
    Raises PlanError when there is nothing to go by, and what reading the source raises; all that is wrong with the
    result is in `differences`.
    """
    if not 0 < sample <= 1:
        raise ConfigError(f"a sample of {sample:g} makes no sense; give a share of the tensors like 0.05 (5%)")
    if public_key is not None and not Path(public_key).is_file():
        raise ConfigError(f"there is no key at {public_key}; give the file of the public key (PEM)")
    found, chosen = Verification(), sampler(sample)
    if against is not None:
        from mindformers_ckpt.look.verify_against import verify_against

        source = checkpoint_at(against, src_strategy, step)
        source.tensors()
        result = _comparable(path, strategy, source, found)
        if result is not None:
            workers = Workers(processes, may_fork)
            verify_against(result, source, chosen, contents=contents, workers=workers, progress=progress, found=found)
    else:
        folder = absolute(path)
        _verify_manifest(folder, strategy, sample, chosen, progress, found)
        if public_key is not None:
            _verify_signatures(folder, Path(public_key), found)
    if strategy is not None and found.differences:
        _doubt_strategy(as_path(path), as_strategy(strategy), found)
    return found


def _doubt_strategy(path: Path, given: Strategy, found: Verification) -> None:
    """Say which strategy a result was made for by its manifest, where one for other ranks was given."""
    if not has_manifest(path):
        return
    made_for, asked = read_result(path).target, given.describe()
    if made_for is not None and _ranks_in(made_for) != _ranks_in(asked):
        found.warnings.append(f"by its manifest the result was made for {made_for}, but the strategy given is {asked}")


def _ranks_in(description: str) -> str:
    """What a strategy's description says of its ranks, without its place."""
    return description.replace(str(origin_of(description)), "")


def _comparable(path: PathLike, strategy: StrategyLike, source: Checkpoint, found: Verification) -> Checkpoint | None:
    """A result as it can be compared with its source; None where it cannot be read, which is noted then."""
    if strategy is None and has_manifest(as_path(path)) and not _brings_layouts(as_path(path)):
        strategy = _known_strategy(read_result(as_path(path)), None, found)
    try:
        result = checkpoint_at(path, strategy)
        for rank in result.files.by_rank:
            result.records_of(rank)
    except FormatError as error:
        found.differences.append(Difference(str(error)))
        return None
    if result.files.tensors is not None:
        raise PlanError(
            f"{result.files.root} is {result.files.kind.value}, whose boxes are not those of a strategy; compare both "
            "as whole tensors (mindformers-ckpt diff)"
        )
    if (source.files.kind is Kind.HUGGING_FACE) != (result.files.kind is Kind.HUGGING_FACE):
        raise PlanError(
            f"one of {source.files.root} and {result.files.root} is a Hugging Face model, the other is not: names and "
            "forms of tensors differ; convert the source once more and compare the two results (diff)"
        )
    return result


def _verify_manifest(
    folder: Path,
    strategy: StrategyLike,
    sample: float,
    chosen: Choose,
    progress: Progress | None,
    found: Verification,
) -> None:
    if not folder.exists():
        raise PlanError(f"there is no result at {folder}{instead(folder)}")
    if not folder.is_dir():
        raise PlanError(f"{folder} is not a folder; a file is compared with its source (--against SOURCE)")
    with system_errors(PlanError, f"{folder}: cannot be read"):
        next(iter(folder.iterdir()), None)
    manifest = read_result(folder)
    check_texts(folder, manifest, found)
    known = _known_strategy(manifest, strategy, found)
    headers = check_files(folder, manifest, found)
    check_ranks(manifest, known, found)
    check_trailers(headers, sample, chosen, found)
    check_hashes(folder, manifest, headers, chosen, found, progress)
    is_whole = len(headers) == len(manifest.entries)
    for part, entry in manifest.fingerprints.items():
        if is_whole:
            _verify_fingerprint(folder, part, entry, manifest, known, chosen, progress, found)
        else:
            found.unchecked.append(_FINGERPRINTS + "not all files can be read")
    if not manifest.fingerprints and not any(entry.hashes for entry in manifest.entries):
        found.unchecked.append(
            "the contents: the run recorded neither hashes (--hash) nor fingerprints (--fingerprint); --against SOURCE "
            "compares them with what they were made of"
        )


def _verify_signatures(folder: Path, public_key: Path, found: Verification) -> None:
    """Check that what is recorded of whole tensors is signed. Whether the tensors are so is checked beside it."""
    parts = read_result(folder).fingerprints
    if any(line.startswith(_FINGERPRINTS) for line in found.unchecked):
        found.differences.append(Difference("what is signed could not be compared with the tensors", folder))
    if not parts:
        found.differences.append(Difference("the result is not signed: it was made without --fingerprint", folder))
    for part, entry in parts.items():
        try:
            tensors = recorded_checksums(entry)
        except (KeyError, TypeError, ValueError, AttributeError):
            found.differences.append(Difference("what is signed cannot be read in the manifest", folder))
            continue
        try:
            check_signature(folder / part, tensors, public_key)
        except PublishError as error:
            found.differences.append(Difference(str(error), folder / part / BUNDLE_FILE))
        else:
            found.checked.append(f"signature: {folder / part / BUNDLE_FILE}, by the key of {public_key}")


def _known_strategy(manifest: Manifest, strategy: StrategyLike, found: Verification) -> Strategy | None:
    """The strategy that is given, or that the manifest names; None where its file is gone."""
    if strategy is not None or manifest.target is None:
        return strategy_or_none(strategy)
    if manifest.target == Strategy.complete().describe():
        return Strategy.complete()
    origin = origin_of(manifest.target)
    if origin is None:
        found.warnings.append(f"the manifest does not tell where the strategy is: {manifest.target}")
        return None
    try:
        return as_strategy(origin)
    except (CheckpointError, OSError) as error:
        found.warnings.append(f"the strategy that the manifest names cannot be used: {error}; give it with --strategy")
        return None


def _verify_fingerprint(
    folder: Path,
    part: str,
    entry: Mapping[str, object],
    manifest: Manifest,
    strategy: Strategy | None,
    chosen: Choose,
    progress: Progress | None,
    found: Verification,
) -> None:
    """Compare the whole tensors of a checkpoint in a result with what is recorded of them."""
    if strategy is None and len(manifest.entries) > 1 and manifest.target is not None:
        found.unchecked.append(_FINGERPRINTS + "the strategy of the result is not known; give it with --strategy")
        return
    try:
        recorded = {told.name: told for told in recorded_checksums(entry)}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        found.differences.append(Difference(f"the manifest has no legible fingerprint ({error!r})", folder))
        return
    if entry.get("digest") != digest_of(recorded.values()):
        found.differences.append(Difference("the fingerprint in the manifest is not that of its tensors", folder))
    source = _source(folder, part, manifest)
    checkpoint = Checkpoint(source, source.own_strategy or strategy or Strategy.complete())
    try:
        verify_checksums(checkpoint, recorded, chosen(list(recorded)), found, progress)
    except (PlanError, FormatError) as error:
        found.differences.append(Difference(str(error)))


def _brings_layouts(folder: Path) -> bool:
    """Whether a result is a checkpoint 2.0."""
    return folder.is_dir() and checkpoint2.is_checkpoint(Listing(folder))


def _source(folder: Path, part: str, manifest: Manifest) -> Source:
    """The files of a checkpoint in a result, by rank."""
    if _brings_layouts(folder):
        return checkpoint2.read(Listing(folder))
    entries = [entry for entry in manifest.entries if folder_of(entry.path) == part]
    if not all("rank_" in Path(entry.path).parent.name for entry in entries):
        return Source(folder, {0: tuple(folder / entry.path for entry in entries)})
    return Source(folder / part, {entry.rank: (folder / entry.path,) for entry in entries}, Kind.RANK_FOLDERS)
