"""Use a model and leave no trace: modes, gradients' flags, buffers and random streams are put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from childtuning.fast.structured import set_aside


@contextmanager
def untouched(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put the model in one mode with no parameter requiring a gradient; put everything back after.

    Layers that form the gradients of a child alone form whole ones inside.

    Args:
        model: the model, whose module modes, ``requires_grad`` flags, ``.grad`` fields and buffers are restored,
            as are the random streams of Python, numpy and torch on every device the model is on.
        training: the mode inside; dropout and batch statistics are active when True.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        model.train(training)
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with torch.random.fork_rng(devices=devices), torch.enable_grad(), set_aside(model):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for buffer, before in buffers:
            buffer.copy_(before)
