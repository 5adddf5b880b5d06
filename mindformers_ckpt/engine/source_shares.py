"""What is read of a source, as shares of the checksums of its tensors: of those that a result has in another form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.checksums.shares import share_of
from mindformers_ckpt.engine.tasks import ALL, SourceShare
from mindformers_ckpt.engine.views import in_view
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.planning.model import Place
from mindformers_ckpt.planning.shards import in_whole

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

# The tensors of source files that are a box of a larger one, by the number of the file and the name there: that box,
# and the shape of the whole.
Cuts = Mapping["tuple[int, str]", "tuple[Box, tuple[int, ...]]"]


class SourceShares:
    """What one copier has read since it was asked last. Nothing is read for it."""

    def __init__(self, cuts: Cuts) -> None:
        self._cuts = cuts
        self._found: dict[tuple[int, str, str], int] = {}

    def add(self, place: Place, target: str, part: Box, content: Array) -> None:
        """Count a part of a place, in the type that the file has, which was read for a target tensor."""
        if not part.volume:
            return
        box, shape = part.relative_to(place.box), place.box.shape
        if place.view is not None:
            box, content = in_view(box, place.view, content)
            shape = place.view.shape
        tensor = place.tensor or target
        share = self._share(place.file, tensor, box, shape, content)
        if share is not None:
            key = place.file, tensor, target
            self._found[key] = self._found.get(key, 0) ^ share

    def add_all(self, file: int, tensor: str, content: Array) -> None:
        """Count all of a file's tensor, in its order, but perhaps in another shape; as often as it is read."""
        if not content.size:
            return
        shape = self._cuts[file, tensor][0].shape if (file, tensor) in self._cuts else content.shape
        share = self._share(file, tensor, Box.whole(shape), shape, content)
        if share is not None:
            self._found[file, tensor, ALL] = share

    def take(self) -> tuple[SourceShare, ...]:
        """What was counted since this was called last."""
        found, self._found = self._found, {}
        return tuple(SourceShare(*key, share) for key, share in found.items())

    def _share(self, file: int, tensor: str, box: Box, shape: tuple[int, ...], content: Array) -> int | None:
        """The share in the checksum of the whole tensor; None where a box of it cannot be told (see `in_whole`)."""
        import numpy as np

        cut = self._cuts.get((file, tensor))
        if cut is not None:
            found = in_whole(box, shape, *cut)
            if found is None:
                return None
            box, shape = found
        return share_of(np.ascontiguousarray(content), box, shape)
