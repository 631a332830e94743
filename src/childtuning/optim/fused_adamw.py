"""Adam and AdamW through the one-pass kernels, with their state where the inner optimizer keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from childtuning.kernels import AdamWStep

_OTHER_UPDATES = ("amsgrad", "capturable", "differentiable")


def can_fuse(inner: type[Optimizer], options: Mapping[str, Any]) -> bool:
    """Tell whether the kernels know this optimizer's update under these options."""
    return inner in (torch.optim.Adam, torch.optim.AdamW) and not any(
        options.get(name) for name in _OTHER_UPDATES
    )


def next_step(
    inner: Optimizer, group: Mapping[str, Any], key: nn.Parameter, size: torch.Size, scale: float
) -> tuple[AdamWStep, Tensor, Tensor]:
    """Count one more step of a parameter; return the step's numbers and the moments, created if need be.

    Args:
        inner: whose state holds ``step``, ``exp_avg`` and ``exp_avg_sq`` as its own class writes them.
        group: the options in force.
        key: the parameter that the state belongs to.
        size: of the moments.
        scale: what the gradient is to be multiplied with.
    """
    state = inner.state[key]
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros(size, dtype=key.dtype, device=key.device)
        state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
    state["step"] += 1
    beta1, beta2 = group["betas"]
    step = AdamWStep(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        step=int(state["step"]),
        decoupled=isinstance(inner, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay")),
        scale=-scale if group.get("maximize") else scale,
    )
    return step, state["exp_avg"], state["exp_avg_sq"]
