"""tools/release.sh and what it is made of; the Dockerfile."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import prepare_release
import pytest
from prepare_release import ReleaseError, section, set_version, standalone
from recorded import random_model, write_tensors

from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.files import write_strategy

ROOT = Path(__file__).resolve().parent.parent
CHANGELOG = """# Changelog

## Unreleased

### Offline
- New.

## 0.1.0 (2026-01-02)

- Old.
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project at version 0.1.0 with one unreleased line."""
    (tmp_path / "mindformers_ckpt").mkdir()
    (tmp_path / "mindformers_ckpt/__init__.py").write_text('"""Doc."""\n\n__version__ = "0.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    return tmp_path


def test_the_version_is_written_and_the_changelog_dated(project: Path) -> None:
    assert set_version(project, "0.2.0", "2026-12-01")
    assert '\n__version__ = "0.2.0"\n' in (project / "mindformers_ckpt/__init__.py").read_text()
    text = (project / "CHANGELOG.md").read_text()
    assert text == CHANGELOG.replace("## Unreleased\n", "## Unreleased\n\n## 0.2.0 (2026-12-01)\n")
    assert section(text, "0.2.0") == "### Offline\n- New."
    assert section(text, "Unreleased") == ""
    assert section(text, "0.1.0") == "- Old."
    files = (project / "CHANGELOG.md", project / "mindformers_ckpt/__init__.py")
    before = [path.read_bytes() for path in files]
    assert not set_version(project, "0.2.0", "2026-12-02")  # it was so already: the date stays
    assert before == [path.read_bytes() for path in files]


@pytest.mark.parametrize("version", ["0.1.0", "0.0.9", "0.1.0rc1", "0.2", "v0.2.0", "0.2.0.dev1"])
def test_versions_that_are_not_the_next(project: Path, version: str) -> None:
    with pytest.raises(ReleaseError, match=r"not newer than 0\.1\.0|a version is 1\.2\.3|0\.1\.0 is dated"):
        set_version(project, version, "2026-12-01")
    assert (project / "CHANGELOG.md").read_text() == CHANGELOG


def test_a_release_of_nothing(project: Path) -> None:
    set_version(project, "0.2.0rc1", "2026-12-01")
    with pytest.raises(ReleaseError, match="nothing under '## Unreleased'"):
        set_version(project, "0.2.0", "2026-12-02")


def test_links_of_the_readme_hold_elsewhere() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    base = "https://example.org/project/blob/v0.2.0"
    linked = standalone(readme, base)
    targets = re.findall(r"\]\((\S+?)\)", linked)
    assert len(targets) > 10
    assert all(target.startswith((base, "http", "#")) for target in targets)
    plain = standalone(readme, "")
    assert all(target.startswith(("http", "#")) for target in re.findall(r"\]\((\S+?)\)", plain))
    mixed = "[docs/a.md](docs/a.md), [中文](README_CN.md), ![p](x.png)"
    assert standalone(mixed, "") == "docs/a.md, 中文 (README_CN.md), "


# ------------------------------------------------------------------------------------------- the script


def git(folder: Path, *words: str) -> str:
    identity = {f"GIT_{who}_{what}": "release" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", *words], cwd=folder, env={**os.environ, **identity}, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture
def repository(project: Path) -> Path:
    """The project with the scripts of a release, in git."""
    (project / "tools").mkdir()
    for name in ("release.sh", "help.sh", "prepare_release.py"):
        shutil.copy(ROOT / "tools" / name, project / "tools")
    git(project, "init", "--quiet")
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "-m", "first")
    return project


def release(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "tools/release.sh", *words]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_changed_tree_is_refused(repository: Path) -> None:
    (repository / "new").touch()
    done = release(repository, "0.2.0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: the tree has changes: commit or stash them\nerror: ?? new\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name the version"),
        (("0.2.0", "0.3.0"), "one version is released at a time"),
        (("--puhs", "0.2.0"), "there is no option --puhs"),
        (("0.1.0",), "0.1.0 is dated in CHANGELOG.md already, and more has come since"),
        (("--tag", "0.2.0"), "a tag needs a commit of version 0.2.0: add --commit"),
        (("0.0.1",), "the tag v0.0.1 is there already"),
    ],
)
def test_what_else_is_refused(repository: Path, words: tuple[str, ...], said: str) -> None:
    git(repository, "tag", "v0.0.1")
    before = git(repository, "log", "--format=%H", "--all")
    done = release(repository, *words)
    assert done.returncode == 1
    assert f"error: {said}" in done.stderr
    assert git(repository, "log", "--format=%H", "--all") == before
    assert git(repository, "tag") == "v0.0.1\n"
    assert git(repository, "status", "--porcelain") == ""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="releases what git knows")
def test_a_release_of_this_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dry, then in earnest, in a clone. Fetches the tools that build and check packages."""
    git(tmp_path, "clone", "--quiet", str(ROOT), "clone")
    clone, version = tmp_path / "clone", "99.0.0"
    changelog = (clone / "CHANGELOG.md").read_text(encoding="utf-8")
    if not section(changelog, "Unreleased"):
        text = changelog.replace("## Unreleased\n", "## Unreleased\n\n- Something.\n", 1)
        (clone / "CHANGELOG.md").write_text(text, encoding="utf-8")
        git(clone, "commit", "--quiet", "--all", "-m", "something")
    before = git(clone, "rev-parse", "HEAD")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # what a developer may have set; it is not what is released
    dry = release(clone, version)
    assert dry.returncode == 0, dry.stdout + dry.stderr
    assert "Nothing here has changed." in dry.stdout
    assert git(clone, "rev-parse", "HEAD") == before
    assert git(clone, "tag") == git(ROOT, "tag")
    assert git(clone, "status", "--porcelain", "--ignored") == ""
    done = release(clone, "--commit", "--tag", version)
    assert done.returncode == 0, done.stdout + done.stderr
    assert git(clone, "log", "-1", "--format=%s") == f"Version {version}\n"
    assert git(clone, "rev-parse", f"v{version}^{{commit}}") == git(clone, "rev-parse", "HEAD")
    names = {path.name for path in (clone / "dist").iterdir()}
    assert {f"mindformers_ckpt-{version}.tar.gz", f"mindformers_ckpt-{version}-py3-none-any.whl"} <= names
    assert {f"mindformers_ckpt-{version}.cdx.json", "SHA256SUMS"} <= names
    assert git(clone, "status", "--porcelain") == ""


