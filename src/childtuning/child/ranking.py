"""Select the entries or units with the highest scores, to an exact budget: the definition.

``fast/ranking.py`` does the same without concatenating the scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from childtuning.child import sharded_ranking
from childtuning.child.pieces import local_of
from childtuning.child.task_free import uniform
from childtuning.child.units import Axes, Granularity, Part, as_axes
from childtuning.config import SCOPES, check_density
from childtuning.errors import ConfigError, ParameterError, did_you_mean
from childtuning.fast import ranking as fast_ranking
from childtuning.fast.ranking import NotNumbersError

Scope = Literal["global", "parameter"]


@dataclass(frozen=True)
class Share:
    """The share of the eligible entries to take, and the units to take them in.

    Args:
        density: p, in (0, 1].
        scope: ``global`` ranks all parameters together; ``parameter`` gives each its own share, rounded by largest
            remainder so that the total is exact.
        granularity: the units.
        row_axes: the units' axes by parameter name where they are not the granularity's.
    Raises:
        ConfigError: the density or scope is outside its range.
    """

    density: float
    scope: str = "global"
    granularity: Granularity = field(default_factory=Granularity)
    row_axes: Mapping[str, Axes] = field(default_factory=dict)

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
        unit = Granularity(fields["granularity"], as_axes(fields["axis"]), tuple(fields["block_shape"]))
        axes = {name: as_axes(axis) for name, axis in fields["row_axes"].items()}
        return cls(fields["density"], fields["scope"], unit, axes)


def top_parts(scores: Mapping[str, Tensor], share: Share, *, lowest: bool = False) -> dict[str, Part]:
    """Take the highest-scoring share; ties go to the earlier parameter, then the lower index.

    Args:
        scores: by parameter name, floating point of one dtype, without NaN, any shape and device.
        share: how many entries to take, and in which units.
        lowest: take the lowest instead.
    Returns:
        one part a name, in the same order.
    """
    parts: dict[str, Part] = {}
    for group, budget in _groups(list(scores), [score.numel() for score in scores.values()], share):
        chosen = {name: scores[name] for name in group}
        if share.granularity.kind == "element":
            parts |= _take_entries(chosen, budget, share, lowest)
            continue
        shapes = {name: tuple(score.shape) for name, score in chosen.items()}
        sums = [sharded_ranking.unit_sums(name, score, share.units(name)) for name, score in chosen.items()]
        sizes = [share.units(name).sizes(shape) for name, shape in shapes.items()]
        means = [total / size.clamp(min=1) for total, size in zip(sums, sizes, strict=True)]
        for name, mean in zip(chosen, means, strict=True):
            if bool(mean.isnan().any()):  # of scores of both signs that are infinite
                raise not_numbers(name)
        parts |= _take_units(shapes, [-mean for mean in means] if lowest else means, budget, share)
    return parts


def random_parts(
    shapes: Mapping[str, Sequence[int]], share: Share, seed: int, *, by_units: bool = True
) -> dict[str, Part]:
    """Take a random share, uniform over units whatever their size: a pure function of (seed, names, shapes, share).

    Args:
        by_units: draw a number for each unit; else for each entry, and rank units by their mean, as files of an
            earlier version were made: wide units then hardly ever came first.
    """
    if not by_units or share.granularity.kind == "element":
        scores = {
            name: uniform("random-child", seed, name, numel=math.prod(shape)).view(tuple(shape))
            for name, shape in shapes.items()
        }
        return top_parts(scores, share)
    parts: dict[str, Part] = {}
    for group, budget in _groups(list(shapes), [math.prod(shape) for shape in shapes.values()], share):
        counts = [share.units(name).num_units(shapes[name]) for name in group]
        drawn = [uniform("random-child", seed, n, numel=k) for n, k in zip(group, counts, strict=True)]
        parts |= _take_units({name: tuple(shapes[name]) for name in group}, drawn, budget, share, fill=False)
    return parts


def not_numbers(name: str) -> ParameterError:
    """Return the error for scores that contain NaN."""
    return ParameterError(f"the scores of {name!r} hold NaN. Check the loss on the batches they come from.")


def _groups(names: list[str], sizes: Sequence[int], share: Share) -> Iterator[tuple[list[str], int]]:
    """Yield the names that are ranked together, with the number of entries to take."""
    groups = [names] if share.scope == "global" else [[name] for name in names]
    return zip(groups, share.budgets(sizes), strict=True)


def _take_entries(scores: Mapping[str, Tensor], budget: int, share: Share, lowest: bool) -> dict[str, Part]:
    ranks = sharded_ranking.holders(scores)
    try:
        if ranks.size > 1:
            taken = sharded_ranking.top_entries(scores, budget, ranks, lowest=lowest)
        else:
            taken = top_entries([local_of(score) for score in scores.values()], budget, lowest=lowest)
    except NotNumbersError as fault:
        raise not_numbers(list(scores)[fault.tensor]) from None
    return {
        name: Part.from_sorted(tuple(scores[name].shape), entries, share.granularity)
        for name, entries in zip(scores, taken, strict=True)
    }


def _take_units(
    shapes: Mapping[str, tuple[int, ...]],
    ranked: Sequence[Tensor],
    budget: int,
    share: Share,
    *,
    fill: bool = True,
) -> dict[str, Part]:
    """Take the units that are ranked highest, as ``top_units`` does."""
    sizes = [share.units(name).sizes(shape) for name, shape in shapes.items()]
    taken = top_units(torch.cat(list(ranked)), torch.cat(sizes), budget, fill=fill)
    chosen = taken.split([len(size) for size in sizes])
    return {
        name: Part.from_sorted(shapes[name], taken.nonzero().squeeze(1), share.units(name))
        for name, taken in zip(shapes, chosen, strict=True)
    }


def top_entries(scores: Sequence[Tensor], count: int, *, lowest: bool = False) -> list[Tensor]:
    """Find the count largest entries of all tensors together; ties go to the earlier tensor, then the lower index.

    Args:
        scores: floating-point tensors of any shape, all of one dtype.
        count: how many entries to take in all.
        lowest: find the smallest instead.
    Returns:
        for each tensor the flat indices taken, int32 or int64, increasing.
    Raises:
        NotNumbersError: a score is NaN.
    """
    if len(dtypes := {score.dtype for score in scores}) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ConfigError(f"scores must share one dtype, got {names}. Convert them.")
    if count and fast_ranking.supports(scores):
        taken = fast_ranking.top_entries(scores, count, lowest=lowest)
        if taken is not None:
            return taken
    flat = [_flat(-score if lowest else score) for score in scores]
    for position, one in enumerate(flat):
        if len(one) and np.isnan(one.min()):
            raise NotNumbersError(position)
    if count == 0:
        return [torch.zeros(0, dtype=torch.int64, device="cpu") for _ in flat]
    everything = np.concatenate(flat)
    place = len(everything) - count
    threshold = np.partition(everything, place)[place]
    ties_left = count - int((everything > threshold).sum())
    taken = []
    for one in flat:
        chosen = one > threshold
        ties = np.flatnonzero(one == threshold)[:ties_left]
        chosen[ties] = True
        ties_left -= len(ties)
        taken.append(torch.from_numpy(np.flatnonzero(chosen)))
    return taken


def _flat(score: Tensor) -> NDArray:
    """Scores as numpy has them: bf16 becomes float32, which is exact."""
    score = score.detach().reshape(-1).cpu()
    return (score.float() if score.element_size() < 4 else score).numpy()


def top_units(means: Tensor, sizes: Tensor, budget: int, *, fill: bool = True) -> Tensor:
    """Take units in order of their mean score, each that still fits the budget of entries; none of −∞.

    Args:
        means: float64 [U], the units' scores; ties go to the lower index.
        sizes: int64 [U], entries in each unit.
        budget: how many entries may be taken in all.
        fill: after a unit that does not fit, go on with smaller ones; otherwise stop there once any was taken, so that
            a random ranking does not favour small units.
    Returns:
        bool [U]. The entries taken never exceed the budget, and fall short of it by less than the size of the
        smallest unit that was left.
    """
    order = torch.sort(means, descending=True, stable=True).indices
    order = order[means[order] > -math.inf]
    taken = torch.zeros(len(means), dtype=torch.bool, device="cpu")
    while len(order):
        running = sizes[order].cumsum(0)
        num_fit = int((running <= budget).sum())
        taken[order[:num_fit]] = True
        budget -= int(running[num_fit - 1]) if num_fit else 0
        order = order[num_fit:]
        if num_fit and not fill:
            break
        order = order[sizes[order] <= budget]
    return taken
