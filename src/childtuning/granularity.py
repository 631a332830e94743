"""What is chosen as one unit: an entry, an output row, a tile, or a whole parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from childtuning.errors import ConfigError, did_you_mean

KINDS = ("element", "row", "block", "parameter")


@dataclass(frozen=True)
class Granularity:
    """How a parameter is cut into units.

    ``element``: every entry. ``row``: the entries that share a coordinate along ``axis``; with axis 0 an output unit
    of a Linear or Conv, or one token's embedding; in a vector each entry. ``block``: tiles of ``block_shape`` of the
    matrix [shape[0], rest] (a vector is one row), cut short at the edges. ``parameter``: all of it.

    Args:
        kind: one of ``KINDS``.
        axis: for rows; negative counts from the end.
        block_shape: for blocks, (height, width) in entries.
    """

    kind: str = "element"
    axis: int = 0
    block_shape: tuple[int, int] = (32, 32)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"granularity must be one of {', '.join(KINDS)}, got {self.kind!r}. "
                              + did_you_mean(self.kind, KINDS))  # fmt: skip
        if len(self.block_shape) != 2 or min(self.block_shape) < 1:
            raise ConfigError(
                f"block_shape must be two positive sizes, got {self.block_shape}. Pass block_shape=(32, 32)."
            )

    def _axis(self, shape: Sequence[int]) -> int:
        if len(shape) < 2:
            return 0
        if not -len(shape) <= self.axis < len(shape):
            raise ConfigError(f"row axis {self.axis} is outside a parameter of shape {tuple(shape)}. Pass 0.")
        return self.axis % len(shape)

    def _tiling(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """Matrix height and width, and the number of tiles down and across."""
        height, width = (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))
        tall, wide = self.block_shape
        return height, width, -(-height // tall), -(-width // wide)

    def num_units(self, shape: Sequence[int]) -> int:
        """Return the number of units in a parameter of this shape."""
        numel = math.prod(shape)
        if self.kind == "parameter":
            return min(numel, 1)
        if self.kind == "row" and len(shape) > 0:
            return shape[self._axis(shape)]
        if self.kind == "block":
            _, _, down, across = self._tiling(shape)
            return down * across
        return numel

    def sums(self, entries: Tensor) -> Tensor:
        """Add up each unit's entries in float64: [num_units]."""
        entries = entries.double()
        if not entries.numel():
            return entries.new_zeros(self.num_units(entries.shape))
        if self.kind == "element":
            return entries.reshape(-1)
        if self.kind == "parameter":
            return entries.sum().reshape(-1)[: self.num_units(entries.shape)]
        if self.kind == "row":
            if entries.dim() < 2:
                return entries.reshape(-1)
            axis = self._axis(entries.shape)
            return entries.movedim(axis, 0).reshape(entries.shape[axis], -1).sum(1)
        height, width, down, across = self._tiling(entries.shape)
        tall, wide = self.block_shape
        padded = entries.new_zeros(down * tall, across * wide)
        padded[:height, :width] = entries.reshape(height, width)
        return padded.view(down, tall, across, wide).sum((1, 3)).reshape(-1)

    def sizes(self, shape: Sequence[int]) -> Tensor:
        """Count each unit's entries: int64 [num_units]."""
        num_units = self.num_units(shape)
        if self.kind == "block":
            height, width, down, across = self._tiling(shape)
            tall, wide = self.block_shape
            heights = (height - torch.arange(down) * tall).clamp(max=tall)
            widths = (width - torch.arange(across) * wide).clamp(max=wide)
            return (heights[:, None] * widths[None, :]).reshape(-1)
        return torch.full((num_units,), math.prod(shape) // max(num_units, 1))

    def spread(self, per_unit: Tensor, shape: Sequence[int]) -> Tensor:
        """Give every entry its unit's value: [num_units] of any dtype -> shape."""
        if self.kind == "block":
            height, width, down, across = self._tiling(shape)
            tall, wide = self.block_shape
            tiles = per_unit.view(down, across).repeat_interleave(tall, 0).repeat_interleave(wide, 1)
            return tiles[:height, :width].reshape(tuple(shape))
        if self.kind == "row" and len(shape) > 1:
            along = [1] * len(shape)
            along[self._axis(shape)] = -1
            return per_unit.view(along).expand(tuple(shape))
        if self.kind == "parameter":
            return (
                per_unit.reshape((1,) * len(shape)).expand(tuple(shape))
                if len(per_unit)
                else per_unit.view(shape)
            )
        return per_unit.view(tuple(shape))

    def is_run(self, shape: Sequence[int]) -> bool:
        """Tell whether a unit's entries lie together, so that unit u starts at entry u · ``run_length``."""
        vector = len(shape) < 2
        return self.kind == "element" or (self.kind == "row" and (vector or self._axis(shape) == 0))

    def run_length(self, shape: Sequence[int]) -> int:
        """Return a length into which runs of entries that lie together can be cut, aligned to it."""
        if self.kind == "row" and len(shape) > 1:
            return max(1, math.prod(shape[self._axis(shape) + 1 :]))
        if self.kind == "block":
            return max(1, math.gcd(self.block_shape[1], self._tiling(shape)[1]))
        return 1

    def entries(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """List the flat indices of the units' entries: int64 [n], increasing."""
        units = units.long()
        if self.kind == "element" or (self.kind == "row" and len(shape) < 2):
            return units
        if self.kind == "row" and self._axis(shape) == 0:
            width = math.prod(shape[1:])
            return (units[:, None] * width + torch.arange(width, device=units.device)).reshape(-1)
        chosen = torch.zeros(self.num_units(shape), dtype=torch.bool, device=units.device)
        chosen[units] = True
        return self.spread(chosen, shape).reshape(-1).nonzero().squeeze(1)
