"""A real browser for tests, where there is one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_chromium() -> str:
    """Return the path of a Chromium; skip the test where there is none."""
    named = os.environ.get("CHILDTUNING_CHROMIUM")
    if named:
        return named
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("no Chromium on PATH; CHILDTUNING_CHROMIUM names another")
    return found


@contextmanager
def started_chromium() -> Iterator[Any]:
    """Start a headless browser; skip the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra dev")
    path = find_chromium()
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


class Visit:
    """A page opened in a window of its own.

    Attributes:
        page: playwright's.
        faults: what the console and the page complained of.
        requests: addresses that were asked for beside the file itself.
    """

    def __init__(self, browser: Any, path: Path, *, fragment: str = "", **window: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **window})
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        address = path.as_uri()
        self.page.goto(address + fragment)
        self.requests = [url for url in self.requests if url.split("#")[0] != address]

    def close(self) -> None:
        self.context.close()
