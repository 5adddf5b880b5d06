#!/usr/bin/env python3
"""Hold a source distribution and a wheel against the files that git knows, and an SBOM against setup.cfg.

    python tools/check_distributions.py DIST     # folder with one .tar.gz, one .whl, and a .cdx.json or none

Exits with 1 and names what is missing. Needs Python and git only.
"""

from __future__ import annotations

import argparse
import configparser
import json
import re
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


def faults_of_bill(bill: Path, wheel: Path) -> dict[str, set[str]]:
    """What a CycloneDX file lacks of the wheel and what it needs, and the paths of this machine in it."""
    text = bill.read_text(encoding="utf-8")
    listed = {(part["name"].lower().replace("-", "_"), part["version"]) for part in json.loads(text)["components"]}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = setup["options"]["install_requires"].splitlines()
    needed = {match[0].lower().replace("-", "_") for line in lines if (match := re.match(r"[\w.-]+", line))}
    own = tuple(wheel.name.split("-")[:2])
    return {
        f"not in {bill.name}": (needed - {name for name, _ in listed})
        | ({" ".join(own)} if own not in listed else set()),
        f"paths of this machine in {bill.name}": set(re.findall(r"file://[^\s\"]+", text)),
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dist", type=Path, help="folder with one .tar.gz and one .whl")
    folder = parser.parse_args(arguments).dist
    sources, wheels = list(folder.glob("*.tar.gz")), list(folder.glob("*.whl"))
    if len(sources) != 1 or len(wheels) != 1:
        parser.error(f"{folder} holds {len(sources)} .tar.gz and {len(wheels)} .whl, not one of each")
    source, wheel = sources[0], wheels[0]
    with tarfile.open(source) as archive:
        in_source = {name.partition("/")[2] for name in archive.getnames()}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    tracked = tracked_files()
    faults = {
        f"not in {source.name}": tracked - in_source,
        f"not in {wheel.name}": {name for name in tracked if name.startswith(PACKAGE)} - in_wheel,
        f"too much in {wheel.name}": {name for name in in_wheel if not name.startswith(PACKAGE[:-1])},
        **{fault: names for bill in folder.glob("*.cdx.json") for fault, names in faults_of_bill(bill, wheel).items()},
    }
    for fault, names in faults.items():
        if names:
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            print(f"error: {fault}: {', '.join(sorted(names)[:20])}{more}", file=sys.stderr)
    print(f"{source.name}: {len(in_source & tracked)} of {len(tracked)} files; {wheel.name}: {len(in_wheel)} files")
    return int(any(faults.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
