"""What the tests of this folder share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Every training collects garbage: let it not look through all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
