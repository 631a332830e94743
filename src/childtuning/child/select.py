"""Choose a child: by scores, at random, or by the size of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from childtuning.child.budget import Costs, child_within
from childtuning.child.child import Child
from childtuning.child.eligible import (
    as_patterns,
    match_names,
    matches,
    refuse_rewritten,
    refuse_sharded,
    unit_axes,
)
from childtuning.child.eligible import eligible as eligible_parameters
from childtuning.child.pieces import is_sharded
from childtuning.child.ranking import Scope, Share, not_numbers, random_parts, top_parts
from childtuning.child.units import Axes, Granularity, Part
from childtuning.config import Budget, check_density, mass_fault
from childtuning.errors import ConfigError, ParameterError


def select_child(
    scores: Mapping[str, Tensor],
    density: float | Literal["auto"] | None = None,
    *,
    budget: Budget | str | None = None,
    costs: Costs | None = None,
    scope: Scope = "global",
    granularity: str | Granularity = "element",
    eligible: Iterable[str] | None = None,
    always: Iterable[str] = (),
    avoid: Child | None = None,
    lowest: bool = False,
    row_axes: Mapping[str, Axes] | None = None,
    mass: float = 0.9,
) -> Child:
    """Choose the child: the share ``density`` of the eligible entries with the highest scores, or what a budget allows.

    With ``element`` units, ``num_trained == round(density · num_eligible)`` exactly; ties go to the earlier
    parameter, then the lower index. Coarser units are ranked by the mean of their entries' scores and taken while
    they fit: the budget is never exceeded, and is met exactly whenever units small enough remain (biases are).

    With a budget, units are ranked by their score for what they cost, and the backward pass ends where that gives the
    child of the highest sum of scores: ``Budget(step=0.5)`` allows half the time of a full step.

    The official code thresholds at a percentile with ``>=``, so that ties exceed the budget: ``official_child``.

    Args:
        scores: importance of each entry by parameter name, in the model's order, floating point, any device. Those of
            a sharded model (DTensors) are ranked where they lie, and every process chooses the same child.
        density: the share p, in (0, 1]; ``"auto"``: that of the smallest child which holds the share ``mass`` of the
            scores' total. ``None``: as much as the budget allows.
        budget: what training may cost, in place of a density; with ``scope="global"`` and scores from 0 up.
        costs: of the model's training step: ``training_costs(model, batch)``. ``None``: those of the pass that made the
            scores, where ``fisher_information`` has just made them.
        scope: ``global`` ranks all parameters together [Xu et al. 2021]; ``parameter`` gives each parameter its
            own share, rounded so that the total is exact.
        granularity: ``element``, ``row``, ``column``, ``block``, ``parameter``, or a ``Granularity``.
        eligible: patterns over the scored names; the others stay frozen. ``None``: all of them.
        always: patterns over the model's parameter names that are trained whole and not counted; names among the
            scores that match are taken out of the eligible ones. A new head belongs here.
        avoid: a child of which no entry is to be chosen, so that two tasks train disjoint children of one model. The
            density stays a share of all eligible entries.
        lowest: choose the lowest scores instead (the paper's ablation).
        row_axes: the units' axes by parameter name where they are not the usual ones, 0 for rows and 1 for columns:
            ``unit_axes(model, granularity)``.
        mass: for ``density="auto"``, in (0, 1].
    Returns:
        the child; indices on the CPU.
    Raises:
        ConfigError: density, scope or granularity outside its range, or a budget that no child fits.
        ParameterError: a pattern fits no scored name, scores hold NaN, the costs are not known, or ``avoid`` leaves too
            little.

    Example:
        >>> import torch
        >>> child = select_child({"w": torch.tensor([3.0, 1.0, 2.0, 4.0])}, density=0.5)
        >>> child.mask("w").tolist()
        [True, False, False, True]
    """
    unit = granularity if isinstance(granularity, Granularity) else Granularity(granularity)
    if not isinstance(scores, Mapping):
        raise ConfigError(
            f"a child is chosen by scores, by parameter name, got {type(scores).__name__}. Pass what "
            "fisher_information(model, batches, loss_fn) returns."
        )
    if budget is not None:
        budget = Budget.parse(budget) if isinstance(budget, str) else budget
        if not isinstance(budget, Budget):
            raise ConfigError(f"budget must be a Budget, got {budget!r:.60}. Pass Budget(step=0.5).")
        if density is not None:
            raise ConfigError(f"a budget takes the place of a density, got density={density}. Leave it out.")
        if lowest or scope != "global" or avoid is not None:
            raise ConfigError("a budget goes with the highest scores of all parameters. Pass a density.")
        costs = costs or getattr(scores, "costs", lambda: None)()
        if not isinstance(costs, Costs):
            raise ParameterError(
                "a budget needs the costs of a training step. Pass costs=training_costs(model, batch)."
            )
        always = as_patterns(always)
        ranked = check_scores(_from_zero(_eligible_scores(scores, eligible, always)))
        return child_within(budget, costs, ranked, Share(1.0, scope, unit, row_axes or {}), always)
    if density == "auto":
        if lowest or scope != "global":
            raise ConfigError("density='auto' goes with the highest scores of all parameters. Pass a number.")
        density = density_for_mass(
            scores, mass, granularity=unit, eligible=eligible, always=always, row_axes=row_axes
        )
    share = Share(check_density(density), scope, unit, row_axes or {})
    always = as_patterns(always)
    ranked = check_scores(_eligible_scores(scores, eligible, always), ranks_entries=unit.kind == "element")
    if avoid is not None:
        ranked = _without(ranked, avoid, share, lowest=lowest)
    child = Child(top_parts(ranked, share, lowest=lowest), always=always)
    if avoid is not None:
        _check_apart(child, avoid, share)
    return child


def _without(scores: Mapping[str, Tensor], avoid: Child, share: Share, *, lowest: bool) -> dict[str, Tensor]:
    """Return scores that rank every unit with an entry of another child last."""
    found = {}
    for name, score in scores.items():
        part = _taken(avoid, name, score.shape)
        if not part.is_empty:
            refuse_sharded(name, score)
            if part.shape != tuple(score.shape):
                raise ParameterError(
                    f"{name!r} has shape {list(score.shape)} in the scores and {list(part.shape)} in the child to "
                    "avoid. Choose both from the same model."
                )
            unit = share.units(name)
            taken = unit.spread(unit.sums(part.mask()) > 0, part.shape).view(part.shape)
            score = score.masked_fill(taken.to(score.device), float("inf") if lowest else -float("inf"))
        found[name] = score
    return found


def _taken(avoid: Child, name: str, shape: Sequence[int]) -> Part:
    """Return what a child to avoid trains of a parameter."""
    return Part(tuple(shape)) if matches(name, avoid.always) else avoid.parts.get(name, Part.none(shape))


def _check_apart(child: Child, avoid: Child, share: Share) -> None:
    """Raise a ParameterError if there was not enough besides the entries to avoid.

    What both train by ``always``, such as heads, is each task's own.
    """
    for name, part in avoid.parts.items():
        if not part.is_empty and matches(name, child.always):
            raise ParameterError(
                f"{name!r} is always trained, and the child to avoid has entries of it. Leave it out of one of them."
            )
    overlaps = any(
        not (part & _taken(avoid, name, part.shape)).is_empty for name, part in child.parts.items()
    )
    unit = max(int(share.units(n).sizes(part.shape).max()) for n, part in child.parts.items() if part.numel)
    if overlaps or round(share.density * child.num_eligible) - child.num_trained >= max(unit, 2):
        raise ParameterError(
            f"density {share.density:g} is more than {avoid!r} leaves. Lower the density, or avoid less."
        )


def check_scores(scores: Mapping[str, Tensor], *, ranks_entries: bool = False) -> dict[str, Tensor]:
    """Return the scores in one dtype, each checked to hold no NaN: as they are, or in float32 where they differ.

    Args:
        scores: by parameter name.
        ranks_entries: whether ``top_entries`` comes next, which looks for NaN itself.
    Raises:
        ParameterError: some are not numbers.
    """
    for name, score in scores.items():
        if is_sharded(score):  # its ranking looks for NaN itself, on all processes
            continue
        if not ranks_entries and score.numel() and bool(score.min().isnan()):
            raise not_numbers(name)
    dtypes = {score.dtype for score in scores.values()}
    alike = len(dtypes) == 1 and dtypes <= {torch.bfloat16, torch.float16, torch.float32}
    return {
        name: score.detach() if alike or score.dtype == torch.float64 else score.detach().float()
        for name, score in scores.items()
    }


def magnitude_scores(
    model: nn.Module, *, eligible: Iterable[str] | None = None, always: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Score every eligible entry by its absolute value, |w|.

    Args:
        model: the pretrained network.
        eligible: patterns over parameter names; ``None``: every floating-point parameter.
        always: patterns over names to leave out, such as a new head.
    Returns:
        new tensors of each parameter's shape on its device, at least float32.
    """
    parameters = eligible_parameters(model, eligible, always)
    return {
        name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32)).abs()
        for name, parameter in parameters.items()
    }


