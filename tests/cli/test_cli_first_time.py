"""What somebody gets who knows nothing yet: one message with what, where and what next, and in JSON."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy import command, invoke, write_toy

from mindformers_ckpt.disk.files import like_it

READERS = ["inspect", "fingerprint", "diff full.ckpt", "verify sharded --against", "plan --src-checkpoint"]
READERS += ["show layers.0.weight --src-checkpoint"]
SOURCES = {
    "ful.ckpt": "there is no checkpoint at {}/ful.ckpt; {} holds .*Did you mean 'full.ckpt'",
    "cut.ckpt": "cut.ckpt: .* it is truncated .*restore it from a good copy",
    "empty.ckpt": "empty.ckpt: the file is empty; save or copy it again",
    "shardd/rank_0": "there is no checkpoint at {}/shardd/rank_0; {} holds .*Did you mean 'sharded'",
    "nothing": "nothing holds neither rank_<n> folders nor .*; give the folder that holds the rank folders, or a file",
    "note.txt": "note.txt: a checkpoint file must end in .ckpt or .safetensors",
}
# command -> exit code, and what it says
OTHERS = {
    "fingerprint dp2mp2/ckpt_strategy_rank_0.ckpt": (1, "a strategy file, .* give it as the strategy"),
    "verify resul": (1, "there is no result at {}/resul; {} holds "),
    "verify full.ckpt": (1, "is not a folder; a file is compared with its source"),
    "verify nothing": (1, "has no manifest.json, .* compare it with what it was made of"),
    "verify sharded --public-key key.pem": (1, "there is no key at key.pem; give the file"),
    "inspect full.ckpt --step 3_9": (1, "full.ckpt is the only file, and not of '3_9'; leave the step out"),
    "inspect sharded --rank 9": (1, "holds no file of rank 9; ranks with files: 0-3"),
    "inspect sharded --name wq": (1, "no parameter is called like 'wq'; there are embedding.weight, "),
    "inspect sharded --strategy dp2mp": (1, "no strategy file or folder at .*a job saves it .*Did you mean 'dp2mp2'"),
    "inspect sharded --strategy nothing": (1, "no strategy file .* in this folder; give the folder `strategy`"),
    "inspect sharded --strategy note.txt": (1, "is not a strategy file .*; give ckpt_strategy_rank_<n>.ckpt"),
    "fingerprint full.ckpt --strategy dp2mp2": (1, "is complete weights, but its strategy .* is for 4 ranks; give"),
    "fingerprint sharded": (1, "no source strategy is given; name the strategy file or folder"),
    "diff full.ckpt full.ckpt --strategy-c x": (2, "No such option '--strategy-c'. Did you mean '--strategy-[ab]' or"),
    "diff full.ckpt": (2, "Missing argument 'B'."),
    "plan --src-checkpoint full.ckpt --out far/plan.json": (1, "cannot write the plan file .*; make its folder first"),
    "show --src-checkpoint full.ckpt --html far/page.html": (1, "cannot be written: .*; make its folder first"),
    "show --src-checkpoint full.ckpt --html nothing": (1, "nothing is a folder; give the name of a file in it"),
    "show x --plan far.json": (1, "cannot read the plan file far.json: .*; plan --out FILE makes one"),
    "show layers.0.wieght --src-checkpoint full.ckpt": (1, "no tensor is called .* Did you mean 'layers.0.weight'"),
}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """The toy checkpoint beside what is none, where every user may read."""
    with tempfile.TemporaryDirectory(prefix="mindformers_ckpt-test-") as name:
        made = Path(name).resolve()
        made.chmod(0o755)
        write_toy(made)
        (made / "cut.ckpt").write_bytes((made / "full.ckpt").read_bytes()[:100])
        (made / "empty.ckpt").touch()
        (made / "nothing").mkdir()
        (made / "note.txt").write_text("hello\n")
        yield made


def check(asked: str, code: int, said: str, folder: Path) -> None:
    """One message on stderr, and the same in JSON on stdout, where that is asked for."""
    pattern = said.replace("{}", re.escape(str(folder)))
    found = invoke(asked.split(), folder)
    assert (found.code, found.err.count("error: ")) == (code, 1), found
    assert re.search(pattern, found.err, re.DOTALL), found
    told = invoke([*asked.split(), "--json"], folder)
    error = json.loads(told.out)["error"]
    assert (told.code, error["exit_code"], set(error)) == (code, code, {"kind", "message", "exit_code"})
    assert re.search(pattern, error["message"], re.DOTALL), error


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_checkpoint(reader: str, source: str, folder: Path) -> None:
    check(f"{reader} {source}", 1, SOURCES[source], folder)


@pytest.mark.parametrize("asked", OTHERS)
def test_other_mistakes(asked: str, folder: Path) -> None:
    check(asked, *OTHERS[asked], folder)


@pytest.fixture
def somebody(folder: Path) -> Iterator[None]:
    """Not the one user who may read everything."""
    (folder / "secret.ckpt").touch(mode=0)
    (folder / "secrets").mkdir(mode=0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    yield
    if is_root:
        os.seteuid(0)
    (folder / "secret.ckpt").unlink()
    (folder / "secrets").rmdir()


@pytest.mark.parametrize(
    "asked", [f"{reader} secret.ckpt" for reader in READERS] + ["inspect secrets", "verify secrets"]
)
def test_what_this_user_may_not_read(asked: str, folder: Path, somebody: None) -> None:
    check(asked, 1, "{}/secret.*Permission denied; this user may not: change the rights, or ask the owner", folder)


def test_doctor_says_that_a_path_is_not_there(folder: Path) -> None:
    found = command(["doctor", "absent"], folder)
    assert found.code == 0
    assert "absent is not there; what is said of the storage is of" in found.out


def test_a_name_that_is_like_another(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    assert like_it(tmp_path / "chekpoint") == " Did you mean 'checkpoint'?"
    assert like_it(tmp_path / "else") == like_it(tmp_path / "no/folder") == ""
