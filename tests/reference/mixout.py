"""Mixout the obvious way: the mixed weights are written out and given to an untouched network."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class MixoutTwin:
    """A network whose mixed weights are leaves, so that mixout's own gradient is applied by hand.

    Args:
        model: copied; its dropout is off, since the copy is in eval mode.
        p: the share of starting values.
        mixed: names of the mixed weights, in the order in which a forward pass uses them.
    """

    def __init__(self, model: nn.Module, p: float, mixed: list[str]) -> None:
        self.model = copy.deepcopy(model).eval()
        self.p, self.mixed = p, mixed
        self.parameters = dict(self.model.named_parameters())
        self.start = {name: self.parameters[name].detach().clone() for name in mixed}

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Draw B for each mixed weight; return W' = [(1−B) W0 + B W − p W0] / (1−p) and B, by name."""
        masks = {name: torch.empty_like(w).bernoulli_(1 - self.p) for name, w in self.start.items()}
        mixed = {}
        for name, B in masks.items():
            W, W0 = self.parameters[name].detach(), self.start[name]
            mixed[name] = ((1 - B) * W0 + B * W - self.p * W0) / (1 - self.p)
        return mixed, masks

    def backward(self, batch: dict[str, Any]) -> Tensor:
        """Return the loss, and leave dW = B / (1−p) dW' in the mixed weights' ``grad``."""
        mixed, masks = self.weights()
        leaves = {name: value.requires_grad_() for name, value in mixed.items()}
        loss = functional_call(self.model, self.parameters | leaves, kwargs=batch).loss
        others = {name: p for name, p in self.parameters.items() if name not in leaves}
        gradients = torch.autograd.grad(loss, [*others.values(), *leaves.values()], allow_unused=True)
        for name, gradient in zip([*others, *leaves], gradients, strict=True):
            if gradient is not None and name in leaves:
                gradient = masks[name] / (1 - self.p) * gradient
            self.parameters[name].grad = gradient
        return loss.detach()
