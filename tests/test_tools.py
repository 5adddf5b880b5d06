"""The scripts of tools/ and the texts that name them, as a newcomer meets them: a fresh clone, nothing installed."""

from __future__ import annotations

import http.client
import os
import random
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from object_server import BUCKET, serving

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
SCRIPTS = sorted(path for path in TOOLS.glob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8"))
SHELL_SCRIPTS = sorted(path for path in TOOLS.glob("*.sh") if path.read_text(encoding="utf-8").startswith("#!"))
Done = subprocess.CompletedProcess[str]


def run(*words: object, packages: str = "", cwd: Path = ROOT) -> Done:
    """Run Python without the packages of its environment, but those in `packages`; nothing there is installed as
    `pip install --editable` does it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment.update({"PYTHONPATH": packages} if packages else {}, PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, "-S", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def helped(packages: str) -> dict[str, Done]:
    """What each script answers to --help."""
    with ThreadPoolExecutor(2) as pool:
        return dict(
            zip(
                [script.name for script in SCRIPTS],
                pool.map(lambda script: run(script, "--help", packages=packages), SCRIPTS),
            )
        )


def test_without_packages_one_line_says_what_to_install() -> None:
    refused = 0
    for name, done in helped("").items():
        assert "Traceback" not in done.stderr
        if done.returncode == 1:
            refused += 1
            line = rf"error: {name} needs (\w+, )*\w+: python -m pip install {re.escape(str(ROOT))}[^\n]*\n"
            assert re.fullmatch(line, done.stderr), f"{name}: {done.stderr}"
            assert not done.stdout
    assert refused > 10
    assert refused < len(SCRIPTS)  # some need Python alone


def test_with_packages_they_run_from_the_checkout() -> None:
    packages = sysconfig.get_paths()["purelib"]
    where = (
        f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import checkout, mindformers_ckpt as it; print(it.__file__)"
    )
    assert run("-c", where, packages=packages).stdout == f"{ROOT / 'mindformers_ckpt' / '__init__.py'}\n"
    for name, done in helped(packages).items():
        assert done.returncode in (0, 2), f"{name}: {done.stderr}"
        assert re.match("usage:", done.stdout + done.stderr, re.IGNORECASE), f"{name}: {done.stdout + done.stderr}"


@pytest.mark.parametrize("script", ["quickstart.py", "run_mindformer.py"])
def test_without_mindspore_one_line_says_what_to_install(script: str, tmp_path: Path) -> None:
    """All other packages are there: for `importlib.metadata` a folder is enough."""
    packages = Path(sysconfig.get_paths()["purelib"])
    for path in packages.iterdir():
        if not path.name.lower().startswith("mindspore"):
            (tmp_path / path.name).symlink_to(path)
    done = run(TOOLS / script, *(["--config", "any.yaml"] * (script != "quickstart.py")), packages=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    line = rf"error: {script} needs mindspore: python -m pip install '{re.escape(str(ROOT))}\[mindspore\]'[^\n]*\n"
    assert re.fullmatch(line, done.stderr), done.stderr


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda script: script.name)
def test_help_of_a_shell_script_is_all_it_does(script: Path, tmp_path: Path) -> None:
    """Nothing is installed: there is no Python to install with, and no environment to install into."""
    environment = {"PATH": "/usr/bin:/bin", "VENV": str(tmp_path / "venv"), "PYTHON": "/nowhere/python"}
    done = subprocess.run(
        ["bash", script.name, "--help"],
        cwd=script.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert script.name in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["coverage.sh", "site.sh", "test_versions.sh"])
def test_a_script_without_arguments_refuses_them(name: str, tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "VENV": str(tmp_path / "venv"), "PYTHON": "/nowhere/python"}
    done = subprocess.run(
        ["bash", str(TOOLS / name), "--hlep"], env=environment, capture_output=True, text=True, timeout=20, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {name} takes no arguments, not --hlep; see --help\n"
    assert not list(tmp_path.iterdir())


def test_the_quickstart_takes_no_arguments(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "VENV": str(tmp_path / "venv"), "PYTHON": "/nowhere/python"}
    done = subprocess.run(
        ["bash", str(TOOLS / "quickstart.sh"), "--hlep"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("usage: bash tools/quickstart.sh\n")


def test_files_that_are_named_are_there() -> None:
    """In pages, docstrings, comments and messages."""
    texts = [ROOT / name for name in ("README.md", "README_CN.md", "CONTRIBUTING.md", ".ci/run")]
    for folder in ("configs", "docs", "examples", "mindformers_ckpt", "tools"):
        texts += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".md", ".py", ".sh", ".yaml")]
    named = re.compile(r"(?<![\w/.$}-])((?:configs|docs|examples|tests|tools)/[\w./-]*\w\.(?:md|py|sh|yaml|txt|c))\b")
    optional = {"tools/checkpoint/convert.py"}  # Megatron's
    lost = {}
    for text in texts:
        for name in named.findall(text.read_text(encoding="utf-8")):
            if name not in optional and not any(
                (place / name).exists() for place in (ROOT, ROOT / "tests", text.parent)
            ):
                lost[name] = text.relative_to(ROOT)
    assert lost == {}


@pytest.mark.parametrize(("whole", "rest"), [(0, 5), (0, 3 << 20), (1, 0), (2, 0), (2, 5), (2, 3 << 20)])
def test_objects_of_the_server_for_measurements_hold_their_parts(tmp_path: Path, whole: int, rest: int) -> None:
    """Parts come in any order, and the last one may be as long as it likes."""
    data = random.Random(1).randbytes(whole * (8 << 20) + rest)
    parts = [data[start : start + (8 << 20)] for start in range(0, len(data), 8 << 20)]
    with serving(tmp_path) as server:
        connection = http.client.HTTPConnection(server.endpoint.rpartition("/")[2], timeout=30)

        def ask(method: str, words: str, body: bytes = b"") -> bytes:
            connection.request(method, f"/{BUCKET}/folder/object?{words}", body)
            return connection.getresponse().read()

        upload = ask("POST", "uploads").partition(b"<UploadId>")[2].partition(b"<")[0].decode()
        for number, part in reversed(list(enumerate(parts, 1))):
            ask("PUT", f"partNumber={number}&uploadId={upload}", part)
        listed = re.findall(rb"<Size>(\d+)</Size>", ask("GET", f"uploadId={upload}"))
        assert [int(size) for size in listed] == [len(part) for part in parts]
        ask("POST", f"uploadId={upload}")
        assert ask("GET", "") == data
        connection.close()
