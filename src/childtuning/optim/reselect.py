"""Carry an optimizer's state over from one fixed child to the next, entry by entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from childtuning.kernels import Places
from childtuning.optim.compact import CompactStep

_SECOND_MOMENT = "exp_avg_sq"


def carry_state(
    old: CompactStep,
    old_inner: Optimizer,
    new: CompactStep,
    new_inner: Optimizer,
    second_moments: Mapping[nn.Parameter, Tensor],
) -> None:
    """Give the new inner optimizer the state of the entries that stay.

    Entries that join start at zero, but for Adam's second moment where an estimate is at hand: beside a step count
    that goes on, zero moments would make their first steps about three times too long.

    Args:
        old, old_inner: what trained so far.
        new, new_inner: what trains from now on, without state.
        second_moments: by parameter, dense estimates of the squared gradient as the inner optimizer sees it.
    """
    homes = {id(parameter): (flat, places) for parameter, flat, places in _homes(old)}
    _carry_masters(old, new)
    counters = _counters(old, old_inner)
    for group, (wholes, buckets) in enumerate(zip(new.whole, new.buckets, strict=True)):
        if group not in counters:
            continue
        for flat in [*wholes, *(bucket.values for bucket in buckets)]:
            new_inner.state[flat] = {key: _copy(value) for key, value in counters[group].items()}
    for parameter, flat, places in _homes(new):
        state = new_inner.state.get(flat)
        if not state:
            continue
        home = homes.get(id(parameter))
        before = old_inner.state.get(home[0], {}) if home else {}
        for key in _entry_keys(old, old_inner):
            dense = torch.zeros_like(parameter, dtype=flat.dtype, memory_format=torch.contiguous_format)
            if key == _SECOND_MOMENT and parameter in second_moments:
                dense.copy_(second_moments[parameter].view_as(dense))
            if home is not None and key in before:
                _write(dense, before[key], home[1], old, home[0], parameter)
            _read(dense, state, key, places, new, flat, parameter)


def _carry_masters(old: CompactStep, new: CompactStep) -> None:
    """Keep the precision beyond the weights' own of the entries that stay."""
    known = {id(slot.parameter): (bucket, slot) for bucket, slot in old.slots() if bucket.is_master}
    for bucket, slot in new.slots():
        if bucket.is_master and id(slot.parameter) in known:
            before, home = known[id(slot.parameter)]
            dense = slot.parameter.detach().to(bucket.dtype, memory_format=torch.contiguous_format)
            home.places.scatter_(dense, home.take(before.values.detach()))
            stretch = slot.take(bucket.values.detach())
            stretch.copy_(slot.places.gather(dense, torch.empty_like(stretch)))


def _homes(work: CompactStep) -> Iterator[tuple[nn.Parameter, nn.Parameter, Places | None]]:
    """Every trained parameter, the tensor that the inner optimizer knows it by, and where its entries lie."""
    for wholes, buckets in zip(work.whole, work.buckets, strict=True):
        yield from ((parameter, parameter, None) for parameter in wholes)
        for bucket in buckets:
            yield from ((slot.parameter, bucket.values, slot.places) for slot in bucket.slots)


def _entry_keys(work: CompactStep, inner: Optimizer) -> list[str]:
    """Names of the states that hold a number for every entry."""
    keys: dict[str, None] = {}
    for _, flat, _ in _homes(work):
        for key, value in inner.state.get(flat, {}).items():
            if key != "step" and isinstance(value, Tensor) and value.shape == flat.shape:
                keys[key] = None
    return list(keys)


def _counters(work: CompactStep, inner: Optimizer) -> dict[int, dict[str, Any]]:
    """Group by group, the states that are one number for a whole tensor, such as the step."""
    entries = set(_entry_keys(work, inner))
    found: dict[int, dict[str, Any]] = {}
    for group, given in enumerate(work.inner_parameters()):
        states = [inner.state[flat] for flat in given if inner.state.get(flat)]
        if states:
            found[group] = {key: value for key, value in states[0].items() if key not in entries}
    every = next(iter(found.values()), None)
    if every is not None:
        for group in range(len(work.whole)):
            found.setdefault(group, every)
    return found


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _stretch(work: CompactStep, flat: nn.Parameter, parameter: nn.Parameter, values: Tensor) -> Tensor:
    """This parameter's stretch of a bucket's state."""
    slot = next(
        slot for bucket, slot in work.slots() if bucket.values is flat and slot.parameter is parameter
    )
    return slot.take(values)


def _write(
    dense: Tensor,
    values: Tensor,
    places: Places | None,
    work: CompactStep,
    flat: nn.Parameter,
    parameter: nn.Parameter,
) -> None:
    if places is None:
        dense.copy_(values)
    else:
        places.scatter_(dense, _stretch(work, flat, parameter, values).to(dense.dtype))


def _read(
    dense: Tensor,
    state: dict[str, Any],
    key: str,
    places: Places | None,
    work: CompactStep,
    flat: nn.Parameter,
    parameter: nn.Parameter,
) -> None:
    if places is None:
        state[key] = dense
        return
    if key not in state:
        state[key] = torch.zeros(flat.shape, dtype=flat.dtype, device=flat.device)
    stretch = _stretch(work, flat, parameter, state[key])
    stretch.copy_(places.gather(dense, torch.empty_like(stretch)))
