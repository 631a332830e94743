"""Per-example gradients of torch's own functions: one rule a function.

A rule is called with the function's arguments. It returns which of them is the input, which may be parameters, and how
their gradients follow from the input x and the gradient dY at the output. Both have the examples on axis 0 and floating
tensors in the dtype of the scores. A call with an option that a rule does not know raises ``NoRuleError``.

Shapes: B examples, T tokens, I in, O out, V rows of a table, D width or channels, … positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as convolution_gradients

from childtuning.fast.gradients import Computed, Dense, ExampleGradients, Outer, Rows

Gradients = Mapping[str, ExampleGradients]


class NoRuleError(Exception):
    """The call has an option that no rule knows."""


@dataclass
class Applied:
    """What a rule says about one call.

    Args:
        x: the input; its leading axes are the output's.
        arguments: by role, what may be a parameter.
        gradients_fn: from (x, dY), examples first, the gradients by role.
        num_inner: how many trailing axes of the output cannot count examples.
        leads: the examples must be on axis 0, several rows of an example next to each other.
    """

    x: Tensor
    arguments: dict[str, Tensor | None]
    gradients_fn: Callable[[Tensor, Tensor], Gradients]
    num_inner: int = 1
    leads: bool = False


RULES: dict[Any, Callable[..., Applied]] = {}


def _rule(*functions: Any) -> Callable[[Callable[..., Applied]], Callable[..., Applied]]:
    def register(rule: Callable[..., Applied]) -> Callable[..., Applied]:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


def _tokens(x: Tensor) -> Tensor:
    """[B, …, D] -> [B, T, D]."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


