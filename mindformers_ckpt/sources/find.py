"""What is at a path? The answer is exactly one source, or an error that says what is there.

This is the one place that decides it: transform, convert, merge-lora, the hook and the adapter under MindFormers ask
here. docs/sources.md has the table.
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from mindformers_ckpt.disk.files import like_it
from mindformers_ckpt.errors import PlanError, describe_problems
from mindformers_ckpt.objects.listing import look_again
from mindformers_ckpt.objects.path import ObjectPath, as_path, may_be_mixture
from mindformers_ckpt.sources import checkpoint2, complete, dcp, dcp_safetensors, foreign, huggingface, rank_folders
from mindformers_ckpt.sources.complete import at_step
from mindformers_ckpt.sources.listing import Listing, rank_of
from mindformers_ckpt.sources.source import SUFFIXES, TORCH_SUFFIXES, Kind, Source
from mindformers_ckpt.strategy.metadata import METADATA_FILE

_LOOKED_INTO = 20  # folders of a folder, for advice
_URL_SCHEMES = ("http://", "https://", "hf://")


def find_source(
    path: str | os.PathLike[str], step: str | None = None, *, resume: bool = False, weights_only: bool = False
) -> Source:
    """Find the weights at `path`.

    `step` chooses among the files of rank folders, or of a folder of complete weights: a file's name, or an epoch and
    step like "3_150". Of rank folders without it the last by default sort of the names is taken (guide), or with
    `resume` the last that all ranks have saved whole. Of a save path of checkpoint 2.0 it chooses an iteration.
    `weights_only` leaves the files of an optimizer aside, where it has files of its own.

    Raises PlanError when there are none, they cannot be told apart, or one shard was given in place of the whole.
    """
    path = _checked(path)
    if path.is_dir():  # asked once: on a network disk the answer is a round trip
        return _in_folder(Listing(path), step, resume=resume, weights_only=weights_only)
    source = _file(path)
    return at_step(source, step) if step else source


def _in_folder(listing: Listing, step: str | None, *, resume: bool, weights_only: bool) -> Source:
    """The source that a folder is."""
    if checkpoint2.is_checkpoint(listing):
        _refuse_two_kinds(listing, "a checkpoint 2.0", "the folder of an iteration")
        return checkpoint2.read(listing, step, weights_only=weights_only)
    distributed = _distributed(listing, weights_only)
    if distributed is not None:
        return _without_steps(distributed, step)
    if listing.rank_folders:
        return rank_folders.read_to_resume(listing) if resume and not step else rank_folders.read(listing, step)
    source = _folder(listing)
    return at_step(source, step) if step else source


def holds_rank_folders(listing: Listing) -> bool:
    """Whether a folder is a checkpoint in rank folders, and no other kind that may have some."""
    others = (checkpoint2, dcp, dcp_safetensors)
    return not any(kind.is_checkpoint(listing) for kind in others) and bool(listing.rank_folders)


def _distributed(listing: Listing, weights_only: bool) -> Source | None:
    """The source of a folder whose files hold boxes of any sizes, and say which; None for another one."""
    kind = next((kind for kind in (dcp, dcp_safetensors) if kind.is_checkpoint(listing)), None)
    if kind is None:
        return None
    _refuse_two_kinds(listing, "a distributed checkpoint", "a folder with that alone")
    return dcp.read(listing, weights_only=weights_only) if kind is dcp else dcp_safetensors.read(listing)


def _without_steps(source: Source, step: str | None) -> Source:
    if step:
        raise PlanError(f"{source.root} is one checkpoint, which has no steps; leave {step!r} out")
    return source


def _folder(listing: Listing) -> Source:
    """The source that a folder without rank folders is."""
    path = listing.folder
    known = foreign.describe(listing)
    if known is not None:
        raise PlanError(known)
    _refuse_shard(path, path)
    if huggingface.is_model(listing):
        return huggingface.read(listing)
    found = complete.read(listing)
    if found is not None:
        return found
    if listing.weight_files(TORCH_SUFFIXES):
        return huggingface.read(listing)
    raise PlanError(_nothing(listing))


def _refuse_two_kinds(listing: Listing, what: str, instead: str) -> None:
    """Refuse a checkpoint beside rank folders that hold files: both could be meant."""
    holding = [place.name for place in listing.rank_folders.values() if Listing(place).weight_files()]
    if holding:
        raise PlanError(
            f"{listing.folder} holds {what}, and rank folders with files ({', '.join(holding[:4])}); give {instead}, "
            "or move the one that is not meant"
        )


def find_mindspore(path: str | os.PathLike[str], step: str | None = None, *, weights_only: bool = False) -> Source:
    """`find_source` where weights with MindSpore's names are needed. Raises PlanError for a Hugging Face model."""
    source = find_source(path, step, weights_only=weights_only)
    if source.kind is Kind.HUGGING_FACE:
        raise PlanError(
            f"{source.root} is a Hugging Face model, whose tensors have other names and forms than MindSpore's; "
            "convert it: mindformers-ckpt convert --input-path … --output-path … (--dst-strategy cuts it in the same "
            "pass)"
        )
    return source


