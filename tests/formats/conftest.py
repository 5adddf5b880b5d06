from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mindformers_ckpt.formats import FileLayout, TensorRecord


@pytest.fixture(scope="session")
def write_file() -> Callable[[Path, FileLayout, Mapping[str, bytes]], Path]:
    """Write a file as its layout says; the contents that are not given stay holes."""

    def write(path: Path, layout: FileLayout, contents: Mapping[str, bytes]) -> Path:
        with path.open("wb") as file:
            file.truncate(layout.size)
            for offset, frame in layout.frames:
                file.seek(offset)
                file.write(frame)
            for name, content in contents.items():
                for segment in layout.tensors[name].segments:
                    file.seek(segment.offset)
                    file.write(content[: segment.length])
                    content = content[segment.length :]
                assert not content
        return path

    return write


@pytest.fixture(scope="session")
def read_content() -> Callable[[Path, TensorRecord], bytes]:
    """Join the segments of a tensor."""

    def read(path: Path, record: TensorRecord) -> bytes:
        data = path.read_bytes()
        return b"".join(data[offset : offset + length] for offset, length in record.segments)

    return read