def test_the_copy_of_prepare_release_is_that_of_this_checkout() -> None:
    assert Path(prepare_release.__file__).resolve().parent == ROOT / "tools"


# ------------------------------------------------------------------------------------------- Dockerfile


def test_the_dockerfile_names_what_is_there() -> None:
    """hadolint looks at it too, where it is installed; here is what it cannot know."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    steps = re.findall(r"^([A-Z]+) (.+)$", text.replace("\\\n", " "), re.MULTILINE)
    assert {keyword for keyword, _ in steps} <= {"FROM", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    pythons = [
        python for keyword, words in steps if keyword == "FROM" for python in re.findall(r"^python:(3\.\d+)-", words)
    ]
    assert len(pythons) == len([keyword for keyword, _ in steps if keyword == "FROM"])
    assert all(f"Python :: {python}\n" in setup["metadata"]["classifiers"] for python in pythons)
    copied = {name for keyword, words in steps if keyword == "COPY" for name in words.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(allowed) == sorted(copied)
    extras = {extra for found in re.findall(r"\[([\w,-]+)\]\"", text) for extra in found.split(",")}
    assert extras
    assert extras <= set(setup["options.extras_require"])
    (script,) = re.findall(r"^([\w-]+) =", setup["options.entry_points"]["console_scripts"].strip(), re.MULTILINE)
    assert f'ENTRYPOINT ["{script}"]' in text
    assert [words for keyword, words in steps if keyword == "USER"] == ["65534"]  # nobody
    if shutil.which("hadolint"):
        subprocess.run(["hadolint", ROOT / "Dockerfile"], check=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_steps_of_the_dockerfile_make_what_runs(tmp_path: Path) -> None:
    """Without Docker: its pip commands as they stand, in a clean folder, and what it starts, without a home."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    source, wheels, work = (tmp_path / name for name in ("source", "wheels", "work"))
    for step in re.findall(r"^COPY (?!--)(.+)$", text, re.MULTILINE):
        *names, _ = step.split()
        source.mkdir(exist_ok=True)
        for name in names:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, source)
    commands = [
        re.sub(r"^(--\S+\s+)*", "", step).replace("/wheels", str(wheels))
        for step in re.findall(r"^RUN (.+)$", text, re.MULTILINE)
    ]
    assert [command.split()[1] for command in commands] == ["wheel", "install"]
    for number, command in enumerate(commands):
        stage = tmp_path / f"stage_{number}"
        subprocess.run([sys.executable, "-m", "venv", stage], check=True)
        environment = {**os.environ, "PATH": f"{stage / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": ""}
        where = source if number == 0 else tmp_path
        shell = ["sh", "-ec", command]
        done = subprocess.run(shell, cwd=where, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (entry,) = re.findall(r'^ENTRYPOINT \["(.+)"\]', text, re.MULTILINE)
    write_tensors(work / "llama.ckpt", random_model({"a": (8, 6), "b": (6,)}))
    write_strategy({"a": Layout.on({"mp": 2}, "mp", None)}, work / "strategy.ckpt", 0)
    arguments = ["--src-checkpoint", "llama.ckpt", "--dst-strategy", "strategy.ckpt", "--dst-checkpoint-dir", "cut"]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    done = subprocess.run(
        [stage / "bin" / entry, "transform", *arguments],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (work / "cut" / "rank_1" / "checkpoint_1.ckpt").exists()