def random_child(
    model: nn.Module,
    density: float,
    *,
    seed: int = 0,
    scope: Scope = "global",
    granularity: str | Granularity = "element",
    eligible: Iterable[str] | None = None,
    always: Iterable[str] = (),
    row_axes: Mapping[str, Axes] | None = None,
) -> Child:
    """Choose a fixed random child, a pure function of (seed, names, shapes): the paper's ablation.

    Every unit has the same chance, whatever its size. Files of the child hold the seed instead of indices. The
    arguments are those of ``select_child``; ``eligible`` and ``always`` are patterns over the model's parameters, and
    ``row_axes`` are the model's ``unit_axes`` by default.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise ConfigError(f"seed must be a whole number, got {seed!r}. Pass seed=0.")
    seed = int(seed)
    if row_axes is None and isinstance(granularity, str):
        row_axes = unit_axes(model, granularity)
    unit = granularity if isinstance(granularity, Granularity) else Granularity(granularity)
    share = Share(density, scope, unit, row_axes or {})
    always = as_patterns(always)
    shapes = {name: tuple(p.shape) for name, p in eligible_parameters(model, eligible, always).items()}
    refuse_rewritten(model, shapes)
    recipe = {
        "source": "random" if unit.kind == "element" else "random-units",
        "seed": seed,
        **share.to_dict(),
    }
    return Child(random_parts(shapes, share, seed), always=always, recipe=recipe)


def density_for_mass(
    scores: Mapping[str, Tensor],
    mass: float,
    *,
    granularity: str | Granularity = "element",
    eligible: Iterable[str] | None = None,
    always: Iterable[str] = (),
    row_axes: Mapping[str, Axes] | None = None,
) -> float:
    """Return the density of the smallest child whose scores sum to a share of all: what ``density="auto"`` takes.

    Args:
        scores: by parameter name, not negative, of any shapes, such as Fisher information.
        mass: the share of the total to be held, in (0, 1].
        granularity, eligible, always, row_axes: as for ``select_child``, which is given the result; units are taken in
            order of their mean score.
    Returns:
        the density, in (0, 1]; the whole when every score is 0.
    Raises:
        ConfigError: a mass outside (0, 1].
        ParameterError: a score is negative or no number.

    Example:
        >>> import torch
        >>> density_for_mass({"w": torch.tensor([8.0, 1.0, 0.5, 0.5])}, 0.9)
        0.5
    """
    if (fault := mass_fault(mass)) is not None:
        raise ConfigError(fault)
    ranked = _from_zero(_eligible_scores(scores, eligible, as_patterns(always)))
    unit = granularity if isinstance(granularity, Granularity) else Granularity(granularity)
    share = Share(1.0, "global", unit, row_axes or {})
    sums = torch.cat([share.units(n).sums(s).cpu() for n, s in ranked.items()])
    sizes = torch.cat([share.units(n).sizes(tuple(s.shape)) for n, s in ranked.items()])
    order = torch.sort(sums / sizes.clamp(min=1), descending=True, stable=True).indices
    running, num_entries = sums[order].cumsum(0), int(sizes.sum())
    if num_entries == 0 or running[-1] == 0:
        return 1.0
    count = min(int((running < mass * running[-1] * (1 - 1e-12)).sum()) + 1, len(order))
    return int(sizes[order][:count].sum()) / num_entries


def _from_zero(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return scores whose sums mean something.

    Raises:
        ParameterError: one is negative or no number.
    """
    for name, score in scores.items():
        refuse_sharded(name, score)
        if score.numel() and not bool(score.min() >= 0):
            raise ParameterError(
                f"the scores of {name!r} are not all numbers from 0 up. Pass a density instead."
            )
    return scores


