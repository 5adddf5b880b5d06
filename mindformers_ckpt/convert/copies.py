"""Tensors that a model holds once and a file holds twice must be equal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mindformers_ckpt.convert.weights import Found
from mindformers_ckpt.errors import PlanError, raise_problems
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.planning.model import Numbers, Place, SourceFile

_COMPARED_BYTES = 4 << 20


def check_copies(copies: Sequence[tuple[Found, Found]]) -> None:
    """Compare tensors that a model ties with what they are tied to. Raises PlanError that lists differences."""
    different = [
        f"{copy.spec.name} is not equal to {original.spec.name}"
        for copy, original in copies
        if not _are_equal(copy, original)
    ]
    headline = (
        "tensors differ that the model holds once; if the output layer is one of its own, config.json must say "
        "tie_word_embeddings false"
    )
    raise_problems(PlanError, headline, different)


def _are_equal(first: Found, second: Found) -> bool:
    import numpy as np

    from mindformers_ckpt.engine.reader import ShardReader
    from mindformers_ckpt.geometry.box import blocks

    if (first.spec.dtype, first.spec.shape) != (second.spec.dtype, second.spec.shape):
        return False
    whole = Box.whole(first.spec.shape)
    files: Numbers[Path] = Numbers()
    both = [found.places(Place(0, whole), files.__getitem__) for found in (first, second)]
    reader = ShardReader([SourceFile(path, path.stat().st_size) for path in files])
    try:
        for block in blocks(whole, _COMPARED_BYTES // first.spec.dtype.itemsize):
            contents = []
            for places in both:
                out = np.empty(block.shape, first.spec.dtype.carrier)
                for place in places:
                    part = place.box.intersect(block)
                    if part is not None:
                        target = out[part.relative_to(block).slices()]
                        reader.read(place, place.tensor, first.spec.dtype, part, target)
                contents.append(out)
            if not np.array_equal(contents[0], contents[1]):
                return False
    finally:
        reader.close()
    return True
