#!/usr/bin/env python3
"""The texts of a release, for tools/release.sh: the version, the dated changelog, a README for readers elsewhere.

    python tools/prepare_release.py version 0.2.0 2026-12-01     # write version and changelog; nothing when they are so
    python tools/prepare_release.py notes 0.2.0                  # print the changelog's section of a version
    python tools/prepare_release.py readme v0.2.0                # rewrite README.md for a package index

Needs Python alone. Works on the checkout that it is in.
"""

from __future__ import annotations

import argparse
import configparser
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSION_FILE = "mindformers_ckpt/__init__.py"
_VERSION_LINE = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)(?:rc(\d+))?")
UNRELEASED = "## Unreleased"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")


class ReleaseError(Exception):
    """What stands against the release, in one line."""


def rank_of(version: str) -> tuple[float, ...]:
    """What versions are compared by; candidates come before their release. Raises ReleaseError for another form."""
    match = _VERSION.fullmatch(version)
    if match is None:
        raise ReleaseError(f"a version is 1.2.3 or 1.2.3rc1, not {version}")
    return (*map(float, match.groups()[:3]), float(match[4] or "inf"))


def set_version(root: Path, version: str, date: str) -> bool:
    """Write the version, and date what is unreleased in the changelog; False when both were so already.

    Raises ReleaseError where the version is not newer, or nothing is unreleased.
    """
    wanted = rank_of(version)
    source, changelog = root / VERSION_FILE, root / "CHANGELOG.md"
    code, text = source.read_text(encoding="utf-8"), changelog.read_text(encoding="utf-8")
    match = _VERSION_LINE.search(code)
    if match is None:
        raise ReleaseError(f"{VERSION_FILE} has no line __version__ = ...")
    is_dated = bool(re.search(rf"^## {re.escape(version)} \(", text, re.MULTILINE))
    news = section(text, UNRELEASED[3:])
    if match[1] == version and is_dated:
        if news:
            raise ReleaseError(f"{version} is dated in CHANGELOG.md already, and more has come since: choose the next")
        return False
    if is_dated or wanted <= rank_of(match[1]):
        raise ReleaseError(f"{version} is not newer than {match[1]}, which {VERSION_FILE} and CHANGELOG.md are at")
    if not news:
        raise ReleaseError(f"CHANGELOG.md has nothing under {UNRELEASED!r}: there is nothing to release")
    changelog.write_text(
        text.replace(f"{UNRELEASED}\n", f"{UNRELEASED}\n\n## {version} ({date})\n", 1), encoding="utf-8"
    )
    source.write_text(code.replace(match[0], f'__version__ = "{version}"', 1), encoding="utf-8")
    return True


def section(changelog: str, version: str) -> str:
    """What the changelog says of a version; "" when it has no such section."""
    match = re.search(
        rf"^## {re.escape(version)}(?: \([\d-]+\))?\n(.*?)(?=^## |\Z)", changelog, re.DOTALL | re.MULTILINE
    )
    return match[1].strip() if match else ""


def standalone(readme: str, base: str) -> str:
    """The README with links that hold outside of the repository: under `base` where there is one, else plain text."""

    def rewrite(link: re.Match[str]) -> str:
        image, text, path = link.groups()
        if base:
            return f"{image}[{text}]({base}/{path})"
        return "" if image else text if text == path else f"{text} ({path})"

    return _LINK.sub(rewrite, readme)


def repository(root: Path) -> str:
    """Where the files of the project are shown, of `project_urls` in setup.cfg; "" when it says nothing of it."""
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg", encoding="utf-8")
    urls = dict(line.split("=", 1) for line in setup.get("metadata", "project_urls", fallback="").splitlines() if line)
    return next((url.strip().rstrip("/") for name, url in urls.items() if name.strip() == "Source"), "")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("version")
    command.add_argument("version")
    command.add_argument("date")
    commands.add_parser("notes").add_argument("version")
    commands.add_parser("readme").add_argument("tag")
    options = parser.parse_args(arguments)
    try:
        if options.command == "version":
            print("changed" if set_version(ROOT, options.version, options.date) else "unchanged")
        elif options.command == "notes":
            print(section((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), options.version))
        else:
            url = repository(ROOT)
            readme = ROOT / "README.md"
            base = f"{url}/blob/{options.tag}" if url else ""
            readme.write_text(standalone(readme.read_text(encoding="utf-8"), base), encoding="utf-8")
            if not url:
                print(
                    "note: setup.cfg names no repository, so that the README's links to its files are plain text; "
                    "fill in project_urls: Source = https://...",
                    file=sys.stderr,
                )
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
