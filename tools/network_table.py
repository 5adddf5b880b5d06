#!/usr/bin/env python3
"""Print what the tests of MindFormers' networks found, as the table of docs/conversion.md.

    python tools/network_table.py FOLDER

reads FOLDER/rows.jsonl, which tests/networks writes: a line for a family, its names and a version of MindFormers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import checkout  # noqa: F401 - finds the package of this checkout

from mindformers_ckpt.text_files import parse_json

HEAD = ("family", "names", "parameters", "MindFormers", "largest difference of logits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    rows: dict[tuple[str, str], list[tuple[str, int, float]]] = {}
    for line in (folder / "rows.jsonl").read_bytes().splitlines():
        family, naming, version, count, largest = parse_json(line)
        rows.setdefault((family, naming), []).append((version, count, largest))
    print("| " + " | ".join(HEAD) + " |")
    print("|---" * len(HEAD) + "|")
    for (family, naming), found in sorted(rows.items()):
        versions = ", ".join(version for version, _, _ in found)
        counts = " or ".join(str(count) for count in dict.fromkeys(count for _, count, _ in found))
        largest = max(largest for _, _, largest in found)
        print(f"| {family} | {naming} | {counts} | {versions} | {largest:.0e} |")


if __name__ == "__main__":
    main()
