"""Scores, one per entry, to parts of a child: the highest share, to an exact budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, Self

import torch
from torch import Tensor

from childtuning.density import check_density
from childtuning.errors import ConfigError, ParameterError, did_you_mean
from childtuning.granularity import Granularity
from childtuning.kernels import NotNumbersError, top_entries, top_units, uniform
from childtuning.part import Part

Scope = Literal["global", "parameter"]
SCOPES = ("global", "parameter")


@dataclass(frozen=True)
class Share:
    """What share of the eligible entries to take, and in which units.

    Args:
        density: p, in (0, 1].
        scope: ``global`` ranks all parameters together; ``parameter`` gives each its own share, rounded by largest
            remainder so that the total is exact.
        granularity: the units.
        row_axes: for rows, the output axis by parameter name where it is not the granularity's.
    Raises:
        ConfigError: the density or scope is outside its range.
    """

    density: float
    scope: str = "global"
    granularity: Granularity = field(default_factory=Granularity)
    row_axes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", check_density(self.density))
        if self.scope not in SCOPES:
            raise ConfigError(f"scope must be one of {', '.join(SCOPES)}, got {self.scope!r}. "
                              + did_you_mean(self.scope, SCOPES))  # fmt: skip

        if self.granularity.kind == "parameter" and self.scope == "parameter":
            raise ConfigError(
                "whole parameters cannot be shared out within each parameter. Use scope='global'."
            )

    def units(self, name: str) -> Granularity:
        """Return the units of one parameter."""
        unit = self.granularity
        axis = self.row_axes.get(name, unit.axis)
        return unit if axis == unit.axis else Granularity(unit.kind, axis, unit.block_shape)

    def budgets(self, sizes: Sequence[int]) -> list[int]:
        """Return how many entries to take: one number for all, or one a parameter, of the exact total."""
        total = round(self.density * sum(sizes))
        if self.scope == "global":
            return [total]
        exact = [Fraction(self.density) * size for size in sizes]
        shares = [int(share) for share in exact]
        by_remainder = sorted(range(len(sizes)), key=lambda i: (shares[i] - exact[i], i))
        for i in [i for i in by_remainder if shares[i] < sizes[i]][: total - sum(shares)]:
            shares[i] += 1
        return shares

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields for ``from_dict``."""
        unit = self.granularity
        return {
            "density": self.density,
            "scope": self.scope,
            "granularity": unit.kind,
            "axis": unit.axis,
            "block_shape": list(unit.block_shape),
            "row_axes": dict(self.row_axes),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Rebuild what ``to_dict`` returned."""
        unit = Granularity(fields["granularity"], fields["axis"], tuple(fields["block_shape"]))
        return cls(fields["density"], fields["scope"], unit, dict(fields["row_axes"]))


def top_parts(scores: Mapping[str, Tensor], share: Share, *, lowest: bool = False) -> dict[str, Part]:
    """Take the share of highest scores; ties go to the earlier parameter, then the lower index.

    Args:
        scores: by parameter name, floating point of one dtype, without NaN, any shape and device.
        share: how many, in which units.
        lowest: take the lowest instead.
    Returns:
        one part a name, in the same order.
    """
    groups = [list(scores)] if share.scope == "global" else [[name] for name in scores]
    budgets = share.budgets([score.numel() for score in scores.values()])
    parts: dict[str, Part] = {}
    for group, budget in zip(groups, budgets, strict=True):
        parts |= _take({name: scores[name] for name in group}, budget, share, lowest)
    return parts


def random_parts(shapes: Mapping[str, Sequence[int]], share: Share, seed: int) -> dict[str, Part]:
    """Take a random share: a pure function of (seed, names, shapes, share)."""
    scores = {
        name: uniform("random-child", seed, name, numel=math.prod(shape)).view(tuple(shape))
        for name, shape in shapes.items()
    }
    return top_parts(scores, share)


def not_numbers(name: str) -> ParameterError:
    """Say whose scores hold NaN."""
    return ParameterError(f"the scores of {name!r} hold NaN. Check the loss on the batches they come from.")


def _take(scores: Mapping[str, Tensor], budget: int, share: Share, lowest: bool) -> dict[str, Part]:
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    if share.granularity.kind == "element":
        try:
            taken = top_entries(scores.values(), budget, lowest=lowest)
        except NotNumbersError as fault:
            raise not_numbers(list(scores)[fault.tensor]) from None
        return {
            name: Part.from_sorted(shapes[name], ids, share.granularity)
            for name, ids in zip(scores, taken, strict=True)
        }
    units = {name: share.units(name) for name in scores}
    sizes = [units[name].sizes(shape) for name, shape in shapes.items()]
    sums = [units[name].sums(score).cpu() for name, score in scores.items()]
    means = [total / size.clamp(min=1) for total, size in zip(sums, sizes, strict=True)]
    ranked = -torch.cat(means) if lowest else torch.cat(means)
    chosen = top_units(ranked, torch.cat(sizes), budget).split([len(size) for size in sizes])
    return {
        name: Part(shapes[name], taken.nonzero().squeeze(1), units[name])
        for name, taken in zip(scores, chosen, strict=True)
    }
