#!/usr/bin/env python3
"""Look at the built site in a headless Chromium: every page at a phone's and a desk's width, and the search.

    python tools/site_look.py SITE               # the folder that tools/site.sh builds
    python tools/site_look.py SITE --pictures FOLDER

The pages are opened as files, without a server, which is the harder case. Exits with 1 when a page is wider than the
screen, asks another server for anything, or a search in Chinese or English does not find its page. Needs chromium or
google-chrome on the PATH, and the package websocket-client.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WIDTHS = {"phone": 390, "desk": 1280}
# Folder of a language, what is searched, and the page that must be among the results.
SEARCHES = (
    ("", "auto_trans_ckpt", "automatic.html"),
    ("", "no source strategy is given", "troubleshooting.html"),
    ("", "fingerprint", "trust.html"),
    ("zh", "策略文件", "offline.html"),
    ("zh", "多卡权重", "to_one_card.html"),
    ("zh", "流水线并行", "automatic.html"),
    ("zh", "auto_trans_ckpt", "automatic.html"),
    ("zh", "no source strategy is given", "troubleshooting.html"),
)
_OPTIONS = (
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--hide-scrollbars",
        "--remote-debugging-port=0",
    ),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-allow-origins=*"),
)
_RESULTS = "[...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"
_SEARCH = """(query => {
    const input = document.querySelector('[data-md-component=search-query]');
    document.querySelector('#__search').click();
    input.focus();
    input.value = query;
    input.dispatchEvent(new KeyboardEvent('keyup', {bubbles: true}));
    input.dispatchEvent(new Event('input', {bubbles: true}));
})"""


class Page:
    """A tab of a browser, spoken to over its debugging protocol."""

    def __init__(self, address: str) -> None:
        from websocket import create_connection

        self._socket = create_connection(address, timeout=30, suppress_origin=True)
        self._numbers = itertools.count(1)
        self.requests: list[str] = []
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": arguments}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("id") == number:
                result: dict[str, Any] = message.get("result", {})
                return result

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def open(self, file: Path) -> None:
        self.call("Page.navigate", url=file.resolve().as_uri())
        self._wait("document.readyState === 'complete'")

    def resize(self, width: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=width < 800
        )

    def search(self, query: str) -> list[str]:
        """The pages that a search finds."""
        self.evaluate(f"{_SEARCH}({json.dumps(query)})")
        self._wait(f"{_RESULTS}.length > 0", seconds=40)
        return [str(link) for link in self.evaluate(_RESULTS) or ()]

    def picture(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def _wait(self, condition: str, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not self.evaluate(condition) and time.monotonic() < end:
            time.sleep(0.05)


@contextlib.contextmanager
def tab(program: str) -> Iterator[Page]:
    profile = Path(tempfile.mkdtemp())
    browser = subprocess.Popen(
        [program, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.DEVNULL
    )
    try:
        yield Page(_address(profile / "DevToolsActivePort"))
    finally:
        browser.terminate()
        browser.wait(timeout=20)
        shutil.rmtree(profile, ignore_errors=True)  # its processes may write a moment longer


def _address(file: Path) -> str:
    """Where the one page of a new browser listens."""
    end = time.monotonic() + 30
    while not (file.is_file() and file.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    port = file.read_text().splitlines()[0]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
        pages = json.load(answer)
    return str(next(page for page in pages if page["type"] == "page")["webSocketDebuggerUrl"])


def look(site: Path, page: Page, pictures: Path | None) -> list[str]:
    """What is wrong with the pages."""
    faults = []
    files = sorted([*site.glob("*.html"), *site.glob("zh/*.html")])
    for (screen, width), file in itertools.product(WIDTHS.items(), files):
        name = file.relative_to(site).with_suffix("").as_posix()
        page.resize(width)
        page.open(file)
        wide = page.evaluate("document.documentElement.scrollWidth")
        if wide > width:
            faults.append(f"{name} is {wide} pixels wide on a {screen} of {width}")
        if pictures is not None:
            (pictures / f"{name.replace('/', '_')}_{screen}.png").write_bytes(page.picture())
    for folder, query, wanted in SEARCHES:
        page.open(site / folder / "index.html")
        found = page.search(query)
        if not any(f"/{folder}/{wanted}".replace("//", "/") in link for link in found):
            faults.append(f"a search for {query!r} in {folder or 'en'!r} does not find {wanted}: {found[:5]}")
        if pictures is not None:
            (pictures / f"search_{folder or 'en'}_{wanted}.png").write_bytes(page.picture())
    foreign = sorted({url for url in page.requests if url.startswith("http")})
    return [*faults, *(f"a page asks for {url}" for url in foreign[:20])]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("--pictures", type=Path, help="folder for a picture of every page and search")
    asked = parser.parse_args(arguments)
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        print("no Chromium is there: the pages were not looked at")
        return 0
    if asked.pictures is not None:
        asked.pictures.mkdir(parents=True, exist_ok=True)
    with tab(program) as page:
        faults = look(asked.site, page, asked.pictures)
    for fault in faults:
        print(fault, file=sys.stderr)
    print(
        f"looked at {len(list(asked.site.rglob('*.html')))} pages at {len(WIDTHS)} widths, and {len(SEARCHES)} searches"
    )
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
