"""Children for comparison: fixed random, and by the size of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from childtuning.child import Child
from childtuning.granularity import Granularity
from childtuning.patterns import as_patterns, canonical_names, match_names, matches
from childtuning.ranked_parts import Scope, Share, random_parts


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
    parameters = _eligible_parameters(model, eligible, as_patterns(always))
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
    row_axes: Mapping[str, int] | None = None,
) -> Child:
    """Choose a fixed random child, a pure function of (seed, names, shapes): the paper's ablation.

    Files of it hold the seed instead of indices. The arguments are those of ``select_child``.
    """
    unit = granularity if isinstance(granularity, Granularity) else Granularity(granularity)
    share = Share(density, scope, unit, row_axes or {})
    always = as_patterns(always)
    shapes = {name: tuple(p.shape) for name, p in _eligible_parameters(model, eligible, always).items()}
    recipe = {"source": "random", "seed": seed, **share.to_dict()}
    return Child(random_parts(shapes, share, seed), always=always, recipe=recipe)


def _eligible_parameters(
    model: nn.Module, eligible: Iterable[str] | None, always: Sequence[str]
) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    plain = dict(zip(canonical_names(named), named.values(), strict=True))
    chosen = set(plain) if eligible is None else match_names(as_patterns(eligible), plain)
    return {
        name: parameter
        for name, parameter in plain.items()
        if parameter.is_floating_point()
        and parameter.requires_grad
        and name in chosen
        and not matches(name, always)
    }