def find_huggingface(path: str | os.PathLike[str], step: str | None = None) -> Source:
    """`find_source` where weights of a Hugging Face model are expected, whatever describes them."""
    source = _huggingface(path, step)
    return at_step(source, step) if step and not source.sharded and source.tensors is None else source


def _huggingface(path: str | os.PathLike[str], step: str | None) -> Source:
    checked = _checked(path)
    if not checked.is_dir():
        if not checked.is_file():
            raise PlanError(f"there is nothing at {checked}{instead(checked)}")
        _refuse_shard(checked, checked.parent)
        _refuse_part(checked)
        return huggingface.read_file(checked)
    listing = Listing(checked)
    if checkpoint2.is_checkpoint(listing):
        raise PlanError(
            f"{checked} is a checkpoint of MindFormers' own format (checkpoint 2.0), not a Hugging Face model; "
            "--reversed converts from MindSpore to Hugging Face"
        )
    distributed = _distributed(listing, weights_only=True)
    if distributed is not None:
        return _without_steps(distributed, step)
    if len(listing.rank_folders) > 1:
        raise PlanError(
            f"{checked} holds rank folders, as MindSpore saves them, not a Hugging Face model; --reversed converts "
            "from MindSpore to Hugging Face"
        )
    if listing.rank_folders:  # what merge-lora makes of a model, in one piece
        return rank_folders.read(listing, step)
    known = foreign.describe(listing)
    if known is not None:
        raise PlanError(known)
    _refuse_shard(checked, checked)
    return huggingface.read(listing)


def check_outside(files: Source, destination: Path) -> None:
    """Refuse a target folder in the source folder, where the result would be taken for a part of the source."""
    root = files.root.resolve()
    if root.is_dir() and destination.resolve().is_relative_to(root):
        raise PlanError(f"the target folder {destination} is in the source folder {root}; choose another folder")