def official_child(scores: Mapping[str, Tensor], density: float, *, always: Iterable[str] = ()) -> Child:
    """Choose what the official code chooses: every entry at or above the percentile 100·(1 − p) of all scores.

    Ties exceed the budget, as they do there. Use ``select_child`` for anything but parity.

    Args:
        scores: importance of each eligible entry, by parameter name.
        density: p, in (0, 1].
        always: patterns over the model's parameter names that are trained whole.
    """
    density = check_density(density)
    always = as_patterns(always)
    checked = check_scores(_eligible_scores(scores, None, always))
    for name, score in checked.items():
        refuse_sharded(name, score)
    # numpy has no bf16, and a percentile may lie between two numbers of it
    ranked = {
        name: score.to(torch.promote_types(score.dtype, torch.float32)) for name, score in checked.items()
    }
    everything = np.concatenate([score.cpu().numpy().reshape(-1) for score in ranked.values()])
    threshold = float(np.percentile(everything, (1 - density) * 100))
    return Child.from_masks(
        {name: (score >= threshold).cpu() for name, score in ranked.items()}, always=always
    )


def _eligible_scores(
    scores: Mapping[str, Tensor], eligible: Iterable[str] | None, always: Sequence[str]
) -> dict[str, Tensor]:
    """The scores that take part in a selection.

    Raises:
        ParameterError: a pattern fits no scored name, or none is left.
    """
    chosen = set(scores) if eligible is None else match_names(as_patterns(eligible), scores)
    found = {n: s.detach() for n, s in scores.items() if n in chosen and not matches(n, always)}
    if not any(score.numel() for score in found.values()):
        raise ParameterError("there are no scores to select from. Check the eligible and always patterns.")
    for name, score in found.items():
        if not score.is_floating_point():
            raise ParameterError(f"the scores of {name!r} are {score.dtype}. Pass floating-point scores.")
    return found
