"""Settings of all tests, and the fixtures that folders share.

There is one conftest.py: several would be modules of one name, which a type checker cannot tell apart.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from mindformers_ckpt.formats import FileLayout, TensorRecord

# MindFormers brings MindSpore 2.7, which comes first: it cannot be imported after protobuf, which reads strategies.
with contextlib.suppress(PackageNotFoundError):
    version("mindformers")
    import mindspore  # noqa: F401

# A shell has jobs in the background ignore Ctrl-C, and their children too: those that are to be interrupted by tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Deadlines measure the machine, and monkeypatch is set once for all examples on purpose.
settings.register_profile(
    "mindformers_ckpt",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
# Many examples, for a night: pytest --hypothesis-profile=thorough tests/test_sources_properties.py
settings.register_profile("thorough", settings.get_profile("mindformers_ckpt"), max_examples=5000)
# Each example takes several times as long where it is measured which lines it executes (tools/coverage.sh).
settings.register_profile("coverage", settings.get_profile("mindformers_ckpt"), max_examples=15)
settings.load_profile("coverage" if os.environ.get("COVERAGE") else "mindformers_ckpt")


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder with the toy checkpoint and its strategies."""
    from toy import write_toy  # tests/cli/toy.py

    write_toy(tmp_path)
    return tmp_path


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
