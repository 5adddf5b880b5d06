#!/usr/bin/env python3
"""Hold a source distribution and a wheel against the files that git knows.

    python tools/check_distributions.py DIST     # folder with one .tar.gz and one .whl

Exits with 1 and names what is missing. Needs Python and git only.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mindformers_ckpt/"


def tracked_files() -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python tools/check_distributions.py DIST", file=sys.stderr)
        return 2
    (source,) = Path(arguments[0]).glob("*.tar.gz")
    (wheel,) = Path(arguments[0]).glob("*.whl")
    with tarfile.open(source) as archive:
        in_source = {name.partition("/")[2] for name in archive.getnames()}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    tracked = tracked_files()
    faults = {
        f"not in {source.name}": tracked - in_source,
        f"not in {wheel.name}": {name for name in tracked if name.startswith(PACKAGE)} - in_wheel,
        f"too much in {wheel.name}": {name for name in in_wheel if not name.startswith(PACKAGE[:-1])},
    }
    for fault, names in faults.items():
        if names:
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            print(f"error: {fault}: {', '.join(sorted(names)[:20])}{more}", file=sys.stderr)
    print(f"{source.name}: {len(in_source & tracked)} of {len(tracked)} files; {wheel.name}: {len(in_wheel)} files")
    return int(any(faults.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
