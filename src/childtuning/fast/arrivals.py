"""The backward pass of a batch: gradients arrive call by call, and a parameter is done when all of them are in.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from childtuning.fast.gradients import Dense, ExampleGradients, add_squares_of_sums_
from childtuning.fast.watch import Layout, Names

Sink = Callable[[str, Callable[[Tensor], object]], None]


class EmissionError(Exception):
    """The sink raised: what it added is not known."""


class Target(NamedTuple):
    """The tensor a call gives gradients for: a parameter, or a shared tensor computed from parameters alone."""

    tensor: Tensor
    names: Names
    is_parameter: bool


@dataclass
class Use:
    """One call, until a gradient arrives.

    Args:
        at: where it arrives, a leaf or the node of an output.
        targets: by role, whose gradients it gives.
        layout: of the gradient.
        gradients_fn: from dY, [B, k, …] in the dtype of the scores, the gradients by role.
    """

    at: Any
    targets: dict[str, Target]
    layout: Layout
    gradients_fn: Callable[[Tensor], Mapping[str, ExampleGradients]] | None

    @property
    def names(self) -> set[str]:
        return {name for target in self.targets.values() for name in target.names}


class Arrivals:
    """The gradients that have arrived, and what is still awaited.

    Args:
        parameters: those wanted, by name.
        size: B.
        sink: called as ``sink(name, add)`` once a parameter is done; ``add(score)`` adds Σ_b G_b².
        left_out: the example whose loss is not in the sum, so that its gradients are zero.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], size: int, sink: Sink, left_out: int | None = None
    ) -> None:
        self.parameters, self.size, self.sink, self.left_out = parameters, size, sink, left_out
        self._num_taken = self._num_mixed = 0
        self.shadows = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        self.failed: dict[str, str] = {}
        self.emitted: set[str] = set()
        self._awaited = dict.fromkeys(parameters, 0)
        self._parts: dict[str, list[ExampleGradients]] = {name: [] for name in parameters}
        self._shared: dict[int, tuple[Target, list[ExampleGradients]]] = {}
        self._held: set[str] = set()  # parameters that shared tensors are made of: done at the end

    @property
    def is_mixed(self) -> bool:
        """Whether every gradient that arrived at the left-out example came from the losses of others."""
        return 0 < self._num_taken == self._num_mixed

    def fail(self, names: Iterable[str], reason: str) -> None:
        """Give up on parameters that have not been emitted yet."""
        for name in names:
            self.failed.setdefault(name, reason)
            self._parts[name] = []

    def expect(self, uses: Iterable[Use]) -> None:
        """Register the gradients that will arrive."""
        for target in (target for use in uses for target in use.targets.values()):
            if target.is_parameter:
                self._awaited[next(iter(target.names))] += 1
            else:
                self._held |= target.names
                self._shared.setdefault(id(target.tensor), (target, []))

    def take(self, use: Use, dY: Tensor) -> None:
        """Form the gradients of one call."""
        gradients_fn, use.gradients_fn = use.gradients_fn, None
        if gradients_fn is None:
            return self.fail(use.names, "its call was differentiated twice")
        dY = use.layout.split(dY.detach().to(_sum_dtype(next(iter(use.targets.values())).tensor)))
        self._num_taken += 1
        if self.left_out is not None and bool(dY[self.left_out].any()):
            # Zero times what is not finite is no zero, and mixes nothing.
            self._num_mixed += bool(dY[self.left_out].isfinite().all())
            return self.fail(use.names, "an example's gradient depends on the losses of others in its batch")
        try:
            with torch.no_grad(), torch.autocast(dY.device.type, enabled=False):
                found = gradients_fn(dY)
        except Exception as error:  # a rule may meet anything; another way is right then
            return self.fail(use.names, f"its rule raised {type(error).__name__}: {error}")
        for role, target in use.targets.items():
            part = found[role]
            if part.shape != target.tensor.shape or part.num_examples != self.size:
                self.fail(target.names, "its rule gives no gradient of its shape")
                continue
            if not target.is_parameter:
                _append(self._shared[id(target.tensor)][1], part)
                continue
            (name,) = target.names
            _append(self._parts[name], part)
            self._awaited[name] -= 1
            if not self._awaited[name] and name not in self._held:
                self._emit(name)
        return None

    def _emit(self, name: str) -> None:
        parts, self._parts[name] = self._parts[name], []
        if name not in self.failed:
            self._give(
                name, parts[0].add_squares_ if len(parts) == 1 else partial(add_squares_of_sums_, parts)
            )

    def _give(self, name: str, add: Callable[[Tensor], object]) -> None:
        self.emitted.add(name)
        try:
            with torch.no_grad():
                self.sink(name, add)
        except Exception as error:
            raise EmissionError from error

    def finish(self) -> None:
        """Propagate the gradients of shared tensors through the graphs that made them."""
        for name, count in self._awaited.items():
            if count:
                self.fail((name,), "no gradient arrived at one of its calls")
        groups: list[tuple[Names, list[tuple[Target, list[ExampleGradients]]]]] = []
        for target, parts in self._shared.values():
            names, members = target.names, [(target, parts)]
            for group in [group for group in groups if group[0] & names]:
                groups.remove(group)
                names, members = names | group[0], members + group[1]
            groups.append((names, members))
        for names, members in groups:
            wanted = [name for name in self.parameters if name in names and name not in self.failed]
            if wanted:
                self._finish_group(wanted, members)

    def _finish_group(self, names: list[str], members: list[tuple[Target, list[ExampleGradients]]]) -> None:
        """G_b = the parameter's own parts + (∂S/∂θ)ᵀ dS_b over its shared tensors S."""
        totals = {name: _zeros(self.parameters[name]) for name in names}
        shadows = [self.shadows[name] for name in names]
        tensors = [target.tensor for target, _ in members]
        for index in range(self.size):
            given = [_zeros(tensor) for tensor in tensors]
            for buffer, (_, parts) in zip(given, members, strict=True):
                for part in parts:
                    part.add_(buffer, index)
            given = [buffer.to(tensor.dtype) for buffer, tensor in zip(given, tensors, strict=True)]
            found = torch.autograd.grad(tensors, shadows, given, retain_graph=True, allow_unused=True)
            for name, gradient in zip(names, found, strict=True):
                own = _zeros(self.parameters[name])
                if gradient is not None:
                    own.add_(gradient)
                for part in self._parts[name]:
                    part.add_(own, index)
                totals[name].addcmul_(own, own)
        for name in names:
            self._parts[name] = []
            self._give(name, lambda score, total=totals[name]: score.add_(total))


def _append(parts: list[ExampleGradients], part: ExampleGradients) -> None:
    """Add to a list of parts; values that are gradients themselves are summed."""
    if isinstance(part, Dense) and parts and isinstance(parts[-1], Dense):
        parts[-1] = Dense(parts[-1].values + part.values)
    else:
        parts.append(part)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=_sum_dtype(tensor), device=tensor.device)
