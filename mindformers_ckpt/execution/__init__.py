"""One run of a plan, from its check to its result: what all commands and jobs do."""

from mindformers_ckpt.execution.checks import check_apart, identity_of, is_checkpoint
from mindformers_ckpt.execution.copying import copy_into, copy_unchanged
from mindformers_ckpt.execution.options import Options, Progress, Report, affordable_processes, report_of
from mindformers_ckpt.execution.run import Run

__all__ = [
    "Options",
    "Progress",
    "Report",
    "Run",
    "affordable_processes",
    "check_apart",
    "copy_into",
    "copy_unchanged",
    "identity_of",
    "is_checkpoint",
    "report_of",
]
