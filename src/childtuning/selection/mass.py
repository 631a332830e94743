"""How dense a child must be to hold a given share of the scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from childtuning.errors import ConfigError, ParameterError
from childtuning.granularity import Granularity
from childtuning.patterns import as_patterns, match_names, matches
from childtuning.ranked_parts import Share

_DIGIT_BITS = 16


def density_for_mass(
    scores: Mapping[str, Tensor],
    mass: float,
    *,
    granularity: str | Granularity = "element",
    eligible: Iterable[str] | None = None,
    always: Iterable[str] = (),
    row_axes: Mapping[str, int] | None = None,
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
    check_mass(mass)
    chosen = match_names(as_patterns(eligible), scores) if eligible is not None else set(scores)
    beside = as_patterns(always)
    ranked = {n: s.detach() for n, s in scores.items() if n in chosen and not matches(n, beside)}
    for name, score in ranked.items():
        if score.numel() and not bool(score.min() >= 0):
            raise ParameterError(
                f"the scores of {name!r} are not all numbers from 0 up. Pass a density instead."
            )
    total_entries = sum(score.numel() for score in ranked.values())
    if not total_entries:
        raise ParameterError("there are no scores to select from. Check the eligible and always patterns.")
    total = math.fsum(float(score.double().sum()) for score in ranked.values())
    if total == 0:
        return 1.0
    unit = granularity if isinstance(granularity, Granularity) else Granularity(granularity)
    if unit.kind == "element":
        entries = _entries_for_mass([score.reshape(-1) for score in ranked.values()], mass * total)
    else:
        entries = _units_for_mass(ranked, Share(1.0, "global", unit, row_axes or {}), mass * total)
    return min(max(entries, 1) / total_entries, 1.0)


def check_mass(mass: Any) -> None:
    """Raise a ConfigError unless the mass is a share in (0, 1]."""
    if isinstance(mass, bool) or not isinstance(mass, (int, float)) or not 0 < mass <= 1:
        raise ConfigError(f"mass must be a share in (0, 1], got {mass!r}. Pass for example mass=0.9.")


def _entries_for_mass(scores: Sequence[Tensor], wanted: float) -> int:
    """Count the largest entries that together reach what is wanted, by sums over 16 bits of the scores at a time."""
    prefix, taken = 0, 0
    for shift in (_DIGIT_BITS, 0):
        sums = torch.zeros(1 << _DIGIT_BITS, dtype=torch.float64)
        counts = torch.zeros(1 << _DIGIT_BITS, dtype=torch.int64)
        for score in scores:
            flat = score.to("cpu", torch.float32)
            bits = (flat + 0.0).view(torch.int32)  # scores from 0 up sort as their bits do
            if shift == 0:
                inside = (bits >> _DIGIT_BITS) == prefix
                flat, bits = flat[inside], bits[inside]
            digits = ((bits >> shift) & ((1 << _DIGIT_BITS) - 1)).long()
            sums += torch.bincount(digits, flat.double(), minlength=1 << _DIGIT_BITS)
            counts += torch.bincount(digits, minlength=1 << _DIGIT_BITS)
        running = sums.flip(0).cumsum(0)
        reached = (running >= wanted).nonzero()
        place = int(reached[0]) if len(reached) else (1 << _DIGIT_BITS) - 1
        digit = (1 << _DIGIT_BITS) - 1 - place
        if place:
            wanted -= float(running[place - 1])
            taken += int(counts.flip(0)[:place].sum())
        prefix = digit
    each = float(sums[digit]) / max(int(counts[digit]), 1)
    equal = math.ceil(wanted / each * (1 - 1e-12)) if each > 0 else 0
    return taken + min(max(equal, 0), int(counts[digit]))


def _units_for_mass(scores: Mapping[str, Tensor], share: Share, wanted: float) -> int:
    units = {name: share.units(name) for name in scores}
    sums = torch.cat([units[name].sums(score).cpu() for name, score in scores.items()])
    sizes = torch.cat([units[name].sizes(tuple(score.shape)) for name, score in scores.items()])
    order = torch.sort(sums / sizes.clamp(min=1), descending=True, stable=True).indices
    running = sums[order].cumsum(0)
    count = min(int((running < wanted * (1 - 1e-12)).sum()) + 1, len(order))
    return int(sizes[order][:count].sum())
