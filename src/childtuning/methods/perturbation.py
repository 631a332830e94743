"""A forward pass with noise on the network's input. Shapes: B examples, T tokens, H width."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from childtuning.errors import ModelError
from childtuning.training import LossStep

NoiseFn = Callable[[Tensor, int], Tensor]


def perturbed_logits(step: LossStep, noise_fn: NoiseFn) -> Tensor:
    """Return the logits of another pass over a batch, with noise added to the network's input.

    For token ids, noise is added to the output of the input embeddings in every look-up, including the decoder's tokens
    of an encoder-decoder. Otherwise it is added to the batch's ``inputs_embeds`` or ``pixel_values``, or to its only
    floating-point entry besides labels and masks. The sum has the input's precision, and later layers have their own:
    bfloat16 loses noise below 1/256 of the value. The model is left unchanged.

    Args:
        step: the pass whose inputs are used.
        noise_fn: called with x, [B, T, H] or the shape of the batch's entry, and the axis of the examples, which a few
            models move; returns noise of x's shape. Called once per look-up, in order.
    Raises:
        ModelError: when there is no input to which noise can be added.
    """
    ids = step.inputs.get("input_ids")
    if isinstance(ids, Tensor) and not ids.is_floating_point():
        tables = _input_embeddings(step.bare_model)
        if tables:
            return _with_noisy_embeddings(step, tables, ids, noise_fn)
    name = _floating_entry(step.inputs)
    x = step.inputs[name]
    return step.forward(**{name: _sum(x, noise_fn(x, 0))})


def noise_like(x: Tensor) -> Tensor:
    """Return an empty tensor of x's shape for noise, in at least single precision."""
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32), requires_grad=False)


def _with_noisy_embeddings(step: LossStep, tables: list[nn.Module], ids: Tensor, noise_fn: NoiseFn) -> Tensor:
    num_lookups = 0

    def add(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], x: Tensor) -> Tensor:
        nonlocal num_lookups
        num_lookups += 1
        looked_up = next(iter((*arguments, *keywords.values())))
        return _sum(x, noise_fn(x, _example_axis(looked_up, ids)))

    handles = [table.register_forward_hook(add, with_kwargs=True) for table in tables]
    try:
        logits = step.forward()
    finally:
        for handle in handles:
            handle.remove()
    if not num_lookups:
        raise ModelError(
            f"{type(step.bare_model).__name__} does not call its input embeddings in a way that allows adding noise. "
            "If it is compiled in place, compile it with torch.compile(model)."
        )
    return logits


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    """The modules that use the input embeddings' weight; none if the model has no ``get_input_embeddings``."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return []
    if not isinstance(table, nn.Module):
        return []
    weight, inside = getattr(table, "weight", None), set(table.modules())
    tied = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is weight]
    return [table, *(m for m in tied if m not in inside)]


def _example_axis(looked_up: Any, ids: Tensor) -> int:
    """0, or 1 if the model looks up the transpose of the batch's ids."""
    if not isinstance(looked_up, Tensor) or ids.ndim != 2 or looked_up.shape != ids.t().shape:
        return 0
    # Only square batches are compared by value, since this synchronises with the GPU.
    same = looked_up.shape == ids.shape and torch.equal(looked_up, ids)
    return 0 if same else int(torch.equal(looked_up, ids.t()))


def _floating_entry(inputs: Mapping[str, Any]) -> str:
    """The name of the network's input if it is not token ids."""
    floating = [
        name
        for name, value in inputs.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and not name.endswith(("mask", "labels", "label"))
    ]
    for name in ("inputs_embeds", "pixel_values", *(floating if len(floating) == 1 else ())):
        if name in floating:
            return name
    raise ModelError(
        "noise needs input embeddings, which this model does not name, or a single floating-point entry in the "
        f"batch, got {', '.join(floating) or 'none'}. Give the model a method get_input_embeddings."
    )


def _sum(x: Tensor, noise: Tensor) -> Tensor:
    return (x + noise).to(x.dtype)
