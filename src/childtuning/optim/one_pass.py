"""Adam and AdamW by the kernels of ``fast/adamw.py``, with the state stored in the inner optimizer.

This module decides per parameter and step whether the kernels apply; everything else goes through ``d_step`` and
``f_step``, which compute the same update up to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from childtuning import fast
from childtuning.child.task_free import TaskFree
from childtuning.errors import ParameterError
from childtuning.fast import adamw
from childtuning.fast.adamw import ChildTable
from childtuning.fast.library import AdamWStep, MaskDraw, Member
from childtuning.optim.trained import Trained


@dataclass(eq=False)
class _Kept:
    """A parameter's state as long as it is the same dict, and its step count as a number."""

    state: dict[str, Any]
    place: int  # of its step count
    first: Tensor
    second: Tensor
    count: int
    weight_at: int = 0  # the address at which the weight was found to be served


class OnePass:
    """The one-pass update of a child.

    Args:
        groups: what is trained, by parameter group.
        inner: the optimizer whose update it does where it knows it.
    """

    def __init__(self, groups: Sequence[Sequence[Trained]], inner: Optimizer) -> None:
        self._known = [adamw.supports(type(inner), options) for options in inner.param_groups]
        self._partial = [t for group in groups for t in group if t.runs is not None]
        self._kept: dict[Trained, _Kept] = {}
        places = {t: place for place, t in enumerate(t for group in groups for t in group)}
        self._places = places
        # The states' step counts are views of it, counted up at once.
        self._steps = torch.zeros(len(places), device="cpu")
        self._tables: dict[torch.device, tuple[list[Trained], ChildTable]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copy it without what it keeps of states: pickle gives a copy's counts storages of their own."""
        return {**self.__dict__, "_kept": {}}

    @torch.no_grad()
    def run(
        self,
        groups: Sequence[Sequence[Trained]],
        inner: Optimizer,
        free: TaskFree | None,
        step: int,
    ) -> tuple[list[Trained], list[Trained]]:
        """Update what the kernels support; return those parameters, and the other ones that have a gradient.

        Args:
            groups: what is trained, by parameter group.
            inner: whose options and state are used.
            free: the task-free child whose masks lie on what ``draws``; ``None`` for a fixed child.
            step: counted from 0; names the masks.
        """
        for options, known in zip(inner.param_groups, self._known, strict=True):
            if known and not adamw.supports(type(inner), options):
                raise ParameterError(
                    "amsgrad, capturable or differentiable was turned on after the optimizer was built. "
                    "Pass amsgrad=True when you build it."
                )
        is_open = fast.enabled()
        done: list[Trained] = []
        rest: list[Trained] = []
        counted: list[int] = []
        child: dict[Trained, Member] = {}
        by_entry: list[tuple[Member, MaskDraw]] = []
        by_row: list[tuple[Member, Tensor]] = []
        for group, options, known in zip(groups, inner.param_groups, self._known, strict=True):
            steps: dict[tuple[int, float], AdamWStep] = {}  # most parameters of a group share theirs
            for t in group:
                gradient = t.gradient()
                if gradient is None:
                    continue
                kept = self._keep(t, gradient, inner, free) if is_open and known else None
                if kept is None:
                    self._kept.pop(t, None)
                    _hand_over(inner, options, t)
                    rest.append(t)
                    continue
                done.append(t)
                counted.append(kept.place)
                kept.count += 1
                hyper = steps.get((kept.count, t.scale))
                if hyper is None:
                    hyper = steps[kept.count, t.scale] = _hyperparameters(inner, options, kept.count, t.scale)
                master = None
                if t.parameter.dtype is not t.dtype:
                    t.read()
                    master = t.value.detach()
                member = Member(t.parameter, gradient, kept.first, kept.second, hyper, master)
                if free is None:
                    child[t] = member
                elif t.rows is not None:
                    member = member._replace(gradient=t.formed_rows(gradient))
                    by_row.append((member, _places(t, t.rows)))
                elif t.units.kind == "element" or t.parameter.dim() < 2:
                    draw = free.draw(t.name, step)
                    assert draw is not None  # a density below 1 does not keep everything
                    by_entry.append((member, draw._replace(start=t.piece.offset)))
                else:
                    rows = free.kept_units(t.name, t.piece.shape, step, t.piece).nonzero().squeeze(1)
                    by_row.append((member, _places(t, rows, of_all=True)))
        if counted:
            self._steps[counted] += 1.0
        self._child_(child)
        if by_entry:
            adamw.masked_(by_entry)
        if by_row:
            adamw.rows_(by_row)
        return done, rest

    def _keep(self, t: Trained, gradient: Tensor, inner: Optimizer, free: TaskFree | None) -> _Kept | None:
        """Return a parameter's state, made if need be as the inner class has it; ``None`` if it is not served."""
        kept = self._kept.get(t)
        if kept is not None and kept.state is not inner.state.get(t.value):
            kept = None
        if kept is not None and kept.weight_at == t.parameter.data_ptr() and free is None:
            return kept if adamw.fits(gradient) else None
        if not _fits(t, gradient, free):
            return None
        if kept is not None:
            kept.weight_at = t.parameter.data_ptr()
            return kept
        state = inner.state[t.value]
        if not state:
            state["step"] = torch.tensor(0.0, device="cpu")
            state["exp_avg"] = torch.zeros(t.value.shape, dtype=t.dtype, device=t.value.device)
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        if not adamw.fits(state["exp_avg"], state["exp_avg_sq"]):
            return None
        place, count = self._places[t], int(state["step"])
        self._steps[place] = count
        state["step"] = self._steps[place]  # on the CPU: a fused optimizer has it where reading it waits
        kept = _Kept(state, place, state["exp_avg"], state["exp_avg_sq"], count, t.parameter.data_ptr())
        self._kept[t] = kept
        return kept

    def _child_(self, members: Mapping[Trained, Member]) -> None:
        """Update a fixed child's entries, one call for each device."""
        for device in dict.fromkeys(member.weight.device for member in members.values()):
            if device not in self._tables:
                there = [t for t in self._partial if t.parameter.device == device]
                runs = [t.runs for t in there if t.runs is not None]
                self._tables[device] = (there, ChildTable(runs))
            there, table = self._tables[device]
            table.step_([members.get(t) for t in there])


def _fits(t: Trained, gradient: Tensor, free: TaskFree | None) -> bool:
    """Tell whether the kernels serve a parameter with this gradient."""
    if free is None:
        is_served = t.runs is not None and t.runs.starts.dtype is torch.int32
    else:
        shape = t.parameter.shape
        is_run = t.is_direct and t.draws and t.units.is_run(shape) and len(t.units.axes(shape)) < 2
        is_served = is_run and (t.rows is not None or gradient.shape == shape)
    return is_served and adamw.fits(t.parameter, gradient) and t.parameter.numel() > 0


def _hyperparameters(inner: Optimizer, options: Mapping[str, Any], count: int, scale: float) -> AdamWStep:
    beta1, beta2 = options["betas"]
    return AdamWStep(
        lr=float(options["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        step=count,
        decoupled=isinstance(inner, torch.optim.AdamW) or bool(options.get("decoupled_weight_decay")),
        scale=-scale if options.get("maximize") else scale,
    )


def _places(t: Trained, rows: Tensor, *, of_all: bool = False) -> Tensor:
    """Say for each row of the parameter which row of its gradient it has: int32 [R], −1 for none."""
    places = torch.full((len(t.parameter),), -1, dtype=torch.int32, device=rows.device)
    places[rows] = (rows if of_all else torch.arange(len(rows), device=rows.device)).to(torch.int32)
    return places


def _hand_over(inner: Optimizer, options: Mapping[str, Any], t: Trained) -> None:
    """Prepare a state for the inner optimizer: its fused step needs the count on the device."""
    step = (inner.state.get(t.value) or {}).get("step")
    if options.get("fused") and isinstance(step, Tensor) and step.device != t.value.device:
        inner.state[t.value]["step"] = step.to(t.value.device)
