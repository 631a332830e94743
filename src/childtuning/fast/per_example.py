"""Per-example gradients of a whole batch from one forward and one backward pass, call by call.

One example runs alone first; what its calls return shows, in the batch's pass, which axis of each call counts examples.
A call with a rule takes its parameters detached, so that no dense gradient is ever formed, and the rule gives their
gradients from the call's input and the gradient at its output. A call that broadcasts a parameter takes it once for
each example, and the gradient of that is the parameter's by example. Tensors made of parameters alone (relative
position biases, normed weights) are treated as parameters are, and their gradients are then taken through the small
graph that made them, example by example. What fits none of these is handed back with the reason.

Shapes: B examples, k rows an example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from childtuning.fast.gradients import Dense, ExampleGradients, add_squares_of_sums_
from childtuning.fast.rules import RULES, NoRuleError
from childtuning.fast.watch import (
    NONE,
    Alone,
    Layout,
    Names,
    Record,
    Watch,
    differs,
    find_layout,
    forget_marks,
    is_in_place,
    name_of,
    outputs_of,
)

Sink = Callable[[str, Callable[[Tensor], object]], None]

_BROADCASTS = {
    "add",
    "iadd",
    "sub",
    "isub",
    "mul",
    "imul",
    "div",
    "idiv",
    "truediv",
    "itruediv",
    "pow",
    "where",
}
_BROADCASTS |= {"maximum", "minimum", "addcmul", "addcdiv", "lerp", "masked_fill", "matmul", "bmm", "baddbmm"}
_BROADCASTS |= {"cat", "concat", "concatenate", "stack", "scaled_dot_product_attention"}
_EXPANDS = {"expand", "expand_as", "broadcast_to", "repeat"}


@dataclass
class Inputs:
    """A batch, or one example of it.

    Args:
        tensors: those that count examples.
        loss_fn: runs the model; returns the sum of the examples' own losses.
    """

    tensors: list[Tensor]
    loss_fn: Callable[[], Tensor]


@dataclass
class Outcome:
    """What a run found.

    Args:
        failed: the parameters that could not be done, with the reason; the sink was not called for them.
        is_reached: whether the loss depends on any parameter.
    """

    failed: dict[str, str]
    is_reached: bool


class EmissionError(Exception):
    """The sink raised: what it added is not known."""


class PerExampleEngine:
    """Per-example gradients of parameters through the torch functions that use them.

    Args:
        model: whose parameters these are.
        parameters: by name.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self.model, self.parameters = model, parameters
        self._num_runs = 0
        self._compares_all = False  # since values decide which rows go where

    def run(
        self, size: int, batch: Inputs, example_fn: Callable[[int], Inputs], names: Iterable[str], sink: Sink
    ) -> Outcome:
        """Give the squares of each parameter to the sink.

        Args:
            size: B, at least 2.
            batch: all examples.
            example_fn: gives one of them alone.
            names: the parameters wanted.
            sink: called as ``sink(name, add)`` at most once a parameter; ``add(score)`` adds Σ_b G_b².
        """
        self._num_runs += 1
        first = (self._num_runs * 2654435761 >> 9) % size
        parameters = {name: self.parameters[name] for name in names}
        with _required_gradients(parameters.values()), self._without_marks():
            records = [(first, self._alone(example_fn(first), parameters))]
            while True:
                if self._compares_all and len(records) < size:
                    missing = set(range(size)) - {index for index, _ in records}
                    records += [(index, self._alone(example_fn(index), parameters)) for index in missing]
                run = _Run(parameters, batch.tensors, size, records, sink)
                try:
                    with run:
                        loss = batch.loss_fn()
                    if not run.routes or self._compares_all:
                        return run.differentiate(loss)
                finally:
                    run.release()
                self._compares_all = True

    @contextmanager
    def _without_marks(self) -> Iterator[None]:
        try:
            yield
        finally:
            forget_marks(self.model.buffers())
            forget_marks(self.model.parameters())

    def _alone(self, example: Inputs, parameters: Mapping[str, Tensor]) -> Record:
        watch = Alone(parameters, example.tensors)
        with watch:  # with gradients, as the batch's pass has them: models may ask
            example.loss_fn()
        self._compares_all = self._compares_all or watch.routes
        return watch.record


