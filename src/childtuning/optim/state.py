"""An optimizer's state by parameter name: saved, loaded, and carried over from one fixed child to the next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from childtuning.child import Child, TaskFree
from childtuning.child.eligible import canonical_name
from childtuning.errors import ParameterError
from childtuning.optim.trained import Trained

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)
Groups = Sequence[Sequence[Trained]]
_SECOND_MOMENT = "exp_avg_sq"
START = "start"  # where a pull towards the pretrained values leads to
_VALUES = (START, "ax")  # states that begin as the parameter; ASGD's average is one
_NO_OPTIONS = ("params", "param_names")
_VERSION = 2  # of the format of a state


def with_state_hooks(cls: type[OptimizerT]) -> type[OptimizerT]:
    """Let the ``state_dict`` and ``load_state_dict`` of an optimizer run the hooks that torch registers for them."""
    save, load = cls.state_dict, cls.load_state_dict

    @wraps(save)
    def state_dict(self: OptimizerT) -> dict[str, Any]:
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = save(self)
        for after in self._optimizer_state_dict_post_hooks.values():
            if (other := after(self, state)) is not None:
                state = other
        return state

    @wraps(load)
    def load_state_dict(self: OptimizerT, state_dict: dict[str, Any]) -> None:
        state_dict = dict(state_dict)  # a hook may put something in the place of an entry
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            if (other := before(self, state_dict)) is not None:
                state_dict = other
        load(self, state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    cls.state_dict, cls.load_state_dict = state_dict, load_state_dict  # type: ignore[method-assign]
    return cls


def state_by_name(groups: Groups, inner: Optimizer) -> dict[str, Any]:
    """Return the inner optimizer's state, its options, and master values, keyed by parameter name.

    Returns:
        ``state``: by name, what the inner optimizer keeps; ``param_groups``: its options, ``params`` being names;
        ``masters``: by name, values of more precision than the weights'.
    """
    masters: dict[str, Tensor] = {}
    for t in _all(groups):
        if t.parameter.dtype != t.dtype and t.is_filled:
            t.read()
            masters[t.name] = t.value.detach()
    return {
        "state": {t.name: dict(inner.state[t.value]) for t in _all(groups) if inner.state.get(t.value)},
        "param_groups": [
            {**{key: value for key, value in options.items() if key != "params"}, "params": _names(group)}
            for group, options in zip(groups, inner.param_groups, strict=True)
        ],
        "masters": masters,
    }


@torch.no_grad()
def load_by_name(saved: Mapping[str, Any], groups: Groups, inner: Optimizer) -> None:
    """Load what ``state_by_name`` returned, in any order of parameters and groups, of this model or of a whole one.

    Raises:
        ParameterError: a parameter's state is missing, has another shape, or belongs to an unknown parameter.
    """
    ours = {t.name: t for t in _all(groups)}
    options = {name: group for group in saved["param_groups"] for name in group["params"]}
    differing = set(options) ^ set(ours)
    if differing:
        raise ParameterError(
            f"the optimizer state and the optimizer differ in {min(differing)!r} ({len(differing)} such). "
            "Build the optimizer with the parameters that the state was saved with."
        )
    saved = _of_this_process(saved, groups)
    for name, entries in saved["state"].items():
        for key, value in entries.items():
            if (
                key != "step"
                and isinstance(value, Tensor)
                and value.dim()
                and value.shape != ours[name].value.shape
            ):
                raise ParameterError(
                    f"the state {key!r} of {name!r} has shape {list(value.shape)}, not {list(ours[name].value.shape)}. "
                    "Build the optimizer with the child saved beside it."
                )
    inner.state.clear()
    for name, entries in saved["state"].items():
        t = ours[name]
        inner.state[t.value] = {
            key: _copied(entry, t) if _is_by_entry(entry, t) else _copied(entry)
            for key, entry in entries.items()
        }
    for position, (group, own) in enumerate(zip(groups, inner.param_groups, strict=True)):
        found = options[group[0].name] if group else _empty(saved["param_groups"], position)
        for t in group:
            if any(
                options[t.name].get(key) != value for key, value in found.items() if key not in _NO_OPTIONS
            ):
                raise ParameterError(
                    f"{t.name!r} and {group[0].name!r} were saved with different options and share a group here. "
                    "Build the optimizer with the groups that the state was saved with."
                )
        own.update({key: deepcopy(value) for key, value in found.items() if key not in _NO_OPTIONS})
    for name, t in ours.items():
        t.empty()
        if name in saved["masters"]:
            t.read()  # the model's weights win where the two disagree
            t.value.copy_(saved["masters"][name])


def settings(child: Child | TaskFree, inner: Optimizer, **others: Any) -> dict[str, Any]:
    """Return what a state and the optimizer that loads it must have in common."""
    return {
        "version": _VERSION,
        "identity": child.fingerprint(),
        "inner": type(inner).__name__,
        **others,
    }


def about_child(saved: Mapping[str, Any], own: Mapping[str, Any], groups: Groups) -> dict[str, Any]:
    """Return what a saved state says of its child and its format.

    Args:
        saved: what ``state_dict`` returned.
        own: the ``settings`` of the optimizer that loads it.
        groups: its parameters.
    Raises:
        ParameterError: it is that of another child, of other settings, of a newer format, or of other pieces than this
            process holds.
    """
    about = saved.get("child")
    if about is None or about["identity"] != own["identity"]:
        raise ParameterError(
            "the optimizer state belongs to another child. Build the optimizer with the child saved beside it."
        )
    if about.get("version", 1) > _VERSION:
        raise ParameterError(
            f"the optimizer state is of version {about['version']}, this library reads {_VERSION}. Update it."
        )
    for name, value in own.items():
        if name != "version" and about.get(name, value) != value:
            raise ParameterError(
                f"the optimizer state was saved with {name}={about[name]!r}, and this optimizer has {value!r}. "
                "Build it as it was."
            )
    if about.get("pieces") == pieces_held(groups):
        return about
    if about.get("pieces") is None and "version" in about:  # that of a whole model, here in pieces
        return {key: value for key, value in about.items() if key != "frozen_bits"}
    raise ParameterError(
        "the optimizer state holds the pieces of another process, or of another number of processes. Use "
        "childtuning.distributed.save and load."
    )


def from_version_1(saved: Mapping[str, Any], groups: Groups, *, is_fixed: bool) -> dict[str, Any]:
    """Read a state of format 1, which lay by position: a fixed child's partial parameters in one flat tensor.

    Its parameters and groups have to come in the order that they were saved in; format 1 does not say which it was.
    """
    state: dict[str, dict[str, Any]] = {}
    masters: dict[str, Tensor] = {}
    param_groups = []
    flat_masters = iter(saved["child"]["masters"])
    for group, options in zip(groups, saved["param_groups"], strict=True):
        whole = [t for t in group if t.part.is_whole and (is_fixed or t.parameter.requires_grad)]
        buckets: dict[Any, list[Trained]] = {}
        for t in group:
            if not t.part.is_whole:
                buckets.setdefault((t.parameter.device, t.parameter.dtype), []).append(t)
        for position, members in zip(
            options["params"], [[t] for t in whole] + list(buckets.values()), strict=True
        ):
            entries = saved["state"].get(position, {})
            sizes = [t.value.numel() for t in members]
            for key, value in entries.items():
                is_flat = isinstance(value, Tensor) and value.dim() and len(members[0].value.shape) == 1
                pieces = (
                    value.split(sizes) if is_flat and len(value) == sum(sizes) else [value] * len(members)
                )
                for t, piece in zip(members, pieces, strict=True):
                    state.setdefault(t.name, {})[key] = piece
        for members in buckets.values():
            flat = next(flat_masters)
            if flat is not None:
                pieces = flat.split([t.value.numel() for t in members])
                masters |= {t.name: piece for t, piece in zip(members, pieces, strict=True)}
        param_groups.append({**options, "params": _names(group)})
    return {"state": state, "param_groups": param_groups, "masters": masters}


def _of_this_process(saved: Mapping[str, Any], groups: Groups) -> dict[str, Any]:
    """Return what this process holds of a state; of a whole parameter's entries those of its piece."""

    def cut(name: str, value: Any) -> Any:
        t = ours.get(name)
        if (
            t is None
            or not isinstance(value, Tensor)
            or not value.dim()
            or value.numel() != t.whole.num_trained
        ):
            return value
        return value.reshape(-1)[t.start : t.start + t.value.numel()].view(t.value.shape)

    ours = {t.name: t for t in _all(groups) if not t.piece.is_all}
    state = {name: {k: cut(name, v) for k, v in fields.items()} for name, fields in saved["state"].items()}
    masters = {name: cut(name, value) for name, value in saved["masters"].items()}
    return {**saved, "state": state, "masters": masters}


