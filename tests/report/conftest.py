"""Pages that several tests look at; each is made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
from tests.report import synthetic

from childtuning.compare import statistics
from childtuning.report import html_page

Page = Callable[[str], str]


@pytest.fixture(scope="module", autouse=True)
def _quick_statistics() -> Iterator[None]:
    """A tenth of the draws, for these tests alone: what is tested is how numbers are shown, not the numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "NUM_RESAMPLES", 999)
        yield


@pytest.fixture(scope="module")
def page() -> Page:
    """Return a function that makes the page of a comparison of ``synthetic`` by its name."""

    @cache
    def made(name: str) -> str:
        odd = synthetic.odd()
        return html_page(odd[name] if name in odd else getattr(synthetic, name)())

    return made