def is_huggingface_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a Hugging Face model."""
    folder = as_path(path)
    return folder.is_dir() and huggingface.is_model(Listing(folder))


def _checked(path: str | os.PathLike[str]) -> Path:
    found = as_path(path)
    if isinstance(found, ObjectPath):
        return _checked_object(found)
    text = os.fspath(path)
    if not text.strip():
        raise PlanError("the path of the checkpoint is empty; is a variable not set?")
    # Path() makes obs:/bucket of obs://bucket.
    if text.startswith((*_URL_SCHEMES, *(scheme.replace("//", "/") for scheme in _URL_SCHEMES))):
        raise PlanError(
            f"{text} is on the web, but files of a disk or of an object storage (obs://, s3://) are read here; copy it "
            "to one first"
        )
    return Path(os.path.abspath(text))


def _checked_object(path: ObjectPath) -> ObjectPath:
    """Refuse a whole bucket, and a result that a run was putting in place when it was killed."""
    if not path.place.key:
        raise PlanError(f"{path} is a whole bucket; name a folder or a file in it")
    look_again()
    if not path.exists():
        return path  # which is said in other words
    for place in (path, *list(path.parents)[:2]):  # a checkpoint, its rank folder, a file in that
        if may_be_mixture(place):
            raise PlanError(
                f"{place} may be a mixture: a run is putting a result there, or was killed while it did; let it end, "
                "or run its command again with --resume"
            )
    return path


def _file(path: Path) -> Source:
    """The source that a single file is."""
    if not path.exists():
        raise PlanError(f"there is no checkpoint at {path}{instead(path)}")
    _refuse_shard(path, path.parent)
    _refuse_part(path)
    in_model = path.suffix == ".safetensors" and huggingface.is_model(Listing(path.parent))
    if path.suffix in (*TORCH_SUFFIXES, ".json") or in_model:
        return huggingface.read_file(path)
    return complete.read_file(path)


def _refuse_shard(path: Path, folder: Path) -> None:
    """Refuse what is in the folder of one rank when other ranks' folders beside it hold files, too.

    Alone it is complete weights: the guide's own example is `…/rank_0/llama3_8b.ckpt`.
    """
    rank = rank_of(folder)
    if rank is None:
        return
    siblings = (other for other in Listing(folder.parent).rank_folders.items() if other[0] != rank)
    holding = list(islice((other for other, place in siblings if Listing(place).weight_files()), 4))
    if holding:
        others = ", ".join(f"rank_{other}" for other in holding)
        alone = (
            f"if {path.name} alone holds the whole weights, give it from a folder that is not named rank_<n> (a copy, "
            "or a symbolic link)"
        )
        whole = f"for the checkpoint of all ranks give {folder.parent}, with the strategy it was saved under"
        headline = f"{path} is the part of one rank: {others} beside it hold files, too"
        raise PlanError(describe_problems(headline, [whole, alone]))


def _refuse_part(path: Path) -> None:
    """Refuse what is a part of a checkpoint 2.0, or of another distributed one.

    The two files of a job on one card are complete weights.
    """
    if dcp.is_part(path.name) or dcp_safetensors.is_part(path.name):
        raise PlanError(
            f"{path} is by its name a part of a distributed checkpoint, which several files are together; give its "
            f"folder, {path.parent}"
        )
    found = checkpoint2.parse_name(path.name)
    if (found is not None and found.total > 1) or path.name == METADATA_FILE:
        raise PlanError(
            f"{path} is by its name a part of a checkpoint of MindFormers' own format (checkpoint 2.0); give its "
            f"folder, {path.parent}"
        )


def instead(path: Path) -> str:
    """What is where a path was expected to lead, and what of it is named alike."""
    if isinstance(path, ObjectPath):
        return ""  # a folder further up may hold anything, and listing it takes as long
    parent = next((parent for parent in path.parents if parent.is_dir()), None)
    if parent is None or parent == Path(parent.anchor):
        return ""
    try:
        held = f"; {parent} holds {Listing(parent).describe()}"
    except PlanError:
        return ""
    like = like_it(path)
    return f"{held}.{like}" if like else held


def _nothing(listing: Listing) -> str:
    strategies = "strategy files, which hold no weights; " if listing.strategy_files else ""
    instead_of_it = folders_with_weights(listing) or "the folder that holds the rank folders, or a file"
    return (
        f"{listing.folder} holds neither rank_<n> folders nor a .ckpt or .safetensors file, but {strategies}"
        f"{listing.describe()}; give {instead_of_it}"
    )


def folders_with_weights(listing: Listing) -> str:
    """The folders of a folder that hold what was looked for, in words; "" when none does."""
    folders = [name for name in listing.names if name not in listing.file_names][:_LOOKED_INTO]
    return " or ".join(str(listing.folder / name) for name in folders if _holds_weights(listing.folder / name))


def _holds_weights(folder: Path) -> bool:
    try:
        listing = Listing(folder)
        held = listing.rank_folders or listing.weight_files((*SUFFIXES, *TORCH_SUFFIXES))
        return bool(held) or any(kind.is_checkpoint(listing) for kind in (checkpoint2, dcp, dcp_safetensors))
    except PlanError:
        return False
