"""How numbers are printed."""

from __future__ import annotations

import math

import pytest

from childtuning.cli.printing import score_text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.1235"), (-1e-9, "0.0000"), (-0.5, "-0.5000"), (None, "—"), (math.nan, "—")],
)
def test_a_score_has_four_digits_and_no_minus_zero(value: float | None, text: str) -> None:
    assert score_text(value) == text
