"""A child within a budget: what a training step of a child costs, and the child of most score that a budget allows.

A step runs the whole network forward. It runs backward down to the lowest trained parameter only, forms gradients of
trained units only, and holds optimizer state for trained entries only. So what a unit costs depends on where it lies.
``Costs`` holds the counts that this follows from; ``fisher.costs.training_costs`` makes them.

L blocks lie at the depths 1 … L, as ``Layers.depth`` numbers them; what comes before at 0, what comes after at L + 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from childtuning.child.child import Child
from childtuning.child.ranking import Share
from childtuning.child.units import Axes, Granularity, Part
from childtuning.config import Budget
from childtuning.errors import ConfigError, ParameterError

_MOMENTS = 8.0  # bytes of a trained entry's two moments
_INDEX = 4.0  # bytes of the position of a trained entry, where entries are chosen one by one
_UPDATE = 28.0  # bytes that AdamW moves for an entry
_SLICE = 1 << 20  # units looked at together
_STRUCTURED = ("row", "block")  # kinds whose layers form the gradient of trained units alone


@dataclass(frozen=True)
class Work:
    """What a part of a step does: matrix products, everything else, and random numbers.

    Args:
        operations: multiplications and additions of matrix products and convolutions.
        num_bytes: read and written by all other operations.
        draws: random numbers, as dropout draws them.
    """

    operations: float = 0.0
    num_bytes: float = 0.0
    draws: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.operations + other.operations, self.num_bytes + other.num_bytes, self.draws + other.draws
        )

    def __sub__(self, other: Work) -> Work:
        return self + other * -1

    @property
    def above_zero(self) -> Work:
        """The same without what is negative."""
        return Work(max(self.operations, 0), max(self.num_bytes, 0), max(self.draws, 0))

    def __mul__(self, times: float) -> Work:
        return Work(self.operations * times, self.num_bytes * times, self.draws * times)


@dataclass(frozen=True)
class Rates:
    """How much of each kind of work a device does a second."""

    operations: float
    num_bytes: float
    draws: float

    def seconds(self, work: Work) -> float:
        """Return the time that work takes."""
        return work.operations / self.operations + work.num_bytes / self.num_bytes + work.draws / self.draws


@dataclass(frozen=True)
class Place:
    """What training one parameter needs.

    Args:
        depth: where it lies.
        shape: its shape.
        itemsize: bytes of an entry.
        gradient: the work of its whole gradient.
        input_axis: of a weight, that of its input units, or those.
        input_bytes: of the input that its gradient is a product with; 0 where there is none.
        shared: the share of these bytes that is kept for its sake where every parameter is trained; below 1 where
            others keep the same input.
        formed: the units, of ``row``, ``column`` and ``block``, whose gradient a layer forms alone.
    """

    depth: int
    shape: tuple[int, ...]
    itemsize: int
    gradient: Work
    input_axis: Axes = 1
    input_bytes: float = 0.0
    shared: float = 1.0
    formed: tuple[str, ...] = ("row", "column", "block")

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def state(self) -> float:
        """Bytes of the optimizer's state for an entry: two moments, and float32 master values of a shorter dtype."""
        return _MOMENTS + 4.0 * (self.itemsize < 4)


@dataclass(frozen=True)
class Amount:
    """How much of a parameter is trained, and in which units, where it does not matter which of them.

    Args:
        num_trained: entries.
        granularity: of the units; ``None``: all of it is trained.
    """

    num_trained: int
    granularity: Granularity | None = None

    @classmethod
    def of(cls, part: Part) -> Amount:
        """Return the amount of a part."""
        return cls(part.num_trained, None if part.is_whole else part.granularity)


