"""Convolutions. Shapes: B examples, I in, O out, … positions, k of the kernel, r chosen rows, n trained entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from childtuning.structured.autocast import lowered
from childtuning.structured.groups import Group, join, take
from childtuning.structured.registry import StructuredLayer, register_structured
from childtuning.structured.trained import Trained

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _Options(NamedTuple):
    """How a kernel moves over its input; ``groups`` cut the channels, and are not those of trained entries."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def gradient(self, dY: Tensor, x: Tensor, weight: Tensor, *, of_x: bool) -> Tensor:
        """Return the gradient of x, for which x need have only a shape, or of the weight, and likewise."""
        stride, padding, dilation, groups = self
        no_output_padding = (0,) * len(stride)
        mask = (of_x, not of_x, False)
        return torch.ops.aten.convolution_backward(
            dY, x, weight, None, stride, padding, dilation, False, no_output_padding, groups, mask
        )[0 if of_x else 1]


class _Convolution(Function):
    """``y = W * x + b``, and of the gradient of W only the groups."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [B, I, …]
        weight: Tensor,  # [O, I, k…], or [O, 1, k…] if depthwise
        bias: Tensor | None,  # [O]
        leaf: Tensor | None,  # [n]
        groups: Sequence[Group],
        options: _Options,
    ) -> Tensor:
        ctx.groups, ctx.options = groups, options
        ctx.x_shape, ctx.weight_shape = x.shape, weight.shape
        needs_x, _, _, needs_leaf, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_leaf else None, weight if needs_x else None)
        return _CONVOLVE[len(options.stride)](x, weight, bias, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # [B, O, …]
        x, weight = ctx.saved_tensors
        needs_x, _, needs_bias, needs_leaf, *_ = ctx.needs_input_grad
        dx = dbias = dleaf = None
        if needs_x:
            shaped = x if needs_leaf else _shape_only(dY, ctx.x_shape)
            dx = ctx.options.gradient(dY, shaped, weight.to(dY.dtype), of_x=True)
        if needs_bias:
            dbias = dY.sum((0, *range(2, dY.dim())))
        if needs_leaf:
            dleaf = join(_gradient(x, dY, ctx.weight_shape, group, ctx.options) for group in ctx.groups)
        return dx, None, dbias, dleaf, None, None


def _gradient(x: Tensor, dY: Tensor, shape: torch.Size, group: Group, options: _Options) -> Tensor:
    """The gradient of one group: that of a kernel with the r chosen rows: [r, columns]."""
    rows, columns = group
    dY = take(dY, rows)
    r = dY.shape[1]
    if options.groups == 1 and _is_pointwise(shape[2:]):
        x, columns = take(x, columns), None
    elif options.groups > 1 and rows is not None:
        x = x.index_select(1, _channels(rows, shape[0] // options.groups, x.device))
        options = options._replace(groups=r)
    kernel = _shape_only(dY, (r, x.shape[1] // options.groups, *shape[2:]))
    return take(options.gradient(dY, x, kernel, of_x=False).flatten(1), columns)


def _is_pointwise(kernel_size: Sequence[int]) -> bool:
    return all(size == 1 for size in kernel_size)


def _channels(rows: Tensor | slice, multiplier: int, device: torch.device) -> Tensor:
    """The input channel that each chosen row of a depthwise convolution reads."""
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=device)
    return rows // multiplier


def _shape_only(like: Tensor, shape: Sequence[int]) -> Tensor:
    return like.new_empty(1).expand(tuple(shape))


class _StructuredConvolution(StructuredLayer):
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    kernel_size: tuple[int, ...]
    groups: int
    padding_mode: str

    @staticmethod
    def fits(module: Any, trained: Trained) -> bool:
        """Accept zero padding, the same on both sides; channels that are one group or each its own; and rows.

        Columns save something only where each is a channel: else they are cut from the gradient of all.
        """
        return (
            module.padding_mode == "zeros"
            and (module.groups == 1 or module.groups == module.in_channels)
            and (module.padding != "same" or all(span % 2 == 0 for span in _spans(module)))
            and (_is_pointwise(module.kernel_size) or all(columns is None for _, columns in trained.groups))
        )

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: [B, I, …] or [I, …] -> [B, O, …] or [O, …]."""
        if not self.in_use:
            return super().forward(input)
        x = lowered(input)
        single = x.dim() < self.weight.dim()
        options = _Options(self.stride, _padding(self), self.dilation, self.groups)
        trained = self.trained_weight
        y = _Convolution.apply(
            x.unsqueeze(0) if single else x,
            self.weight.detach(),
            self.bias,
            trained.wanted,
            trained.groups,
            options,
        )
        return y.squeeze(0) if single else y


def _spans(module: Any) -> list[int]:
    """How far the kernel reaches beyond its first position, along each axis."""
    return [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]


def _padding(module: Any) -> tuple[int, ...]:
    if module.padding == "same":
        return tuple(span // 2 for span in _spans(module))
    return (0,) * len(module.stride) if module.padding == "valid" else module.padding


@register_structured(nn.Conv1d)
class StructuredConv1d(_StructuredConvolution, nn.Conv1d):
    """A Conv1d whose weight gradient is that of the chosen output channels."""


@register_structured(nn.Conv2d)
class StructuredConv2d(_StructuredConvolution, nn.Conv2d):
    """A Conv2d whose weight gradient is that of the chosen output channels."""


@register_structured(nn.Conv3d)
class StructuredConv3d(_StructuredConvolution, nn.Conv3d):
    """A Conv3d whose weight gradient is that of the chosen output channels."""
