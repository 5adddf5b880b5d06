"""tools/run_mindformer.py with something that goes wrong: FAULT="1:load" kills rank 1 when it loads."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "auto")]

from faults import arm  # noqa: E402
from run_mindformer import main  # noqa: E402

from mindformers_ckpt.job.config import Config  # noqa: E402

if __name__ == "__main__":
    rank, _, fault = os.environ.get("FAULT", "").partition(":")
    if rank and rank == os.environ.get("MS_NODE_ID"):
        arm(fault, Config())
    sys.exit(main())
