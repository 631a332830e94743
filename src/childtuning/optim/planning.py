"""Lay out what an optimizer works on: which parameters the inner optimizer is given, and by which kind of step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import nn

from childtuning.child import Child
from childtuning.errors import ConfigError, ParameterError
from childtuning.optim.compact import CompactStep
from childtuning.optim.fresh_masks import FixedMasks, FreshMasks
from childtuning.optim.fresh_rows import FreshRows
from childtuning.optim.groups import Group
from childtuning.optim.masked import MaskedStep
from childtuning.optim.release import GradientRelease
from childtuning.part import Part
from childtuning.patterns import canonical_names, match_names
from childtuning.task_free import TaskFree

Named = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Plan:
    """How a child is trained.

    Args:
        work: what does a step.
        inner: for each group, what the inner optimizer is given.
        shown: for each group, what ``param_groups`` shows, by name: where gradients are to be found.
        changed: what was changed in the model beside ``requires_grad``, to be removed with ``remove()``.
        trained: for a fixed child, whether each parameter has trained entries.
    """

    work: CompactStep | MaskedStep
    inner: list[list[nn.Parameter]]
    shown: list[Named]
    changed: GradientRelease | FreshRows | None = None
    trained: list[tuple[nn.Parameter, bool]] = field(default_factory=list)

    def freeze(self) -> None:
        """Let a parameter of a fixed child require a gradient exactly if it has trained entries."""
        for parameter, is_trained in self.trained:
            parameter.requires_grad_(is_trained)
            if not is_trained:
                parameter.grad = None


def plan_compact(
    groups: Sequence[Group],
    child: Child,
    scale: float,
    *,
    can_fuse: Sequence[bool],
    release_gradients: bool,
    model: nn.Module | None,
) -> Plan:
    """Give the inner optimizer compact tensors of a fixed child's entries."""
    named = {name: p for group in groups for name, p in group.named.items()}
    parts = child.resolve({name: p.shape for name, p in named.items()})
    plain = dict(zip(parts, canonical_names(parts), strict=True))
    members: list[list[tuple[nn.Parameter, Part]]] = []
    scaled: list[nn.Parameter] = []
    for group in groups:
        for name, parameter in group.named.items():
            eligible_part = child.parts.get(plain[name])
            if eligible_part is not None and eligible_part.is_whole and parts[name] is eligible_part:
                scaled.append(parameter)
        members.append([(p, parts[name]) for name, p in group.named.items() if not parts[name].is_empty])
    released = release_gradients or model is not None
    if released:
        _check_one_process()
    work = CompactStep(members, scale, scaled, can_fuse=can_fuse, released=released)
    inner = work.inner_parameters()
    names = {id(p): name for name, p in named.items()}
    if released:
        shown = [
            [(names.get(id(p), f"child.{i}.{k}"), p) for k, p in enumerate(given)]
            for i, given in enumerate(inner)
        ]
    else:
        shown = [[(names[id(p)], p) for p, _ in pairs] for pairs in members]
    by_parameter = {id(named[name]): part for name, part in parts.items()}
    release = GradientRelease(work, by_parameter, model) if released else None
    trained = [(p, not parts[name].is_empty) for name, p in named.items()]
    return Plan(work, inner, shown, release, trained)


def plan_masked(
    groups: Sequence[Group],
    child: Child | TaskFree,
    scale: float,
    can_fuse: Sequence[bool],
    *,
    official: bool,
    model: nn.Module | None,
) -> Plan:
    """Give the inner optimizer every parameter that requires a gradient, under masks."""
    shown = [[(name, p) for name, p in group.named.items() if p.requires_grad] for group in groups]
    names = [name for name, _ in chain.from_iterable(shown)]
    plain = dict(zip(names, canonical_names(names), strict=True))
    work_groups = [{plain[name]: p for name, p in pairs} for pairs in shown]
    shapes = {name: p.shape for named in work_groups for name, p in named.items()}
    rows = None
    if isinstance(child, TaskFree):
        exempt = match_names(child.always, shapes) if not official else set()
        masks: FixedMasks | FreshMasks = FreshMasks(child, shapes, exempt)
        if model is not None and not official:
            _check_one_process()
            rows = FreshRows(masks, {name: p for named in work_groups for name, p in named.items()}, model)
    else:
        parts = child.resolve(shapes)
        masks = FixedMasks({name: parts[name] for name in child.parts})
    work = MaskedStep(work_groups, masks, scale, can_fuse=can_fuse, rows=rows)
    return Plan(work, [list(named.values()) for named in work_groups], shown, rows)


def check_released(child: Child | TaskFree, release_gradients: bool, official: bool) -> None:
    """Refuse to release gradients that a step needs whole.

    Raises:
        ConfigError: for a task-free child, or under the official preset.
    """
    if release_gradients and (official or isinstance(child, TaskFree)):
        kind = "preset='official'" if official else "a task-free child"
        raise ConfigError(
            f"release_gradients=True keeps a fixed child's entries only, but {kind} needs every gradient whole. "
            "Leave it out, or use a fixed child."
        )


def _check_one_process() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ConfigError(
            "gradients that are released or formed for the child alone are not averaged between processes. "
            "Leave out release_gradients and model."
        )


def check_trained(plan: Plan) -> None:
    """Raise a ParameterError if nothing is trained."""
    if not any(plan.shown):
        raise ParameterError(
            "the child trains no entry of these parameters. Raise the density, or pass always."
        )
