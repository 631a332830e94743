"""Convolutions. Shapes: B examples, k images of one example (1 nearly always), C channels, … the positions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as convolution_gradients

from childtuning.fisher.gradients import Computed, Dense, ExampleGradients
from childtuning.fisher.rules import UnsupportedLayerError, rule

_WEIGHT_GRADIENT: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: convolution_gradients.conv1d_weight,
    nn.Conv2d: convolution_gradients.conv2d_weight,
    nn.Conv3d: convolution_gradients.conv3d_weight,
}


@rule(*_WEIGHT_GRADIENT)
def convolution(module: nn.Conv2d, x: Tensor, dY: Tensor) -> dict[str, ExampleGradients]:
    """weight: ``einsum('bop,bip->boi', dY, unfold(x))`` over positions p, as torch's own kernel for one example.

    Groups, strides, dilation and every kind of padding are that kernel's business; bias: ``einsum('bop->bo', dY)``.
    """
    axes = len(module.kernel_size)
    weight_gradient = next(f for cls, f in _WEIGHT_GRADIENT.items() if isinstance(module, cls))
    x = x.reshape(len(x), -1, *x.shape[-axes - 1 :])
    dY = dY.reshape(len(dY), -1, *dY.shape[-axes - 1 :])
    padding, beforehand, mode = _padding(module)
    shape = module.weight.shape

    def compute(index: int) -> Tensor:
        x_b = F.pad(x[index], beforehand, mode=mode) if beforehand else x[index]
        return weight_gradient(
            x_b, shape, dY[index].contiguous(), module.stride, padding, module.dilation, module.groups
        )

    return {
        "weight": Computed(compute, len(x), shape),
        "bias": Dense(dY.sum(1).flatten(2).sum(2)),
    }


def _padding(module: nn.Conv2d) -> tuple[tuple[int, ...], list[int], str]:
    """Return the kernel's own zero padding, what to pad beforehand (as F.pad takes it), and how."""
    none = (0,) * len(module.kernel_size)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if isinstance(module.padding, str):
        if module.padding not in ("same", "valid"):
            raise UnsupportedLayerError(f"padding={module.padding!r} has no rule")
        return none, list(module._reversed_padding_repeated_twice) if module.padding == "same" else [], mode
    if mode == "constant":
        return module.padding, [], mode
    return none, list(module._reversed_padding_repeated_twice), mode
