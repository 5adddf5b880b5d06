"""What setup.cfg promises is what the scripts test."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import yaml
from packaging.requirements import Requirement

from mindformers_ckpt import __version__

ROOT = Path(__file__).parent.parent
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
PYTHONS = ("3.9", "3.10", "3.11", "3.12", "3.13")


def requirements(text: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


NEEDED = requirements(SETUP["options"]["install_requires"])
OPTIONAL = [
    requirement
    for extra in ("mindspore", "object-storage", "fingerprint", "sign")
    for requirement in requirements(SETUP["options.extras_require"][extra])
]


def test_the_lowest_versions_are_those_of_the_bounds() -> None:
    bounds = {
        (requirement.name, specifier.version)
        for requirement in NEEDED + OPTIONAL
        if requirement.marker is None or requirement.marker.evaluate({"python_version": PYTHONS[0]})
        for specifier in requirement.specifier
        if specifier.operator == ">="
    }
    lowest = {
        (requirement.name, re.sub(r"(\.0)+$", "", specifier.version))
        for requirement in requirements((ROOT / "tools" / "lowest.txt").read_text(encoding="utf-8"))
        for specifier in requirement.specifier
    }
    assert lowest == {(name, re.sub(r"(\.0)+$", "", version)) for name, version in bounds}


def test_every_python_has_one_numpy() -> None:
    for python in PYTHONS:
        found = [
            str(requirement.specifier)
            for requirement in NEEDED
            if requirement.name == "numpy"
            and requirement.marker
            and requirement.marker.evaluate({"python_version": python})
        ]
        assert found == [">=2.1" if python == "3.13" else "<2,>=1.26"], python


def test_the_versions_of_python_are_the_same_everywhere() -> None:
    classifiers = re.findall(r"Python :: (3\.\d+)$", SETUP["metadata"]["classifiers"], re.MULTILINE)
    assert tuple(classifiers) == PYTHONS
    assert SETUP["options"]["python_requires"] == f">={PYTHONS[0]}"
    script = (ROOT / "tools" / "test_versions.sh").read_text(encoding="utf-8")
    assert f"VERSIONS=({' '.join(PYTHONS)})" in script
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"^ +(3\.\d+)$", workflow, re.MULTILINE)) == set(PYTHONS)


def test_the_workflow_runs_every_script_of_the_local_run() -> None:
    local = set(re.findall(r"tools/\w+\.sh", (ROOT / ".ci" / "run").read_text(encoding="utf-8")))
    public = set(
        re.findall(r"- (tools/\w+\.sh)$", (ROOT / ".github/workflows/ci.yml").read_text("utf-8"), re.MULTILINE)
    )
    assert public == {*local, "tools/test_versions.sh"}  # which takes too long for every change here
    assert all((ROOT / script).is_file() for script in local)


def test_the_floor_of_coverage_is_the_one_that_is_documented() -> None:
    (floor,) = re.findall(r"^fail_under = (\d+)$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"(`fail_under`, {floor} %)" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_forms_of_issues_ask_something() -> None:
    forms = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").iterdir() if path.name != "config.yml"]
    assert len(forms) == 2
    for form in map(yaml.safe_load, (path.read_text(encoding="utf-8") for path in forms)):
        assert {"name", "description", "body"} <= set(form)
        assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (\S+) \((unreleased|\d{4}-\d{2}-\d{2})\)$", text, re.MULTILINE)
    assert len(headings) == text.count("\n## ")
    assert headings[0][0] == __version__
