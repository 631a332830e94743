"""The frozen entries of a fixed child: their flags, and a check that nothing writes to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from childtuning.child.pieces import local_of
from childtuning.child.units import Part
from childtuning.errors import ParameterError
from childtuning.fast.runs import Runs

_ENTRIES_AT_ONCE, _HALF = 1 << 20, 1 << 63
_WIDE = {
    torch.uint8: torch.int32,
    torch.int16: torch.int32,
    torch.int32: torch.int32,
    torch.int64: torch.int64,
}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an entry


@dataclass(eq=False)
class _Watched:
    name: str
    parameter: nn.Parameter
    runs: Runs | None  # of the trained entries; ``None``: there are none
    version: int
    bits: int | None  # ``None``: not known yet


class Frozen:
    """The entries outside a fixed child.

    A parameter without a trained entry requires no gradient. The optimizer writes to no frozen entry; but a forward
    pass may (``nn.Embedding(max_norm=…)``), or a user. Torch counts the writes to a tensor. Where the count has moved
    since the optimizer's own last write, the frozen bits are added up and compared with their sum at the start.

    Args:
        parts: (name, parameter, part) of every parameter that the optimizer was given.
        runs: by name, where the local entries lie that are trained, ``None`` for all of them; without a name, none is.
    """

    def __init__(
        self, parts: Iterable[tuple[str, nn.Parameter, Part]], runs: Mapping[str, Runs | None]
    ) -> None:
        self._watched: list[_Watched] = []
        self._observed = False
        self._is_trained: list[tuple[nn.Parameter, bool]] = []
        self._flags: list[bool] = []  # as they were before
        for name, parameter, part in parts:
            self._is_trained.append((parameter, not part.is_empty))
            inside = runs.get(name)
            if inside is not None or name not in runs:
                local = local_of(parameter)
                self._watched.append(_Watched(name, parameter, inside, local._version, _bits(local, inside)))

    def freeze(self) -> None:
        """Let a parameter require a gradient exactly if it has trained entries."""
        self._flags = [parameter.requires_grad for parameter, _ in self._is_trained]
        for parameter, is_trained in self._is_trained:
            parameter.requires_grad_(is_trained)
            if not is_trained:
                parameter.grad = None

    def observe(self) -> None:
        """Let every parameter receive a gradient; those without a trained entry stay frozen."""
        self._observed = True
        for parameter, _ in self._is_trained:
            parameter.requires_grad_(True)

    def release(self) -> None:
        """Restore the flags that the parameters had before ``freeze``; a second call does nothing."""
        for (parameter, _), flag in zip(self._is_trained, self._flags, strict=False):
            parameter.requires_grad_(flag)
        self._flags = []

    def forget(self) -> None:
        """Drop the gradients that ``observe`` let frozen parameters have."""
        for parameter, is_trained in self._is_trained if self._observed else ():
            parameter.grad = parameter.grad if is_trained else None

    def checksums(self) -> dict[str, int | None]:
        """Return the checksum of each parameter's frozen entries."""
        return {watched.name: watched.bits for watched in self._watched}

    def expect_weights(self, checksums: Mapping[str, int | None] | None) -> None:
        """Take the weights at the next check as the frozen ones, e.g. after a model is loaded.

        Args:
            checksums: the expected values; ``None`` if they were not saved.
        """
        for watched in self._watched:
            watched.version = -1
            watched.bits = None if checksums is None else checksums.get(watched.name)

    def check(self) -> None:
        """Raise a ParameterError if a frozen parameter was unfrozen, or a frozen entry changed."""
        for watched in self._watched:
            parameter = local_of(watched.parameter)
            if watched.runs is None and watched.parameter.requires_grad and not self._observed:
                raise ParameterError(
                    f"{watched.name!r} is outside the child and requires a gradient now, which nothing would train. "
                    "Choose a child that holds it, or leave it frozen."
                )
            if parameter._version == watched.version:
                continue
            bits = _bits(parameter, watched.runs)
            if watched.bits is not None and bits != watched.bits:
                raise ParameterError(
                    f"entries of {watched.name!r} outside the child have changed since the optimizer was built: by the "
                    "model's forward pass (max_norm), or by hand. Set max_norm=None or train it whole (always=); "
                    "after a change on purpose call accept_weights()."
                )
            watched.version, watched.bits = parameter._version, bits

    def note(self) -> None:
        """Record the optimizer's own writes as known."""
        for watched in self._watched:
            watched.version = local_of(watched.parameter)._version


def _bits(parameter: Tensor, runs: Runs | None) -> int:
    """Return a checksum of the entries outside the child: their bits as integers, mixed and weighted by position."""
    if not parameter.numel():
        return 0
    if parameter.is_complex():
        parameter = torch.view_as_real(parameter.detach())
    matrix = parameter.detach().reshape(len(parameter) if parameter.dim() > 1 else 1, -1)
    matrix = matrix.view(_INTEGERS[parameter.element_size()])
    height, width = matrix.shape
    down, across = (
        _weights(height, torch.int64, matrix.device),
        _weights(width, _WIDE[matrix.dtype], matrix.device),
    )
    total = 0
    step = max(1, _ENTRIES_AT_ONCE // max(width, 1))
    for start in range(0, height, step):
        rows = (_mixed(matrix[start : start + step].to(across.dtype)) * across).sum(1, dtype=torch.int64)
        total += int((rows * down[start : start + step]).sum())
    if runs is not None:
        places = runs.indices()
        trained = _mixed(runs.gather(matrix).to(across.dtype)) * across[places % width]
        total -= int((trained.long() * down[places // width]).sum())
    return (total + _HALF) % (2 * _HALF) - _HALF  # as int64 wraps


def _mixed(bits: Tensor) -> Tensor:
    """Spread each bit over others, one to one: the highest ones of several entries would cancel in a sum."""
    bits = bits * 0x2545F491
    return bits.bitwise_xor_(bits >> (4 * bits.element_size() - 1))


def _weights(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return distinct odd weights."""
    return ((torch.arange(size, device=device) * 0x9E3779B1) | 1).to(dtype)
