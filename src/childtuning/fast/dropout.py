"""Dropouts that keep their masks in a byte an entry, alone and inside of attention.

On a CPU torch keeps a dropout's mask as floating-point numbers. Attention with dropout keeps, besides, the matrices of
probabilities before and after it; here it keeps the mask, and forms the probabilities anew in the backward pass.
Both draw the random numbers that torch draws.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_TORCHS = "sdpa"  # transformers' name for torch's attention
_SPARED: WeakSet[nn.Module] = WeakSet()  # whose attention keeps its mask alone


class BooleanDropout(nn.Dropout):
    """A dropout that keeps its mask in a byte an entry, where torch's on a CPU keeps it as floating-point numbers.

    It draws the same numbers and returns the same values, forward and backward.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[...] -> [...]."""
        is_plain = input.device.type != "cpu" or self.inplace or not 0 < self.p < 1
        if is_plain or not (self.training and input.requires_grad and torch.is_grad_enabled()):
            return super().forward(input)
        if torch._C._are_functorch_transforms_active():
            return super().forward(input)
        return _Drop.apply(input, self.p)


class _Drop(Function):
    """``y = x ∘ m / (1 − p)`` for a mask m of Bernoulli(1 − p), drawn as torch draws it."""

    is_one_pass = True  # its backward runs no backward pass of its own

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        mask = torch.empty_like(x).bernoulli_(1 - p)
        ctx.p = p
        ctx.save_for_backward(mask.bool())
        return x * mask.div_(1 - p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return dY * mask.to(dY.dtype).div_(1 - ctx.p), None


class _Attend(Function):
    """``y = (P ∘ m / (1 − p)) V`` for ``P = softmax(s Q Kᵀ + b)``, of which m alone is kept."""

    is_one_pass = True

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,  # [B, heads, L, E]
        k: Tensor,  # [B, heads, S, E]
        v: Tensor,  # [B, heads, S, E']
        bias: Tensor | None,  # broadcast to [B, heads, L, S]; of booleans, False where there is no attention
        scale: float,
        p: float,
    ) -> Tensor:
        probabilities = _probabilities(q, k, bias, scale)
        mask = torch.empty_like(probabilities, dtype=torch.bool).bernoulli_(1 - p)
        if bias is not None:
            mask.logical_and_(_attends(bias))
        ctx.scale, ctx.p = scale, p
        ctx.save_for_backward(q, k, v, bias, mask)
        return (probabilities.mul_(mask) @ v).div_(1 - p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # [B, heads, L, E']
        q, k, v, bias, mask = ctx.saved_tensors
        needs_q, needs_k, needs_v, needs_bias, *_ = ctx.needs_input_grad
        dY = dY / (1 - ctx.p)
        probabilities = _probabilities(q, k, bias, ctx.scale)
        dv = (probabilities * mask).transpose(-2, -1) @ dY if needs_v else None
        dP = (dY @ v.transpose(-2, -1)).mul_(mask)
        dS = torch.ops.aten._softmax_backward_data(dP, probabilities, -1, dP.dtype)
        del dP, probabilities
        dq = (dS @ k).mul_(ctx.scale) if needs_q else None
        dk = (dS.transpose(-2, -1) @ q).mul_(ctx.scale) if needs_k else None
        return dq, dk, dv, dS.sum_to_size(bias.shape) if needs_bias else None, None, None


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        least = torch.finfo(scores.dtype).min  # and not -inf, of which a whole row has no softmax
        added = bias.clamp(min=least) if bias.dtype != torch.bool else scores.new_zeros(()).where(bias, least)
        scores = scores.add_(added)
    return torch.softmax(scores, -1)


def _attends(bias: Tensor) -> Tensor:
    """Tell which rows attend to anything: [..., 1]."""
    return (bias if bias.dtype == torch.bool else bias != -torch.inf).any(-1, keepdim=True)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return what ``F.scaled_dot_product_attention`` returns; where it would keep the probabilities, keep a mask."""
    given = (query, key, value)
    is_plain = (
        not 0 < dropout_p < 1
        or enable_gqa
        or any(t.device.type != "cpu" or t.dtype not in (torch.float32, torch.float64) for t in given)
        or len({(t.dtype, *t.shape[:-2]) for t in given}) > 1
        or (attn_mask is not None and (is_causal or attn_mask.dtype not in (torch.bool, query.dtype)))
        or not (torch.is_grad_enabled() and any(t.requires_grad for t in given))
        or torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
    )
    if is_plain:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return _Attend.apply(query, key, value, attn_mask, factor, dropout_p)


class _Attending(TorchFunctionMode):
    """Let ``attend`` stand in for torch's function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (attend if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def _let_transformers_attend() -> None:
    """Let transformers' own attention run around ``attend`` where a module is spared; else it runs as it is."""
    transformers = sys.modules.get("transformers")  # a model of it is there only if it was imported
    if transformers is None:
        return
    theirs = transformers.AttentionInterface()[_TORCHS]
    if getattr(theirs, "is_sparing", False):
        return

    def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or module not in _SPARED:
            return theirs(module, *args, **kwargs)
        with _Attending():
            return theirs(module, *args, **kwargs)

    attention.is_sparing = True  # type: ignore[attr-defined]
    transformers.AttentionInterface.register(_TORCHS, attention)


def spare_dropouts(model: nn.Module, *, spared: bool = True) -> Callable[[], None]:
    """Let the model's dropouts keep their masks in a byte an entry, and attention with dropout its mask alone.

    Args:
        spared: or else, let torch's own run again.
    Returns:
        what undoes it.
    """
    theirs, ours = (nn.Dropout, BooleanDropout) if spared else (BooleanDropout, nn.Dropout)
    dropouts: list[nn.Module] = [m for m in model.modules() if type(m) is theirs and "forward" not in vars(m)]
    others = [m for m in model.modules() if (m in _SPARED) != spared]
    _let_transformers_attend()

    def change(cls: type[nn.Dropout], attend_in: Callable[[nn.Module], None]) -> None:
        for module in dropouts:
            module.__class__ = cls
        for module in others:
            attend_in(module)

    begin, end = (_SPARED.add, _SPARED.discard) if spared else (_SPARED.discard, _SPARED.add)
    change(ours, begin)
    return partial(change, theirs, end)
