"""What a process holds of a parameter: parts, masks and kernels of pieces are the whole's, cut."""

from __future__ import annotations

import pytest
import torch
from tests.fast.adamw_twin import assert_near, draws, twin

from childtuning.child.pieces import Piece
from childtuning.child.task_free import TaskFree
from childtuning.child.units import Granularity, Part
from childtuning.fast import adamw
from childtuning.fast.library import LIBRARY, AdamWStep, Member

SHAPES = [(7, 5), (12,), (6, 4, 3), (70, 9)]
UNITS = [
    Granularity("element"),
    Granularity("row"),
    Granularity("column"),
    Granularity("row", -1),
    Granularity("block", block_shape=(4, 2)),
    Granularity("parameter"),
]


def pieces_of(shape: tuple[int, ...], ranks: int) -> list[Piece]:
    size = -(-shape[0] // ranks)
    starts = [min(size * rank, shape[0]) for rank in range(ranks)]
    return [Piece(shape, start, min(size, shape[0] - start)) for start in starts]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: f"{unit.kind}{unit.axis}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_parts_of_pieces_are_the_part_cut(shape, unit, ranks) -> None:
    torch.manual_seed(0)
    num_units = unit.num_units(shape)
    for count in {0, 1, num_units // 2, num_units}:
        whole = Part(shape, torch.randperm(num_units)[:count].sort().values, unit)
        for piece in pieces_of(shape, ranks):
            local = piece.part(whole)
            assert local.shape == piece.local_shape
            assert torch.equal(local.mask(), piece.slice(whole.mask()))
            assert torch.equal(local.runs().gather(torch.ones(local.shape)), torch.ones(local.num_trained))


@pytest.mark.parametrize("granularity", ["element", "row", "column", "block", "parameter"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_masks_of_pieces_are_the_mask_cut(shape, granularity) -> None:
    free = TaskFree(0.4, seed=2, granularity=granularity)
    whole = free.mask("w", shape, 3)
    for ranks in (1, 2, 3, 5):
        cut = [free.mask("w", shape, 3, piece) for piece in pieces_of(shape, ranks)]
        assert torch.equal(torch.cat(cut), whole)


@pytest.mark.skipif(LIBRARY is None, reason="no compiled kernels")
@pytest.mark.parametrize("start", [0, 1, 31, 32, 64, 1000, 4097])
def test_the_kernel_draws_the_mask_of_a_piece(start: int) -> None:
    free, numel = TaskFree(0.3, seed=1), 3000
    keep = free.mask("w", (start + numel,), 0)[start:]
    draw = free.draw("w", 0)
    assert draw is not None
    step = AdamWStep(1e-2, 0.9, 0.99, 1e-8, 0.01, 1, scale=2.0)
    weight, gradient = draws(numel), draws(numel, seed=1)
    moments = draws(numel, seed=2), draws(numel, seed=3).square()
    wanted = twin(weight, gradient, *moments, step, keep)
    adamw.masked_([(Member(weight, gradient, *moments, step), draw._replace(start=start))])
    for got, want in zip((weight, *moments), wanted, strict=True):
        assert_near(got, want)