@_rule(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Applied:
    """weight [O, I]: ``einsum('bto,bti->boi', dY, x)``; bias [O]: ``einsum('bto->bo', dY)``."""
    if weight.dim() != 2:
        raise NoRuleError

    def gradients(x: Tensor, dY: Tensor) -> Gradients:
        x, dY = _tokens(x), _tokens(dY)
        return {"weight": Outer(dY, x), "bias": Dense(dY.sum(1))}

    return Applied(input, {"weight": weight, "bias": bias}, gradients)


@_rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _matmul(input: Tensor, other: Tensor) -> Applied:
    """weight [I, O]: ``einsum('bti,bto->bio', x, dY)``."""
    if other.dim() != 2 or input.dim() < 2:
        raise NoRuleError
    return Applied(input, {"weight": other}, lambda x, dY: {"weight": Outer(_tokens(x), _tokens(dY))})


@_rule(torch.addmm, Tensor.addmm)
def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Applied:
    """bias + x W, as GPT-2's Conv1D: weight [I, O] as for ``matmul``; bias [O]: ``einsum('bto->bo', dY)``."""
    if beta != 1 or alpha != 1 or input.dim() != 1:
        raise NoRuleError

    def gradients(x: Tensor, dY: Tensor) -> Gradients:
        x, dY = _tokens(x), _tokens(dY)
        return {"weight": Outer(x, dY), "bias": Dense(dY.sum(1))}

    return Applied(mat1, {"weight": mat2, "bias": input}, gradients)


@_rule(F.embedding)
def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Applied:
    """weight [V, D]: ``einsum('btv,btd->bvd', onehot(ids), dY)``, without the row ``padding_idx``.

    The renormalisation to ``max_norm`` comes before the look-up and has no gradient.
    """
    if scale_grad_by_freq or sparse:
        raise NoRuleError
    num_rows, width = weight.shape
    skip = padding_idx if padding_idx is None or padding_idx >= 0 else padding_idx + num_rows

    def gradients(ids: Tensor, dY: Tensor) -> Gradients:
        return {"weight": Rows(ids.reshape(len(ids), -1), dY.reshape(len(ids), -1, width), num_rows, skip)}

    return Applied(input, {"weight": weight}, gradients)


def _affine(normalised: Tensor, dY: Tensor, shape: torch.Size) -> Gradients:
    """weight: ``einsum('b…d,b…d->bd', dY, n(x))``; bias: ``einsum('b…d->bd', dY)``; d may be several axes."""
    dY = dY.reshape(len(dY), -1, *shape)
    return {"weight": Dense((dY * normalised.reshape(dY.shape)).sum(1)), "bias": Dense(dY.sum(1))}


@_rule(F.layer_norm)
def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Applied:
    """n(x) = (x − mean) / √(var + eps) over the last axes."""
    shape = torch.Size(normalized_shape)

    def gradients(x: Tensor, dY: Tensor) -> Gradients:
        return _affine(F.layer_norm(x, shape, eps=eps), dY, shape)

    return Applied(input, {"weight": weight, "bias": bias}, gradients, num_inner=len(shape))


@_rule(F.rms_norm)
def _rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Applied:
    """n(x) = x / √(mean x² + eps) over the last axes."""
    shape = torch.Size(normalized_shape)
    eps = torch.finfo(input.dtype).eps if eps is None else eps

    def gradients(x: Tensor, dY: Tensor) -> Gradients:
        return {"weight": _affine(F.rms_norm(x, shape, eps=eps), dY, shape)["weight"]}

    return Applied(input, {"weight": weight}, gradients, num_inner=len(shape))


def _channels(normalised: Tensor, dY: Tensor) -> Gradients:
    """weight [D]: ``einsum('bd…,bd…->bd', dY, n(x))``; bias: ``einsum('bd…->bd', dY)``."""
    return {"weight": Dense(_rows_summed(dY * normalised, 2)), "bias": Dense(_rows_summed(dY, 2))}


def _rows_summed(x: Tensor, axis: int) -> Tensor:
    """Sum over everything but the example and one axis."""
    others = [a for a in range(1, x.dim()) if a != axis]
    return x.sum(others) if others else x


def _own_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call a function of [N, D, …] on [B, k, D, …]."""
    return function(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@_rule(F.batch_norm)
def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Applied:
    """n(x) = (x − running mean) / √(running var + eps) over axis 1: with batch statistics examples would meet."""
    if training or running_mean is None or running_var is None:
        raise NoRuleError
    mean, var = running_mean, running_var

    def gradients(x: Tensor, dY: Tensor) -> Gradients:
        stats = mean.to(x.dtype), var.to(x.dtype)
        return _channels(_own_rows(lambda rows: F.batch_norm(rows, *stats, eps=eps), x), dY)

    return Applied(input, {"weight": weight, "bias": bias}, gradients, leads=True)


@_rule(F.group_norm)
def _group_norm(
    input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Applied:
    """n(x) = (x − mean) / √(var + eps) over each group of channels, axis 1."""

    def gradients(x: Tensor, dY: Tensor) -> Gradients:
        return _channels(_own_rows(lambda rows: F.group_norm(rows, num_groups, eps=eps), x), dY)

    return Applied(input, {"weight": weight, "bias": bias}, gradients, leads=True)


def _convolution(function: Any, num_axes: int, weight_gradient: Callable[..., Tensor]) -> None:
    """weight: ``einsum('bop,bip->boi', dY, unfold(x))`` over positions p, as torch's own kernel for one example.

    Groups, strides, dilation and zero padding are that kernel's business; bias: ``einsum('bop->bo', dY)``.
    """

    @_rule(function)
    def convolution(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Applied:
        if input.dim() != num_axes + 2:
            raise NoRuleError
        shape, beforehand = weight.shape, [0] * (2 * num_axes)
        steps = [dilation] * num_axes if isinstance(dilation, int) else list(dilation)
        if padding == "valid":
            padding = 0
        if padding == "same":  # torch pads the odd entry behind; F.pad counts axes from the last
            total = [step * (length - 1) for step, length in zip(steps, shape[2:], strict=True)]
            beforehand = [n for both in reversed(total) for n in (both // 2, both - both // 2)]
            padding = 0
        if isinstance(padding, str):
            raise NoRuleError

        def gradients(x: Tensor, dY: Tensor) -> Gradients:
            def compute(index: int) -> Tensor:
                x_b = F.pad(x[index], beforehand) if any(beforehand) else x[index]
                return weight_gradient(x_b, shape, dY[index].contiguous(), stride, padding, dilation, groups)

            return {"weight": Computed(compute, len(x), shape), "bias": Dense(_rows_summed(dY, 2))}

        return Applied(input, {"weight": weight, "bias": bias}, gradients, leads=True)


_convolution(F.conv1d, 1, convolution_gradients.conv1d_weight)
_convolution(F.conv2d, 2, convolution_gradients.conv2d_weight)
_convolution(F.conv3d, 3, convolution_gradients.conv3d_weight)
