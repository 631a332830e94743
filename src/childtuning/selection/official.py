"""The selection of the paper's own code, for parity only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from childtuning.child import Child
from childtuning.density import check_density
from childtuning.patterns import as_patterns, matches
from childtuning.selection.top_share import check_scores


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
    checked = check_scores({name: score for name, score in scores.items() if not matches(name, always)})
    # numpy has no bf16, and a percentile may lie between two numbers of it
    ranked = {
        name: score.to(torch.promote_types(score.dtype, torch.float32)) for name, score in checked.items()
    }
    everything = np.concatenate([score.cpu().numpy().reshape(-1) for score in ranked.values()])
    threshold = float(np.percentile(everything, (1 - density) * 100))
    return Child.from_masks(
        {name: (score >= threshold).cpu() for name, score in ranked.items()}, always=always
    )
