"""Do the contents of a sharded checkpoint agree with the strategy it is read under?

Shapes cannot tell whether a strategy is the right one: under a wrong one every size may still divide. The
contents can, and a few kilobytes of some tensors are enough:

- ranks that hold the same box must hold the same values;
- ranks that hold different boxes do not all hold the same values.

This finds strategies of another run, files that were saved whole although the strategy cuts them
(`aggregated_save`), and parameters that are cut although no strategy names them (strategies saved for
trainable parameters only). It cannot find two dimensions mixed up where nothing is replicated.

Healthy checkpoints break both rules too, so not everything that is found proves a wrong strategy:

- Replicas drift apart in training, norms under sequence parallelism for one; they still resemble each other.
  Only matrices whose replicas have nothing to do with each other are proof.
- Some values are each rank's own: random generators, counters, statistics, gradients not yet summed up. They are
  integers that no strategy names, vectors, or states of a weight whose own replicas agree.
- Experts may be copies of each other (sparse upcycling). Then a rank that holds several holds equal ones; and where
  each holds one, all of them are equal.

What proves nothing is a warning, which says whose values are taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from mindformers_ckpt.errors import PlanError, describe_problems
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.numbers import Comparison, are_constant, compare
from mindformers_ckpt.sources.sampling import SMALLEST, Chosen, Pair, Samples, choose, read_samples, repeats_itself
from mindformers_ckpt.sources.shards import LogicalTensor
from mindformers_ckpt.state_names import state_of
from mindformers_ckpt.words import counted, shortened

# Replicas are trained by the same operations, but not every reduction repeats bit for bit.
_DRIFT = 0.02


class _Difference(NamedTuple):
    """Replicas of a tensor that differ."""

    pair: Pair
    found: Comparison

    def describe(self) -> str:
        return f"{self.pair.tensor} (ranks {self.pair.first} and {self.pair.second}: {self.found.words})"


class _Equals(NamedTuple):
    """What ranks hold that should hold different boxes: the tensors in which they are equal.

    `copies` are those that may be copies of each other in a healthy checkpoint, `others` are those that differ.
    """

    first: int
    second: int
    equal: list[str]
    copies: list[str]
    others: list[str]


def check_names(source: Checkpoint, tensors: Mapping[str, LogicalTensor]) -> None:
    """Raise PlanError when files and strategy have no parameter in common."""
    named = source.strategy.names()
    if named and tensors and named.isdisjoint(tensors):
        raise PlanError(
            f"{source.files.root} and its strategy ({source.strategy.origin}) have no parameter in common: the files "
            f"hold {min(tensors)}, …, the strategy names {min(named)}, …; it is the strategy of another model"
        )


def check_contents(source: Checkpoint, tensors: Mapping[str, LogicalTensor], mode: str = "error") -> list[str]:
    """Compare samples of shards; returns warnings. `mode` is one of MODES.

    Raises PlanError that names the tensors and ranks when the strategy cannot be that of the files, and
    TransferError that names a file which cannot be read.
    """
    if mode == "off" or source.strategy.is_complete:
        return []
    chosen = choose(source, tensors)
    differences = _differences(tensors, chosen)
    proof = _proof(source, tensors, differences)
    equals = _equals(source, tensors, chosen)
    wrong = [found for found in equals if found.equal and not found.others]
    if mode == "error" and (proof or wrong):
        if source.look_closely():
            return check_contents(source, tensors, mode)
        doubtful = [found for found in differences if found not in proof and found.found.distance > _DRIFT]
        raise PlanError(_describe_contradiction(source, proof, doubtful if proof else [], wrong))
    return [*_replica_warnings(differences), *_copy_warnings(equals)]


def _describe_contradiction(
    source: Checkpoint, proof: Sequence[_Difference], doubtful: Sequence[_Difference], wrong: Sequence[_Equals]
) -> str:
    problems = [
        f"{pair.tensor}: ranks {pair.first} and {pair.second} should hold the same values, but have nothing to do "
        f"with each other ({found.words})"
        for pair, found in proof
    ]
    problems += [
        f"{pair.tensor}: ranks {pair.first} and {pair.second} should hold the same values too ({found.words})"
        for pair, found in doubtful
    ]
    problems += [
        f"ranks {found.first} and {found.second} hold the same values of all "
        f"{counted(len(found.equal + found.copies), 'tensor')} looked at ({found.equal[0]}, …), but "
        "should hold different boxes: saved whole, or under another strategy"
        for found in wrong
    ]
    return describe_problems(
        f"the contents of {source.files.root} contradict its strategy ({source.strategy.origin}): is it the "
        "strategy of this run, and does it name all parameters (only_trainable_params: False)? If you know that it is "
        "right, go on with --contents warn (yaml: check_contents: warn)",
        problems,
    )


# ------------------------------------------------------------------------------------------- replicas


def _differences(tensors: Mapping[str, LogicalTensor], chosen: Chosen) -> list[_Difference]:
    """Of every tensor the replicas that are farthest apart, where some differ."""
    found = []
    for _, pairs in groupby(chosen.replicas, key=lambda pair: pair.tensor):
        compared = (_Difference(pair, _compared(tensors, chosen.samples, pair)) for pair in pairs)
        worst = max(compared, key=lambda difference: (difference.found.is_unrelated, difference.found.distance))
        if worst.found.distance:
            found.append(worst)
    return found


def _compared(tensors: Mapping[str, LogicalTensor], samples: Samples, pair: Pair) -> Comparison:
    first, second = (samples[rank, pair.tensor] for rank in pair[1:])
    return compare(first, second, tensors[pair.tensor].spec.dtype)


def _proof(
    source: Checkpoint, tensors: Mapping[str, LogicalTensor], differences: Iterable[_Difference]
) -> list[_Difference]:
    """The differences that replicas of a rightly read tensor do not have."""
    candidates = [difference for difference in differences if difference.found.is_unrelated]
    candidates = [difference for difference in candidates if _is_matrix(source, tensors[difference.pair.tensor])]
    # A state is cut like its weight, or further. Of the same shape and under a strategy that is right for the
    # weight, its replicas differ by nature: gradients that are not summed up yet, moments of them.
    weights = {
        difference.pair: difference.pair._replace(tensor=weight)
        for difference in candidates
        if (weight := _weight_of(difference.pair.tensor, tensors)) is not None
        and all(source.holds(rank, weight) for rank in difference.pair[1:])
    }
    samples = read_samples(source, {(rank, pair.tensor) for pair in weights.values() for rank in pair[1:]})
    return [
        difference
        for difference in candidates
        if difference.pair not in weights or _compared(tensors, samples, weights[difference.pair]).is_unrelated
    ]


def _is_matrix(source: Checkpoint, tensor: LogicalTensor) -> bool:
    """Whether a tensor is one that a model is made of: weights, and no list of each rank's own numbers."""
    spec = tensor.spec
    is_named = any(spec.name in layouts for layouts in source.strategy.stages)
    wide = sum(extent > 1 for extent in spec.shape) > 1
    return wide and spec.size >= SMALLEST and (is_named or "float" in spec.dtype.name)


