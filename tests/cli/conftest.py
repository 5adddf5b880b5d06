from __future__ import annotations

from pathlib import Path

import pytest
from toy import write_toy


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder with the toy checkpoint and its strategies."""
    write_toy(tmp_path)
    return tmp_path
