"""The page in a real browser: drawn, quiet, sorted, filtered, readable on a phone, in the dark and on paper."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.report import synthetic
from tests.report.chromium import Visit, started_chromium

CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")
Open = Callable[..., Visit]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started_chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser, page, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Return a function that opens the page of a comparison; at the end nothing may have been complained of."""
    opened: list[Visit] = []

    def open_page(name: str, **window: Any) -> Visit:
        path = tmp_path_factory.mktemp("page") / "report.html"
        path.write_text(page(name), encoding="utf-8")
        opened.append(Visit(browser, path, **window))
        return opened[-1]

    yield open_page
    for one in opened:
        assert one.faults == []
        assert one.requests == []
        one.close()


PAGES = ["glue", "low_resource", "domain_transfer", "task_transfer"]
ODD = ["empty", "all nan", "markup", "long names"]


@pytest.mark.parametrize("name", [*PAGES, *ODD])
def test_it_opens_quietly_and_fits_every_width(visit: Open, name: str) -> None:
    page = visit(name).page
    for width in (360, 861, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"wider than {width}"


@pytest.mark.parametrize("name", PAGES)
def test_every_chart_is_drawn(visit: Open, name: str) -> None:
    page = visit(name).page
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    charts = page.locator("svg[role=img]")
    boxes = charts.evaluate_all(
        "all => all.map(e => { const b = e.getBoundingClientRect(); return [b.width, b.height]; })"
    )
    assert boxes and all(width > 80 and height > 20 for width, height in boxes)
    # Marks lie on their chart: percentages and pixels mean what they should.
    outside = charts.evaluate_all(
        """all => all.flatMap((chart) => {
            const frame = chart.getBoundingClientRect();
            return Array.from(chart.querySelectorAll("circle, use, path.curve, line.mean, line.interval"), (mark) => {
                const box = mark.getBoundingClientRect();
                const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
                const inside = x >= frame.left && x <= frame.right && y >= frame.top && y <= frame.bottom;
                return inside && box.width + box.height > 1 ? null : mark.outerHTML;
            }).filter(Boolean);
        })"""
    )
    assert outside == []


def test_every_seed_is_a_point(visit: Open) -> None:
    page = visit("glue").page
    runs = [
        run for run in synthetic.glue().records if run.state == "done" and run.point["learning_rate"] == 4e-5
    ]
    assert page.locator(".forest circle").count() == len(runs) == 3 * 5 * 8
    assert page.locator(".forest circle.collapsed").count() == 1
    assert page.locator("#costs circle").count() == 3 * len(runs)
    assert page.locator("#costs use.mean").count() == 5 + 3 * 3 * 5  # the key's as well
    assert page.locator("#curves path.curve:not(.faint)").count() == 3 * 5
    assert page.locator("#curves path.curve.faint").count() == len(runs)
    assert page.locator("#tuning .plot use").count() == 3 * 5 * 3
    assert page.locator("#overlap .heat td").first.inner_text() == "100 %"


def test_places_on_an_axis_are_in_proportion(visit: Open) -> None:
    """A dot lies where its number is between two ticks, in the browser's own pixels."""
    page = visit("glue").page
    table = page.locator(".forest").first
    ticks = table.locator(".ruler text").evaluate_all(
        """all => all.map(e => { const b = e.getBoundingClientRect();
            return [Number(e.textContent), b.x + b.width / 2]; })"""
    )
    dots = table.locator("circle").evaluate_all(
        """all => all.map(e => { const b = e.getBoundingClientRect();
            return [Number(e.dataset.tip.split(": ")[1]), b.x + b.width / 2]; })"""
    )
    (low, x_low), (high, x_high) = ticks[0], ticks[-1]
    for value, x in dots:
        assert x == pytest.approx(x_low + (value - low) / (high - low) * (x_high - x_low), abs=0.6)


def _column(page: Any, index: int, *, shown: bool = False) -> list[str]:
    rows = "#runs-table tbody tr:not([hidden])" if shown else "#runs-table tbody tr"
    return page.locator(rows).evaluate_all(f"all => all.map(row => row.cells[{index}].textContent)")


def test_the_table_of_runs_sorts(visit: Open) -> None:
    page = visit("glue").page
    names = page.locator("#runs-table thead th").all_inner_texts()
    score, trained = names.index("score"), names.index("trained")
    header = page.locator("#runs-table thead th").nth(score)
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    rising = [float(text) for text in _column(page, score) if text != "–"]
    assert rising == sorted(rising) and len(rising) == 150
    assert _column(page, score)[-2:] == ["–", "–"]
    header.get_by_role("button").press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert [float(text) for text in _column(page, score)[:150]] == rising[::-1]
    assert _column(page, score)[-2:] == ["–", "–"]

    page.locator("#runs-table thead th").nth(trained).get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "none"
    sizes = _column(page, trained)
    assert list(dict.fromkeys(sizes)) == ["296 k", "6.81 M", "22.7 M", "–"]  # by number, not by text


def test_the_table_of_runs_filters(visit: Open) -> None:
    page = visit("glue").page
    found = page.locator("#runs-found")
    assert found.inner_text() == "152 runs, the first 40 shown"
    assert len(_column(page, 0, shown=True)) == 40
    page.get_by_role("button", name="Show all 152 runs").click()
    assert len(_column(page, 0, shown=True)) == 152
    assert not page.locator("#runs-more").is_visible()

    box = page.get_by_role("searchbox", name="Filter")
    box.fill("child-d MRPC")
    assert found.inner_text() == "10 runs"
    assert set(_column(page, 0, shown=True)) == {"mrpc"} and set(_column(page, 1, shown=True)) == {"child-d"}
    box.fill("no such thing")
    assert found.inner_text() == "0 runs"
    box.fill("")
    page.get_by_role("combobox", name="State").select_option("failed")
    assert found.inner_text() == "2 runs"
    page.get_by_role("combobox", name="State").select_option("collapsed")
    assert _column(page, 1, shown=True) == ["full"]


def test_one_task_can_be_chosen(visit: Open) -> None:
    page = visit("glue").page
    page.get_by_role("combobox", name="Task").select_option("cola")
    titles = page.locator("figure:visible figcaption b").all_inner_texts()
    assert "cola" in titles and not {"rte", "mrpc"} & set(titles)
    assert page.locator(".findings li:visible b").all_inner_texts() == ["Across tasks", "cola"]
    assert set(_column(page, 0, shown=True)) == {"cola"}
    page.get_by_role("combobox", name="Task").select_option("all tasks")
    assert page.locator(".findings li:visible").count() == 4


def test_a_run_opens_with_its_configuration_and_command(visit: Open) -> None:
    page = visit("glue").page
    dialog = page.locator("dialog")
    page.locator("#runs-table tbody a").nth(1).click()
    page.wait_for_selector("dialog[open]")
    run = synthetic.glue().records[1]
    assert dialog.get_attribute("open") is not None
    assert page.get_by_role("dialog", name=f"Run {run.id}").is_visible()
    command, config = dialog.locator("pre").all_inner_texts()[-2:]
    assert command.startswith("childtuning train ") and command.endswith(f"--output runs/{run.id}")
    assert "--learning-rate 4e-05" in command and "--method full" in command
    assert "learning_rate = 4e-05" in config and 'data_dir = "/data/glue"' in config
    page.keyboard.press("Escape")
    assert dialog.get_attribute("open") is None and "#" not in page.url

    page.locator(".failure a").first.click()
    page.wait_for_selector("dialog[open]")
    assert dialog.locator("pre").first.inner_text() == "out of memory: 1.9 GB wanted"
    page.get_by_role("button", name="Close").click()
    assert dialog.get_attribute("open") is None

    linked = visit("glue", fragment=f"#run-{run.id}").page
    assert linked.locator("#run-title").inner_text() == f"Run {run.id}"
    assert linked.locator("dialog").get_attribute("open") is not None


def test_names_show_as_they_are(visit: Open) -> None:
    page = visit("markup").page
    nasty = "</script><b>&\"'`\\ {x} é"
    assert page.locator("h1").inner_text().startswith(f"2 methods on {nasty}")
    page.locator(".failure a").first.click()
    assert nasty in page.locator("dialog pre").first.inner_text()
    assert tomllib.loads(page.locator("dialog pre").last.inner_text())["task"] == f"{nasty}\u2028"


def test_marks_say_what_they_are_and_methods_come_forward(visit: Open) -> None:
    page = visit("glue").page
    dot = page.locator("#costs circle").first
    dot.scroll_into_view_if_needed()
    for _ in range(20):  # the page may still move when the first hover arrives
        dot.hover(force=True)
        if page.get_by_role("tooltip").count():
            break
        page.mouse.move(0, 0)
        page.wait_for_timeout(100)
    assert re.fullmatch(r"[\w-]+, seed \d: 0\.\d{4}, .+", page.get_by_role("tooltip").inner_text())
    entry = page.locator("#costs .key button").filter(has_text="child-d")
    entry.click()
    page.mouse.move(0, 0)
    place = entry.get_attribute("data-focus")
    opacity = "e => Number(getComputedStyle(e).opacity)"
    assert page.locator(f'#costs .plot g[data-m="{place}"]').first.evaluate(opacity) == 1
    others = page.locator(f'#costs .plot g[data-m]:not([data-m="{place}"])')
    assert max(others.evaluate_all(f"all => all.map({opacity})")) < 0.2
    assert entry.get_attribute("aria-pressed") == "true"
    entry.click()
    page.mouse.move(0, 0)
    assert min(others.evaluate_all(f"all => all.map({opacity})")) == 1


@pytest.mark.parametrize(
    ("name", "scheme"), [("glue", "light"), ("glue", "dark"), ("domain_transfer", "dark")]
)
def test_text_and_marks_stand_out(visit: Open, name: str, scheme: str) -> None:
    page = visit(name, color_scheme=scheme).page
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    found = page.evaluate(CONTRAST)
    assert len(found) > 200
    weak = [one for one in found if one[1] < (4.5 if one[0] == "text" else 3)]
    assert weak == []


def test_dark_is_dark_and_paper_is_light(visit: Open) -> None:
    colours = (
        "() => ['background-color', 'color'].map(n => getComputedStyle(document.body).getPropertyValue(n))"
    )
    light = visit("glue").page
    dark = visit("glue", color_scheme="dark").page
    mark = "e => getComputedStyle(e).fill"
    assert light.evaluate(colours) != dark.evaluate(colours)
    assert light.locator(".mean").first.evaluate(mark) != dark.locator(".mean").first.evaluate(mark)
    dark.emulate_media(media="print", color_scheme="dark")
    assert dark.evaluate(colours) == light.evaluate(colours)


def test_it_prints(visit: Open) -> None:
    page = visit("glue").page
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    assert 4 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    assert not page.get_by_role("searchbox").is_visible()
    assert page.locator("#runs-found").is_visible()
    assert page.locator(".forest").first.is_visible()


@pytest.mark.parametrize("name", PAGES)
def test_everything_has_an_accessible_name(visit: Open, name: str) -> None:
    page = visit(name).page
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    named = re.compile(r"\S")
    for role in ("img", "table", "button", "link", "combobox", "searchbox", "region", "navigation"):
        assert page.get_by_role(role).count() == page.get_by_role(role, name=named).count(), role
    assert page.get_by_role("list", name="Methods").count() == page.locator(".key").count()
    assert page.get_by_role("figure").count() == page.locator("figure:visible").count() > 3
    charts = page.locator(".plot svg[role=img]")
    said = charts.evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
    assert len(said) == len(set(said)), "two charts have one name"
    assert all(len(text) > 30 for text in said)
    assert page.locator("html").get_attribute("lang") == "en"


def test_it_reads_without_scripts(visit: Open) -> None:
    page = visit("glue", java_script_enabled=False).page
    assert page.locator(".forest circle").count() == 120
    assert page.locator("#runs-table tbody tr:visible").count() == 40
    assert math.isclose(page.locator(".forest svg[role=img]").first.bounding_box()["height"], 34)
