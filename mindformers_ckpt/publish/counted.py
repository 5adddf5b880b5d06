"""What a run counted: the fingerprints of its result and of its source, and the signatures that go with them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.engine.tasks import Done
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.publish.fingerprints import KEY, describe_fingerprints, recorded_checksums
from mindformers_ckpt.publish.signature import left_behind, sign, take_over
from mindformers_ckpt.publish.source_fingerprint import SOURCE_KEY, Origin, describe_source

LEFT_ASIDE = "left_aside"  # what a manifest says of tensors of the source that the plan does not take


class Counted(NamedTuple):
    """Fingerprints as a manifest has them.

    Attributes:
        result: folder of a checkpoint in the result -> its fingerprint.
        source: that of the source, where the result is not only cut in another way.
    """

    result: Mapping[str, Any]
    source: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        plan: Plan,
        done: Collection[Done],
        shapes: Mapping[str, tuple[int, ...]],
        origins: Iterable[Origin] | None,
        *,
        of_all: bool,
    ) -> Counted:
        """What finished tasks counted; `shapes` and `origins` are those of `Run`, `of_all` if nothing is left aside."""
        of_all = of_all and origins is None
        shares = itertools.chain.from_iterable(task.shares for task in done)
        result = describe_fingerprints(plan, shares, shapes, of_all=of_all)
        if origins is None:
            return cls(result, {})
        targets = itertools.chain.from_iterable(map(recorded_checksums, result.values()))
        of_sources = itertools.chain.from_iterable(task.sources for task in done)
        return cls(result, describe_source(plan, origins, list(targets), of_sources))

    @classmethod
    def recorded(cls, manifests: Iterable[Mapping[str, Any]]) -> Counted:
        """What the first manifest with fingerprints has."""
        made: Mapping[str, Any] = next((manifest for manifest in manifests if KEY in manifest), {})
        return cls(made.get(KEY, {}), made.get(SOURCE_KEY, {}))

    def as_manifest(self) -> dict[str, Any]:
        """The keys of a manifest."""
        return {KEY: self.result, **({SOURCE_KEY: self.source} if self.source else {})}

    def digests(self) -> dict[str, str]:
        """The digests of the checkpoints in the result, by their folders."""
        return {folder: entry["digest"] for folder, entry in self.result.items()}

    def source_digest(self) -> str:
        """The digest of the source, "" where it is not known; of several checkpoints each has its own."""
        if self.source:
            return self.source["digest"] or ""
        found = [entry.get("source_digest", "") for entry in self.result.values()]
        return str(found[0]) if len(found) == 1 else ""

    def sign(self, folder: Path, key: Path) -> str:
        """Sign the checkpoints in the folder of the result; what is to be said of it."""
        for part, entry in self.result.items():
            sign(folder / part, recorded_checksums(entry), key)
        return f"made with {key}"

    def keep(self, bundle: Path, folder: Path) -> str:
        """Take the signature of the source over where the result has its tensors; what is to be said of it."""
        if not self.result:
            return left_behind(bundle, "only with --fingerprint is it known whether the tensors are the same")
        taken = [take_over(bundle, folder / part, recorded_checksums(entry)) for part, entry in self.result.items()]
        return f"taken over from {bundle}" if any(taken) else left_behind(bundle, "the result has other tensors")
