"""Adam and AdamW through the one-pass kernels, with their state where the inner optimizer keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from childtuning.errors import ParameterError
from childtuning.kernels import AdamWStep, has_kernels

_OTHER_UPDATES = ("amsgrad", "capturable", "differentiable")


def can_fuse(inner: type[Optimizer], options: Mapping[str, Any]) -> bool:
    """Tell whether the kernels know this optimizer's update under these options."""
    return inner in (torch.optim.Adam, torch.optim.AdamW) and not any(
        options.get(name) for name in _OTHER_UPDATES
    )


def fits_state(inner: Optimizer, key: nn.Parameter) -> bool:
    """Tell whether the kernels can work on the moments that a parameter has so far."""
    return all(has_kernels(moment) for moment in _moments(inner.state.get(key) or {}))


def hand_over(inner: Optimizer, group: Mapping[str, Any], key: nn.Parameter) -> None:
    """Let the inner optimizer go on from a state of ours: its fused step reads the count on the device."""
    step = (inner.state.get(key) or {}).get("step")
    if group.get("fused") and isinstance(step, Tensor) and step.device != key.device:
        inner.state[key]["step"] = step.to(key.device)


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
    Raises:
        ParameterError: the state or the options are not those that the optimizer was built with.
    """
    state = inner.state[key]
    _check(group, state, size)
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros(size, dtype=key.dtype, device=key.device)
        state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
    if state["step"].is_cuda:  # where a fused optimizer keeps it: counting there would wait for the device
        state["step"] = state["step"].cpu()
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


def _moments(state: Mapping[str, Any]) -> list[Tensor]:
    return [state[name] for name in ("exp_avg", "exp_avg_sq") if name in state]


def _check(group: Mapping[str, Any], state: Mapping[str, Any], size: torch.Size) -> None:
    """Refuse what the kernels would misread: they are handed addresses alone."""
    other = [name for name in _OTHER_UPDATES if group.get(name)]
    if other:
        raise ParameterError(
            f"{other[0]} was turned on after the optimizer was built. Pass {other[0]}=True when you build it."
        )
    for moment in _moments(state):
        if moment.shape != size or not has_kernels(moment):
            raise ParameterError(
                f"the optimizer state of a parameter of shape {list(size)} has shape {list(moment.shape)} and dtype "
                f"{moment.dtype}. Load a state of the same parameters in the same order."
            )
