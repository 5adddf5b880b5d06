"""tools/run_mindformer.py as on ModelArts: a folder and a node name for each rank, hyperparameters as --key=value."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from run_mindformer import main  # noqa: E402

from mindformers_ckpt import CheckpointHook  # noqa: E402

if __name__ == "__main__":
    number = os.environ.get("MS_NODE_ID", "0")
    os.environ["MINDFORMERS_CKPT_NODE"] = f"machine{number}"
    disk = Path(os.environ["DISKS"], number)
    disk.mkdir(parents=True, exist_ok=True)
    os.chdir(disk)
    given = sys.argv[1:]
    CheckpointHook.from_yaml = lambda config, overrides: CheckpointHook.from_args(given, config)  # type: ignore[assignment, method-assign, misc]
    sys.argv = [sys.argv[0], *(word for word in given if "=" not in word)]
    sys.exit(main())
