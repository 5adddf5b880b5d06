"""Take the pictures of docs/look.md and its Chinese twin: the page of a plan for 1,024 ranks, in a headless Chromium.

    python tools/page_pictures.py

A DeepSeek-V3 with optimizer states (sparse files, see simulate_scale.py) goes from 1,024 ranks to 512. Needs chromium
or google-chrome on the PATH (Debian: apt-get install chromium); tests skip what needs it where there is none.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import checkout  # noqa: F401 - finds the package of this checkout
from simulate_scale import mesh_of, strategy_of, write_source

from mindformers_ckpt.look.page import write_page
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.planning.file import Job
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source

_DOCS = Path(__file__).resolve().parent.parent / "docs"
# The same pictures twice: a link out of a language's folder would not work on the site.
IMAGES = (_DOCS / "images", _DOCS / "zh" / "images")
# As a program of a machine that has no network.
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=8000"),
)


def browser() -> str | None:
    """The path of a Chromium, None when there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(page: Path, state: str, *, dom: bool = False, size: tuple[int, int] = (1280, 1500)) -> bytes:
    """A picture (PNG) of a page in a state, or with `dom` its elements after its script has run."""
    program = browser()
    if program is None:
        raise FileNotFoundError("there is no Chromium; on Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        what = "--dump-dom" if dom else f"--screenshot={picture}"
        options = (*_OPTIONS, f"--user-data-dir={folder}/profile", f"--window-size={size[0]},{size[1]}", what)
        done = subprocess.run(
            [program, *options, f"{page.resolve().as_uri()}#{state}"], capture_output=True, check=True, timeout=120
        )
        return done.stdout if dom else picture.read_bytes()


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    source, target = strategy_of(mesh_of(1024, 8)), strategy_of(mesh_of(512, 16))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "deepseek_v3"
        write_source(checkpoint, source)
        plan = build_plan(Checkpoint(find_source(checkpoint), source), target, contents="off")
        about = {"source": source.describe(), "target": target.describe()}
        page = Path(folder) / "page.html"
        write_page(Job(plan, about, False, None), page, (source.stage_size, target.stage_size))
        for theme in ("light", "dark"):
            state = f"tensor=model.layers.7.attention.wo.weight&search=layers.7.&rank=77&theme={theme}"
            picture = browse(page, state, size=(1280, 1900))
            for images in IMAGES:
                images.mkdir(exist_ok=True)
                (images / f"plan_{theme}.png").write_bytes(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
