"""Summed squares of per-example gradients, as other libraries and the obvious loop compute them.

Each builder takes a model of its own in ``eval()`` mode and the names to score, and returns a function of batches that
returns the sums by name. What a library cannot score it leaves out; what it cannot run raises, and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Tensor]
Squares = Callable[[Iterable[Batch]], dict[str, Tensor]]


def batch_of_one(model: Any, names: Sequence[str]) -> Squares:
    """One example, cut to its own length, one backward pass, one square."""
    parameters = _named(model, names)

    def run(batches: Iterable[Batch]) -> dict[str, Tensor]:
        sums = _zeros(parameters)
        for batch in batches:
            for index in range(len(batch["labels"])):
                model.zero_grad(set_to_none=True)
                model(**_alone(batch, index)).loss.backward()
                for name, p in parameters.items():
                    if p.grad is not None:
                        sums[name].addcmul_(p.grad, p.grad)
        model.zero_grad(set_to_none=True)
        return sums

    return run


def opacus(model: Any, names: Sequence[str]) -> Squares:
    """Opacus: its hooks keep B gradients a parameter, which are squared and summed after each batch.

    Its hooks need ``train()`` mode, so dropout is set to 0. Positions are passed, since it wants every input to have
    the batch axis.
    """
    from opacus import GradSampleModule

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _only(model, names)
    wrapped = GradSampleModule(model.train(), loss_reduction="sum", strict=False)
    parameters = _named(model, names)

    def run(batches: Iterable[Batch]) -> dict[str, Tensor]:
        sums = _zeros(parameters)
        for batch in batches:
            _sum_loss(wrapped, _with_positions(batch)).backward()
            for name, p in parameters.items():
                sums[name] += p.grad_sample.square_().sum(0)
                p.grad_sample = p.grad = None
        return sums

    return run


def backpack(model: Any, names: Sequence[str]) -> Squares:
    """BackPACK's SumGradSquared; it has no rule for LayerNorm, whose parameters are left out."""
    from backpack import backpack as extended
    from backpack import extend
    from backpack.extensions import SumGradSquared

    without = {
        f"{prefix}.{own}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for own, _ in module.named_parameters(recurse=False)
    }
    names = [name for name in names if name not in without]
    _only(model, names)
    parameters = _named(model, names)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # it refuses one; padding is masked and gets no gradient anyway
        if isinstance(module, nn.Linear | nn.Embedding):
            extend(module)

    def run(batches: Iterable[Batch]) -> dict[str, Tensor]:
        sums = _zeros(parameters)
        for batch in batches:
            with extended(SumGradSquared()):
                _sum_loss(model, _with_positions(batch)).backward()
            for name, p in parameters.items():
                sums[name] += p.sum_grad_squared
                del p.sum_grad_squared
                p.grad = None
        return sums

    return run


def nngeometry(model: Any, names: Sequence[str]) -> Squares:
    """NNGeometry's diagonal Fisher of the layers that it knows, from the embedded inputs on."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection

    wanted = set(names)
    layers = LayerCollection()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.LayerNorm) and f"{prefix}.weight" in wanted:
            layers.add_layer_from_model(model, module)

    def log_probability(inputs: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        logits = model(inputs_embeds=inputs, attention_mask=mask).logits
        return F.log_softmax(logits, dim=1).gather(1, labels[:, None])

    def run(batches: Iterable[Batch]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for batch in batches:
            inputs = model.get_input_embeddings()(batch["input_ids"]).detach()
            backend = TorchHooksJacobianBackend(model, log_probability, layer_collection=layers)
            diagonal = backend.get_covariance_diag((inputs, batch["attention_mask"], batch["labels"]))
            diagonal = diagonal * len(inputs)
            for prefix, layer in layers.layers.items():
                start, size = layers.p_pos[prefix], layer.weight.numel()
                weight = diagonal[start : start + size].view(layer.weight.size)
                name = f"{prefix}.weight"
                sums[name] = sums[name] + weight if name in sums else weight
        return sums

    return run


def torch_func(model: Any, names: Sequence[str], chunk_size: int | None = None) -> Squares:
    """``torch.func``: vmap of grad over the examples of a batch, some at a time.

    Attention masks are made beforehand, since the model makes its own by branching on data.
    """
    from torch.func import functional_call, grad, vmap

    model.config._attn_implementation = "eager"
    lowest = torch.finfo(torch.float32).min
    state = {name: p.detach() for name, p in model.named_parameters()}
    scored = {name: state.pop(name) for name in names}
    fixed = {**state, **dict(model.named_buffers())}

    def loss(parameters: dict[str, Tensor], example: Batch) -> Tensor:
        batch = {key: value[None] for key, value in example.items()}
        labels = batch.pop("labels")
        return F.cross_entropy(functional_call(model, {**fixed, **parameters}, (), batch).logits, labels)

    gradients = vmap(grad(loss), in_dims=(None, 0), chunk_size=chunk_size)

    def run(batches: Iterable[Batch]) -> dict[str, Tensor]:
        sums = _zeros(scored)
        for batch in batches:
            mask = (batch["attention_mask"] == 0)[:, None, None, :] * lowest
            for name, gradient in gradients(scored, {**batch, "attention_mask": mask}).items():
                sums[name] += gradient.square_().sum(0)
        return sums

    return run


PER_EXAMPLE: dict[str, Callable[[Any, Sequence[str]], Squares]] = {
    "Opacus": opacus,
    "BackPACK SumGradSquared (no LayerNorm)": backpack,
    "NNGeometry diagonal": nngeometry,
    "torch.func, whole batch": torch_func,
    "torch.func, chunks of 4": lambda model, names: torch_func(model, names, 4),
}


def _named(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    wanted = set(names)
    return {name: p for name, p in model.named_parameters() if name in wanted}


def _only(model: nn.Module, names: Sequence[str]) -> None:
    wanted = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)


def _zeros(parameters: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}


def _alone(batch: Batch, index: int) -> Batch:
    mask = batch["attention_mask"]
    length = int(mask[index].sum())
    one = {key: value[index : index + 1] for key, value in batch.items()}
    return {
        key: value[:, :length] if value.shape[1:] == mask.shape[1:] else value for key, value in one.items()
    }


def _with_positions(batch: Batch) -> Batch:
    ids = batch["input_ids"]
    return {**batch, "position_ids": torch.arange(ids.shape[1]).expand(ids.shape).contiguous()}


def _sum_loss(model: Any, batch: Batch) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="sum")
