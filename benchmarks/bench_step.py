"""The optimizer step alone: BERT-base shapes, gradients filled with random numbers.

Ours against torch's AdamW over all parameters, against the twin of the paper's own optimizer, and against optimizers
that others made to save memory. Every optimizer that keeps values of its own has a model of its own; the others share
one. Gradients are put back before each sample, outside the timed stretch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from record import Record
from references.memory_optimizers import MEMORY_OPTIMIZERS
from references.official import OfficialChildTuning, eligible, official_masks
from shapes import HEAD, SharedGradients, classifier
from timing import Case, alternating

import childtuning as ct

_ADAMW = {"lr": 2e-5, "weight_decay": 0.01}
_D, _F = 0.1, 0.3
_FUSED, _FOREACH = "AdamW fused, all parameters", "AdamW foreach, all parameters"
_D_ELEMENT, _D_ROW = "child 0.1, element", "child 0.1, row"
_F_ELEMENT, _F_ROW = "task-free 0.3, element", "task-free 0.3, row"
_OFFICIAL_D, _OFFICIAL_F = "official twin D 0.1", "official twin F 0.3"


def run(record: Record, options: argparse.Namespace) -> None:
    """Measure the steps."""
    shape = "tiny" if options.quick else "bert-base"
    shared = classifier(shape)
    gradients = SharedGradients(shared)
    named = dict(shared.named_parameters())
    scores = {name: torch.rand_like(p) for name, p in named.items() if not name.startswith("classifier")}
    record.facts["parameters"] = sum(p.numel() for p in named.values())
    ours: dict[str, tuple[Any, ct.ChildOptimizer]] = {}
    cases: dict[str, Case] = {}

    def add(name: str, build: Callable[[], Case]) -> None:
        case = record.attempt(name, build, ours=name in (_D_ELEMENT, _D_ROW, _F_ELEMENT, _F_ROW))
        if case is not None:
            cases[name] = case

    def plain(make: Callable[[Any], Any]) -> Case:
        optimizer = make(shared.parameters())
        return Case(optimizer.step, lambda: gradients.fill(shared))

    def child(name: str, choose: Callable[[], ct.Child | ct.TaskFree]) -> Case:
        model = classifier(shape)
        optimizer = ct.ChildOptimizer(
            model.named_parameters(), choose(), torch.optim.AdamW, fused=True, **_ADAMW
        )
        ours[name] = model, optimizer
        return Case(optimizer.step, lambda: gradients.fill(model), ours=True)

    add(_FUSED, lambda: plain(lambda params: torch.optim.AdamW(params, fused=True, **_ADAMW)))
    add(_FOREACH, lambda: plain(lambda params: torch.optim.AdamW(params, foreach=True, **_ADAMW)))
    add(_D_ELEMENT, lambda: child(_D_ELEMENT, lambda: ct.select_child(scores, _D, always=HEAD)))
    add(_D_ROW, lambda: child(_D_ROW, lambda: ct.select_child(scores, _D, granularity="row", always=HEAD)))
    add(_F_ELEMENT, lambda: child(_F_ELEMENT, lambda: ct.TaskFree(_F, always=HEAD)))
    add(_F_ROW, lambda: child(_F_ROW, lambda: ct.TaskFree(_F, granularity="row", always=HEAD)))

    def official(mode: Any, density: float) -> Case:
        ranked = {p: scores[n] for n, p in eligible(shared).items()}
        masks = official_masks(ranked, density) if mode == "D" else None
        return plain(lambda params: OfficialChildTuning(params, mode, density, masks, **_ADAMW))

    add(_OFFICIAL_D, lambda: official("D", _D))
    add(_OFFICIAL_F, lambda: official("F", _F))

    def memory_saving(build: Any) -> Case:
        model = classifier(shape)
        prepare, step = build(model, gradients)
        return Case(step, prepare)

    for name, build in MEMORY_OPTIMIZERS.items():
        add(name, lambda build=build: memory_saving(build))

    alternating(record, cases, options.repeats)
    record.ratio("D step, 0.1, element ÷ fused AdamW", _D_ELEMENT, _FUSED, at_most=0.60)
    record.ratio("D step, 0.1, row ÷ fused AdamW", _D_ROW, _FUSED, at_most=0.25)
    record.ratio("F step, 0.3, element ÷ fused AdamW", _F_ELEMENT, _FUSED, at_most=1.5)
    record.ratio("F step, 0.3, row ÷ fused AdamW", _F_ROW, _FUSED)
    record.ratio("D step, element ÷ official twin's D", _D_ELEMENT, _OFFICIAL_D, at_most=0.10)
    record.ratio("F step, element ÷ official twin's F", _F_ELEMENT, _OFFICIAL_F, at_most=0.08)
    for name in (_D_ELEMENT, _D_ROW, _F_ELEMENT, _F_ROW):
        record.ratio(f"{name} ÷ foreach AdamW", name, _FOREACH)
    for name in (_FOREACH, _OFFICIAL_D, _OFFICIAL_F, *MEMORY_OPTIMIZERS):
        record.ratio(f"{name} ÷ fused AdamW", name, _FUSED)
    _held_bytes(record, ours)


def _held_bytes(record: Record, ours: dict[str, tuple[Any, ct.ChildOptimizer]]) -> None:
    for name, at_most in ((_D_ELEMENT, 20.5), (_D_ROW, None)):
        if name not in ours:
            record.value(f"bytes held per child entry, {name}", None, at_most=at_most)
            continue
        model, optimizer = ours[name]
        child = optimizer.child
        assert isinstance(child, ct.Child)
        head = sum(p.numel() for n, p in model.named_parameters() if n.startswith("classifier"))
        entries = child.num_trained + head
        record.facts[name] = {"trained": entries, "state_bytes": optimizer.num_state_bytes}
        record.value(
            f"bytes held per child entry, {name}", optimizer.num_state_bytes / entries, at_most=at_most
        )
        record.value(
            f"bytes per child entry in every tensor that optimizer and child reach, {name}",
            _reachable_bytes(optimizer, model) / entries,
        )


def _reachable_bytes(root: Any, model: torch.nn.Module) -> int:
    """Count the storages that an object holds beside the model's parameters and their gradients."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    known |= {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
    found: dict[int, int] = {}
    seen: set[int] = set()
    stack: list[Any] = [root]
    while stack:
        thing = stack.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            if storage.data_ptr() not in known:
                found[storage.data_ptr()] = storage.nbytes()
            stack.append(thing.grad if thing.is_leaf else None)
        elif isinstance(thing, dict):
            stack.extend((*thing.keys(), *thing.values()))
        elif isinstance(thing, list | tuple | set | frozenset):
            stack.extend(thing)
        elif hasattr(thing, "nbytes") and hasattr(thing, "dtype"):
            found[id(thing)] = thing.nbytes
        elif type(thing).__module__.startswith(("childtuning", "torch.optim")):
            stack.append(getattr(thing, "__dict__", None))
            slots = getattr(type(thing), "__slots__", ())
            stack.extend(getattr(thing, slot, None) for slot in slots)
    return sum(found.values())