def _weight_of(name: str, tensors: Mapping[str, LogicalTensor]) -> str | None:
    """The weight of the same shape that a tensor is a state of ("adam_m.<weight>"), None when it is none."""
    state = state_of(name, tensors)
    return state.weight if state and tensors[state.weight].spec.shape == tensors[name].spec.shape else None


def _replica_warnings(differences: Iterable[_Difference]) -> list[str]:
    differences = list(differences)
    slight = [difference.describe() for difference in differences if difference.found.distance <= _DRIFT]
    far = [difference.describe() for difference in differences if difference.found.distance > _DRIFT]
    warnings = []
    if slight:
        warnings.append(f"replicas differ slightly, those of the first rank are taken: {shortened(slight, 20)}")
    if far:
        warnings.append(
            "ranks that should hold the same values hold different ones, those of the first rank are taken for all: "
            f"{shortened(far, 20)}"
        )
    return warnings


# ------------------------------------------------------------------------------------------- different boxes


def _equals(source: Checkpoint, tensors: Mapping[str, LogicalTensor], chosen: Chosen) -> list[_Equals]:
    """The ranks that hold the same values of tensors of which they should hold different boxes."""
    by_ranks: dict[tuple[int, int], _Equals] = {}
    everywhere = _equal_everywhere(tensors, chosen)
    repeating: dict[str, bool] = {}
    for pair in chosen.distinct:
        first, second = (chosen.samples[rank, pair.tensor] for rank in pair[1:])
        if are_constant(first, tensors[pair.tensor].spec.dtype):
            continue  # norms at their start and empty moments tell nothing
        found = by_ranks.setdefault((pair.first, pair.second), _Equals(pair.first, pair.second, [], [], []))
        if first != second:
            found.others.append(pair.tensor)
            continue
        if pair.tensor not in repeating:
            repeating[pair.tensor] = _may_be_copies(source, tensors[pair.tensor], pair, pair.tensor in everywhere)
        (found.copies if repeating[pair.tensor] else found.equal).append(pair.tensor)
    return [found for found in by_ranks.values() if found.equal or found.copies]


def _equal_everywhere(tensors: Mapping[str, LogicalTensor], chosen: Chosen) -> set[str]:
    """The tensors of which all ranks that were compared hold the same values."""
    unequal = {
        pair.tensor
        for pair in chosen.distinct
        if chosen.samples[pair.first, pair.tensor] != chosen.samples[pair.second, pair.tensor]
    }
    return {pair.tensor for pair in chosen.distinct} - unequal


def _may_be_copies(source: Checkpoint, tensor: LogicalTensor, pair: Pair, everywhere: bool) -> bool:
    """Whether equal shards of a tensor may be copies of each other: experts that were made of one matrix."""
    shard = source.records_of(pair.first)[tensor.spec.name][1].spec.shape
    assert tensor.layout is not None
    if tensor.layout.cuts[0] == 1:
        return False
    if shard[0] == 1:
        return everywhere  # one expert a rank: no whole tensor, and no run has the same expert on every rank
    return repeats_itself(source, pair.first, tensor.spec.name)


def _copy_warnings(equals: Sequence[_Equals]) -> list[str]:
    """What ranks hold alike, by tensor."""
    ranks: dict[str, list[int]] = {}
    for found in equals:
        for name in found.equal + found.copies:
            ranks.setdefault(name, [found.first]).append(found.second)
    if not ranks:
        return []
    listed = [f"{name} (ranks {', '.join(map(str, held[:8]))})" for name, held in ranks.items()]
    what = "ranks hold the same values although the strategy says different boxes"
    return [f"{what}; right for copies, such as experts that were made of one matrix: {shortened(listed, 20)}"]
