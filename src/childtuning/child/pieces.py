"""What this process holds of a parameter: all of it, or some of the rows of a sharded one (FSDP2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from childtuning.child.units import Granularity, Part
from childtuning.errors import ParameterError
from childtuning.ranks import Ranks

_FSDP = "torch.distributed.fsdp"


@dataclass(frozen=True)
class Piece:
    """What this process holds of a parameter: the coordinates start … start + length − 1 of its first axis.

    Its entries lie together in the parameter, and in its local tensor.

    Args:
        shape: the whole parameter's shape.
        start: first coordinate along the first axis.
        length: how many; ``None``: all, the parameter is not sharded.
        ranks: the processes that hold the other pieces.
    """

    shape: tuple[int, ...]
    start: int = 0
    length: int | None = None
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def is_all(self) -> bool:
        """Whether the parameter is not sharded."""
        return self.length is None

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the local tensor."""
        return self.shape if self.length is None else (self.length, *self.shape[1:])

    @property
    def offset(self) -> int:
        """Flat index of the first local entry in the parameter."""
        return self.start * math.prod(self.shape[1:])

    def part(self, whole: Part) -> Part:
        """Return which local entries are trained, of a part of the whole parameter."""
        if self.is_all:
            return whole
        shape, units = self.local_shape, whole.units
        if units is None:
            return Part(shape, None, whole.granularity)
        if whole.is_empty or not math.prod(shape):
            return Part.none(shape)
        if whole.granularity.is_uncut(whole.shape):
            first, count = self.runs(whole.granularity)
            inside = units[(units >= first) & (units < first + count)] - first
            return Part.from_sorted(shape, inside, whole.granularity)
        if whole.granularity.kind == "row":  # of a later axis, which is not cut
            return Part.from_sorted(shape, units, whole.granularity)
        entries, (first, count) = whole.indices(), self.runs(Granularity())
        inside = entries[(entries >= first) & (entries < first + count)] - first
        return Part.from_sorted(shape, inside, Granularity())

    def runs(self, granularity: Granularity) -> tuple[int, int]:
        """Return the first local unit, and how many there are, where each lies in one piece (``is_uncut``)."""
        count = granularity.num_units(self.local_shape)
        return (self.start * (count // self.length) if self.length else 0), count

    def before(self, whole: Part) -> int:
        """Count the trained entries of the pieces before this one."""
        return Piece(self.shape, 0, self.start).part(whole).num_trained if self.start else 0

    def slice(self, whole: Tensor) -> Tensor:
        """Return the local entries of a tensor of the whole parameter's shape."""
        return whole if self.length is None else whole.narrow(0, self.start, self.length)


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor, whose local values are not the parameter's."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local_of(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: itself, or a DTensor's local tensor."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined]


def whole_of(tensor: Tensor) -> Tensor:
    """Return all of a tensor; every process that holds a piece of it must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def piece_of(name: str, tensor: Tensor) -> Piece:
    """Return what this process holds of a parameter.

    Raises:
        ParameterError: it is sharded otherwise than along its first axis, over one axis of devices, as FSDP2 does it.
    """
    if not is_sharded(tensor):
        return Piece(tuple(tensor.shape))
    from torch.distributed.tensor import Shard

    mesh, placements = tensor.device_mesh, tuple(tensor.placements)  # type: ignore[attr-defined]
    if mesh.ndim != 1 or type(placements[0]) is not Shard or placements[0].dim != 0:
        raise ParameterError(
            f"{name!r} is sharded as {placements} over a mesh of {tuple(mesh.shape)}, which is not supported. "
            "Shard along the first axis over one axis of devices: fully_shard(module)."
        )
    ranks = Ranks(mesh.get_group())
    size = -(-tensor.shape[0] // ranks.size)  # as torch.chunk cuts
    start = min(ranks.rank * size, tensor.shape[0])
    piece = Piece(tuple(tensor.shape), start, min(size, tensor.shape[0] - start), ranks)
    if tuple(local_of(tensor).shape) != piece.local_shape:
        raise ParameterError(
            f"this process holds {list(local_of(tensor).shape)} of {name!r}, {list(piece.local_shape)} were expected. "
            "Shard it with fully_shard(module)."
        )
    return piece


def reshard(model: nn.Module) -> None:
    """Let FSDP2's modules hold their pieces again: a forward pass without a backward pass leaves some of them whole."""
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules that ``fully_shard`` was called on, by their class: nothing is imported for a plain model."""
    words = ("unshard", "reshard")
    return [module for module in model.modules() if all(hasattr(type(module), word) for word in words)]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Let a model's modules hold whole parameters, and run without the hooks of FSDP2, which gather and shard them.

    Raises:
        ParameterError: a parameter is sharded by something else.
    """
    sharded = _sharded_modules(model)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    hooks = [
        (held, dict(held))
        for module in model.modules()
        for held in (module._forward_pre_hooks, module._forward_hooks)
        if any(_is_fsdp(hook) for hook in held.values())
    ]
    try:
        for module in sharded:
            module.unshard()
        for name, parameter in model.named_parameters():
            if is_sharded(parameter):
                raise ParameterError(
                    f"{name!r} is sharded, and not by fully_shard. Shard with torch.distributed.fsdp.fully_shard."
                )
            if parameter.dtype != dtypes[name]:
                raise ParameterError(
                    f"{name!r} is {dtypes[name]} and gathered as {parameter.dtype}: mixed precision of FSDP2 is not "
                    "supported here. Load the model in that precision: the child has float32 master values."
                )
        for held, before in hooks:
            held.clear()
            held.update({key: hook for key, hook in before.items() if not _is_fsdp(hook)})
        yield
    finally:
        for held, before in hooks:
            held.clear()
            held.update(before)
        for module in sharded:
            module.reshard()


def _is_fsdp(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_FSDP)
