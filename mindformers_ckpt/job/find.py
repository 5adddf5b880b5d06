"""What a job's `load_checkpoint` leads to."""

from __future__ import annotations

from mindformers_ckpt.job.config import Config
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.sources.source import Source


def find_checkpoint(config: Config) -> Source:
    """Find it, and of rank folders the files that `resume_training` asks for. Raises PlanError."""
    return find_source(
        config.load_checkpoint,
        config.step_file,
        resume=config.resume_training is True,
        weights_only=config.run_mode not in ("train", "finetune"),
    )
