"""Dropouts that keep the seed of their mask in its place, alone and inside of attention.

On a CPU torch draws a dropout's mask on one thread, one number after the other, and keeps it as floating-point numbers.
Attention with dropout keeps, besides, the matrices of probabilities before and after it. Here torch's generator gives a
seed, from which all threads draw the mask, in the backward pass as in the forward pass; there the probabilities are
formed anew as well. The random numbers are therefore not torch's, but a run repeats as it does with torch's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

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
_is_on = True
_SPARED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # how many want its dropout to keep a seed


class SeededDropout(nn.Dropout):
    """A dropout that keeps the seed of its mask, where torch's on a CPU keeps the mask as floating-point numbers."""

    def forward(self, input: Tensor) -> Tensor:
        """[...] -> [...]."""
        is_plain = not self.training or self.inplace or not _is_drawn(self.p, input)
        return super().forward(input) if is_plain else _Drop.apply(input, self.p)

    def __reduce__(self) -> Any:
        """Copy and pickle it as what it was."""
        return nn.Dropout, (self.p, self.inplace), vars(self)


def _is_drawn(p: float, x: Tensor) -> bool:
    """Whether a mask is drawn from a seed: with and without gradients, since a checkpoint runs both ways."""
    return (
        0 < 1 - p < 1
        and x.device.type == "cpu"
        and not x.is_nested
        and _is_on
        and library.LIBRARY is not None
        and fast.enabled()
        and not (torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling())
        and torch._C._get_tracing_state() is None
    )


@contextmanager
def torchs_dropouts() -> Iterator[None]:
    """Let torch's own dropouts and attention run inside the context."""
    global _is_on
    before, _is_on = _is_on, False
    try:
        yield
    finally:
        _is_on = before


# An operator of torch's, so that what counts a step's operations, or plans one, sees it.
_OPS = torch.library.Library("childtuning", "DEF")
_OPS.define("dropout(Tensor x, Tensor seed, float p, *, Tensor(a!) out) -> Tensor(a!)")


def _dropped(x: Tensor, seed: Tensor, p: float, *, out: Tensor) -> Tensor:
    first, second = seed.tolist()
    library.dropout_(out, MaskDraw((first, second), int((1 - p) * 2.0**64)), x, 1 / (1 - p))
    return out


_OPS.impl("dropout", _dropped, "CPU")
_OPS.impl("dropout", lambda x, seed, p, *, out: out, "Meta")


def _seed() -> Tensor:
    """Take two numbers from torch's generator."""
    return torch.empty(2, dtype=torch.int64, device="cpu").random_()


def _drop(x: Tensor, seed: Tensor, p: float, out: Tensor | None = None) -> Tensor:
    """Return ``x ∘ m / (1 − p)`` for the mask m of Bernoulli(1 − p) that a seed names; in ``out``, which may be x."""
    return torch.ops.childtuning.dropout(x, seed, p, out=torch.empty_like(x) if out is None else out)


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
        probabilities = _probabilities(q, k, bias, scale)
        y = _drop(probabilities, seed, p, out=probabilities) @ v
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
        dP = dY @ v.transpose(-2, -1)
        dP = _drop(dP, seed, ctx.p, out=dP)
        dS = torch.ops.aten._softmax_backward_data(dP, probabilities, -1, dP.dtype)
        del dP, probabilities
        dq = (dS @ k).mul_(ctx.scale) if needs_q else None
        dk = (dS.transpose(-2, -1) @ q).mul_(ctx.scale) if needs_k else None
        dbias = dS.sum_to_size(bias.shape) if bias is not None and needs_bias else None
        return dq, dk, dv, dbias, None, None


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        nothing = ~_attends(bias)  # rows of -inf alone, which have no softmax
        if bias.dtype == torch.bool:
            scores.add_(scores.new_zeros(()).where(bias | nothing, -torch.inf))
        else:
            scores.add_(bias.masked_fill(nothing, 0.0))
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
        not all(_is_drawn(dropout_p, t) and t.dtype in (torch.float32, torch.float64) for t in given)
        or enable_gqa
        or not query.shape[-1]
        or len({(t.dtype, *t.shape[:-2]) for t in given}) > 1
        or (attn_mask is not None and (is_causal or attn_mask.dtype not in (torch.bool, query.dtype)))
        or torch.is_autocast_enabled("cpu")
    )
    if is_plain:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device="cpu").tril()
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return _Attend.apply(query, key, value, attn_mask, factor, dropout_p)


class _Attending(TorchFunctionMode):
    """Let ``attend`` stand in for torch's function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (attend if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def _let_transformers_attend() -> None:
    """Let transformers' own attention run around ``attend`` where a module is spared; else it runs as it is."""
    modeling = sys.modules.get(
        "transformers.modeling_utils"
    )  # a model of it is there only if it was imported
    if modeling is None:
        return
    theirs = modeling.AttentionInterface()[_TORCHS]
    if getattr(theirs, "is_sparing", False):
        return

    def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
        drops = kwargs.get("dropout", True)  # a number, unless it is among args
        if not (_is_on and drops) or torch.compiler.is_compiling() or module not in _SPARED:
            return theirs(module, *args, **kwargs)
        with _Attending():
            return theirs(module, *args, **kwargs)

    attention.is_sparing = True  # type: ignore[attr-defined]
    modeling.AttentionInterface.register(_TORCHS, attention)


def spare_dropouts(model: nn.Module) -> Callable[[], None]:
    """Let the model's dropouts, and its attention with dropout, keep seeds, where kernels are compiled.

    Returns:
        what undoes it once; they keep seeds until all who wanted it have undone it.
    """
    _let_transformers_attend()
    modules = list(model.modules())
    for module in modules:
        _SPARED[module] = _SPARED.get(module, 0) + 1
        if type(module) is nn.Dropout and "forward" not in vars(module):
            module.__class__ = SeededDropout

    def undo() -> None:
        for module in modules:
            left = _SPARED.pop(module, 0) - 1
            if left > 0:
                _SPARED[module] = left
            elif type(module) is SeededDropout:
                module.__class__ = nn.Dropout  # type: ignore[assignment]

    return undo