@contextmanager
def _required_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let the parameters themselves require gradients, so that uses which no call shows are found in the graph."""
    parameters = list(parameters)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


@dataclass
class _Use:
    """One call, until the gradient at ``at`` arrives: the call's output, or what was lent to it."""

    at: Any  # a leaf, or the autograd node of an output
    targets: dict[str, str | Tensor]  # by role, a parameter's name or a shared tensor
    layout: Layout
    gradients_fn: Callable[[Tensor, torch.dtype], Mapping[str, ExampleGradients]] | None


class _Run(Watch):
    """The pass of a batch: the calls made, and the gradients that have arrived."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        inputs: Iterable[Tensor],
        size: int,
        records: list[tuple[int, Record]],
        sink: Sink,
    ) -> None:
        super().__init__(parameters, inputs)
        self.parameters, self.size, self.records, self.sink = parameters, size, records, sink
        self.failed: dict[str, str] = {}
        self.emitted: set[str] = set()
        self.shadows = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        self.uses: list[_Use] = []
        self.checks: list[tuple[Names, Tensor]] = []
        self.tables: dict[int, tuple[Tensor, str, Callable[[Tensor], ExampleGradients]]] = {}
        self.awaited = dict.fromkeys(parameters, 0)
        self.parts: dict[str, list[ExampleGradients]] = {name: [] for name in parameters}
        self.shared: dict[int, tuple[Tensor, list[ExampleGradients]]] = {}
        self.held: set[str] = set()  # parameters that shared tensors are made of: done at the end

    # Forward

    def handle(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], names: Names, number: int
    ) -> Any:
        seen = [
            (i, record[func, names, number]) for i, record in self.records if (func, names, number) in record
        ]
        if not torch.is_grad_enabled() or len(seen) < len(self.records):
            out = self._plain(func, args, kwargs, tensors)
            if outputs_of(out):
                self._fail(names, f"{name_of(func)} is not called in the same way for an example alone")
            return self._owned(func, args, out, tensors)
        if self.takes_examples(func, tensors) or is_in_place(func):
            for way in (self._by_rule, self._lent):
                out = way(func, args, kwargs, tensors, names, seen)
                if out is not NotImplemented:
                    return self._owned(func, args, out, tensors)
            return self._owned(func, args, self._misfit(func, args, kwargs, tensors, names), tensors)
        return self._among_shared(func, args, kwargs, tensors, names, seen)

    def _among_shared(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], names: Names, seen: list
    ) -> Any:
        """A call that no example takes part in: what it returns is shared, unless it is one for each example."""
        out = self._plain(func, args, kwargs, tensors)
        outputs = outputs_of(out)
        if not any(one.requires_grad for one in outputs):
            return out
        if all(list(map(_shape, outputs)) == list(map(_shape, one.outputs)) for _, one in seen):
            for _, one in seen:
                self.checks += [(names, differs(f, w)) for f, w in zip(outputs, one.outputs, strict=True)]
            for one in outputs:
                self.mark(one, names)
            if func is torch.nn.functional.embedding and len(names) == 1:
                self._remember_table(out, args, kwargs, next(iter(names)))
            return out
        out = self._by_rule(func, args, kwargs, tensors, names, seen)
        if out is NotImplemented:
            out = self._lent(func, args, kwargs, tensors, names, seen)
        if out is NotImplemented and name_of(func) in _EXPANDS and len(outputs) == 1:
            out = self._expanded(outputs[0], self._known(tensors), names, seen)
        if out is NotImplemented:
            out = self._misfit(func, args, kwargs, tensors, names)
        for one in outputs_of(out):
            self.mark(one, NONE)
        return out

    def _by_rule(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], names: Names, seen: list
    ) -> Any:
        """Call with detached parameters; the rule gives their gradients."""
        if func not in RULES:
            return NotImplemented
        try:
            applied = RULES[func](*args, **kwargs)
        except (NoRuleError, TypeError):
            return NotImplemented
        roles = {role: t for role, t in applied.arguments.items() if isinstance(t, Tensor) and self.names(t)}
        if {id(t) for t in roles.values()} != {id(t) for t in self._known(tensors)}:
            return NotImplemented
        detached = {id(t): t.detach() for t in roles.values()}
        out = func(*_swapped(args, detached), **_swapped(kwargs, detached))
        layout = self._layout(out, names, seen)
        if layout is None or layout.axis >= out.dim() - applied.num_inner or (applied.leads and layout.axis):
            self._fail(names, f"{func.__name__} has no axis that counts examples")
            return out
        x, version = applied.x.detach(), applied.x._version

        def gradients(dY: Tensor, dtype: torch.dtype) -> Mapping[str, ExampleGradients]:
            if x._version != version:
                raise RuntimeError("its input was changed in place")
            rows = layout.split(x)
            return applied.gradients_fn(rows.to(dtype) if x.is_floating_point() else rows, dY)

        if out.requires_grad:
            out, watched = _not_bypassed(out)
            use = _Use(watched.grad_fn, self._targets(roles), layout, gradients)
            watched.register_hook(lambda dY, shape=out.shape: self._arrived(use, dY.view(shape)))
            self.uses.append(use)
            return out
        root = out.detach().requires_grad_()
        self._await_leaf(root, self._targets(roles), layout, gradients)
        return root.clone()  # a leaf must not be written to in place, as a ReLU after this call may do

    def _lent(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], names: Names, seen: list
    ) -> Any:
        """Call with each shared tensor expanded to one for each example."""
        known = {id(t): t for t in self._known(tensors)}
        place = self._rows_from_the_right(tensors, seen)
        if (
            name_of(func) not in _BROADCASTS
            or place is None
            or (is_in_place(func) and self.names(tensors[0]))
        ):
            return NotImplemented
        behind, rows = place
        if any(t.dim() >= behind and t.shape[-behind] != 1 for t in known.values()):
            return NotImplemented
        leaves = {key: self._leaf(t, behind, self.size * rows) for key, t in known.items()}
        try:
            out = func(*_swapped(args, leaves), **_swapped(kwargs, leaves))
        except (RuntimeError, TypeError, ValueError):
            if is_in_place(func):  # it may have written
                raise
            return NotImplemented
        layout = self._layout(out, names, seen)
        if layout is None or layout.rows != rows:
            self._fail(names, f"{name_of(func)} has no axis that counts examples")
            return out if is_in_place(func) else NotImplemented
        for key, t in known.items():
            self._await_lent(leaves[key], t, layout, behind)
        return out

    def _expanded(self, out: Tensor, known: list[Tensor], names: Names, seen: list) -> Any:
        """Give each example its own copy of a shared tensor, where the model expands it to the batch."""
        layout = self._layout(out, names, seen)
        if layout is None or len(known) != 1:
            return NotImplemented
        axis, behind, tensor = layout.axis, out.dim() - layout.axis, known[0]
        length = tensor.shape[-behind] if tensor.dim() >= behind else 1
        if length == 1:
            leaf = self._leaf(tensor, behind, out.shape[axis])
            expanded = leaf
        elif length == layout.rows and not layout.interleaved:  # all rows of it once for each example
            leaf = self._leaf(tensor.detach().unsqueeze(-behind - 1), behind + 1, self.size)
            layout, behind = Layout(self.size, 0), behind + 1
            expanded = leaf.flatten(-behind, -behind + 1)
        else:
            return NotImplemented
        try:
            expanded = expanded.expand(out.shape)
        except RuntimeError:
            return NotImplemented
        self._await_lent(leaf, tensor, layout, behind)
        return expanded

    def _leaf(self, tensor: Tensor, behind: int, length: int) -> Tensor:
        """View a shared tensor, with an axis of this length before the last ``behind − 1``, as a leaf."""
        tensor = tensor.detach()
        tensor = tensor.reshape((1,) * (behind - tensor.dim()) + tensor.shape)
        shape = list(tensor.shape)
        shape[-behind] = length
        return tensor.expand(shape).requires_grad_()

    def _await_lent(self, leaf: Tensor, tensor: Tensor, layout: Layout, behind: int) -> None:
        """The gradient at what was lent is the shared tensor's, by example."""
        shape = (self.size, *tensor.shape)
        lent = Layout(self.size, leaf.dim() - behind, layout.rows, layout.interleaved)
        table = self.tables.get(id(tensor))
        if table is not None:
            _, name, rows_fn = table
            gradients = lambda dY, dtype: {"lent": rows_fn(dY.sum(1).reshape(shape))}  # noqa: E731
            return self._await_leaf(leaf, {"lent": name}, lent, gradients)
        gradients = lambda dY, dtype: {"lent": Dense(dY.sum(1).reshape(shape))}  # noqa: E731
        return self._await_leaf(leaf, self._targets({"lent": tensor}), lent, gradients)

    def _await_leaf(self, leaf: Tensor, targets: Any, layout: Layout, gradients: Any) -> None:
        use = _Use(leaf, targets, layout, gradients)

        def take(leaf: Tensor) -> None:
            dY, leaf.grad = leaf.grad, None
            self._arrived(use, dY)

        leaf.register_post_accumulate_grad_hook(take)
        self.uses.append(use)

    def _remember_table(self, out: Tensor, args: Any, kwargs: Any, name: str) -> None:
        """A table that all examples look up in the same rows needs no graph: the rows are known."""
        applied = RULES[torch.nn.functional.embedding](*args, **kwargs)
        ids = applied.x.unsqueeze(0)

        def rows(values: Tensor) -> ExampleGradients:
            return applied.gradients_fn(ids.expand(len(values), *ids.shape[1:]), values)["weight"]

        self.tables[id(out)] = (out, name, rows)

    def _plain(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """Call with shadows of the parameters, which gradients reach only where nothing better was found."""
        shadows = {
            id(t): self.shadows[next(iter(self.names(t)))] for t in tensors if id(t) in self._parameters
        }
        return func(*_swapped(args, shadows), **_swapped(kwargs, shadows))

    def _misfit(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], names: Names) -> Any:
        out = self._plain(func, args, kwargs, tensors)
        written = tensors[:1] if is_in_place(func) else []
        if any(one.requires_grad for one in (*outputs_of(out), *written)):
            self._fail(names, f"{name_of(func)} has no rule")
        return out

    def _owned(self, func: Any, args: Any, out: Any, tensors: list[Tensor]) -> Any:
        if self.takes_examples(func, tensors):
            self._mark_all(func, args, out)
        return out

    def _known(self, tensors: list[Tensor]) -> list[Tensor]:
        return [t for t in tensors if self.names(t)]

    def _targets(self, roles: Mapping[str, Tensor]) -> dict[str, str | Tensor]:
        return {
            role: next(iter(self.names(t))) if id(t) in self._parameters else t for role, t in roles.items()
        }

    def _layout(self, out: Any, names: Names, seen: list) -> Layout | None:
        """Find the axis that counts examples, and have it compared with the examples alone."""
        if not isinstance(out, Tensor):
            return None
        alone = [(index, one.outputs[0]) for index, one in seen]
        layout = find_layout(out.detach(), alone, self.size)
        if layout is not None:
            self.checks += [(names, differs(layout.example(out, i), one)) for i, one in alone]
        return layout

    def _rows_from_the_right(self, tensors: list[Tensor], seen: list) -> tuple[int, int] | None:
        """Return how far from the right the other tensors have the axis that counts examples, and k."""
        found = set()
        for t, shape in zip(tensors, seen[0][1].shapes, strict=True):
            if not self.names(t) and t.dim() == len(shape):
                axes = [axis for axis in range(t.dim()) if t.shape[axis] != shape[axis]]
                if len(axes) == 1 and t.shape[axes[0]] == self.size * shape[axes[0]]:
                    found.add((t.dim() - axes[0], shape[axes[0]]))
        return found.pop() if len(found) == 1 else None

    def _fail(self, names: Iterable[str], reason: str) -> None:
        for name in names:
            self.failed.setdefault(name, reason)
            self.parts[name] = []

    # Backward

    def differentiate(self, loss: Tensor) -> Outcome:
        """Run backward; squares go to the sink as soon as a parameter's gradients are complete."""
        if self.checks and bool((wrong := torch.stack([flag for _, flag in self.checks])).any()):
            for (names, _), is_wrong in zip(self.checks, wrong.tolist(), strict=True):
                if is_wrong:
                    self._fail(names, "its examples are not told apart")
        self.checks.clear()
        if not loss.requires_grad:
            return Outcome(self.failed, False)
        nodes, leaves = _graph(loss)
        reached = {id(item) for item in (*nodes, *leaves)}
        for name, parameter in self.parameters.items():
            if id(parameter) in reached or id(self.shadows[name]) in reached:
                self._fail((name,), "it is used by a call without a rule")
        self._plan([use for use in self.uses if id(use.at) in reached])
        own = {id(use.at) for use in self.uses}
        others = [(leaf, leaf.grad) for leaf in leaves if id(leaf) not in own]
        del nodes, leaves
        self.release()
        with ExitStack() as hooks:
            for leaf, gradient in others:  # autograd would add to what is there
                leaf.grad = None
                hooks.callback(setattr, leaf, "grad", gradient)
                hooks.callback(leaf.register_post_accumulate_grad_hook(_let_go).remove)
            try:
                loss.backward()
                self._finish()
            except EmissionError:
                raise
            except Exception as error:
                reason = f"the backward pass raised {type(error).__name__}: {error}"
                self._fail(set(self.parameters) - self.emitted, reason)
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                if name in self.emitted:
                    raise RuntimeError(f"the gradient of {name} came twice. Set CHILDTUNING_FAST=0.")
                parameter.grad = None
                self._fail((name,), "its gradient is taken inside of another function")
        return Outcome(self.failed, True)

    def release(self) -> None:
        """Let go of the graph: what hooks hold must not hold the nodes they hang on."""
        for use in self.uses:
            use.at = None
        self.uses.clear()

    def _plan(self, uses: list[_Use]) -> None:
        """Count the gradients that each parameter waits for."""
        for use in uses:
            for target in use.targets.values():
                if isinstance(target, str):
                    self.awaited[target] += 1
                else:
                    self.held |= self.names(target)
                    self.shared.setdefault(id(target), (target, []))

    def _arrived(self, use: _Use, dY: Tensor | None) -> None:
        """Form the gradients of one call; a parameter is done when all its calls are."""
        gradients_fn, use.gradients_fn = use.gradients_fn, None
        names = NONE.union(
            *(frozenset((t,)) if isinstance(t, str) else self.names(t) for t in use.targets.values())
        )
        if gradients_fn is None:
            return self._fail(names, "its call was differentiated twice")
        parts: Mapping[str, ExampleGradients] = {}
        if dY is not None:
            first = next(iter(use.targets.values()))
            dtype = (self.parameters[first] if isinstance(first, str) else first).dtype
            dtype = torch.promote_types(dtype, torch.float32)
            try:
                with torch.no_grad(), torch.autocast(dY.device.type, enabled=False):
                    parts = gradients_fn(use.layout.split(dY.detach().to(dtype)), dtype)
            except Exception as error:  # a rule may meet anything; another way is right then
                return self._fail(names, f"its rule raised {type(error).__name__}: {error}")
        for role, target in use.targets.items():
            part = parts.get(role)
            shape = self.parameters[target].shape if isinstance(target, str) else target.shape
            if part is not None and (part.shape != shape or part.num_examples != self.size):
                self._fail(names, "its rule gives no gradient of its shape")
            elif isinstance(target, str):
                self._add_part(self.parts[target], part)
                self.awaited[target] -= 1
                if not self.awaited[target] and target not in self.held:
                    self._emit(target)
            else:
                self._add_part(self.shared[id(target)][1], part)
        return None

    def _add_part(self, parts: list[ExampleGradients], part: ExampleGradients | None) -> None:
        if isinstance(part, Dense) and parts and isinstance(parts[-1], Dense):
            parts[-1].values = parts[-1].values + part.values
        elif part is not None:
            parts.append(part)

    def _emit(self, name: str) -> None:
        parts, self.parts[name] = self.parts[name], []
        if name in self.failed or not parts:
            return
        self._give(name, parts[0].add_squares_ if len(parts) == 1 else partial(add_squares_of_sums_, parts))

    def _give(self, name: str, add: Callable[[Tensor], object]) -> None:
        self.emitted.add(name)
        try:
            with torch.no_grad():
                self.sink(name, add)
        except Exception as error:
            raise EmissionError from error

    def _finish(self) -> None:
        """Take what arrived at shared tensors through the graphs that made them."""
        for name, count in self.awaited.items():
            if count:
                self._fail((name,), "no gradient arrived at one of its calls")
        groups: list[tuple[set[str], list[tuple[Tensor, list[ExampleGradients]]]]] = []
        for tensor, parts in self.shared.values():
            names, members = set(self.names(tensor)), [(tensor, parts)]
            for group in [group for group in groups if group[0] & names]:
                groups.remove(group)
                names, members = names | group[0], members + group[1]
            groups.append((names, members))
        for names, members in groups:
            self._finish_group(
                [name for name in self.parameters if name in names - self.failed.keys()], members
            )

    def _finish_group(self, names: list[str], members: list[tuple[Tensor, list[ExampleGradients]]]) -> None:
        if not names:
            return
        dtypes = {name: torch.promote_types(self.parameters[name].dtype, torch.float32) for name in names}
        totals = {name: torch.zeros_like(self.parameters[name], dtype=dtypes[name]) for name in names}
        for index in range(self.size):
            given = []
            for tensor, parts in members:
                buffer = torch.zeros(
                    tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device
                )
                for part in parts:
                    part.add_(buffer, index)
                given.append(buffer.to(tensor.dtype))
            shadows = [self.shadows[name] for name in names]
            found = torch.autograd.grad(
                [tensor for tensor, _ in members], shadows, given, retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(names, found, strict=True):
                own = torch.zeros_like(totals[name]) if gradient is None else gradient.to(dtypes[name])
                for part in self.parts[name]:
                    own = own.clone() if own is gradient else own
                    part.add_(own, index)
                totals[name].addcmul_(own, own)
        for name in names:
            self.parts[name] = []
            self._give(name, lambda score, total=totals[name]: score.add_(total))


def _not_bypassed(out: Tensor) -> tuple[Tensor, Tensor]:
    """Return an output, and the tensor of its gradient that a later write in place leaves in the graph: no view."""
    base = out._base
    if base is None:
        return out, out
    if base.requires_grad and base.numel() == out.numel() and base.is_contiguous() and out.is_contiguous():
        return out, base
    out = out.clone()
    return out, out


def _let_go(leaf: Tensor) -> None:
    leaf.grad = None


def _shape(tensor: Tensor) -> torch.Size:
    return tensor.shape


def _swapped(value: Any, by_id: Mapping[int, Tensor]) -> Any:
    """Return arguments with some tensors in place of others."""
    if isinstance(value, Tensor):
        return by_id.get(id(value), value)
    if isinstance(value, dict):
        return {key: _swapped(item, by_id) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_swapped(item, by_id) for item in value)
    return value


def _graph(loss: Tensor) -> tuple[set[Any], list[Tensor]]:
    """Return the nodes of a loss's graph, and its leaves."""
    nodes: set[Any] = set()
    leaves = [] if loss.grad_fn is not None else [loss]
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        stack.extend(after for after, _ in node.next_functions)
    return nodes, leaves
