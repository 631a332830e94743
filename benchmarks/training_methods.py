"""A whole training step (forward, backward, optimizer) of each way to fine-tune, for time and for memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from references.paca import paca
from references.peft_methods import PEFT_METHODS, lora
from shapes import HEAD, classifier, random_batch
from torch import Tensor, nn

import childtuning as ct
from childtuning.child import random_child
from childtuning.fast.dropout import spare_dropouts

FULL, ROW, LORA = "full fine-tuning", "child 0.1, row", "PEFT LoRA r=16"
SEEDED = f"{LORA}, our dropouts"
COLUMN, PACA = "child 0.1, column", "PaCA, as many entries"
ELEMENT = "child 0.1, element"
_ADAMW = {"lr": 2e-5, "weight_decay": 0.01, "fused": True}


@dataclass
class TrainingStep:
    """One step, ready to be run again and again, and how many entries it trains."""

    run: Callable[[], None]
    trained: int


def training_step(method: str, shape: str, batch_size: int, num_tokens: int) -> TrainingStep:
    """Build a model of the shape with random weights and a step of the method."""
    model = classifier(shape).train()
    batch = random_batch(model, batch_size, num_tokens)
    if method.startswith("budget "):
        return _within(method.removeprefix("budget "), model, batch)
    if (build := METHODS.get(method)) is None:
        _, density, granularity = re.split(r",? ", method)  # child 0.02, column
        build = _child(granularity, float(density))
    return build(model, batch)


def _within(budget: str, model: Any, batch: dict[str, Tensor]) -> TrainingStep:
    """Train the columns that a budget allows, by random scores."""
    scores = {n: torch.rand(p.shape) for n, p in model.named_parameters() if not n.startswith("classifier")}
    child = ct.select_child(
        scores,
        budget=ct.Budget.parse(budget),
        costs=ct.training_costs(model, batch),
        granularity="column",
        row_axes=ct.unit_axes(model, "column"),
        always=HEAD,
    )
    return _of_child(model, batch, child)


def _full(model: Any, batch: dict[str, Tensor]) -> TrainingStep:
    return _plain(model, batch)


def _head_only(model: Any, batch: dict[str, Tensor]) -> TrainingStep:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    return _plain(model, batch)


def _plain(model: nn.Module, batch: dict[str, Tensor]) -> TrainingStep:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **_ADAMW)
    return TrainingStep(_step(model, batch, optimizer), sum(p.numel() for p in trained))


def _child(granularity: str, density: float = 0.1) -> Callable[[Any, dict[str, Tensor]], TrainingStep]:
    def build(model: Any, batch: dict[str, Tensor]) -> TrainingStep:
        child = random_child(model, density, granularity=granularity, always=HEAD)
        return _of_child(model, batch, child, structured=granularity != "element")

    return build


def _of_child(
    model: Any, batch: dict[str, Tensor], child: ct.Child, *, structured: bool = True
) -> TrainingStep:
    head = sum(p.numel() for n, p in model.named_parameters() if n.startswith("classifier"))
    optimizer = ct.ChildOptimizer(
        model.named_parameters(),
        child,
        torch.optim.AdamW,
        release_gradients=True,
        model=model if structured else None,
        **_ADAMW,
    )
    return TrainingStep(_step(model, batch, optimizer), child.num_trained + head)


def _task_free(granularity: str) -> Callable[[Any, dict[str, Tensor]], TrainingStep]:
    def build(model: Any, batch: dict[str, Tensor]) -> TrainingStep:
        child = ct.TaskFree(density=0.3, granularity=granularity, always=HEAD)
        more = {} if granularity == "element" else {"model": model}
        optimizer = ct.ChildOptimizer(model.named_parameters(), child, torch.optim.AdamW, **more, **_ADAMW)
        return TrainingStep(_step(model, batch, optimizer), sum(p.numel() for p in model.parameters()))

    return build


def _peft(wrap: Callable[[Any], nn.Module]) -> Callable[[Any, dict[str, Tensor]], TrainingStep]:
    return lambda model, batch: _plain(wrap(model).train(), batch)


def _seeded(model: Any, batch: dict[str, Tensor]) -> TrainingStep:
    """LoRA with what structured layers bring besides: so much of the gain has nothing to do with children."""
    wrapped = lora(model).train()
    spare_dropouts(wrapped)
    return _plain(wrapped, batch)


def _step(model: Any, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def run() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


METHODS: dict[str, Callable[[Any, dict[str, Tensor]], TrainingStep]] = {
    FULL: _full,
    ROW: _child("row"),
    COLUMN: _child("column"),
    ELEMENT: _child("element"),
    "task-free 0.3, element": _task_free("element"),
    "task-free 0.3, row": _task_free("row"),
    **{name: _peft(wrap) for name, wrap in PEFT_METHODS.items()},
    SEEDED: _seeded,
    PACA: _peft(paca),
    "head only": _head_only,
}
OURS = tuple(name for name in METHODS if name.startswith(("child", "task-free")))
