"""Per-example gradients of a whole batch from one forward and one backward pass, call by call.

One example runs alone first; what its calls return shows, in the batch's pass, which axis of each call counts examples.
A call with a rule takes its parameters detached, so that no dense gradient is ever formed, and the rule gives their
gradients from the call's input and the gradient at its output. A call that broadcasts a parameter takes it once for
each example, and the gradient of that is the parameter's by example. Tensors made of parameters alone (relative
position biases, normed weights) are treated as parameters are, and their gradients are then taken through the small
graph that made them, example by example. What fits none of these is handed back with the reason.

Where the examples' losses are known one by one, that of one example is left out of the first batch, the second, the
fourth, and so on. Its rows of every gradient must then be zero, exactly: else the loss or a layer mixes examples, or
the rows are another example's.

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
from torch.nn import functional as F

from childtuning.fast.arrivals import Arrivals, EmissionError, Sink, Target, Use
from childtuning.fast.gradients import Dense, ExampleGradients
from childtuning.fast.rules import RULES, NoRuleError
from childtuning.fast.watch import (
    NONE,
    Alone,
    Call,
    Layout,
    Record,
    Seen,
    Watch,
    differs,
    find_layouts,
    forget_marks,
    outputs_of,
)

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
_NO_AXIS = "has no axis that counts examples"


@dataclass
class Inputs:
    """A batch, or one example of it.

    Args:
        tensors: those that count examples.
        loss_fn: runs the model; returns the sum of the examples' own losses, without that of one if a number is given.
        has_losses: whether one can be left out.
    """

    tensors: list[Tensor]
    loss_fn: Callable[[int | None], Tensor]
    has_losses: bool = False


@dataclass
class Outcome:
    """What a run found.

    Args:
        failed: the parameters that could not be done, with the reason; the sink was not called for them.
        is_reached: whether the loss depends on any parameter.
        left_out: the example whose squares the sink has not been given.
        is_mixed: whether at every call the gradient of an example depended on the losses of others.
    """

    failed: dict[str, str]
    is_reached: bool
    left_out: int | None = None
    is_mixed: bool = False


class PerExampleEngine:
    """Per-example gradients of parameters through the torch functions that use them.

    Args:
        model: whose parameters these are.
        parameters: by name.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self.model, self.parameters = model, parameters
        self._num_runs = 0
        self.eps = 0.0  # of the coarsest dtype that calls have returned
        self._compares_all = False  # since values decide which rows go where

    def run(
        self, size: int, batch: Inputs, example_fn: Callable[[int], Inputs], names: Iterable[str], sink: Sink
    ) -> Outcome:
        """Pass the squares of each parameter to the sink.

        Args:
            size: B, at least 2.
            batch: all examples.
            example_fn: gives one of them alone.
            names: the parameters wanted; none of them requires a gradient or has one.
            sink: called as ``sink(name, add)`` at most once a parameter; ``add(score)`` adds Σ_b G_b² over all examples
                but the one left out.
        Raises:
            EmissionError: the sink raised.
            Exception: what the forward pass raises; the sink has not been called then.
        """
        self._num_runs += 1
        first = (self._num_runs * 2654435761 >> 9) % size
        is_checked = batch.has_losses and not self._num_runs & (self._num_runs - 1)
        left_out = first if is_checked else None
        parameters = {name: self.parameters[name] for name in names}
        with _required_gradients(parameters.values()), self._without_marks():
            records = [(first, self._alone(example_fn(first), parameters))]
            while True:
                if self._compares_all and len(records) < size:
                    missing = set(range(size)) - {index for index, _ in records}
                    records += [(index, self._alone(example_fn(index), parameters)) for index in missing]
                run = _Run(parameters, batch.tensors, size, records, self.eps, sink, left_out)
                try:
                    with run:
                        loss = batch.loss_fn(left_out)
                    if not run.routes or self._compares_all:
                        return run.differentiate(loss)
                finally:
                    run.release()
                self._compares_all = True

    def _alone(self, example: Inputs, parameters: Mapping[str, Tensor]) -> Record:
        watch = Alone(parameters, example.tensors)
        with watch:  # with gradients, as the batch's pass has them: models may ask
            example.loss_fn(None)
        self._compares_all = self._compares_all or watch.routes
        self.eps = max(self.eps, watch.eps)
        return watch.record

    @contextmanager
    def _without_marks(self) -> Iterator[None]:
        try:
            yield
        finally:
            forget_marks(self.model.buffers())
            forget_marks(self.model.parameters())


