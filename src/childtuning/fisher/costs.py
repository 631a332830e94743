"""What a training step costs, counted on one batch: operations, bytes and random numbers, without a clock.

Two steps are run and every call that reaches a kernel is counted, at the depth where it happens: one that trains
everything, and one that trains nothing but a vector at the bottom, so that it goes back all the way and forms the
gradient of no weight. What the first does beyond the second is the cost of the weights' gradients.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from childtuning.child.budget import Costs, Place, Rates, Work
from childtuning.child.eligible import bare_model, is_conv1d, named, unit_axes
from childtuning.child.layers import Layers, find_layers
from childtuning.errors import DataError
from childtuning.fast.dropout import spare_dropouts, torchs_dropouts
from childtuning.fast.structured import formed_alone
from childtuning.fisher.batches import to_device
from childtuning.fisher.loop import check_finite, differentiable, take_gradients
from childtuning.fisher.losses import LossFn, checked, model_loss
from childtuning.fisher.without_trace import without_trace

CPU = Rates(operations=2.0e11, num_bytes=3.9e10, draws=2.3e8)
"""Of the processor that `benchmarks/results/costs.json` was recorded on; other processors differ less in the ratios."""


def training_costs(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn | None = None,
    *,
    rates: Rates | None = None,
    training: bool = True,
) -> Costs:
    """Count what a training step of a model costs, and what each parameter adds to it.

    The model's weights, gradients, buffers and random streams are as before afterwards. Of fake tensors
    (``FakeTensorMode``) it is counted without memory for weights.

    Args:
        model: the network with its head; of a model that torch.compile or DDP wraps, what is inside.
        batch: as for ``fisher_information``: of the size that is trained with.
        loss_fn: ``loss_fn(model, batch)``, a scalar or one loss an example; ``None``: the model's own.
        rates: of the device; ``None``: recorded ones for a CPU, so that the same model gives the same costs every time;
            measured for other devices.
        training: whether in ``train()`` mode, with dropout; else as a Fisher pass runs it.
    Returns:
        the counts, by depth and by parameter.
    Raises:
        DataError: the loss is no finite real number or depends on no parameter; a model on the ``meta`` device.
    """
    model = bare_model(model)
    parameters = {name: p for name, p in named(model).items() if p.is_floating_point()}
    if not parameters:
        raise DataError("the model has no floating-point parameters. Pass a network that can be trained.")
    device = next(iter(parameters.values())).device
    batch = to_device(batch, device)
    if rates is None:
        rates = CPU if device.type == "cpu" else measured_rates(device)
    layers, axes = find_layers(model), unit_axes(model, "column")
    depth = layers.depth()
    with without_trace(model, training=training):
        undo = spare_dropouts(model)
        try:
            whole = _counted(model, layers, batch, loss_fn, parameters)
            bottom = min(whole.reached, key=lambda name: (depth[name], parameters[name].numel()))
            plain = _counted(model, layers, batch, loss_fn, {bottom: parameters[bottom]})
        finally:
            undo()
        with torchs_dropouts():
            unspared = _counted(model, layers, batch, loss_fn, {bottom: parameters[bottom]})
    more = [(a - b).above_zero for a, b in zip(whole.backward, plain.backward, strict=True)]
    entries, inputs = [0] * len(more), [0.0] * len(more)
    for name, parameter in parameters.items():
        entries[depth[name]] += parameter.numel()
        inputs[depth[name]] += whole.input_bytes.get(name, 0)
    # Products are of the weights that are used at a depth, all else of the parameters that lie there.
    used = [sum(at.values()) for at in whole.used]
    formed: dict[int, tuple[str, ...]] = {}
    for module in model.modules():
        if (weight := module._parameters.get("weight")) is not None:
            formed[id(weight)] = (*formed.get(id(weight), ()), *formed_alone(module))
    places = {}
    for name, parameter in parameters.items():
        at = depth[name]
        products = sum(
            more[d].operations * whole.used[d].get(name, 0) / used[d] for d in range(len(more)) if used[d]
        )
        if not used[at]:
            products += more[at].operations * parameter.numel() / max(entries[at], 1)
        beside = more[at].num_bytes * parameter.numel() / max(entries[at], 1)
        read = max(whole.kept[at] - plain.kept[at], 0)
        places[name] = Place(
            depth=at,
            shape=tuple(parameter.shape),
            itemsize=parameter.element_size(),
            gradient=Work(products, beside),
            input_axis=axes.get(name, 1),
            input_bytes=whole.input_bytes.get(name, 0),
            shared=min(read / inputs[at], 1.0) if inputs[at] else 0.0,
            formed=formed.get(id(parameter), ()),
        )
    besides = tuple(
        (unspared.kept[d] - plain.kept[d], unspared.work(d) - plain.work(d)) for d in range(len(more))
    )
    return Costs(
        tuple(plain.forward),
        tuple(plain.backward),
        tuple(plain.kept),
        places,
        rates,
        besides,
        plain.working,
    )


def measured_rates(device: torch.device) -> Rates:
    """Measure the rates of a device with the fastest of a few samples: about a second."""
    square, line = torch.ones(4096, 4096, device=device), torch.ones(1 << 26, device=device)
    generator = torch.Generator(device)  # of its own: the model's random streams stay as they are
    amounts: list[tuple[Callable[[], Any], float]] = [
        (lambda: square @ square, 2.0 * 4096**3),
        (line.neg_, 2.0 * line.nbytes),
        (lambda: line.bernoulli_(0.1, generator=generator), float(line.numel())),
    ]
    return Rates(*(amount / min(_seconds(call, device) for _ in range(5)) for call, amount in amounts))


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    call()
    sync()
    return time.perf_counter() - start


class _Counter(TorchDispatchMode):
    """Count the calls that reach a kernel, by the depth where the model is."""

    def __init__(self, num_depths: int) -> None:
        super().__init__()
        self.depth, self.is_forward = 0, True
        self.forward, self.backward = [Work()] * num_depths, [Work()] * num_depths
        self.kept, self.input_bytes = [0] * num_depths, dict[str, int]()
        self.used = [dict[str, int]() for _ in range(num_depths)]
        self.reached: list[str] = []
        self.outside: set[int] = set()  # storages that are not the step's: weights and buffers
        self.alive: set[int] = set()
        self.num_alive, self.most_alive = 0, [0, 0]  # bytes; forward, and at the start of the backward pass

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._follow(out)
        counts = self.forward if self.is_forward else self.backward
        counts[self.depth] += _work(func, args, kwargs, out)
        return out

    def work(self, depth: int) -> Work:
        """Return what is done at a depth, forward and backward."""
        return self.forward[depth] + self.backward[depth]

    @property
    def working(self) -> tuple[int, int]:
        """The most bytes that are alive in the forward pass, and as the backward pass begins, beyond what is kept."""
        forward, backward = (max(most - sum(self.kept), 0) for most in self.most_alive)
        return forward, backward

    def _follow(self, out: Any) -> None:
        """Count the memory of what a call has made for as long as it lives."""
        for tensor in tree_leaves(out):
            if not _is_dense(tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self.alive or key in self.outside:
                continue
            self.alive.add(key)
            self.num_alive += size
            weakref.finalize(storage, self._forget, key, size).atexit = False
        if self.is_forward or self.depth >= len(self.kept) - 2:
            at = int(not self.is_forward)
            self.most_alive[at] = max(self.most_alive[at], self.num_alive)

    def _forget(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.num_alive -= size


def _work(func: Any, args: Any, kwargs: Any, out: Any) -> Work:
    packet = func._overloadpacket
    if packet in flop_registry:
        is_batched = packet in (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
        slower = _BATCHED if is_batched and out.device.type == "cpu" else 1.0
        return Work(operations=slower * flop_registry[packet](*args, **kwargs, out_val=out))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return Work(operations=sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return Work(operations=sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    if func.is_view or packet in _FREE:
        return Work()
    made = [leaf for leaf in tree_leaves(out) if _is_dense(leaf)]
    if not made:  # a question, such as a tensor's device
        return Work()
    read = [leaf for leaf in tree_leaves((args, kwargs)) if _is_dense(leaf)]
    is_random = torch.Tag.nondeterministic_seeded in func.tags
    draws = sum(tensor.numel() for tensor in made) if is_random else 0.0
    if packet is torch.ops.childtuning.dropout:
        draws = _SEEDED * args[0].numel()
    return Work(num_bytes=sum(tensor.nbytes for tensor in made + read), draws=draws)


def _is_dense(leaf: Any) -> TypeGuard[Tensor]:
    """Tell whether it is a tensor with a storage; a sparse gradient is taken to cost nothing."""
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided


_BATCHED = 1.6  # operations of a whole product in the time of one of a batch of small ones, on a CPU
_SEEDED = 0.07  # draws of torch's in the time of one from a seed
_FREE = {torch.ops.aten.detach, torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten._unsafe_view}


def _counted(
    model: nn.Module,
    layers: Layers,
    batch: Any,
    loss_fn: LossFn | None,
    trained: Mapping[str, nn.Parameter],
) -> _Counter:
    """Run one step that differentiates some parameters, and count it."""
    counter = _Counter(len(layers.blocks) + 2)
    seen = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    counter.outside = seen | {buffer.untyped_storage()._cdata for buffer in model.buffers()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)  # kept until the backward pass, so that the address is its own
            counter.kept[counter.depth] += storage.nbytes()
        return tensor

    with differentiable(trained.values()), _followed(model, layers, counter), counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model_loss(model, batch) if loss_fn is None else checked(loss_fn(model, batch))
        loss = loss.mean()
        counter.is_forward, counter.depth = False, len(layers.blocks) + 1
        if loss.requires_grad:
            take_gradients(loss, trained, lambda name, _: counter.reached.append(name))
    check_finite(loss.detach())
    if not counter.reached:
        raise DataError("the loss depends on no parameter. Pass loss_fn.")
    return counter


@contextmanager
def _followed(model: nn.Module, layers: Layers, counter: _Counter) -> Iterator[None]:
    """Tell the counter at which depth the model is, forward and backward, and what its weights read."""

    def arrive(depth: int) -> Callable[..., None]:
        def at(*_: Any) -> None:
            counter.depth = depth

        return at

    def mark(tensors: Any, depth: int) -> None:
        """Let the backward pass say that it has come to this depth."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(arrive(depth))

    with ExitStack() as after:
        for index, block in enumerate(layers.blocks):

            def enter(module: nn.Module, args: Any, kwargs: Any, depth: int = index + 1) -> None:
                if depth == 1:
                    mark((args, kwargs), 0)
                counter.depth = depth

            def leave(module: nn.Module, args: Any, out: Any, depth: int = index + 1) -> None:
                counter.depth = depth + 1
                mark(out, depth)

            after.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            after.callback(block.register_forward_hook(leave).remove)
        names = {id(parameter): name for name, parameter in named(model).items()}
        for module in model.modules():
            weight = module._parameters.get("weight")
            if weight is None or weight.dim() < 2 or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                continue
            if not (is_conv1d(module) or isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))):
                continue

            def read(module: nn.Module, args: Any, kwargs: Any, name: str = names[id(weight)]) -> None:
                given = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
                counter.input_bytes[name] = counter.input_bytes.get(name, 0) + given.nbytes
                here = counter.used[counter.depth]
                here[name] = here.get(name, 0) + module._parameters["weight"].numel()  # type: ignore[union-attr]

            after.callback(module.register_forward_pre_hook(read, with_kwargs=True).remove)
        yield