@dataclass(frozen=True)
class Costs:
    """The counts of one training step on one batch.

    Args:
        forward: by depth, 0 … L + 1.
        backward: by depth, of the gradients of inputs alone.
        kept: bytes by depth that the backward pass reads, without the inputs of trained weights.
        places: by parameter name, in the model's order.
        rates: of the device.
        unspared: bytes by depth that dropouts keep besides without ``model=``, and the work by depth, which may be
            negative in parts, that they do besides.
        working: the most bytes beside what is kept: in the last layer, and where the backward pass begins.
    """

    forward: tuple[Work, ...]
    backward: tuple[Work, ...]
    kept: tuple[int, ...]
    places: Mapping[str, Place]
    rates: Rates
    unspared: tuple[tuple[int, Work], ...] = ()
    working: tuple[int, int] = (0, 0)

    def shares(self, child: Child) -> dict[str, float]:
        """Predict what training a child costs, as shares of full fine-tuning, by the names of ``Budget``.

        Of units other than single entries it is the cost with ``model=``.
        """
        parts = child.resolve({name: place.shape for name, place in self.places.items()})
        return {what: self.total(what, parts) / self.full(what) for what in Budget.KINDS}

    def full(self, what: str) -> float:
        """Return the cost of full fine-tuning: seconds for ``step``, else bytes."""
        return self.total(what, {name: Part(place.shape) for name, place in self.places.items()})

    def total(self, what: str, parts: Mapping[str, Part | Amount]) -> float:
        """Return the cost of training these parts, in the unit of ``full``."""
        return max(self.moments(what, parts))

    def moments(
        self,
        what: str,
        parts: Mapping[str, Part | Amount],
        lowest: int | None = None,
        structured: bool | None = None,
    ) -> list[float]:
        """Return the cost at each moment that may be the dearest.

        Args:
            what: the kind of cost.
            parts: what is trained, by parameter name.
            lowest: the depth that the step goes back to at least.
            structured: whether it runs with ``model=``; ``None``: if the parts' units say so.
        """
        trained = {name: part for name, part in parts.items() if part.num_trained}
        depths = [len(self.forward) if lowest is None else lowest, *(self.places[n].depth for n in trained)]
        if structured is None:
            structured = any(_is_structured(part.granularity) for part in trained.values())
        moments = list(self.base(what, min(depths), structured=structured))
        for name, part in trained.items():
            amount = Amount.of(part) if isinstance(part, Part) else part
            fixed, each = self.of_entries(what, name, amount.granularity)
            for i, (once, one) in enumerate(zip(fixed, each, strict=True)):
                moments[i] += once + one * amount.num_trained
        return moments

    def base(self, what: str, lowest: int, *, structured: bool) -> tuple[float, ...]:
        """Return what a step costs that goes back to this depth and trains nothing.

        Memory has three moments: in the last layer, before the backward pass, and after it; the largest counts.
        """
        unspared = () if structured else self.unspared[lowest:]
        if what == "step":
            backward = sum(self.backward[lowest:], start=Work())
            besides = sum((work for _, work in unspared), start=Work())
            return (self.rates.seconds(sum(self.forward, start=Work()) + backward + besides),)
        if what == "memory":
            weights = float(sum(place.numel * place.itemsize for place in self.places.values()))
            kept = sum(self.kept[lowest:]) + sum(num_bytes for num_bytes, _ in unspared)
            in_last, at_start = self.working
            return weights + kept + in_last, weights + kept + at_start, weights
        return (0.0,)

    def of_entries(
        self, what: str, name: str, granularity: Granularity | None
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return what a parameter adds once any of it is trained, and what each trained entry adds, by moment.

        Args:
            what: the kind of cost.
            name: of the parameter.
            granularity: of the trained units; ``None``: all of it is trained.
        """
        place = self.places[name]
        size = max(place.numel, 1)
        unit = granularity or Granularity("parameter")
        is_whole = unit.kind == "parameter"
        inputs = Granularity("row", place.input_axis).axes(place.shape)
        is_matrix, has_index = len(place.shape) > 1, unit.kind == "element"
        of_inputs = is_matrix and unit.kind == "row" and unit.axes(place.shape) == inputs
        is_structured = is_matrix and ("column" if of_inputs else unit.kind) in place.formed
        is_columns = of_inputs and is_structured
        if what == "step":
            formed = self.rates.seconds(place.gradient)
            copied = self.rates.seconds(Work(num_bytes=2 * place.input_bytes)) if is_columns else 0.0
            update = self.rates.seconds(Work(num_bytes=_UPDATE))
            if is_structured or is_whole:
                return (0.0,), ((formed + copied) / size + update,)
            # Moments are compact; the gradient is formed whole, and its lines and the weight's travel whole.
            return (formed + self.rates.seconds(Work(num_bytes=12.0 * size)),), (update,)
        if what == "memory":
            read, each = (
                (0.0, place.input_bytes / size) if is_columns else (place.shared * place.input_bytes, 0.0)
            )
            is_kept = place.depth < len(self.forward) - 2  # by then, in the last layer
            state = place.state + _INDEX * has_index
            return (read * is_kept, read, 0.0), (state + each * is_kept, state + each, state + place.itemsize)
        if what == "state":
            return (0.0,), (place.state + _INDEX * has_index,)
        return (0.0,), (place.itemsize + 1.0 * has_index,)


def _is_structured(unit: Granularity | None) -> bool:
    """Tell whether layers may form the gradient of these units alone."""
    return unit is not None and unit.kind in _STRUCTURED


def check_budget(budget: Budget, costs: Costs, always: Iterable[str] = ()) -> None:
    """Refuse a budget that a step exceeds even where nothing but what is always trained is.

    Raises:
        ConfigError: it does.
    """
    rest = Child({}, always=always).resolve({name: place.shape for name, place in costs.places.items()})
    least = max(costs.moments(budget.kind, rest, structured=True)) / costs.full(budget.kind)
    if least >= budget.share:
        raise ConfigError(
            f"no child fits the budget {budget}: with none at all it is {least:.3g} of full fine-tuning. Raise it."
        )


def child_within(
    budget: Budget,
    costs: Costs,
    scores: Mapping[str, Tensor],
    share: Share,
    always: Iterable[str] = (),
) -> Child:
    """Choose the child of most score that costs no more than the budget.

    For every depth that the backward pass may go back to, units at that depth and above are taken in order of score
    for the cost, as far as the budget reaches; the depth that gives the highest sum of scores is chosen.

    Args:
        budget: a share of the cost of full fine-tuning.
        costs: of a step of the model.
        scores: of the eligible parameters, not negative.
        share: the units.
        always: patterns over the names that are trained whole besides.
    Raises:
        ConfigError: even the least child costs more.
        ParameterError: the scores name a parameter that the costs do not.
    """
    for name, score in scores.items():
        if name not in costs.places or costs.places[name].shape != tuple(score.shape):
            raise ParameterError(
                f"the costs are not of a model with {name!r} of shape {list(score.shape)}. Count anew."
            )
    check_budget(budget, costs, always)
    what, limit = budget.kind, budget.share * costs.full(budget.kind) * (1 + 1e-9)
    rest = Child({}, always=always).resolve({name: place.shape for name, place in costs.places.items()})
    whole = {name: Part(tuple(score.shape)) for name, score in scores.items()}
    if costs.total(what, rest | whole) <= limit:
        return Child(whole, always=always)
    units = _Units.of(what, costs, scores, share)
    order = units.by_worth()
    depth = torch.tensor([costs.places[name].depth for name in scores], device="cpu")
    best: tuple[float, Tensor] | None = None
    for lowest in sorted(set(depth.tolist()), reverse=True):
        spent = costs.moments(what, rest, lowest, _is_structured(share.granularity))
        left = limit - torch.tensor(spent, dtype=torch.float64, device="cpu")
        taken = units.fill(order, depth >= lowest, left)
        held = sum(float(units.value[some].sum()) for some in taken.split(_SLICE))
        if len(taken) and (best is None or held > best[0]):
            best = held, taken
    if best is None:
        raise ConfigError(
            f"no child of these units fits the budget {budget}. Raise it, or choose smaller units, or columns."
        )
    chosen = torch.zeros(len(units.value), dtype=torch.bool, device="cpu")
    chosen[best[1]] = True
    parts = {
        name: Part.from_sorted(tuple(score.shape), taken.nonzero().squeeze(1), share.units(name))
        for (name, score), taken in zip(scores.items(), chosen.split(units.counts), strict=True)
    }
    return Child(parts, always=always)


@dataclass(frozen=True)
class _Units:
    """The units of all parameters, and what they cost, by moment.

    Args:
        value: float64 [units], the sums of their scores.
        size: int32 or int64 [units], their entries.
        owner: int32 [units], their parameters.
        first: float64 [moments, parameters], what a parameter adds once any of it is taken.
        each: float64 [moments, parameters], what each entry adds.
    """

    value: Tensor
    size: Tensor
    owner: Tensor
    first: Tensor
    each: Tensor

    @classmethod
    def of(cls, what: str, costs: Costs, scores: Mapping[str, Tensor], share: Share) -> _Units:
        """Return the units of these scores, and their costs of this kind."""
        sums, sizes, owners, prices = [], [], [], []
        for owner, (name, score) in enumerate(scores.items()):
            unit = share.units(name)
            sums.append(unit.sums(score).cpu())
            size = unit.sizes(tuple(score.shape))
            sizes.append(size.int() if score.numel() < 1 << 31 else size)
            owners.append(torch.full((len(sizes[-1]),), owner, dtype=torch.int32, device="cpu"))
            prices.append(costs.of_entries(what, name, unit))
        first, each = torch.tensor(prices, dtype=torch.float64, device="cpu").permute(1, 2, 0)
        return cls(torch.cat(sums), torch.cat(sizes), torch.cat(owners), first, each)

    @property
    def counts(self) -> list[int]:
        """Number of units by parameter."""
        return self.owner.bincount(minlength=self.each.shape[1]).tolist()

    def by_worth(self) -> Tensor:
        """Return all units in order of value for the cost: int64 [units]."""
        worth = torch.empty_like(self.value)
        for at in range(0, len(worth), _SLICE):
            some = slice(at, at + _SLICE)
            price = self.size[some] * self.each[0][self.owner[some].long()]
            worth[some] = -self.value[some] / price.clamp(min=1e-300)
        return torch.from_numpy(np.argsort(worth.numpy(), kind="stable"))  # half the memory of torch's

    def fill(self, order: Tensor, is_open_to: Tensor, left: Tensor) -> Tensor:
        """Take units in order, each that still fits.

        Args:
            order: int64 [units].
            is_open_to: bool [parameters], whose units may be taken.
            left: float64 [moments], the budget.
        Returns:
            int64 [m], the units taken.
        """
        has_any = torch.zeros_like(is_open_to)
        least = self.each[:, is_open_to].amin(1)  # of any unit
        taken = []
        for some in order.split(_SLICE):
            if bool((left < least).any()):
                break
            owners = self.owner[some].long()
            may = is_open_to[owners]
            some, owners = some[may], owners[may]
            while len(some):
                price = self.size[some] * self.each[:, owners]
                alone = price + self.first[:, owners] * ~has_any[owners]
                fits = (alone <= left[:, None]).all(0)
                some, owners, costs = some[fits], owners[fits], price[:, fits]
                if not len(some):
                    break
                opening = torch.full((len(has_any),), len(some), device="cpu")
                opening.scatter_reduce_(0, owners, torch.arange(len(some), device="cpu"), "amin")
                opening = opening[(opening < len(some)) & ~has_any]
                costs[:, opening] += self.first[:, owners[opening]]
                count = int((costs.cumsum(1) <= left[:, None]).all(0).sum())
                taken.append(some[:count])
                left = left - costs[:, :count].sum(1)
                has_any[owners[:count]] = True
                some, owners = some[count:], owners[count:]
        return torch.cat(taken) if taken else order[:0]
