"""The arguments of an optimizer: named parameters, in every form that torch accepts, and an inner optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from childtuning.child import Child, TaskFree
from childtuning.child.eligible import canonical_name
from childtuning.errors import ConfigError, ParameterError
from childtuning.ranks import num_processes

_REMEDY = "Use an element-wise one (AdamW, SGD, RAdam, NAdam, Adagrad, RMSprop, …), or a task-free child."
_STEPS = 3


@dataclass
class Group:
    """The named parameters of one group and the options that differ from the defaults."""

    named: dict[str, nn.Parameter]
    options: dict[str, Any]


def named_groups(params: Iterable[Any]) -> list[Group]:
    """Read ``model.named_parameters()``, or dicts whose ``params`` are (name, parameter) pairs.

    Raises:
        ParameterError: parameters without names, no parameters, one that stands twice, or two in the same memory.
    """
    if isinstance(params, nn.Module):
        raise ParameterError("got a model in place of its parameters. Pass model.named_parameters().")
    entries = list(params)
    if not entries:
        raise ParameterError("there are no parameters to optimise. Pass model.named_parameters().")
    if all(isinstance(entry, Mapping) for entry in entries):
        if any("params" not in entry for entry in entries):
            raise ParameterError("a parameter group has no 'params'. Pass (name, parameter) pairs there.")
        groups = [
            Group(_named(entry["params"]), {key: value for key, value in entry.items() if key != "params"})
            for entry in entries
        ]
    else:
        groups = [Group(_named(entries), {})]
    seen: dict[int, str] = {}
    for name, parameter in ((n, p) for group in groups for n, p in group.named.items()):
        if id(parameter) in seen:
            raise ParameterError(f"{name!r} and {seen[id(parameter)]!r} are one parameter. Pass it once.")
        seen[id(parameter)] = name
    _refuse_shared_memory({n: p for group in groups for n, p in group.named.items()})
    names = [name for group in groups for name in group.named]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ParameterError(f"two parameters are named {twice!r}. Names must differ.")
    return groups


def _refuse_shared_memory(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise a ParameterError if two parameters share an entry: a step of one would move frozen entries of the other."""
    spans: list[tuple[int, int, int, str]] = []
    for name, p in parameters.items():
        # Shards, fake tensors and the like are of other classes, and may have no memory of their own.
        if type(p) is nn.Parameter and p.numel() and not p.is_meta and p.layout is torch.strided:
            reach = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
            at = p.data_ptr()
            spans.append((p.untyped_storage().data_ptr(), at, at + (reach + 1) * p.element_size(), name))
    spans.sort()
    for number, (storage, _, end, name) in enumerate(spans):
        for other_storage, start, _, other in spans[number + 1 :]:
            if other_storage != storage or start >= end:
                break
            if _overlap(parameters[name], parameters[other]):
                raise ParameterError(
                    f"{name!r} and {other!r} are two parameters in the same memory, so that a step of one would move "
                    "the other. Make them one: module.weight = other_module.weight."
                )


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors of one storage share an entry; lines of one buffer may lie between each other."""
    taken = torch.zeros(
        one.untyped_storage().nbytes() // one.element_size() + 1, dtype=torch.bool, device="cpu"
    )
    places = [
        taken.as_strided(t.shape, t.stride(), t.storage_offset())
        for t in (one, other)
        if t.element_size() == one.element_size()
    ]
    places[0].fill_(True)
    return bool(places[-1].any())


def _named(pairs: Any) -> dict[str, nn.Parameter]:
    named: dict[str, nn.Parameter] = {}
    for pair in [pairs] if isinstance(pairs, Tensor) else pairs:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ParameterError(
                f"a child knows parameters by name, got a {type(pair).__name__} without one. "
                "Pass model.named_parameters(), or groups whose 'params' are (name, parameter) pairs."
            )
        if pair[0] in named:
            raise ParameterError(f"two parameters are named {pair[0]!r}. Names must differ.")
        named[pair[0]] = pair[1]
    return named


def canonical_names_of(groups: list[Group], child: Child | TaskFree, *, is_fixed: bool) -> dict[str, str]:
    """Return the canonical name of each given one.

    Names that all begin with "module." may be those of a model that DistributedDataParallel has wrapped. A fixed child
    knows the names and decides it. Under a task-free one they would decide the masks, so that among several processes
    they are refused.
    """
    given = [name for group in groups for name in group.named]
    plain = {name: canonical_name(name) for name in given}
    is_prefixed = all(name.startswith("module.") for name in plain.values())
    if not is_prefixed or (isinstance(child, Child) and any(name in child.parts for name in plain.values())):
        return plain
    bare = {name: canonical.removeprefix("module.") for name, canonical in plain.items()}
    in_several = num_processes() > 1
    if isinstance(child, TaskFree):
        if in_several:
            raise ParameterError(
                "the names begin with 'module.', as after DistributedDataParallel, and masks depend on names. "
                "Pass the bare model's: model.module.named_parameters()."
            )
        return plain
    if (
        is_fixed
        and in_several
        and any(part.is_empty for part in child.resolve(_shapes(groups, bare)).values())
    ):
        raise ParameterError(
            "the child freezes parameters of a model that DistributedDataParallel has wrapped already, and it would "
            "wait for their gradients. Build the optimizer first, from the bare model, then wrap it."
        )
    return bare


def _shapes(groups: list[Group], names: Mapping[str, str]) -> dict[str, torch.Size]:
    return {names[name]: p.shape for group in groups for name, p in group.named.items()}


def check_arguments(child: object, inner: object, preset: object, max_grad_norm: object) -> None:
    """Raise a ConfigError for arguments of a wrong kind."""
    if preset not in (None, "official"):
        raise ConfigError(f"preset must be None or 'official', got {preset!r}. Leave it out.")
    if not isinstance(child, (Child, TaskFree)):
        raise ConfigError(
            f"child must be a Child or a TaskFree, got {type(child).__name__}. Choose one first."
        )
    if inner is not None and not isinstance(inner, type):
        raise ConfigError(
            f"inner must be an optimizer's class, got {type(inner).__name__}. Pass torch.optim.AdamW."
        )
    if max_grad_norm is not None and not (isinstance(max_grad_norm, (int, float)) and max_grad_norm > 0):
        raise ConfigError(f"max_grad_norm must be a positive number, got {max_grad_norm!r}. Leave it out.")


def check_elementwise(
    inner: type[Optimizer], options: Mapping[str, Any], of_group: Mapping[str, Any]
) -> None:
    """Refuse an optimizer that mixes coordinates, since the compact tensors hold a child's entries, not matrices.

    The optimizer runs a few steps on a small matrix, and again on a vector of some of that matrix's entries with the
    same gradients. One that is element-wise moves those entries alike.

    Args:
        inner: the optimizer.
        options: what it is to be given.
        of_group: what a parameter group sets for itself; what the optimizer does not know is for others to read.
    Raises:
        ConfigError: it mixes coordinates (Muon, Shampoo, LBFGS, Adafactor), reads values when it is built, or cannot
            run on vectors at all.
    """
    known = inspect.signature(inner).parameters
    options = {**options, **{name: value for name, value in of_group.items() if name in known}}
    options.pop("capturable", None)
    if "lr" in known:  # a rate at which every difference shows
        options["lr"] = 0.01
    entries = torch.arange(1, 64, 3, device="cpu")
    start = torch.linspace(-1.0, 1.0, 64, device="cpu").view(8, 8)
    matrix, vector = nn.Parameter(start.clone()), nn.Parameter(start.flatten()[entries].clone())
    try:
        with torch.random.fork_rng(devices=[]):
            _run(inner, options, matrix)
            _run(inner, options, vector, is_late=True)
    except Exception as fault:
        unknown = [name for name in options if name not in known]
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            raise ConfigError(
                f"{inner.__name__} has no option {unknown[0]!r}. It takes {', '.join(known)}."
            ) from None
        reason = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        raise ConfigError(f"{inner.__name__} cannot update single entries ({reason}). {_REMEDY}") from None
    if bool(vector.isnan().any()) and not bool(matrix.isnan().any()):
        raise ConfigError(
            f"{inner.__name__} reads the parameters when it is built, before the child's values are gathered. {_REMEDY}"
        )
    if not torch.allclose(matrix.detach().flatten()[entries], vector.detach(), rtol=1e-5, atol=1e-7):
        raise ConfigError(
            f"{inner.__name__} mixes coordinates, so it cannot update a child's entries alone. {_REMEDY}"
        )


def _run(
    inner: type[Optimizer], options: Mapping[str, Any], parameter: nn.Parameter, *, is_late: bool = False
) -> None:
    """Run a few steps; where values are late, the optimizer is built on NaN, as it is on a child's entries."""
    values = parameter.data
    if is_late:
        parameter.data = torch.full_like(values, float("nan"))
    optimizer = inner([parameter], **options)
    parameter.data = values
    for step in range(_STEPS):
        parameter.grad = torch.sin(parameter.detach() * (step + 2)) + 0.1 * step
        optimizer.step()


def refuse_closures(inner: type[Optimizer]) -> None:
    """Refuse an optimizer whose step evaluates the loss itself: the gradients that it sees then have no mask.

    Raises:
        ConfigError: its ``step`` demands a closure (LBFGS).
    """
    closure = inspect.signature(inner.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ConfigError(
            f"{inner.__name__} evaluates the loss several times a step, without the child's mask. "
            "Use an optimizer whose step takes no closure."
        )
