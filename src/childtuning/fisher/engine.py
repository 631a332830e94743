"""Per-example gradients of a whole batch in one backward pass, layer by layer.

Hooks keep the input of each module that owns a wanted parameter and, when the gradient at its output arrives, hand
both to the module's rule. Parameters themselves require no gradient, so that no dense gradient is ever formed.
Parameters [1, …] that a module without a rule adds or joins to the batch, such as a class token, are lent to it as
[B, …], whose gradient is theirs by example.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from childtuning.fisher import convolution, embedding, linear, normalization
from childtuning.fisher.gradients import Dense, ExampleGradients, add_squares_of_sums_
from childtuning.fisher.loop import check_finite
from childtuning.fisher.losses import LossFn
from childtuning.fisher.rules import Rule, find_rule

BUILT_IN = (convolution, embedding, linear, normalization)  # importing them registers their rules

Sink = Callable[[str, Callable[[Tensor], None]], None]


@dataclass
class _Use:
    """One call of a module: its input until the gradient at its output arrives."""

    module: nn.Module
    rule: Rule
    names: Mapping[str, str]  # attribute -> parameter
    x: Tensor | None
    version: int


class Engine:
    """Per-example gradients of the parameters whose modules have rules.

    Args:
        model: its parameters must not require gradients while it runs.
        parameters: those wanted, by name.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self.model = model
        self.dtypes = {name: torch.promote_types(p.dtype, torch.float32) for name, p in parameters.items()}
        self.shapes = {name: p.shape for name, p in parameters.items()}
        names = {id(parameter): name for name, parameter in parameters.items()}
        self.owners: dict[str, list[tuple[str, nn.Module]]] = {name: [] for name in parameters}
        self.sites: list[tuple[nn.Module, Rule, dict[str, str]]] = []
        self.lent: list[tuple[nn.Module, str, str]] = []
        self.without_rule: set[str] = set()
        for path, module in model.named_modules():
            own = {attr: names[id(p)] for attr, p in module._parameters.items() if id(p) in names}
            for name in own.values():
                self.owners[name].append((path, module))
            rule = find_rule(module) if own else None
            if rule is not None:
                self.sites.append((module, rule, own))
                continue
            for attr, name in own.items():
                if parameters[name].dim() > 2 and len(parameters[name]) == 1:
                    self.lent.append((module, attr, name))
                else:
                    self.without_rule.add(name)

        # A parameter may also be held by a module that does not use it; the comparison with the loop tells.
        ruled = {name for _, _, own in self.sites for name in own.values()}
        self.without_rule -= ruled
        self.lent = [(module, attr, name) for module, attr, name in self.lent if name not in ruled]

    def lend_nothing(self) -> bool:
        """Count lent parameters among those without a rule from now on; tell whether there were any."""
        names = {name for _, _, name in self.lent}
        self.lent.clear()
        self.without_rule |= names
        return bool(names)

    def run(
        self,
        batch: Any,
        size: int,
        loss_fn: LossFn,
        names: Iterable[str],
        weigh: Callable[[Tensor], Tensor],
        sink: Sink,
    ) -> dict[str, str]:
        """Run forward and backward once; give the squares of each wanted parameter to the sink.

        Args:
            batch: of ``size`` examples.
            names: the parameters wanted in this run.
            weigh: from the batch's loss, the weight w_b of each example in it, [B].
            sink: called as ``sink(name, add)`` at most once a parameter; ``add(score)`` adds Σ_b G_b².
        Returns:
            the parameters that could not be done, with the reason; nothing was given to the sink for them.
        """
        run = _Run(self, size, set(names) - self.without_rule, sink)
        with ExitStack() as hooks:
            for module, rule, own in self.sites:
                own = {attr: name for attr, name in own.items() if name in run.names}
                if own:
                    hook = partial(run.called, rule=rule, names=own)
                    handle = module.register_forward_hook(hook, with_kwargs=True)
                    hooks.callback(handle.remove)
            for module, attr, name in self.lent:
                if name in run.names:
                    hooks.callback(module._parameters.__setitem__, attr, module._parameters[attr])
                    module._parameters[attr] = run.lend(module._parameters[attr], name)
            loss = loss_fn(self.model, batch)
            run.recording = False
            check_finite(loss)
            weights = weigh(loss)
            if loss.requires_grad and run.roots:
                run.scale = weights.amin() / weights if bool((weights != weights[0]).any()) else None
                torch.autograd.grad(loss / float(weights.amin()), run.roots, allow_unused=True)
                run.finish()
        return run.failed


def _lent(module: nn.Module, parameter: Tensor, dY: Tensor) -> dict[str, ExampleGradients]:
    """parameter [1, …], lent as [B, …]: the gradient itself."""
    return {"": Dense(dY.unsqueeze(1))}


