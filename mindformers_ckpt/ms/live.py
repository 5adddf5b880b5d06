"""The strategy of the network in hand.

On Ascend MindSpore itself saves it while it compiles the network; here it is told where. A network whose
parallelism is written by hand (as on CPU, where MindSpore compiles no semi_auto_parallel) declares its
layouts instead, and the file is written where MindSpore would have written it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.files import rank_file_name, write_strategy


def save_at_compile(folder: Path, rank: int, network: Any = None) -> Path:
    """Have MindSpore save the strategy of all parameters when the network is compiled.

    Sets the auto-parallel context, and `network` as well when it is an `AutoParallel` cell, which does not
    look at the context. All parameters, not only the trainable ones: what a strategy does not name cannot
    be re-sliced. Returns the file that will be written.
    """
    import mindspore

    file = (folder / rank_file_name(rank)).absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    config = {"save_file": str(file), "only_trainable_params": False}
    mindspore.set_auto_parallel_context(strategy_ckpt_config=config)
    if hasattr(network, "save_param_strategy_file"):
        network.save_param_strategy_file(str(file))
        network.disable_strategy_file_only_for_trainable_params()
    return file


def declare(layouts: Mapping[str, Layout], folder: Path, rank: int, stage: int = 0) -> Path:
    """Write the strategy file of a rank from declared layouts."""
    file = folder / rank_file_name(rank)
    write_strategy(layouts, file, stage)
    return file
