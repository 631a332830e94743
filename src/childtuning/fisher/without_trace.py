"""Use a model without side effects: modes, gradients, flags, buffers, weights and random states are restored."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from childtuning.child.pieces import reshard
from childtuning.errors import ConfigError, ParameterError, warn
from childtuning.fast.structured import set_aside


@contextmanager
def without_trace(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Set the model's mode, with no parameter requiring a gradient; restore everything afterwards.

    Structured layers form dense gradients inside; hooks on parameters do not run.

    Args:
        model: the model, whose module modes, ``requires_grad`` flags, ``.grad`` fields, buffers and weights are
            restored, as are the random streams of Python, numpy and torch on every device the model is on.
        training: the mode inside; dropout and batch statistics are active when True.
    Raises:
        ConfigError: inside ``torch.inference_mode()``.
        ParameterError: the forward pass has written to a weight, other than by ``max_norm`` of an embedding.
    """
    if torch.is_inference_mode_enabled():
        raise ConfigError("gradients are needed, and torch.inference_mode() forbids them. Leave it first.")
    with ExitStack() as stack:
        stack.enter_context(_random_streams_kept(model))
        stack.enter_context(_buffers_kept(model))
        stack.enter_context(_weights_kept(model))
        stack.enter_context(_flags_kept(model))
        stack.callback(
            reshard, model
        )  # what a forward pass has gathered would keep the flags of this context
        model.train(training)
        if any("_orig_mod" in module._modules for module in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(set_aside(model))
        yield


@contextmanager
def used_in_training(model: nn.Module) -> Iterator[None]:
    """Run the model in ``train()`` mode as an optimizer has set it up; restore modes, buffers and random states."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with _random_streams_kept(model), _buffers_kept(model):
            model.train()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _random_streams_kept(model: nn.Module) -> Iterator[None]:
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore the buffers, both the tensors and their values."""
    owners = [(module, dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, before in owners:
            module._buffers.clear()
            module._buffers.update(before)
        with torch.no_grad():
            for buffer, value in buffers:
                if 0 not in buffer.stride():  # an expanded one cannot be written to
                    buffer.copy_(value)


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    """Turn off gradients, ``requires_grad`` and hooks of parameters inside; restore them and the modes after."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = list(model.parameters())
    kept = [(p, p.requires_grad, p.grad) for p in parameters]
    hooks = [
        (held, dict(held))
        for p in parameters
        for held in (p._backward_hooks, p._post_accumulate_grad_hooks)
        if held
    ]
    try:
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)
        for held, _ in hooks:
            held.clear()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for held, before in hooks:
            held.update(before)
        for parameter, flag, gradient in kept:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


@contextmanager
def _weights_kept(model: nn.Module) -> Iterator[None]:
    """Restore embeddings that renormalise rows in the forward pass; raise if another weight changed."""
    renormed: dict[int, tuple[str, Tensor, Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            renormed[id(module.weight)] = (path, module.weight, module.weight.detach().clone())
    versions = [(name, p, p._version) for name, p in model.named_parameters() if id(p) not in renormed]
    if renormed:
        names = ", ".join(path or "the model" for path, _, _ in renormed.values())
        warn(
            f"The forward pass of {names} writes to its weight (max_norm). The Fisher pass restores it; in training, "
            "entries outside a child would move. Set max_norm=None."
        )
    try:
        yield
    finally:
        with torch.no_grad():
            for _, weight, before in renormed.values():
                weight.copy_(before)
    for name, parameter, version in versions:
        if parameter._version != version:
            raise ParameterError(
                f"the forward pass changes parameter {name!r} in place. Leave parameters as they are in forward()."
            )
