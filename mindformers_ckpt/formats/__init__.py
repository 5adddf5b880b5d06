"""Checkpoint files as data: which tensors a file holds and at which bytes; `.ckpt` and `.safetensors`.

Reading looks at headers only, never at contents. Writing is a `FileLayout`: set the file to its size,
write its frames, and write the contents at its segments.
"""

from mindformers_ckpt.formats.dtypes import DType
from mindformers_ckpt.formats.tensor_file import (
    FileLayout,
    Header,
    Segment,
    TensorRecord,
    TensorSpec,
    file_size,
    layout_file,
    read_header,
)

__all__ = [
    "DType",
    "FileLayout",
    "Header",
    "Segment",
    "TensorRecord",
    "TensorSpec",
    "file_size",
    "layout_file",
    "read_header",
]