def pieces_held(groups: Groups) -> list[int] | None:
    """Return this process's number and that of all, where it holds pieces of the state; else ``None``."""
    sharded = [t.piece.ranks for t in _all(groups) if not t.piece.is_all]
    return [sharded[0].rank, sharded[0].size] if sharded else None


def scaled_moments(
    moments: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], factor: float
) -> dict[str, Tensor]:
    """Return estimates of squared gradients by canonical name, times a factor.

    Raises:
        ParameterError: no parameter has the name and shape of one.
    """
    found = {canonical_name(name): value for name, value in moments.items()}
    for name, value in found.items():
        if shapes.get(name) != value.shape:
            raise ParameterError(
                f"second_moments has {name!r} of shape {list(value.shape)}, which no parameter has. "
                "Pass tensors of the parameters' names and shapes."
            )
    return {name: value * factor for name, value in found.items()}


@torch.no_grad()
def carry_over(
    old: Groups, old_inner: Optimizer, new: Groups, new_inner: Optimizer, second_moments: Mapping[str, Tensor]
) -> None:
    """Carry the state of entries in both children over to a new optimizer.

    Entries that join start as the inner optimizer's own do: at zero, as the parameter (a start, an average), at the
    learning rate (Rprop's step), or with what it sets up itself (Adagrad). Adam's second moment starts from an estimate
    where one is at hand: beside a step count t that goes on, zero would make the first steps three times too long. It
    is stored times 1 − β₂ᵗ, by which Adam divides.

    Args:
        old, old_inner: what trained so far.
        new, new_inner: what trains from now on, without state.
        second_moments: by name, dense estimates of the squared gradient as the inner optimizer sees it.
    """
    before = {t.name: t for t in _all(old)}
    states = {t.name: old_inner.state[t.value] for t in _all(old) if old_inner.state.get(t.value)}
    entry_keys = {
        key: None
        for name, state in states.items()
        for key, v in state.items()
        if _is_by_entry(v, before[name])
    }
    for old_group, group, options in zip(old, new, new_inner.param_groups, strict=True):
        known = [states[t.name] for t in old_group if t.name in states] or list(states.values())
        if not known:
            continue
        for t in group:
            home, state = before.get(t.name), states.get(t.name, {})
            counters = {k: v for k, v in (state or known[0]).items() if k not in entry_keys}
            fresh = dict(new_inner.state.get(t.value) or {})
            new_inner.state[t.value] = {key: _copied(value) for key, value in counters.items()}
            for key in entry_keys:
                dense = torch.zeros_like(t.parameter, dtype=t.dtype, memory_format=torch.contiguous_format)
                if key == _SECOND_MOMENT and t.name in second_moments:
                    decay = float(options.get("betas", (0, 0))[1]) ** float(counters.get("step", math.inf))
                    dense.copy_(second_moments[t.name].view_as(dense) * (1 - decay))
                elif key in _VALUES:
                    dense.copy_(t.parameter)
                elif key == "step_size":
                    dense.fill_(float(options["lr"]))
                elif key in fresh:
                    _spread(dense, t, fresh[key])
                if home is not None and key in state:
                    _spread(dense, home, state[key])
                new_inner.state[t.value][key] = t.of(dense).clone()
            if home is not None and t.parameter.dtype != t.dtype and home.is_filled:
                dense = t.parameter.detach().to(t.dtype, memory_format=torch.contiguous_format)
                _spread(dense, home, home.value.detach())
                t.read()
                t.value.copy_(t.of(dense))


def _spread(dense: Tensor, t: Trained, values: Tensor) -> None:
    if t.runs is None:
        dense.copy_(values)
    else:
        t.runs.scatter_(dense, values)


def _is_by_entry(value: Any, t: Trained) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == t.value.shape


def _all(groups: Groups) -> Iterator[Trained]:
    for group in groups:
        yield from group


def _names(group: Sequence[Trained]) -> list[str]:
    return [t.name for t in group]


def _empty(param_groups: Sequence[Mapping[str, Any]], position: int) -> Mapping[str, Any]:
    """Return the options saved for a group without parameters, found by position."""
    group = param_groups[position] if position < len(param_groups) else {}
    return group if not group.get("params") else {}


def _copied(value: Any, like: Trained | None = None) -> Any:
    """A copy; of entries, as the parameter's own are laid out."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(like.value.device, like.dtype, copy=True) if like else value.detach().clone()
