"""The child of the highest scores, to an exact budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from childtuning.child import Child
from childtuning.errors import ConfigError, ParameterError
from childtuning.granularity import Granularity
from childtuning.patterns import as_patterns, match_names, matches
from childtuning.ranked_parts import Scope, Share, not_numbers, top_parts
from childtuning.selection.mass import density_for_mass


def select_child(
    scores: Mapping[str, Tensor],
    density: float | Literal["auto"],
    *,
    scope: Scope = "global",
    granularity: str | Granularity = "element",
    eligible: Iterable[str] | None = None,
    always: Iterable[str] = (),
    lowest: bool = False,
    row_axes: Mapping[str, int] | None = None,
    mass: float = 0.9,
) -> Child:
    """Choose the child: the share ``density`` of the eligible entries with the highest scores.

    With ``element`` units, ``num_trained == round(density · num_eligible)`` exactly; ties go to the earlier
    parameter, then the lower index. Coarser units are ranked by the mean of their entries' scores and taken while
    they fit: the budget is never exceeded, and is met exactly whenever units small enough remain (biases are).

    The official code thresholds at a percentile with ``>=``, so that ties exceed the budget: ``official_child``.

    Args:
        scores: importance of each entry by parameter name, in the model's order, floating point, any device.
        density: the share p, in (0, 1]; ``"auto"``: that of the smallest child which holds the share ``mass`` of the
            scores' total.
        scope: ``global`` ranks all parameters together [Xu et al. 2021]; ``parameter`` gives each parameter its
            own share, rounded so that the total is exact.
        granularity: ``element``, ``row``, ``block``, ``parameter``, or a ``Granularity``.
        eligible: patterns over the scored names; the others stay frozen. ``None``: all of them.
        always: patterns over the model's parameter names that are trained whole and not counted; names among the
            scores that match are taken out of the eligible ones. A new head belongs here.
        lowest: choose the lowest scores instead (the paper's ablation).
        row_axes: for ``row``, the output axis by parameter name where it is not 0 (GPT-2's Conv1D has 1).
        mass: for ``density="auto"``, in (0, 1].
    Returns:
        the child; indices on the CPU.
    Raises:
        ConfigError: density, scope or granularity outside its range.
        ParameterError: a pattern fits no scored name, or scores hold NaN.

    Example:
        >>> import torch
        >>> child = select_child({"w": torch.tensor([3.0, 1.0, 2.0, 4.0])}, density=0.5)
        >>> child.mask("w").tolist()
        [True, False, False, True]
    """
    unit = granularity if isinstance(granularity, Granularity) else Granularity(granularity)
    if density == "auto":
        if lowest or scope != "global":
            raise ConfigError("density='auto' goes with the highest scores of all parameters. Pass a number.")
        density = density_for_mass(
            scores, mass, granularity=unit, eligible=eligible, always=always, row_axes=row_axes
        )
    share = Share(density, scope, unit, row_axes or {})
    always = as_patterns(always)
    ranked = check_scores(
        {name: score for name, score in scores.items() if not matches(name, always)},
        ranks_entries=unit.kind == "element",
    )
    if eligible is not None:
        chosen = match_names(as_patterns(eligible), scores)
        ranked = {name: score for name, score in ranked.items() if name in chosen}
    return Child(top_parts(ranked, share, lowest=lowest), always=always)


def check_scores(scores: Mapping[str, Tensor], *, ranks_entries: bool = False) -> dict[str, Tensor]:
    """Return the scores in one dtype, each checked to hold no NaN: as they are, or in float32 where they differ.

    Args:
        scores: by parameter name.
        ranks_entries: whether ``top_entries`` comes next, which looks for NaN itself.
    Raises:
        ParameterError: there are no scores, or some are not numbers.
    """
    if not scores:
        raise ParameterError("there are no scores to select from. Check the eligible and always patterns.")
    for name, score in scores.items():
        if not ranks_entries and score.numel() and bool(score.min().isnan()):
            raise not_numbers(name)
    dtypes = {score.dtype for score in scores.values()}
    alike = len(dtypes) == 1 and dtypes <= {torch.bfloat16, torch.float16, torch.float32}
    return {
        name: score.detach() if alike or score.dtype == torch.float64 else score.detach().float()
        for name, score in scores.items()
    }
