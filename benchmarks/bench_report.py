"""Opening a report of 2,000 runs in Chromium, beside an empty page: from the address to what is painted."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

from environment import ROOT
from record import Record
from timing import Case, alternating

_REPORT, _EMPTY = "open the page of 2,000 runs", "open an empty page"
_EMPTY_PAGE = "<!doctype html><title>empty</title><p>nothing"
# Two frames after the load event everything in the window is on the screen.
_PAINTED = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


def run(record: Record, options: argparse.Namespace) -> None:
    """Measure in turn, each in a window of its own in one browser that runs already."""
    sys.path.append(str(ROOT))
    from tests.report import synthetic
    from tests.report.chromium import started_chromium

    from childtuning.report import html_page

    recorded = synthetic.odd()["nan"] if options.quick else synthetic.many(2000)
    page = html_page(recorded)
    record.facts |= {"runs": len(recorded.records), "page_bytes": len(page.encode())}
    with tempfile.TemporaryDirectory() as scratch, started_chromium() as browser:
        record.facts["chromium"] = browser.version

        def opened(name: str, content: str) -> Case:
            path = Path(scratch) / f"{name}.html"
            path.write_text(content, encoding="utf-8")
            windows = []

            def fresh() -> None:
                while windows:
                    windows.pop().close()
                windows.append(browser.new_context(viewport={"width": 1280, "height": 900}))
                windows[0].new_page()

            def run() -> None:
                tab = windows[0].pages[0]
                tab.goto(path.as_uri())
                tab.evaluate(_PAINTED)

            return Case(run, fresh, ours=True)

        cases = {_REPORT: opened("report", page), _EMPTY: opened("empty", _EMPTY_PAGE)}
        alternating(record, cases, options.repeats)
    seconds = record.samples[_REPORT]["values"]
    record.value(
        "seconds until the page of 2,000 runs is painted", median(seconds), at_most=2, statistic="median"
    )
    record.ratio("page of 2,000 runs ÷ empty page", _REPORT, _EMPTY)
