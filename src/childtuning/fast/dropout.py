"""Dropouts that keep the seed of their mask in its place, alone and inside of attention.

On a CPU torch draws a dropout's mask on one thread, one number after the other, and keeps it as floating-point numbers.
Attention with dropout keeps, besides, the matrices of probabilities before and after it. Here torch's generator gives a
seed, from which all threads draw the mask, in the backward pass as in the forward pass; there the probabilities are
formed anew as well. The random numbers are therefore not torch's, but a run repeats as it does with torch's.
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

from childtuning import fast
from childtuning.fast import library
from childtuning.fast.library import MaskDraw

_TORCHS = "sdpa"  # transformers' name for torch's attention
_SPARED: WeakSet[nn.Module] = WeakSet()  # whose attention keeps a seed


class SeededDropout(nn.Dropout):
    """A dropout that keeps the seed of its mask, where torch's on a CPU keeps the mask as floating-point numbers."""

    def forward(self, input: Tensor) -> Tensor:
        """[...] -> [...]."""
        is_plain = input.device.type != "cpu" or self.inplace or not _is_drawn(self.p)
        if is_plain or not (self.training and input.requires_grad and torch.is_grad_enabled()):
            return super().forward(input)
        if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
            return super().forward(input)
        return _Drop.apply(input, self.p)


def _is_drawn(p: float) -> bool:
    return 0 < 1 - p < 1 and library.LIBRARY is not None and fast.enabled()


_OPS = torch.library.Library(
    "childtuning", "DEF"
)  # so that what counts a step's operations, or plans one, sees it
_OPS.define("dropout(Tensor x, Tensor seed, float p) -> Tensor")


def _dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    first, second = seed.tolist()
    draw = MaskDraw((first, second), int((1 - p) * 2.0**64))
    return library.dropout(draw, x, 1 / (1 - p))


_OPS.impl("dropout", _dropped, "CPU")
_OPS.impl("dropout", lambda x, seed, p: torch.empty_like(x), "Meta")


def _seed() -> Tensor:
    """Take two numbers from torch's generator."""
    return torch.empty(2, dtype=torch.int64).random_()


def _drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Return ``x ∘ m / (1 − p)`` for the mask m of Bernoulli(1 − p) that a seed names."""
    return torch.ops.childtuning.dropout(x, seed, p)


class _Drop(Function):
    """``y = x ∘ m / (1 − p)`` for a mask m of Bernoulli(1 − p)."""

    is_one_pass = True  # its backward runs no backward pass of its own

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.p, seed = p, _seed()
        ctx.save_for_backward(seed)
        return _drop(x, seed, p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, None]:
        (seed,) = ctx.saved_tensors
        return _drop(dY, seed, ctx.p), None


class _Attend(Function):
    """``y = (P ∘ m / (1 − p)) V`` for ``P = softmax(s Q Kᵀ + b)``; neither P nor m is kept."""

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
        ctx.scale, ctx.p, seed = scale, p, _seed()
        ctx.save_for_backward(q, k, v, bias, seed)
        y = _drop(_probabilities(q, k, bias, scale), seed, p) @ v
        return y if bias is None else y.mul_(_attends(bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # [B, heads, L, E']
        q, k, v, bias, seed = ctx.saved_tensors
        needs_q, needs_k, needs_v, needs_bias, *_ = ctx.needs_input_grad
        if bias is not None:
            dY = dY * _attends(bias)
        probabilities = _probabilities(q, k, bias, ctx.scale)
        dv = _drop(probabilities, seed, ctx.p).transpose(-2, -1) @ dY if needs_v else None
        dP = _drop(dY @ v.transpose(-2, -1), seed, ctx.p)
        dS = torch.ops.aten._softmax_backward_data(dP, probabilities, -1, dP.dtype)
        del dP, probabilities
        dq = (dS @ k).mul_(ctx.scale) if needs_q else None
        dk = (dS.transpose(-2, -1) @ q).mul_(ctx.scale) if needs_k else None
        dbias = dS.sum_to_size(bias.shape) if bias is not None and needs_bias else None
        return dq, dk, dv, dbias, None, None


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
    """Return what ``F.scaled_dot_product_attention`` returns; where it would keep the probabilities, keep a seed."""
    given = (query, key, value)
    is_plain = (
        not _is_drawn(dropout_p)
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
    """Let the model's dropouts, and its attention with dropout, keep seeds, where kernels are compiled.

    Args:
        spared: or else, let torch's own run again.
    Returns:
        what undoes it.
    """
    theirs, ours = (nn.Dropout, SeededDropout) if spared else (SeededDropout, nn.Dropout)
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
