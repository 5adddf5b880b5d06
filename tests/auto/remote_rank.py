"""A rank as in `rank.py`, with faults of jobs that go through an object storage."""

from __future__ import annotations

import random
import sys
import time

import rank
from faults import arm as arm_others
from faults import at_step, before, kill

from mindformers_ckpt.job import shared_disk
from mindformers_ckpt.job.cluster.cluster import Cluster
from mindformers_ckpt.job.config import Config
from mindformers_ckpt.job.modelarts import Exchange
from mindformers_ckpt.job.transfers import Transfers


def arm(fault: str, config: Config) -> None:
    """Prepare what is to go wrong on this rank."""
    if fault == "sends no strategy":
        before(Exchange, "share_strategies", lambda *arguments: time.sleep(16))
    elif fault == "killed while fetching":
        before(Cluster, "barrier", at_step("weights complete", lambda: before(Transfers, "fetch", kill)))
    else:
        arm_others(fault, config)


def main() -> int:
    random.uniform = lambda a, b: 0.02  # a fiftieth of the pauses between attempts
    shared_disk._PROBE_PATIENCE = 0.2  # these nodes' disks have no cache that shows a file late
    rank.arm = arm  # type: ignore[attr-defined]
    return rank.main()


if __name__ == "__main__":
    sys.exit(main())
