"""The built site: no raw fences, no dead links, no errors in a browser."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from tests.report.chromium import Visit, started_chromium

ROOT = Path(__file__).resolve().parents[2]
MARKS = ("```", "~~~", ":::", "<!--", "](", "**")


class Page(HTMLParser):
    """The text of a page outside code, its ids, and what it links to or loads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self._inside: list[str] = []
        self.text, self.ids, self.links = "", set[str](), set[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("pre", "code", "script", "style"):
            self._inside.append(tag)
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.ids.add(value)
            if (name == "href" and tag in ("a", "link")) or name == "src":
                self.links.add(value or "")

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is in the extra dev")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "--site-dir", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def pages(site: Path) -> dict[Path, Page]:
    found = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    return {path: page for path, page in found.items() if path.name not in ("404.html", "glue-small.html")}


@pytest.mark.slow
def test_no_page_shows_its_own_markup_or_links_nowhere(site: Path) -> None:
    found = pages(site)
    assert len(found) > 30
    faults = []
    for path, page in found.items():
        name = path.relative_to(site)
        faults += [f"{name} shows {mark!r}" for mark in MARKS if mark in page.text]
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                faults.append(f"{name} links to {link!r}, which is not there")
            elif parts.fragment and target in found and unquote(parts.fragment) not in found[target].ids:
                faults.append(f"{name} links to {link!r}, which has no such part")
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.slow
def test_no_page_troubles_a_browser(site: Path) -> None:
    faults = []
    with started_chromium() as browser:
        for path in pages(site):
            visit = Visit(browser, path)
            name = path.relative_to(site)
            faults += [f"{name}: {fault}" for fault in visit.faults]
            faults += [
                f"{name} asks for {url}" for url in visit.requests if not url.startswith(("file:", "data:"))
            ]
            visit.context.close()
    assert not faults, "\n" + "\n".join(faults)


def test_a_fault_is_found() -> None:
    page = Page('<p id="a">a <code>```</code> b ```</p><a href="#c">d</a><pre>**</pre>')
    assert page.text == "a  b ```d" and page.ids == {"a"} and page.links == {"#c"}
