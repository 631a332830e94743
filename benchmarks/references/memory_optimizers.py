"""One step of optimizers that others made to save memory.

Each builder takes a model whose gradients ``gradients.fill`` sets, and returns (prepare, step).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from shapes import SharedGradients

Steps = tuple[Callable[[], None], Callable[[], Any]]
_RANK = 128
_OPTIONS = {"lr": 2e-5, "weight_decay": 0.01}


def badam_ratio(model: Any, gradients: SharedGradients) -> Steps:
    """BAdam's BlockOptimizerRatio at 0.1: the gradient made sparse in a hook, and a sparse Adam step.

    The head is trained whole, as elsewhere; "adjacent" masks are its default.
    """
    from badam import BlockOptimizerRatio

    named = list(model.named_parameters())
    optimizer = BlockOptimizerRatio(
        [{"params": [p for _, p in named]}],
        named,
        update_ratio=0.1,
        verbose=0,
        switch_every=10**9,
        preserve_threshold=0,
        param_update_ratios={"classifier": 1.0},
        lr=_OPTIONS["lr"],
        include_embedding=True,
        include_lm_head=True,
    )

    def step() -> None:
        for _, parameter in named:
            optimizer.sparse_hook(parameter)
        optimizer.step()

    return lambda: gradients.fill(model), step


def galore(model: Any, gradients: SharedGradients) -> Steps:
    """GaLore's AdamW, rank 128 on the linear layers; the projection is computed before the samples."""
    from galore_torch import GaLoreAdamW

    matrices = {"update_proj_gap": 10**9, "scale": 0.25, "proj_type": "std"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        optimizer = GaLoreAdamW(_groups(model, matrices), **_OPTIONS)
    return lambda: gradients.fill(model), optimizer.step


def apollo(model: Any, gradients: SharedGradients) -> Steps:
    """APOLLO's AdamW, rank 128 with random projections on the linear layers."""
    from apollo_torch import APOLLOAdamW

    matrices = {
        "proj": "random",
        "scale_type": "channel",
        "scale": 1,
        "update_proj_gap": 10**9,
        "proj_type": "std",
    }
    optimizer = APOLLOAdamW(_groups(model, matrices), **_OPTIONS)
    return lambda: gradients.fill(model), optimizer.step


def lomo(model: Any, gradients: SharedGradients) -> Steps:
    """LOMO: plain SGD inside backward; one call updates every parameter that has a gradient."""
    from lomo_optim import Lomo

    optimizer = Lomo(model, **_OPTIONS)
    return lambda: gradients.fill(model), lambda: optimizer.grad_func(0)


MEMORY_OPTIMIZERS = {
    "BAdam BlockOptimizerRatio 0.1": badam_ratio,
    "GaLore AdamW, rank 128": galore,
    "APOLLO AdamW, rank 128": apollo,
    "LOMO (SGD, no moments)": lomo,
}


def _groups(model: Any, matrices: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the encoder's weight matrices in a group of their own, as both recipes have it."""
    named = dict(model.named_parameters())
    inside = [n for n, p in named.items() if p.dim() == 2 and "layer" in n]
    rank = min(_RANK, *(min(named[n].shape) // 4 for n in inside))  # below 128 for tiny shapes only
    return [
        {"params": [p for n, p in named.items() if n not in inside]},
        {"params": [named[n] for n in inside], "rank": rank, **matrices},
    ]
