"""One run of a plan into an object storage, step by step, as `execution.Run` does it on a disk.

    with ObjectRun(plan, destination, options) as run:
        run.prepare()        # an upload a target file; with `resume` those of an earlier run, and their parts
        run.copy()           # parts are sent; no object changes
        run.publish()        # objects take their places, and the manifest as the last

A storage cannot rename, but an upload in parts is not there before it is completed, and that is one short request. So
all bytes are sent first. Then a marker says that the destination is being changed, the old manifest goes, uploads are
completed, what was there before and is not replaced goes, the new manifest is written, and the marker goes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mindformers_ckpt.engine.object_sink import Upload, Uploads, bare_parts, part_bytes_for, send_part
from mindformers_ckpt.engine.object_tasks import object_tasks
from mindformers_ckpt.engine.sinks import Layouts
from mindformers_ckpt.engine.tasks import Task
from mindformers_ckpt.errors import ConfigError, PublishError, TransferError, raise_problems
from mindformers_ckpt.execution.checks import add_companions, check_apart, identity_of, is_checkpoint
from mindformers_ckpt.execution.copying import copy_into
from mindformers_ckpt.execution.options import Options, Report, report_of
from mindformers_ckpt.objects.attempts import at_once
from mindformers_ckpt.objects.client import Part
from mindformers_ckpt.objects.errors import MissingObject, ObjectError
from mindformers_ckpt.objects.listing import files_below, look_again
from mindformers_ckpt.objects.path import ObjectPath, may_be_mixture
from mindformers_ckpt.planning.digest import digest_of
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.planning.source_states import check_unchanged, states_of
from mindformers_ckpt.progress import Progress
from mindformers_ckpt.publish.manifest import MANIFEST_FILE, is_result, is_whole, read_manifests, without
from mindformers_ckpt.publish.results import check_addable, describe_result, partial_manifest_name
from mindformers_ckpt.publish.signature import find_bundle, left_behind
from mindformers_ckpt.publish.staging import not_ours
from mindformers_ckpt.publish.texts import hash_of, with_checksum
from mindformers_ckpt.uploads.record import Record, delete, give_up, put, put_json

_PLAN = "mindformers-ckpt-plan"  # what an object notes of the run that made it


class ObjectRun:
    """One run of a plan, used as a context manager. A failure before `publish` leaves the destination as it was.

    The arguments are those of `execution.Run`. Raises ConfigError for options that need a disk, PublishError where the
    destination may not be replaced, ObjectError where the storage does not answer.
    """

    def __init__(
        self,
        plan: Plan,
        destination: ObjectPath,
        options: Options,
        *,
        about: Mapping[str, Any] | None = None,
        file: bool = False,
    ) -> None:
        self._started = time.monotonic()
        self.plan, self.options, self.destination = plan, options, destination
        self._about, self._is_file = dict(about or {}), file
        _check_options(options, destination)
        check_apart(plan, destination)
        self._states = states_of(plan.sources)
        self.fingerprint = identity_of(digest_of(plan), self._states, options)
        self._record = Record(destination, self.fingerprint, options.partial)
        self._layout = Layouts(plan.targets).of
        self._uploads: tuple[Upload, ...] = ()
        self._tasks: list[Task] = []
        self.already_made = False

    def __enter__(self) -> ObjectRun:
        look_again()
        self.already_made = self.options.resume and self._is_made()
        if self.already_made:
            self._record.clear_markers()
        else:
            self._check_destination()
        self._record.clear(own_too=self.already_made or not self.options.resume)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or not self._uploads:
            return
        if not self.options.keep:
            with contextlib.suppress(ObjectError):  # the next run for the destination does it
                give_up(self.destination, self._names())
                delete([self._record.path])
        elif isinstance(error, (TransferError, PublishError)):
            failure = PublishError if isinstance(error, PublishError) else TransferError
            advice = "What was sent is kept in the storage: the same command with --resume goes on"
            raise failure(f"{error}\n  {advice}") from error

    def prepare(self, check: Callable[[], None] = lambda: None) -> None:
        """Begin an upload for every target file, or find those of an earlier run and what they have."""
        if self.already_made:
            return
        known = self._record.read() if self.options.resume else {}
        found = at_once(lambda file: self._upload(file, known), range(len(self.plan.targets)))
        self._uploads = tuple(found)
        self._record.write(self._names())
        for file, upload in enumerate(self._uploads):
            check()
            for number, content in bare_parts(self._layout(file), upload):
                send_part(upload, number, content)
        self._tasks = object_tasks(self.plan, self._uploads, whole_groups=self.options.processes > 1)

    def copy(self, *, progress: Progress | None = None, check: Callable[[], None] = lambda: None) -> None:
        """Send what the storage does not have. `progress` is told the bytes and the total after every task."""
        if self.already_made:
            return
        copy_into(
            self.plan,
            Uploads(self._uploads),
            self._tasks,
            self.options,
            progress=progress,
            check=check,
            before=self._resumed_bytes,
        )
        check_unchanged(self._states)

    def publish(self, companions: Callable[[Path], None] = lambda folder: None) -> Report:
        """Put the objects in place, with those that `companions` makes of files in a folder, and the manifest."""
        if not self.already_made:
            parts = at_once(self._parts, range(len(self._uploads)))
            if self._is_file:
                self._complete(0, parts[0])
            else:
                self._put(parts, _texts(companions))
            delete([self._record.path])
            look_again()
        resumed = self.plan.bytes_written if self.already_made else self._resumed_bytes
        bundle = None if self.already_made or not self.plan.sources else find_bundle(self.plan.sources[0].path)
        signature = "" if bundle is None else left_behind(bundle, "a result in an object storage has no fingerprint")
        return report_of(self.plan, self.destination, self._started, resumed, signature=signature)

    def _put(self, parts: list[list[Part]], texts: Mapping[str, bytes]) -> None:
        """Put a folder in place: with the marker there from before the first change until after the last one."""
        targets = [target.path for target in self.plan.targets]
        put_json(self._record.marker, {"plan": self.fingerprint})
        self._remove_manifests()
        before = [below(self.destination, key) for key in files_below(self.destination.place)]
        at_once(lambda file: self._complete(file, parts[file]), range(len(parts)))
        at_once(lambda item: put(self.destination / item[0], item[1]), texts.items())
        made = {self.destination / path for path in (*texts, *targets)}
        folders = {(self.destination / path).parent for path in targets}
        delete(path for path in before if path not in made and (not self.options.partial or path.parent in folders))
        self._check_made()
        look_again()
        about = {"plan": self.fingerprint, **self._about}
        hashes = {path: hash_of(content) for path, content in texts.items()}
        manifest = describe_result(self.plan, self.destination, (), about, self._states, texts=hashes)
        put_json(self.destination / self._manifest_name, with_checksum(manifest))
        self._record.clear_markers()

    @property
    def _manifest_name(self) -> str:
        return partial_manifest_name(self.plan) if self.options.partial else MANIFEST_FILE

    def _remove_manifests(self) -> None:
        """Take back what manifests say of files that are about to change."""
        own = {Path(target.path).parent for target in self.plan.targets}
        for name, content in read_manifests(self.destination).items():
            kept = without(content, own) if self.options.partial and name != self._manifest_name else None
            if kept is None:
                delete([self.destination / name])
            else:
                put_json(self.destination / name, with_checksum(kept))

    def _complete(self, file: int, parts: Sequence[Part]) -> None:
        """Put one object in place, unless an earlier attempt did."""
        upload = self._uploads[file]
        if upload.upload:
            place = upload.place
            try:
                place.client.complete(place.bucket, place.key, upload.upload, parts)
            except MissingObject:  # the answer to an attempt that succeeded was lost, or somebody has given it up
                if not self._is_made_object(file):
                    raise

    def _check_made(self) -> None:
        """Raise PublishError unless all objects are those of this run: another one may have been at work."""
        problems = [
            f"{self._target(file)} is not what this run has put there"
            for file, is_made in enumerate(at_once(self._is_made_object, range(len(self._uploads))))
            if not is_made
        ]
        headline = f"another run is changing {self.destination}; let it end, then run this one again (--overwrite)"
        raise_problems(PublishError, headline, problems)

    def _upload(self, file: int, known: Mapping[str, str]) -> Upload:
        """The upload of a target file, an earlier run's or a new one; without a name for an object that is made."""
        place = self._target(file).place
        size = part_bytes_for(self._layout(file).size)
        all_parts = frozenset(range(1, -(-self._layout(file).size // size) + 1))
        name = known.get(place.key)
        if name is not None and self._is_made_object(file):
            return Upload(place, "", size, all_parts)
        if name:
            try:
                parts = place.client.parts(place.bucket, place.key, name)
                whole = (number for number, part in parts.items() if part.size == self._part_size(file, size, number))
                return Upload(place, name, size, frozenset(whole))
            except MissingObject:
                pass  # given up, by somebody or by a rule of the bucket
        return Upload(place, place.client.begin(place.bucket, place.key, {_PLAN: self.fingerprint}), size)

    def _part_size(self, file: int, part_bytes: int, number: int) -> int:
        return min(part_bytes, self._layout(file).size - (number - 1) * part_bytes)

    def _parts(self, file: int) -> list[Part]:
        """The parts of a target file, as the storage has them. Raises PublishError unless they are the whole of it."""
        upload = self._uploads[file]
        if not upload.upload:
            return []
        place, size = upload.place, self._layout(file).size
        parts = place.client.parts(place.bucket, place.key, upload.upload)
        wanted = range(1, -(-size // upload.part_bytes) + 1)
        lacking = [
            number
            for number in wanted
            if number not in parts or parts[number].size != self._part_size(file, upload.part_bytes, number)
        ]
        if lacking:
            raise PublishError(
                f"{self._target(file)}: the storage lacks {len(lacking)} of {len(wanted)} parts that were sent "
                f"(the first is {lacking[0]})"
            )
        return [parts[number] for number in wanted]

    def _is_made_object(self, file: int) -> bool:
        """Whether the object at a target is the one that this run, or an earlier one of the same plan, makes."""
        place = self._target(file).place
        try:
            found, notes = place.client.head(place.bucket, place.key)
        except MissingObject:
            return False
        return notes.get(_PLAN) == self.fingerprint and found.size == self._layout(file).size

    def _target(self, file: int) -> ObjectPath:
        return self.destination if self._is_file else self.destination / self.plan.targets[file].path

    def _names(self) -> dict[str, str]:
        """The uploads for the record, by the keys of their objects."""
        return {upload.place.key: upload.upload for upload in self._uploads}

    @property
    def _resumed_bytes(self) -> int:
        return max(0, self.plan.bytes_written - sum(task.bytes_written for task in self._tasks))

    def _is_made(self) -> bool:
        """Whether the destination has the whole result of this plan."""
        if self._is_file:
            return bool(self.plan.targets) and self._is_made_object(0)
        made = [found for found in read_manifests(self.destination).values() if found.get("plan") == self.fingerprint]
        return any(is_whole(self.destination, manifest) for manifest in made)

    def _check_destination(self) -> None:
        """Refuse a destination that holds what may not be replaced. Raises PublishError."""
        destination, options = self.destination, self.options
        if not destination.exists() and not may_be_mixture(destination):
            return
        if destination.is_file() != self._is_file and destination.exists():
            form, wanted = ("an object", "a folder") if destination.is_file() else ("a folder", "the name of an object")
            raise PublishError(f"{destination} is {form}; {wanted} was expected")
        if options.partial:
            replace = options.overwrite or options.overwrite_anything or options.resume
            check_addable(self.plan, destination, self._about, replace, self._states)
            return
        if options.overwrite_anything or (options.resume and self._record.marker.exists()):
            return
        is_mixture = may_be_mixture(destination)
        if is_mixture and not options.overwrite:
            raise PublishError(
                f"{destination} may be a mixture: a run is putting a result there, or was killed while it did; let it "
                "end, go on with its own command and --resume, or replace what is there (--overwrite)"
            )
        if not options.overwrite:
            state = "exists" if self._is_file else "is not empty"
            raise PublishError(f"{destination} {state}; choose another name, or allow it to be replaced (--overwrite)")
        is_ours = is_checkpoint(destination) if self._is_file else is_result(destination)
        if not (is_ours or is_mixture):
            raise not_ours(destination, self._is_file)


def below(folder: ObjectPath, key: str) -> ObjectPath:
    """The path of a key in the bucket of a folder."""
    return ObjectPath(folder.place._replace(key=key).url)


def _check_options(options: Options, destination: ObjectPath) -> None:
    """Refuse what needs the result on a disk. Raises ConfigError."""
    asked = {
        "--hash": options.hashes,
        "--fingerprint": options.fingerprints,
        "--sign": options.sign is not None,
        "--crc-check": options.crc,
        "--fsync": options.fsync,
    }
    refused = [name for name, is_given in asked.items() if is_given]
    if refused:
        raise ConfigError(
            f"{destination} is in an object storage, where {', '.join(refused)} cannot be done; leave it out "
            "(mindformers-ckpt fingerprint reads a result afterwards)"
        )
    if not destination.place.key:
        raise ConfigError(f"{destination} is a whole bucket; name a folder in it")


def _texts(companions: Callable[[Path], None]) -> dict[str, bytes]:
    """The files that stand beside those with tensors, by their paths in the folder of the result."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="mindformers_ckpt-") as name:
        folder = Path(name)
        add_companions(companions, folder)
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
