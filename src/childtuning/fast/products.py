"""Matrix products that torch is slow at: thin ones, and those of bf16 and fp16 on CPUs that have none.

A product with a few columns, of a weight's gradient, takes up to twenty times as long as its transpose with a few rows.
In bf16 and fp16 torch's own are 20 to 270 times slower than float32's.

Forward passes are not slow, as torch multiplies by a transposed weight there; backward passes are.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from childtuning import fast


def _slow_dtypes() -> frozenset[torch.dtype]:
    """The short dtypes that this CPU has no product of."""
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    known = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
    return frozenset(
        dtype for dtype, name in names.items() if not (hasattr(known, name) and getattr(known, name)())
    )


_SLOW = _slow_dtypes()
_THIN = 16  # columns; with as many, either way is as fast
_AT_ONCE = 1 << 22  # entries of a factor that are in float32 at a time


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right``, by way of float32 where a CPU has no product of its dtype."""
    if left.device.type == "cpu" and right.shape[1] < _THIN < left.shape[0]:
        return multiply(right.t(), left.t()).t()
    if left.device.type != "cpu" or left.dtype not in _SLOW:
        return left @ right
    wide = torch.zeros(left.shape[0], right.shape[1], dtype=torch.float32, device=left.device)
    rows = max(1, _AT_ONCE // max(1, *wide.shape))
    for some, others in zip(left.split(rows, 1), right.split(rows), strict=True):
        wide.addmm_(some.float(), others.float())
    return wide.to(left.dtype)


class _Linear(Function):
    """``y = x Wᵀ + b`` with the products of its backward pass by way of float32."""

    is_one_pass = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # [N, O]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            multiply(dY, weight) if needs_x else None,
            multiply(dY.t(), x) if needs_weight else None,
            dY.sum(0) if needs_bias else None,
        )


def wide_products(tensors: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Let ``F.linear`` differentiate by way of float32 inside the context, where a CPU has no product of its dtype."""
    is_slow = fast.enabled() and any(tensor.is_cpu and tensor.dtype in _SLOW for tensor in tensors)
    return _WideProducts() if is_slow else nullcontext()


class _WideProducts(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return (_linear if func is F.linear else func)(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    is_slow = (
        type(weight) in (Tensor, nn.Parameter)  # others multiply in a way of their own
        and weight.is_cpu
        and weight.dtype in _SLOW
        and input.dtype is weight.dtype
        and weight.dim() == 2
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )
    if not is_slow:
        return F.linear(input, weight, bias)
    y = _Linear.apply(input.reshape(-1, input.shape[-1]), weight, bias)
    return y.view(*input.shape[:-1], weight.shape[0])
