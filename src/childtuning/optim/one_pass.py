"""Adam and AdamW through the kernels of ``fast/adamw.py``, with their state where the inner optimizer keeps it.

What it serves is decided here, parameter by parameter and step by step; everything else is left to ``d_step`` and
``f_step``, of which this is the same update to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from childtuning.child.task_free import TaskFree
from childtuning.errors import ParameterError
from childtuning.fast import adamw
from childtuning.fast.adamw import ChildTable
from childtuning.fast.library import AdamWStep, MaskDraw, Member
from childtuning.optim.trained import Trained


class OnePass:
    """The one-pass update of a child.

    Args:
        groups: what is trained, by parameter group.
        inner: the optimizer whose update it does where it knows it.
    """

    def __init__(self, groups: Sequence[Sequence[Trained]], inner: Optimizer) -> None:
        self._known = [adamw.supports(type(inner), options) for options in inner.param_groups]
        self._partial = [t for group in groups for t in group if t.runs is not None]
        self._tables: dict[torch.device, tuple[list[Trained], ChildTable]] = {}

    @torch.no_grad()
    def run(
        self,
        groups: Sequence[Sequence[Trained]],
        inner: Optimizer,
        free: TaskFree | None,
        step: int,
    ) -> tuple[list[Trained], list[Trained]]:
        """Update what the kernels serve; return that, and what has a gradient and is not served.

        Args:
            groups: what is trained, by parameter group.
            inner: whose options and state are used.
            free: the task-free child whose masks lie on what ``draws``; ``None`` for a fixed child.
            step: counted from 0; names the masks.
        """
        done: list[Trained] = []
        rest: list[Trained] = []
        child: dict[int, Member] = {}
        by_entry: list[tuple[Member, MaskDraw]] = []
        by_row: list[tuple[Member, Tensor]] = []
        for group, options, known in zip(groups, inner.param_groups, self._known, strict=True):
            if known and not adamw.supports(type(inner), options):
                raise ParameterError(
                    "amsgrad, capturable or differentiable was turned on after the optimizer was built. "
                    "Pass amsgrad=True when you build it."
                )
            for t in group:
                gradient = t.gradient()
                if gradient is None:
                    continue
                served = known and not gradient.is_sparse and self._fits(t, gradient, inner, free)
                if not served:
                    _hand_over(inner, options, t)
                    rest.append(t)
                    continue
                done.append(t)
                if free is None:
                    child[id(t)] = _member(t, gradient, inner, options)
                elif t.rows is not None:
                    by_row.append((_member(t, t.formed_rows(gradient), inner, options), _places(t, t.rows)))
                elif t.units.kind == "element" or t.parameter.dim() < 2:
                    draw = free.draw(t.name, step)
                    assert draw is not None  # a density below 1 does not keep everything
                    by_entry.append((_member(t, gradient, inner, options), draw))
                else:
                    kept = free.kept_units(t.name, t.parameter.shape, step).nonzero().squeeze(1)
                    places = _places(t, kept, of_all=True)
                    by_row.append((_member(t, gradient, inner, options), places))
        self._child_(child)
        if by_entry:
            adamw.masked_(by_entry)
        if by_row:
            adamw.rows_(by_row)
        return done, rest

    def _fits(self, t: Trained, gradient: Tensor, inner: Optimizer, free: TaskFree | None) -> bool:
        """Tell whether the kernels serve a parameter with this gradient and the state that it has so far."""
        state = inner.state.get(t.value) or {}
        moments = [state[name] for name in ("exp_avg", "exp_avg_sq") if name in state]
        if not t.parameter.numel() or not adamw.fits(t.parameter, gradient, *moments):
            return False
        if free is None:
            return t.runs is not None and t.runs.starts.dtype == torch.int32
        is_run = t.units.is_run(t.parameter.shape)
        return (
            t.is_direct and t.draws and is_run and (t.rows is not None or gradient.shape == t.parameter.shape)
        )

    def _child_(self, members: Mapping[int, Member]) -> None:
        """Update a fixed child's entries, one call for each device."""
        for device in dict.fromkeys(member.weight.device for member in members.values()):
            if device not in self._tables:
                there = [t for t in self._partial if t.parameter.device == device]
                runs = [(t.runs.starts, t.runs.width) for t in there if t.runs is not None]
                self._tables[device] = (there, ChildTable(runs))
            there, table = self._tables[device]
            table.step_([members.get(id(t)) for t in there])


def _member(t: Trained, gradient: Tensor, inner: Optimizer, options: Mapping[str, Any]) -> Member:
    """Count one more step of a parameter; its moments are made if need be, as the inner optimizer's class has them."""
    state = inner.state[t.value]
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros(t.value.shape, dtype=t.dtype, device=t.value.device)
        state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
    if state["step"].is_cuda:  # where a fused optimizer keeps it: counting there would wait for the device
        state["step"] = state["step"].cpu()
    state["step"] += 1
    if t.parameter.dtype != t.dtype:
        t.read()
    beta1, beta2 = options["betas"]
    step = AdamWStep(
        lr=float(options["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        step=int(state["step"]),
        decoupled=isinstance(inner, torch.optim.AdamW) or bool(options.get("decoupled_weight_decay")),
        scale=-t.scale if options.get("maximize") else t.scale,
    )
    master = t.value.detach() if t.parameter.dtype != t.dtype else None
    return Member(t.parameter, gradient, state["exp_avg"], state["exp_avg_sq"], step, master)


def _places(t: Trained, rows: Tensor, *, of_all: bool = False) -> Tensor:
    """Say for each row of the parameter which row of its gradient it has: int32 [R], −1 for none."""
    places = torch.full((len(t.parameter),), -1, dtype=torch.int32, device=rows.device)
    places[rows] = (rows if of_all else torch.arange(len(rows), device=rows.device)).to(torch.int32)
    return places


def _hand_over(inner: Optimizer, options: Mapping[str, Any], t: Trained) -> None:
    """Let the inner optimizer go on from a state of ours: its fused step reads the count on the device."""
    step = (inner.state.get(t.value) or {}).get("step")
    if options.get("fused") and isinstance(step, Tensor) and step.device != t.value.device:
        inner.state[t.value]["step"] = step.to(t.value.device)
