"""The trained entries of a weight as few rectangles: groups of (rows, columns) of the matrix [shape[0], rest]."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from childtuning.granularity import Granularity
from childtuning.part import Part

Chosen = Tensor | slice | None
"""Coordinates along one side of the matrix: increasing int64 [n], ``slice(start, stop)``, or None for all."""

Group = tuple[Chosen, Chosen]
"""The entries where one of the rows meets one of the columns."""


def part_groups(part: Part, device: torch.device | str | None = None) -> list[Group] | None:
    """Cut a part into groups whose entries, row-major and one after another, are in the order of ``part.indices()``.

    Rows of axis 0 are one group (rows, None); of a later axis, (None, columns). Blocks are one group a row of tiles.

    Args:
        part: what is trained of a weight.
        device: where index tensors shall lie; the weight's.
    Returns:
        The groups, none if nothing is trained; ``None`` if the part has no such structure: a vector, single entries,
        or the whole weight, whose gradient is dense.
    Example:
        >>> rows = Part((4, 3), torch.tensor([0, 2]), Granularity("row"))
        >>> part_groups(rows)
        [(tensor([0, 2]), None)]
        >>> part_groups(Part((4, 3), torch.tensor([1]), Granularity("block", block_shape=(2, 2))))
        [(slice(0, 2, None), slice(2, 3, None))]
    """
    if len(part.shape) < 2 or part.units is None:
        return None
    if part.is_empty:
        return []
    units, kind = part.units.long(), part.granularity.kind
    if kind == "row":
        groups = [_row_group(units, part.shape, part.granularity.axis % len(part.shape))]
    elif kind == "block":
        groups = _block_groups(units, part.shape, part.granularity.block_shape)
    else:
        return None
    return [(_to(rows, device), _to(columns, device)) for rows, columns in groups]


def _row_group(units: Tensor, shape: tuple[int, ...], axis: int) -> Group:
    if axis == 0:
        return _short(units, shape[0]), None
    columns = Granularity("row", axis - 1).entries(units, shape[1:])
    return None, _short(columns, math.prod(shape[1:]))


def _block_groups(units: Tensor, shape: tuple[int, ...], block_shape: tuple[int, int]) -> list[Group]:
    height, width, (tall, wide) = shape[0], math.prod(shape[1:]), block_shape
    across = -(-width // wide)
    downs, counts = (units // across).unique_consecutive(return_counts=True)
    groups: list[Group] = []
    for down, tiles in zip(downs.tolist(), (units % across).split(counts.tolist()), strict=True):
        columns = (tiles[:, None] * wide + torch.arange(wide)).reshape(-1)
        rows = slice(down * tall, min((down + 1) * tall, height))
        groups.append((rows, _short(columns[columns < width], width)))
    return groups


def _short(chosen: Tensor, size: int) -> Chosen:
    """None for all, a slice for a run: neither is copied when taken."""
    if len(chosen) == size:
        return None
    start, stop = int(chosen[0]), int(chosen[-1]) + 1
    return slice(start, stop) if stop - start == len(chosen) else chosen


def _to(chosen: Chosen, device: torch.device | str | None) -> Chosen:
    return chosen.to(device) if isinstance(chosen, Tensor) else chosen


def take(tensor: Tensor, chosen: Chosen) -> Tensor:
    """Return the chosen coordinates of axis 1, as a view where possible."""
    if chosen is None:
        return tensor
    return tensor[:, chosen] if isinstance(chosen, slice) else tensor.index_select(1, chosen)


def join(gradients: Iterable[Tensor]) -> Tensor:
    """Lay the groups' gradients out as the leaf is: flat, one after another."""
    flat = [gradient.reshape(-1) for gradient in gradients]
    return flat[0] if len(flat) == 1 else torch.cat(flat)
