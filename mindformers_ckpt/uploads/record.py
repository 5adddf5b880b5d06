"""What a run has in the storage beside its destination while it works: a record of its uploads, and a marker.

Keys, for a destination `folder/result`:

    folder/.result.run-<id>.json         the uploads of a run that has not ended
    folder/.result.run-part-<id>.json    the same, of one that adds some ranks
    folder/.result.unfinished-<id>       objects are being put in place: until it goes, readers refuse the destination
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mindformers_ckpt.errors import PublishError
from mindformers_ckpt.log import log
from mindformers_ckpt.objects.attempts import at_once
from mindformers_ckpt.objects.listing import keys_beginning
from mindformers_ckpt.objects.path import ObjectPath, marker_of
from mindformers_ckpt.text_files import MAX_OWN_BYTES, read_json_object, readable_json

_PART = "part-"


@dataclass(frozen=True)
class Record:
    """The record of one run. Raises ObjectError where the storage does not answer."""

    destination: ObjectPath
    fingerprint: str
    is_part: bool

    @property
    def path(self) -> ObjectPath:
        return self.destination.with_name(f"{self._start}{self.fingerprint[:16]}.json")

    @property
    def marker(self) -> ObjectPath:
        return marker_of(self.destination, self.fingerprint[:16])

    @property
    def _start(self) -> str:
        return f".{self.destination.name}.run-" + (_PART if self.is_part else "")

    def write(self, uploads: Mapping[str, str]) -> None:
        """Note the uploads, by the keys of their objects, before anything is sent to them."""
        put_json(self.path, {"plan": self.fingerprint, "uploads": dict(uploads)})

    def read(self) -> dict[str, str]:
        """The uploads of an earlier run of the same plan; none where there was none."""
        if str(self.path) not in map(str, _objects(self.destination, self._start)):
            return {}
        content = read_json_object(self.path, PublishError, limit=MAX_OWN_BYTES)
        return _uploads_in(content) if content.get("plan") == self.fingerprint else {}

    def clear(self, *, own_too: bool) -> None:
        """Give up what earlier runs have sent. Runs that add ranks leave each other's."""
        for path in _objects(self.destination, self._start):
            if own_too if path == self.path else not self.is_part:
                log.info("giving up what an earlier run has sent to %s", self.destination)
                give_up(self.destination, _uploads_in(read_json_object(path, PublishError, limit=MAX_OWN_BYTES)))
                delete([path])

    def clear_markers(self) -> None:
        """Nothing at the destination is a mixture: neither by this run, nor, where all was replaced, by others."""
        delete([self.marker] if self.is_part else _objects(self.destination, marker_of(self.destination).name))


def give_up(destination: ObjectPath, uploads: Mapping[str, str]) -> None:
    """Abort uploads; their parts go."""

    def abort(item: tuple[str, str]) -> None:
        destination.place.client.abort(destination.place.bucket, *item)

    at_once(abort, uploads.items())


def put_json(path: ObjectPath, content: Any) -> None:
    """Write a JSON file as an object."""
    put(path, (readable_json(content, indent=1) + "\n").encode())


def put(path: ObjectPath, data: bytes) -> None:
    """Write a small object."""
    path.place.client.put(path.place.bucket, path.place.key, data)


def delete(paths: Iterable[ObjectPath]) -> None:
    """Remove objects."""
    at_once(lambda path: path.place.client.delete(path.place.bucket, path.place.key), paths)


def _objects(destination: ObjectPath, start: str) -> list[ObjectPath]:
    """The objects beside a destination whose names begin so."""
    keys = keys_beginning(destination.with_name(start).place)
    return [destination.with_name(key.rpartition("/")[2]) for key in keys]


def _uploads_in(content: Mapping[str, Any]) -> dict[str, str]:
    uploads = content.get("uploads")
    return {str(key): str(upload) for key, upload in uploads.items()} if isinstance(uploads, dict) else {}