class _Run:
    """What one run knows: the calls of the forward pass, and the gradients that have arrived."""

    def __init__(self, engine: Engine, size: int, names: set[str], sink: Sink) -> None:
        self.engine, self.size, self.names, self.sink = engine, size, names, sink
        self.recording = True  # False in the backward pass, where checkpointing calls modules again
        self.rows = size  # of the last call: B, or a multiple of it
        self.scale: Tensor | None = None
        self.roots: list[Tensor] = []
        self.failed: dict[str, str] = {}
        self.awaited = dict.fromkeys(names, 0)
        self.parts: dict[str, list[ExampleGradients]] = {name: [] for name in names}

    def called(
        self,
        module: nn.Module,
        args: tuple,
        kwargs: dict,
        output: Any,
        *,
        rule: Rule,
        names: Mapping[str, str],
    ) -> Tensor | None:
        """Keep the module's input and wait for the gradient at its output."""
        if not self.recording or not torch.is_grad_enabled():
            return None
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if (
            x is None
            or not isinstance(output, Tensor)
            or not x.dim()
            or not output.dim()
            or len(x) != len(output)
        ):
            return self._fail(names, f"{type(module).__name__} does not map one tensor to one tensor")
        if len(x) % self.size and len(x) != 1:
            return self._fail(names, "its module is called on something else than the batch")
        shared = len(x) == 1 != self.size  # by the batch, as position embeddings are
        if not shared:
            self.rows = len(x)
        if not output.requires_grad:
            output = output.detach().requires_grad_()
            self.roots.append(output)
            if not shared:  # a leaf must not be written to in place, as a ReLU after this layer may do
                output = output.clone()
        if shared:
            x, output = x.expand(self.rows, *x.shape[1:]), output.expand(self.rows, *output.shape[1:])
        for name in names.values():
            self.awaited[name] += 1
        use = _Use(module, rule, names, x.detach(), x._version)
        output.register_hook(partial(self._arrived, use))
        return output

    def lend(self, parameter: Any, name: str) -> Any:
        """Return the parameter once for each example; the gradient by example is the gradient."""
        root = parameter.detach().requires_grad_()
        self.roots.append(root)
        lent = root.expand(self.size, *parameter.shape[1:])
        self.awaited[name] += 1
        use = _Use(self.engine.model, _lent, {"": name}, parameter, parameter._version)
        lent.register_hook(partial(self._arrived, use))
        return lent

    def _arrived(self, use: _Use, dY: Tensor) -> None:
        """Apply the rule; a parameter is done when all its uses are."""
        x, use.x = use.x, None
        if x is None:
            return self._fail(use.names, "its module was differentiated twice")
        if x._version != use.version:
            return self._fail(use.names, "the input of its module was changed in place")
        try:
            with torch.autocast(dY.device.type, enabled=False):
                parts = use.rule(use.module, *self._prepared(x, dY.detach(), next(iter(use.names.values()))))
        except Exception as error:  # a rule may meet anything; the batch-of-one loop is right then
            return self._fail(use.names, f"its rule raised {type(error).__name__}: {error}")
        for attr, name in use.names.items():
            part = parts.get(attr)
            part = Dense(part) if isinstance(part, Tensor) else part
            if part is None or part.shape != self.engine.shapes[name] or part.num_examples != self.size:
                self._fail({attr: name}, "its rule gives no gradient of its shape")
                continue
            self.parts[name].append(part)
            self.awaited[name] -= 1
            if not self.awaited[name]:
                self._emit(name)
        return None

    def _prepared(self, x: Tensor, dY: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Put the examples on the first axis, take the weights out of dY, and compute in the scores' dtype."""
        dtype = self.engine.dtypes[name]
        x = x.to(dtype) if x.is_floating_point() else x
        dY = dY.to(dtype)
        if len(dY) != self.size:  # several rows an example, one after the other, as multiple choice has
            x = x.reshape(self.size, -1, *x.shape[1:])
            dY = dY.reshape(self.size, -1, *dY.shape[1:])
        if self.scale is not None:
            dY = dY * self.scale.to(dY).view(-1, *[1] * (dY.dim() - 1))
        return x, dY

    def _emit(self, name: str) -> None:
        parts, self.parts[name] = self.parts[name], []
        if name in self.failed or not parts:
            return
        self.sink(name, parts[0].add_squares_ if len(parts) == 1 else partial(add_squares_of_sums_, parts))

    def _fail(self, names: Mapping[str, str], reason: str) -> None:
        for name in names.values():
            self.failed.setdefault(name, reason)
            self.parts[name] = []

    def finish(self) -> None:
        """Emit parameters some of whose uses the loss does not reach."""
        for name in self.names:
            self._emit(name)
