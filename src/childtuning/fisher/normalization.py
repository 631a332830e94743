"""Normalisation layers: y = weight ⊙ n(x) + bias; the normalised input n(x) is computed again.

Shapes: B examples, D the normalised or channel axis, … whatever lies between or after.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from childtuning.fisher.gradients import Dense, ExampleGradients
from childtuning.fisher.rules import UnsupportedLayerError, own_parameters, rule


def _affine(normalised: Tensor, dY: Tensor, shape: torch.Size) -> dict[str, ExampleGradients]:
    """weight: ``einsum('b…d,b…d->bd', dY, n(x))``; bias: ``einsum('b…d->bd', dY)``; d may be several axes."""
    dY = dY.reshape(len(dY), -1, *shape)
    return {"weight": Dense((dY * normalised.reshape(dY.shape)).sum(1)), "bias": Dense(dY.sum(1))}


@rule(nn.LayerNorm)
def layer_norm(module: nn.LayerNorm, x: Tensor, dY: Tensor) -> dict[str, ExampleGradients]:
    """n(x) = (x − mean) / √(var + eps) over the last axes."""
    shape = torch.Size(module.normalized_shape)
    return _affine(F.layer_norm(x, shape, eps=module.eps), dY, shape)


def _is_rms_norm(module: Any) -> bool:
    """The copies of LlamaRMSNorm in Hugging Face models: one weight [D] and an epsilon."""
    return (
        type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))
        and own_parameters(module) == {"weight"}
        and module.weight.dim() == 1
        and any(isinstance(getattr(module, name, None), float) for name in ("variance_epsilon", "eps"))
    )


@rule(_is_rms_norm, nn.RMSNorm)
def rms_norm(module: Any, x: Tensor, dY: Tensor) -> dict[str, ExampleGradients]:
    """n(x) = x / √(mean x² + eps) over the last axes."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    eps = torch.finfo(module.weight.dtype).eps if eps is None else eps
    shape = module.weight.shape
    scale = x.square().mean(tuple(range(-len(shape), 0)), keepdim=True).add_(eps).rsqrt_()
    return {"weight": _affine(x * scale, dY, shape)["weight"]}


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(module: nn.BatchNorm2d, x: Tensor, dY: Tensor) -> dict[str, ExampleGradients]:
    """n(x) = (x − running mean) / √(running var + eps) over axis 1, in eval mode: examples do not meet."""
    if module.training or module.running_mean is None or module.running_var is None:
        raise UnsupportedLayerError("batch statistics mix the examples")
    mean, var = module.running_mean.to(x.dtype), module.running_var.to(x.dtype)
    return _channels(F.batch_norm(x, mean, var, eps=module.eps), dY)


@rule(nn.GroupNorm)
def group_norm(module: nn.GroupNorm, x: Tensor, dY: Tensor) -> dict[str, ExampleGradients]:
    """n(x) = (x − mean) / √(var + eps) over each group of channels, axis 1."""
    return _channels(F.group_norm(x, module.num_groups, eps=module.eps), dY)


def _channels(normalised: Tensor, dY: Tensor) -> dict[str, ExampleGradients]:
    """Weight [D]: ``einsum('bd…,bd…->bd', dY, n(x))``; bias: ``einsum('bd…->bd', dY)``."""
    flat = dY.flatten(2) if dY.dim() > 2 else dY.unsqueeze(2)
    return {"weight": Dense((flat * normalised.reshape(flat.shape)).sum(2)), "bias": Dense(flat.sum(2))}
