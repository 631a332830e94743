"""Numbers, axes and marks: what stands on the page for a value."""

from __future__ import annotations

import math

import pytest

from childtuning.report import numbers
from childtuning.report.markup import Markup, el, raw_text
from childtuning.report.method_marks import MethodMarks
from childtuning.report.scales import fit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (numbers.score(0.56789), "0.568"),
        (numbers.score(-0.01), "−0.010"),
        (numbers.score(math.nan), "–"),
        (numbers.score(None), "–"),
        (numbers.difference(0.012), "+0.012"),
        (numbers.difference(-0.012), "−0.012"),
        (numbers.p_value(0.0004), "< 0.001"),
        (numbers.p_value(0.0312), "0.031"),
        (numbers.si(22_713_986), "22.7 M"),
        (numbers.si(999_999), "1.00 M"),
        (numbers.si(999.7e6, "B"), "1.00 GB"),
        (numbers.si(770), "770"),
        (numbers.si(1.8e9, "B"), "1.80 GB"),
        (numbers.si(1.8e9, "B", trim=True), "1.8 GB"),
        (numbers.si(0, "B"), "0"),
        (numbers.duration(59), "59.0 s"),
        (numbers.duration(90), "1.50 min"),
        (numbers.duration(36_000), "10.0 h"),
        (numbers.share(0.0004), "< 0.1 %"),
        (numbers.share(0.9996), "> 99.9 %"),
        (numbers.share(1.0), "100 %"),
        (numbers.share(0.034), "3.4 %"),
        (numbers.counted(1, "run"), "1 run"),
        (numbers.counted(2000, "run"), "2,000 runs"),
        (numbers.option(2e-5), "2e-5"),
        (numbers.option(0.1), "0.1"),
        (numbers.option(None), "None"),
        (numbers.point({"lr": 2e-5, "scope": "global"}), "lr 2e-5, scope global"),
        (numbers.listed(["a"]), "a"),
        (numbers.listed(["a", "b", "c"]), "a, b and c"),
        (numbers.listed(list("abcdef")), "a, b, c and 3 others"),
    ],
)
def test_a_number_reads_as_it_should(text: str, expected: str) -> None:
    assert text == expected


def test_a_linear_axis_has_round_ticks_inside() -> None:
    scale = fit([0.5312, 0.5871], "accuracy")
    assert list(scale.ticks) == [0.54, 0.56, 0.58]
    assert [scale.format_fn(tick) for tick in scale.ticks] == ["0.54", "0.56", "0.58"]
    assert scale.share(scale.low) == 0 and scale.share(scale.high) == 1
    assert 0 < scale.share(0.5312) < 0.05 and 0.95 < scale.share(0.5871) < 1
    assert scale.percent((scale.low + scale.high) / 2) == "50%"


def test_a_logarithmic_axis_has_equal_ratios_equally_far_apart() -> None:
    scale = fit([1e3, 1e7], "entries", numbers.si, log=True)
    assert list(scale.ticks) == [1e3, 1e4, 1e5, 1e6, 1e7]
    gaps = [
        scale.share(high) - scale.share(low) for low, high in zip(scale.ticks, scale.ticks[1:], strict=False)
    ]
    assert gaps == pytest.approx([gaps[0]] * 4)
    assert list(fit([100, 2490], "examples", log=True).ticks) == [100, 200, 500, 1000, 2000]
    assert len(fit([1e-9, 1e9], "loss", log=True).ticks) <= 5


@pytest.mark.parametrize(
    "values", [[], [0.5], [0.0], [0.5, 0.5, math.nan], [math.inf, 3], [-2, -1], [1e-12, 2e-12]]
)
def test_an_axis_holds_whatever_there_is(values: list[float]) -> None:
    scale = fit(values, "x")
    assert scale.low < scale.high
    assert 1 <= len(scale.ticks) <= 5
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks)
    assert all(0 <= scale.share(value) <= 1 for value in values if math.isfinite(value))
    assert len({scale.format_fn(tick) for tick in scale.ticks}) == len(scale.ticks)


def test_an_axis_in_another_unit_has_the_same_places_and_text() -> None:
    minutes = fit([2.0, 9.0], "minutes")
    seconds = minutes.times(60)
    assert seconds.percent(300) == minutes.percent(5)
    assert [seconds.format_fn(tick) for tick in seconds.ticks] == [
        minutes.format_fn(tick) for tick in minutes.ticks
    ]


def test_only_elements_are_markup() -> None:
    assert el("td", "<b>&", None, [1, el("b", "x")], title='"<>', hidden=True, class_=None) == (
        '<td title="&quot;&lt;&gt;" hidden>&lt;b&gt;&amp;1<b>x</b></td>'
    )
    assert el("circle", cx="5%", data_tip="a") == '<circle cx="5%" data-tip="a"/>'
    assert isinstance(el("p"), Markup)
    with pytest.raises(ValueError, match="must not hold"):
        raw_text("x </script>")


def test_methods_differ_in_colour_or_shape() -> None:
    methods = [f"m{number}" for number in range(37)]
    marks = MethodMarks(methods, "m5")
    looks = {(marks.colour(method), marks.shape(method)) for method in methods}
    assert len(looks) == 37
    assert marks.colour("m5") == "m0"
    assert {marks.colour(method) for method in methods[:7]} == {f"m{place}" for place in range(7)}
    assert MethodMarks(methods, None).colour("m5") == "m6"


def test_without_a_margin_an_axis_ends_at_its_numbers() -> None:
    scale = fit([10, 600], "step", margin=0.0)
    assert (scale.low, scale.high) == (10, 600)
