"""Strategy: the layouts of all parameters on all pipeline stages of a job."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from mindformers_ckpt.errors import StrategyError
from mindformers_ckpt.geometry.layout import MOST_RANKS, Layout


@dataclass(frozen=True)
class Strategy:
    """Layouts by stage and parameter name, for stages of equally many ranks.

    Rank r belongs to stage r // stage_size and is rank r % stage_size of it.

    Attributes:
        stages: for every pipeline stage, parameter name -> layout.
        stage_size: ranks of one stage.
        origin: where it was read, for messages.
    """

    stages: tuple[Mapping[str, Layout], ...]
    stage_size: int
    origin: str = "complete weights"

    @classmethod
    def complete(cls) -> Strategy:
        """The strategy of complete weights: one rank that holds everything whole."""
        return cls(({},), 1)

    @classmethod
    def of_stages(cls, stages: tuple[Mapping[str, Layout], ...], origin: str) -> Strategy:
        """Build and check: every layout must lie on the same number of ranks.

        Raises StrategyError when layouts disagree about the number of ranks, or no layout is there at all.
        """
        counts = {layout.rank_count for stage in stages for layout in stage.values()}
        if not counts:
            raise StrategyError(f"{origin}: no parameter has a layout; is this a strategy file?")
        if len(counts) > 1:
            examples = {
                layout.rank_count: f"{name} on {layout.rank_count} ranks (stage {number})"
                for number, stage in enumerate(stages)
                for name, layout in stage.items()
            }
            raise StrategyError(
                f"{origin}: the layouts are for different numbers of ranks: {', '.join(list(examples.values())[:20])}. "
                "Files of different runs may be mixed here; keep those of one run only"
            )
        size = counts.pop()
        if size * len(stages) > MOST_RANKS:
            raise StrategyError(
                f"{origin}: {len(stages)} pipeline stages of {size} ranks; no job has more than {MOST_RANKS} ranks"
            )
        return cls(stages, size, origin)

    @property
    def rank_count(self) -> int:
        """Number of ranks of the job."""
        return self.stage_size * len(self.stages)

    @property
    def is_complete(self) -> bool:
        """Whether this describes complete weights (one rank, nothing cut)."""
        return self.rank_count == 1

    def stage_of(self, rank: int) -> int:
        """The pipeline stage of a rank."""
        return rank // self.stage_size

    def names(self) -> frozenset[str]:
        """All parameters that have a layout on some stage."""
        return self._names

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset().union(*self.stages)

    def layout(self, name: str, stage: int) -> Layout | None:
        """The layout of a parameter on a stage.

        MindSpore leaves a parameter that several stages share (a tied embedding) out of the files of all
        but one of them; on the other stages its tensor map holds, but not its optimizer shard (seen on
        compiled networks). None when no stage has the parameter: it is replicated.
        """
        own = self.stages[stage].get(name)
        if own is not None:
            return own
        shared = next((layouts[name] for layouts in self.stages if name in layouts), None)
        return None if shared is None else replace(shared, optimizer_shards=0, optimizer_step=0)

    def describe(self) -> str:
        """One line for messages and reports."""
        if self.is_complete:
            return "complete weights"
        stages = f", {len(self.stages)} pipeline stages of {self.stage_size}" if len(self.stages) > 1 else ""
        count = math.prod((len(self.stages), self.stage_size))
        return f"{count} ranks{stages} ({self.origin})"


def origin_of(description: str) -> str | None:
    """Where the strategy was read that `describe` said a line of, None for complete weights or another line."""
    match = re.fullmatch(r"\d+ ranks(?:, \d+ pipeline stages of \d+)? \((.+)\)", description, re.DOTALL)
    return None if match is None else match[1]
