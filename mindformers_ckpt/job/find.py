"""What a job's `load_checkpoint` leads to."""

from __future__ import annotations

from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.job.config import Config
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.sources.source import Source


def find_checkpoint(config: Config) -> Source:
    """Find it, and of rank folders the files that `resume_training` asks for. Raises PlanError."""
    found = find_source(
        config.load_checkpoint,
        config.step_file,
        resume=config.resume_training is True,
        weights_only=not config.for_training,
    )
    if found.tensors is not None:
        raise PlanError(
            f"load_checkpoint is {found.kind.value} ({found.root}), which a job does not read; make rank files of it "
            "with mindformers-ckpt convert (Hugging Face names) or transform (MindSpore's names) first"
        )
    return found
