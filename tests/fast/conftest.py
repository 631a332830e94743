"""Fixtures of the fast paths' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def _open() -> Iterator[None]:
    """Open the room, whatever the environment says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CHILDTUNING_FAST", raising=False)
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    """Put torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