@contextmanager
def _required_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let the parameters require gradients, so that uses that no call shows appear in the graph."""
    parameters = list(parameters)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


class _Run(Watch):
    """The pass of a batch. A way of making a call returns ``NotImplemented`` if it does not apply."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        inputs: Iterable[Tensor],
        size: int,
        records: list[tuple[int, Record]],
        eps: float,
        sink: Sink,
        left_out: int | None,
    ) -> None:
        super().__init__(parameters, inputs)
        self.parameters, self.size, self.records, self.eps = parameters, size, records, eps
        self.arrivals = Arrivals(parameters, size, sink, left_out)
        self.uses: list[Use] = []
        self.checks: list[tuple[frozenset[str], Tensor]] = []
        self.tables: dict[int, tuple[Tensor, Tensor, Callable[[Tensor], ExampleGradients]]] = {}
        self.orders: set[tuple[int, bool]] = set()  # the rows an example and their order, met where they show
        self.seen: list[tuple[int, Seen]] = []  # the call that is being made, by examples alone

    # Forward

    def handle(self, call: Call) -> Any:
        self.seen = [(index, record[call.key]) for index, record in self.records if call.key in record]
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # type: ignore[attr-defined]
            # What a checkpoint saves must be what it computes again, where this mode is not active.
            out = self._plain(call)
            if any(one.requires_grad for one in outputs_of(out)):
                self._fail(call, "is inside of a checkpoint")
            return out
        if not torch.is_grad_enabled() or len(self.seen) < len(self.records):
            out = self._plain(call)
            if outputs_of(out):
                self._fail(call, "is not called in the same way for an example alone")
            return out
        if call.takes_examples or call.is_in_place:
            ways = (self._by_rule, self._lent, self._misfit)
            return next(out for way in ways if (out := way(call)) is not NotImplemented)
        out = self._plain(call)
        outputs = outputs_of(out)
        if not any(one.requires_grad for one in outputs):
            return out
        if all(
            [one.shape for one in outputs] == [one.shape for one in seen.outputs] for _, seen in self.seen
        ):
            self._share(call, out, outputs)
            return out
        ways = (self._by_rule, self._lent, partial(self._expanded, plain=out), self._misfit)
        out = next(out for way in ways if (out := way(call)) is not NotImplemented)
        for one in outputs_of(out):
            self.mark(one, NONE)
        return out

    def _share(self, call: Call, out: Any, outputs: list[Tensor]) -> None:
        """Mark a call's outputs as computed from parameters alone."""
        for _, seen in self.seen:
            wrong = [
                differs(found, wanted, self.eps) for found, wanted in zip(outputs, seen.outputs, strict=True)
            ]
            self.checks += [(call.names, flag) for flag in wrong]
        for one in outputs:
            self.mark(one, call.names)
        if call.func is F.embedding and any(id(tensor) in self._parameters for tensor in call.tensors):
            applied = RULES[F.embedding](*call.args, **call.kwargs)  # the rows are known: no graph is needed
            weight, ids = applied.arguments["weight"], applied.x.unsqueeze(0)
            assert weight is not None

            def rows(dS: Tensor) -> ExampleGradients:
                return applied.gradients_fn(ids.expand(len(dS), *applied.x.shape), dS)["weight"]

            self.tables[id(out)] = (out, weight, rows)

    def _by_rule(self, call: Call) -> Any:
        """Call with detached parameters; the rule gives their gradients."""
        if call.func not in RULES:
            return NotImplemented
        try:
            applied = RULES[call.func](*call.args, **call.kwargs)
        except (NoRuleError, TypeError):
            return NotImplemented
        roles = {role: t for role, t in applied.arguments.items() if isinstance(t, Tensor) and self.names(t)}
        known = self._known(call)
        if {id(tensor) for tensor in roles.values()} != known.keys():
            return NotImplemented
        out = call.make({key: tensor.detach() for key, tensor in known.items()})
        layout = self._layout(call, out)
        if layout is None or layout.axis >= out.dim() - applied.num_inner or (applied.leads and layout.axis):
            self._fail(call, _NO_AXIS)
            return out
        x, version = applied.x.detach(), applied.x._version

        def gradients(dY: Tensor) -> Mapping[str, ExampleGradients]:
            if x._version != version:
                raise RuntimeError("its input was changed in place")
            rows = layout.split(x)
            return applied.gradients_fn(rows.to(dY.dtype) if x.is_floating_point() else rows, dY)

        targets = {role: self._target(tensor) for role, tensor in roles.items()}
        if not out.requires_grad:
            root = out.detach().requires_grad_()
            self._await_leaf(Use(root, targets, layout, gradients))
            return root.clone()  # a leaf must not be written to in place, as a ReLU after this call may do
        out, watched = _not_bypassed(out)
        use = Use(watched.grad_fn, targets, layout, gradients)
        shape = out.shape
        watched.register_hook(lambda dY: None if dY is None else self.arrivals.take(use, dY.reshape(shape)))
        self.uses.append(use)
        return out

    def _lent(self, call: Call) -> Any:
        """Call with each shared tensor expanded to one for each example."""
        place, known = self._rows_from_the_right(call), self._known(call)
        if (
            call.name not in _BROADCASTS
            or place is None
            or (call.is_in_place and id(call.tensors[0]) in known)
        ):
            return NotImplemented
        behind, rows = place
        if any(t.dim() >= behind and t.shape[-behind] != 1 for t in known.values()):
            return NotImplemented
        leaves = {key: _expanded_leaf(t, behind, self.size * rows) for key, t in known.items()}
        try:
            out = call.make(leaves)
        except (RuntimeError, TypeError, ValueError):
            if call.is_in_place:  # it may have written
                raise
            return NotImplemented
        layout = self._layout(call, out)
        if layout is None or layout.rows != rows:
            self._fail(call, _NO_AXIS)
            return out if call.is_in_place else NotImplemented
        for key, tensor in known.items():
            self._await_lent(leaves[key], tensor, layout, behind)
        return out

    def _expanded(self, call: Call, plain: Tensor) -> Any:
        """Give each example its own copy where the model expands a shared tensor to the batch."""
        known = list(self._known(call).values())
        layout = self._layout(call, plain) if call.name in _EXPANDS and len(known) == 1 else None
        if layout is None:
            return NotImplemented
        tensor, behind = known[0], plain.dim() - layout.axis
        length = tensor.shape[-behind] if tensor.dim() >= behind else 1
        if length == 1:
            out = leaf = _expanded_leaf(tensor, behind, plain.shape[layout.axis])
        elif length == layout.rows and not layout.interleaved:  # all of its rows once for each example
            behind, layout = behind + 1, Layout(self.size, 0)
            leaf = _expanded_leaf(tensor.detach().unsqueeze(-behind), behind, self.size)
            out = leaf.flatten(-behind, -behind + 1)
        else:
            return NotImplemented
        try:
            out = out.expand(plain.shape)
        except RuntimeError:
            return NotImplemented
        self._await_lent(leaf, tensor, layout, behind)
        return out

    def _plain(self, call: Call) -> Any:
        """Call with copies of the parameters; they receive gradients only if no other way applied."""
        names = {id(t): self._parameters[id(t)] for t in call.tensors if id(t) in self._parameters}
        return call.make({key: self.arrivals.shadows[next(iter(name))] for key, name in names.items()})

    def _misfit(self, call: Call) -> Any:
        out = self._plain(call)
        written = call.tensors[:1] if call.is_in_place else []
        if any(one.requires_grad for one in (*outputs_of(out), *written)):
            self._fail(call, "has no rule")
        return out

    def _fail(self, call: Call, reason: str) -> None:
        self.arrivals.fail(call.names, f"{call.name} {reason}")

    def _known(self, call: Call) -> dict[int, Tensor]:
        return {id(tensor): tensor for tensor in call.tensors if self.names(tensor)}

    def _target(self, tensor: Tensor) -> Target:
        return Target(tensor, self.names(tensor), id(tensor) in self._parameters)

    def _layout(self, call: Call, out: Any) -> Layout | None:
        """Find the axis of the examples, and schedule a comparison with the examples run alone."""
        if not isinstance(out, Tensor):
            return None
        alone = [(index, seen.outputs[0]) for index, seen in self.seen]
        found = find_layouts(out.detach(), alone, self.size, self.eps)
        if len(found) == 1:
            self.orders.add((found[0].rows, found[0].interleaved))
        elif call.name != "repeat":  # it puts all rows of an example next to each other
            is_tested = self.arrivals.left_out is not None  # whether wrong rows would be found out
            found = [one for one in found if is_tested and (one.rows, one.interleaved) in self.orders]
        layout = found[0] if found and (len(found) == 1 or call.name == "repeat") else None
        if layout is not None:
            self.checks += [(call.names, differs(layout.example(out, i), one, self.eps)) for i, one in alone]
        return layout

    def _rows_from_the_right(self, call: Call) -> tuple[int, int] | None:
        """Return how far from the right the other tensors have the axis that counts examples, and k."""
        found = set()
        for tensor, shape in zip(call.tensors, self.seen[0][1].shapes, strict=True):
            if not self.names(tensor) and tensor.dim() == len(shape):
                axes = [axis for axis in range(len(shape)) if tensor.shape[axis] != shape[axis]]
                if len(axes) == 1 and tensor.shape[axes[0]] == self.size * shape[axes[0]]:
                    found.add((len(shape) - axes[0], shape[axes[0]]))
        return found.pop() if len(found) == 1 else None

    def _await_lent(self, leaf: Tensor, tensor: Tensor, layout: Layout, behind: int) -> None:
        """The gradient at what was lent is the shared tensor's, by example."""
        shape = (self.size, *tensor.shape)
        _, parameter, parts_fn = self.tables.get(id(tensor), (tensor, tensor, Dense))
        layout = Layout(self.size, leaf.dim() - behind, layout.rows, layout.interleaved)
        gradients = lambda dY: {"lent": parts_fn(dY.sum(1).reshape(shape))}  # noqa: E731
        self._await_leaf(Use(leaf, {"lent": self._target(parameter)}, layout, gradients))

    def _await_leaf(self, use: Use) -> None:
        def take(leaf: Tensor) -> None:
            dY, leaf.grad = leaf.grad, None
            if dY is not None:
                self.arrivals.take(use, dY)

        use.at.register_post_accumulate_grad_hook(take)
        self.uses.append(use)

    def release(self) -> None:
        """Release the graph: objects held by hooks must not keep alive the nodes that hold the hooks."""
        for use in self.uses:
            use.at = None
        self.uses.clear()
        self.checks.clear()

    # Backward

    def differentiate(self, loss: Tensor) -> Outcome:
        """Run backward; squares go to the sink as soon as a parameter's gradients are complete."""
        arrivals = self.arrivals
        wrong = torch.stack([flag.to(loss.device) for _, flag in self.checks]).tolist() if self.checks else []
        for (names, _), is_wrong in zip(self.checks, wrong, strict=True):
            if is_wrong:
                arrivals.fail(names, "its examples are not told apart")
        if not loss.requires_grad:
            return Outcome(arrivals.failed, False)
        nodes, leaves = _graph(loss)
        reached = {id(item) for item in (*nodes, *leaves)}
        for name, parameter in self.parameters.items():
            if id(parameter) in reached or id(arrivals.shadows[name]) in reached:
                arrivals.fail((name,), "it is used by a call without a rule")
        arrivals.expect(use for use in self.uses if id(use.at) in reached)
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
                arrivals.finish()
            except EmissionError:
                raise
            except Exception as error:
                reason = f"the backward pass raised {type(error).__name__}: {error}"
                arrivals.fail(self.parameters.keys() - arrivals.emitted, reason)
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                if name in arrivals.emitted:
                    raise EmissionError from RuntimeError(
                        f"the gradient of {name} came twice. Set CHILDTUNING_FAST=0."
                    )
                parameter.grad = None
                arrivals.fail((name,), "its gradient is taken inside of another function")
        return Outcome(arrivals.failed, True, arrivals.left_out, arrivals.is_mixed)


def _expanded_leaf(tensor: Tensor, behind: int, length: int) -> Tensor:
    """View a shared tensor as a leaf whose axis before the last ``behind − 1`` has this length."""
    tensor = tensor.detach()
    tensor = tensor.reshape((1,) * (behind - tensor.dim()) + tensor.shape)
    shape = list(tensor.shape)
    shape[-behind] = length
    return tensor.expand(shape).requires_grad_()


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
