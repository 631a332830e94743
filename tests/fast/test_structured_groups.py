"""Groups hold exactly a part's entries, in the part's order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from childtuning.child import Granularity, Part
from childtuning.fast.layers import Chosen


def _take(matrix: Tensor, chosen: Chosen) -> Tensor:
    return matrix if chosen is None else matrix[chosen]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_entries_in_order(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=4)))
    granularity = data.draw(
        st.one_of(
            st.integers(-len(shape), len(shape) - 1).map(lambda axis: Granularity("row", axis)),
            st.tuples(st.integers(1, 8), st.integers(1, 9)).map(
                lambda s: Granularity("block", block_shape=s)
            ),
        )
    )
    chosen = data.draw(st.sets(st.integers(0, granularity.num_units(shape) - 1)))
    part = Part(shape, torch.tensor(sorted(chosen), dtype=torch.int64), granularity)
    groups = part.groups()
    if part.is_whole:
        assert groups is None
        return
    assert groups is not None
    matrix = torch.arange(part.numel).view(shape[0], -1)
    listed = [_take(_take(matrix, rows).t(), columns).t().reshape(-1) for rows, columns in groups]
    assert torch.equal(torch.cat([torch.zeros(0, dtype=torch.int64), *listed]), part.indices())


@pytest.mark.parametrize(
    "part",
    [
        Part((5,), torch.tensor([1, 2]), Granularity("row")),
        Part((6,), torch.tensor([0]), Granularity("block", block_shape=(2, 2))),
        Part((3, 4), torch.tensor([1, 5])),
        Part((3, 4)),
        Part.none((3,)),
        Part.none((3, 4)),
    ],
)
def test_what_has_no_structure(part: Part) -> None:
    assert part.groups() is None


def test_runs_are_slices() -> None:
    assert Part((6, 3), torch.tensor([2, 3, 4]), Granularity("row")).groups() == [(slice(2, 5), None)]
    tiles = Part((4, 6), torch.tensor([0, 1, 3]), Granularity("block", block_shape=(2, 3)))
    assert tiles.groups() == [(slice(0, 2), None), (slice(2, 4), slice(3, 6))]


@pytest.mark.parametrize("granularity", [Granularity("row"), Granularity("row", 1), Granularity("block")])
def test_no_units_are_no_groups(granularity: Granularity) -> None:
    assert Part((4, 6), torch.zeros(0, dtype=torch.int32), granularity).groups() == []
