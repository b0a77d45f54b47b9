"""The site, built once for all test processes, and what its pages have: anchors, headings, rows."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import attrs

ROOT = Path(__file__).resolve().parents[2]


def build(shared: Path) -> tuple[Path, str]:
    """The folder of the site, and what its build said; ``shared``: a folder of all processes."""
    site, log = shared / "site", shared / "site.log"
    with (shared / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            done = subprocess.run(
                [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
                cwd=ROOT, check=False, capture_output=True, text=True, timeout=600,
                env={**os.environ, "NO_MKDOCS_2_WARNING": "1", **_NO_NETWORK},
            )  # fmt: skip
            log.write_text(f"{done.returncode}\n{done.stdout}{done.stderr}", encoding="utf-8")
    return site, log.read_text("utf-8")


#: A proxy that is not there: what asks the network for something fails.
_NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


@attrs.define
class Page(HTMLParser):
    """ids: all anchors. headings: their texts. cells: the first cell of each row of a table."""

    ids: set[str] = attrs.field(factory=set)
    headings: list[str] = attrs.field(factory=list)
    cells: list[str] = attrs.field(factory=list)
    _into: list[str] | None = None
    _first: bool = False

    def __attrs_post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if found.get("id"):
            self.ids.add(found["id"])
        if tag == "tr":
            self._first = True
        elif tag in {"h1", "h2", "h3", "h4", "h5", "h6"}:
            self.headings.append("")
            self._into = self.headings
        elif tag == "td" and self._first:
            self._first = False
            self.cells.append("")
            self._into = self.cells

    def handle_endtag(self, tag):
        if tag == "td" or (tag[0] == "h" and tag[1:].isdigit()):
            self._into = None

    def handle_data(self, data):
        if self._into is not None:
            self._into[-1] += data


def read(path: Path) -> Page:
    """What a page of the site has."""
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.headings = [each.rstrip("¶").strip() for each in page.headings]
    page.cells = [each.strip() for each in page.cells]
    return page
