"""The trained entries of one parameter, and the units they were chosen in.

``Granularity`` cuts a parameter into units; ``Part`` stores which units are trained. It is the only representation of
trained entries: masks, flat indices, runs of entries, and rows and columns all come from its methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from childtuning.config import KINDS
from childtuning.errors import ConfigError, ParameterError, did_you_mean
from childtuning.fast.layers import Chosen, Group
from childtuning.fast.runs import Runs

# One axis of a parameter, or several: a unit then shares its coordinate along each of them.
Axes: TypeAlias = int | tuple[int, ...]
_BY_KIND = cast(int, None)


def as_axes(found: Any) -> Axes:
    """Return one axis, or several, as read from a file, where a tuple is a list."""
    return tuple(map(int, found)) if isinstance(found, (list, tuple)) else int(found)


@dataclass(frozen=True)
class Granularity:
    """How a parameter is cut into units.

    ``element``: every entry. ``row``: the entries that share a coordinate along ``axis``; with axis 0 an output unit
    of a Linear or Conv, or one token's embedding; in a vector each entry. ``column``: the same along axis 1, an input
    unit of a Linear or Conv; it is kept as rows of that axis. ``block``: tiles of ``block_shape`` of the matrix
    [shape[0], rest] (a vector is one row), cut short at the edges. ``parameter``: all of it.

    A weight [experts, out, in] holds a matrix for each expert: a row is then along axes (0, 1), a column along (0, 2),
    and blocks have axis (0,).

    Args:
        kind: one of ``KINDS``.
        axis: for rows and columns, one or several; negative counts from the end. ``None``: 0 for rows, 1 for columns.
            For blocks the tuple of the first axes, where these number matrices that are cut each by itself: (0,).
        block_shape: for blocks, (height, width) in entries.
    """

    kind: str = "element"
    axis: Axes = _BY_KIND
    block_shape: tuple[int, int] = (32, 32)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"granularity must be one of {', '.join(KINDS)}, got {self.kind!r}. "
                              + did_you_mean(str(self.kind), KINDS))  # fmt: skip
        if self.kind == "block" and not isinstance(self.axis, tuple):
            object.__setattr__(self, "axis", ())
        elif cast(Axes | None, self.axis) is None:
            object.__setattr__(self, "axis", int(self.kind == "column"))
        if self.kind == "block" and self.axis != tuple(range(len(self._given))):
            raise ConfigError(f"axis of blocks must be the first axes, in order, got {self.axis}. Pass (0,).")
        if self.kind in ("row", "column") and self.axis == ():
            raise ConfigError("rows and columns need an axis, got (). Pass axis=0.")
        if self.kind == "column":
            object.__setattr__(self, "kind", "row")
        sizes = self.block_shape if isinstance(self.block_shape, (tuple, list)) else ()
        if len(sizes) != 2 or not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise ConfigError(
                f"block_shape must be two positive sizes, got {self.block_shape}. Pass block_shape=(32, 32)."
            )

    @property
    def _given(self) -> tuple[int, ...]:
        return self.axis if isinstance(self.axis, tuple) else (self.axis,)

    def axes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the axes of a parameter along which units share a coordinate: of rows, or of blocks' matrices."""
        if self.kind not in ("row", "block") or (self.kind == "row" and len(shape) < 2):
            return ()
        if not all(-len(shape) <= axis < len(shape) for axis in self._given):
            raise ConfigError(f"row axis {self.axis} is outside a parameter of shape {tuple(shape)}. Pass 0.")
        return tuple(sorted({axis % len(shape) for axis in self._given}))

    def _tiling(self, shape: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """View a parameter as a few axes cut into tiles: return the axes' lengths, a tile's, and the tiles per axis."""
        numel, axes = math.prod(shape), self.axes(shape)
        sizes = tile = [numel]
        if self.kind == "element" or (self.kind == "row" and len(shape) < 2):
            tile = [1]
        elif self.kind == "row":  # neighbouring axes are one, where all or none of them are cut
            alike = [list(group) for _, group in groupby(range(len(shape)), axes.__contains__)]
            sizes = [math.prod(shape[axis] for axis in group) for group in alike]
            tile = [1 if group[0] in axes else size for group, size in zip(alike, sizes, strict=True)]
        elif self.kind == "block":
            matrix = shape[len(axes) :]
            height = matrix[0] if len(matrix) > 1 else 1
            sizes = [math.prod(shape[: len(axes)]), height, math.prod(matrix) // max(height, 1)]
            tile = [1, *self.block_shape]
        tile = [max(length, 1) for length in tile]
        return sizes, tile, [-(-size // length) for size, length in zip(sizes, tile, strict=True)]

    def num_units(self, shape: Sequence[int]) -> int:
        """Return the number of units in a parameter of this shape."""
        return math.prod(self._tiling(shape)[2])

    def sums(self, entries: Tensor) -> Tensor:
        """Add up each unit's entries in float64: [num_units]."""
        sizes, tile, counts = self._tiling(entries.shape)
        entries = entries.double()
        if not entries.numel() or max(tile) == 1:
            return entries.reshape(-1)
        missing = [count * t - size for size, t, count in zip(sizes, tile, counts, strict=True)]
        padded = entries.reshape(sizes)
        if any(missing):
            padded = F.pad(padded, [n for axis in reversed(missing) for n in (0, axis)])
        split = [n for both in zip(counts, tile, strict=True) for n in both]
        inside = [axis for axis in range(1, len(split), 2) if split[axis] > 1]
        return padded.view(split).sum(inside).reshape(-1)

    def sizes(self, shape: Sequence[int]) -> Tensor:
        """Count each unit's entries: int64 [num_units]."""
        sizes, tile, counts = self._tiling(shape)
        if not any(size % length for size, length in zip(sizes, tile, strict=True)):
            return torch.full((math.prod(counts),), math.prod(tile), device="cpu")
        outer, middle, inner = (
            (size - torch.arange(count, device="cpu") * length).clamp(max=length)
            for size, length, count in zip(sizes, tile, counts, strict=True)
        )
        return (outer[:, None, None] * middle[:, None] * inner).reshape(-1)

    def num_entries(self, units: Tensor, shape: Sequence[int]) -> int:
        """Count the entries of some units, whatever the number of all of them."""
        sizes, tile, counts = self._tiling(shape)
        if not any(size % length for size, length in zip(sizes, tile, strict=True)):
            return len(units) * math.prod(tile)
        units = units.long()
        places = (units // (counts[1] * counts[2]), units // counts[2] % counts[1], units % counts[2])
        lengths = [
            (size - place * length).clamp(max=length)
            for place, size, length in zip(places, sizes, tile, strict=True)
        ]
        return int((lengths[0] * lengths[1] * lengths[2]).sum())

    def spread(self, per_unit: Tensor, shape: Sequence[int]) -> Tensor:
        """Give every entry its unit's value: [num_units] of any dtype -> shape."""
        sizes, tile, counts = self._tiling(shape)
        tiles = per_unit.reshape(counts)
        for axis, (size, length) in enumerate(zip(sizes, tile, strict=True)):
            if counts[axis] > 1 and length > 1:
                tiles = tiles.repeat_interleave(length, axis).narrow(axis, 0, size)
        return tiles.expand(sizes).reshape(tuple(shape))

    def groups(self, units: Tensor, shape: Sequence[int]) -> list[Group]:
        """Return rows' entries as rows or as columns of the matrix [shape[0], rest]: (units, None) or (None, columns).

        Args:
            units: int64 [n], increasing.
            shape: of two axes or more, of which the rows are along one (``is_of_matrix``).
        """
        (axis,) = self.axes(shape)
        if axis == 0:
            return [(units, None)]
        return [(None, Granularity("row", axis - 1).entries(units, shape[1:]))]

    def is_of_matrix(self, shape: Sequence[int]) -> bool:
        """Return whether the units are rows, columns or blocks of the matrix [shape[0], rest]."""
        return len(shape) > 1 and len(self.axes(shape)) == (self.kind == "row")

    def is_run(self, shape: Sequence[int]) -> bool:
        """Return whether each unit is contiguous, so that unit u starts at entry u · ``run_length``."""
        axes = self.axes(shape)
        return self.kind == "element" or (self.kind == "row" and axes == tuple(range(len(axes))))

    def is_uncut(self, shape: Sequence[int]) -> bool:
        """Return whether each unit lies at one coordinate of the first axis, so that shards along it cut none."""
        return self.is_run(shape) or 0 in self.axes(shape)

    def num_repeats(self, shape: Sequence[int]) -> int | None:
        """Return how often rows' runs come again: once for each coordinate before their axis. ``None``: irregularly."""
        axes = self.axes(shape)
        if self.kind != "row" or (axes and axes[-1] - axes[0] >= len(axes)):
            return None
        return math.prod(shape[: axes[0]]) if axes else 1

    def run_length(self, shape: Sequence[int]) -> int:
        """Return the length of the aligned contiguous runs that the trained entries consist of."""
        sizes, tile, _ = self._tiling(shape)
        return max(1, math.gcd(sizes[-1], tile[-1]))

    def entries(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """List the flat indices of the units' entries: int64 [n], increasing."""
        units = units.long()
        if self.is_run(shape):
            width = self.run_length(shape)
            return (units[:, None] * width + torch.arange(width, device=units.device)).reshape(-1)
        chosen = torch.zeros(self.num_units(shape), dtype=torch.bool, device=units.device)
        chosen[units] = True
        return self.spread(chosen, shape).reshape(-1).nonzero().squeeze(1)


@dataclass(frozen=True, eq=False)
class Part:
    """The trained units of one parameter.

    Args:
        shape: the parameter's shape.
        units: sorted unit indices [n] without repeats, int32 (int64 for parameters of 2^31 entries or more), on the
            CPU; ``None`` means every unit.
        granularity: what the indices count.
    Raises:
        ParameterError: the indices are not sorted, or out of range.
    """

    shape: tuple[int, ...]
    units: Tensor | None = None
    granularity: Granularity = field(default_factory=Granularity)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.units is None:
            return
        units = self.units.detach().to(device="cpu", dtype=self._index_dtype)
        num_units = self.granularity.num_units(self.shape)
        if len(units) and (
            int(units[0]) < 0 or int(units[-1]) >= num_units or bool((units[1:] <= units[:-1]).any())
        ):
            raise ParameterError(
                f"unit indices must increase within 0 … {num_units - 1}, got {units[:4].tolist()} …. Sort them."
            )
        object.__setattr__(self, "units", None if len(units) == num_units and num_units else units)

    @classmethod
    def from_sorted(cls, shape: Sequence[int], units: Tensor, granularity: Granularity) -> Part:
        """Return a part without checking its units: they must be sorted, in range and without repeats."""
        part = cls(tuple(shape), None, granularity)
        if len(units) != granularity.num_units(shape) or not len(units):
            object.__setattr__(part, "units", units.detach().to(device="cpu", dtype=part._index_dtype))
        return part

    @classmethod
    def none(cls, shape: Sequence[int]) -> Part:
        """Return the part of a fully frozen parameter."""
        return cls(tuple(shape), torch.zeros(0, dtype=torch.int32, device="cpu"))

    @classmethod
    def from_mask(cls, mask: Tensor) -> Part:
        """Return the part that trains the entries where the bool mask is True."""
        return cls(tuple(mask.shape), mask.reshape(-1).nonzero().squeeze(1))

    @property
    def _index_dtype(self) -> torch.dtype:
        return torch.int32 if self.numel < 2**31 else torch.int64

    @property
    def numel(self) -> int:
        """Number of entries of the parameter."""
        return math.prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether every entry is trained."""
        return self.units is None

    @property
    def is_empty(self) -> bool:
        """Whether no entry is trained."""
        return self.units is not None and len(self.units) == 0

    @cached_property
    def num_trained(self) -> int:
        """Number of trained entries."""
        if self.units is None:
            return self.numel
        return self.granularity.num_entries(self.units, self.shape)

    def indices(self) -> Tensor:
        """List the trained entries' flat indices: int64 [num_trained], increasing, on the CPU."""
        if self.units is None:
            return torch.arange(self.numel, device="cpu")
        return self.granularity.entries(self.units, self.shape)

    def mask(self) -> Tensor:
        """Return the bool tensor of the parameter's shape that is True where trained."""
        mask = torch.zeros(self.numel, dtype=torch.bool, device="cpu")
        mask[self.indices()] = True
        return mask.view(self.shape)

    def __or__(self, other: Part) -> Part:
        """Return what either trains, of one parameter: in their units if these are the same, else entry by entry."""
        if self.is_whole or other.is_empty:
            return self
        return other if other.is_whole or self.is_empty else self._with(other, torch.Tensor.__or__)

    def __and__(self, other: Part) -> Part:
        """Return what both train."""
        if self.is_empty or other.is_whole:
            return self
        return other if other.is_empty or self.is_whole else self._with(other, torch.Tensor.__and__)

    def __sub__(self, other: Part) -> Part:
        """Return what this trains and the other does not."""
        if self.is_empty or other.is_empty:
            return self
        if other.is_whole:
            return Part.none(self.shape)
        return self._with(other, lambda ours, theirs: ours & ~theirs)

    def _with(self, other: Part, of_masks: Callable[[Tensor, Tensor], Tensor]) -> Part:
        alike = self.granularity == other.granularity or self.is_whole or other.is_whole
        unit = (other if self.is_whole else self).granularity if alike else Granularity()
        masks = []
        for part in (self, other):
            chosen = torch.full((unit.num_units(self.shape),), part.is_whole, device="cpu")
            if part.units is not None:
                chosen[part.units.long() if alike else part.indices()] = True
            masks.append(chosen)
        return Part.from_sorted(self.shape, of_masks(*masks).nonzero().squeeze(1), unit)

    def runs(self) -> Runs:
        """Return the trained entries as contiguous runs, as long as the layout allows, on the CPU."""
        if self.units is None:
            return Runs(torch.arange(self.numel, dtype=self._index_dtype, device="cpu"), 1)
        starts, width = self.units, self.granularity.run_length(self.shape)
        if (repeats := self.granularity.num_repeats(self.shape)) is not None:
            return Runs(starts, width, repeats, self.numel // max(repeats, 1))
        if not self.granularity.is_run(self.shape):
            starts = (self.indices()[::width] // width).to(self._index_dtype)
        return Runs(starts, width)

    def groups(self, device: torch.device | str | None = None) -> list[Group] | None:
        """Return the trained entries of the matrix [shape[0], rest] as blocks of rows and columns.

        Returns:
            (rows, columns) pairs; flattened row-major, one after another, they list the trained entries of rows and
            blocks. Empty if nothing is trained, ``None`` if the part has no such structure.

        Example:
            >>> Part((4, 3), torch.tensor([0, 2]), Granularity("row")).groups()
            [(tensor([0, 2]), None)]
            >>> Part((4, 3), torch.tensor([1]), Granularity("block", block_shape=(2, 2))).groups()
            [(slice(0, 2, None), slice(2, 3, None))]
        """
        is_of_matrix = self.granularity.kind in ("row", "block") and self.granularity.is_of_matrix(self.shape)
        if self.units is None or not is_of_matrix:
            return None
        if self.is_empty:
            return []
        units = self.units.long()
        if self.granularity.kind == "block":
            groups = self._block_groups(units)
        else:
            ((rows, columns),) = self.granularity.groups(units, self.shape)
            height, width = self.shape[0], math.prod(self.shape[1:])
            groups = [(_shortest(rows, height), _shortest(columns, width))]
        return [(_on(rows, device), _on(columns, device)) for rows, columns in groups]

    def _block_groups(self, units: Tensor) -> list[Group]:
        height, width = self.shape[0], math.prod(self.shape[1:])
        tall, wide = self.granularity.block_shape
        across = -(-width // wide)
        downs, counts = (units // across).unique_consecutive(return_counts=True)
        groups: list[Group] = []
        for down, tiles in zip(downs.tolist(), (units % across).split(counts.tolist()), strict=True):
            columns = (tiles[:, None] * wide + torch.arange(wide, device="cpu")).reshape(-1)
            rows = slice(down * tall, min((down + 1) * tall, height))
            groups.append((rows, _shortest(columns[columns < width], width)))
        return groups


def _shortest(chosen: Chosen, size: int) -> Chosen:
    """None for all, a slice for a run: neither is copied when taken."""
    if not isinstance(chosen, Tensor):
        return chosen
    if len(chosen) == size:
        return None
    start, stop = int(chosen[0]), int(chosen[-1]) + 1
    return slice(start, stop) if stop - start == len(chosen) else chosen


def _on(chosen: Chosen, device: torch.device | str | None) -> Chosen:
    return chosen.to(device) if isinstance(chosen, Tensor) else chosen
