"""What a fixed child freezes: the flags, and the proof that nothing else writes into it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from childtuning.child.units import Part, Runs
from childtuning.errors import ParameterError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an entry


@dataclass(eq=False)
class _Watched:
    name: str
    parameter: nn.Parameter
    runs: Runs | None  # of the trained entries; ``None``: there are none
    version: int
    bits: int


class Frozen:
    """The entries outside a fixed child.

    A parameter without a trained entry requires no gradient. The optimizer writes to no frozen entry; but a forward
    pass may (``nn.Embedding(max_norm=…)``), or a user. Torch counts the writes to a tensor. Where the count has moved
    since the optimizer's own last write, the frozen bits are added up and compared with their sum at the start.

    Args:
        parts: (name, parameter, part) of every parameter that the optimizer was given.
        runs: by name, where the trained entries of the partly trained ones lie.
    """

    def __init__(
        self, parts: Iterable[tuple[str, nn.Parameter, Part]], runs: Mapping[str, Runs | None]
    ) -> None:
        self._watched: list[_Watched] = []
        self._observed = False
        self._flags: list[tuple[nn.Parameter, bool, bool]] = []
        for name, parameter, part in parts:
            self._flags.append((parameter, not part.is_empty, parameter.requires_grad))
            if not part.is_whole:
                inside = runs.get(name)
                bits = _bits(parameter, inside)
                self._watched.append(_Watched(name, parameter, inside, parameter._version, bits))

    def freeze(self) -> None:
        """Let a parameter require a gradient exactly if it has trained entries."""
        for parameter, is_trained, _ in self._flags:
            parameter.requires_grad_(is_trained)
            if not is_trained:
                parameter.grad = None

    def observe(self) -> None:
        """Let every parameter have a gradient; those without a trained entry stay frozen all the same."""
        self._observed = True
        for parameter, _, _ in self._flags:
            parameter.requires_grad_(True)

    def release(self) -> None:
        """Give the parameters the flags back that they had before."""
        for parameter, _, flag in self._flags:
            parameter.requires_grad_(flag)

    def expect_weights(self) -> None:
        """Freeze the weights as the next check finds them: a resumed model gets its own loaded."""
        for watched in self._watched:
            watched.version = -1

    def check(self) -> None:
        """Raise a ParameterError if a frozen parameter was unfrozen, or a frozen entry changed."""
        for watched in self._watched:
            parameter = watched.parameter
            if watched.runs is None and parameter.requires_grad and not self._observed:
                raise ParameterError(
                    f"{watched.name!r} is outside the child and requires a gradient now, which nothing would train. "
                    "Choose a child that holds it, or leave it frozen."
                )
            if parameter._version == watched.version:
                continue
            bits = _bits(parameter, watched.runs)
            if watched.version >= 0 and bits != watched.bits:
                raise ParameterError(
                    f"entries of {watched.name!r} outside the child have changed since the optimizer was built: by the "
                    "model's forward pass (max_norm), or by hand. Set max_norm=None or train it whole (always=); "
                    "load weights before you build the optimizer."
                )
            watched.version, watched.bits = parameter._version, bits

    def note(self) -> None:
        """Count what the optimizer has written as known."""
        for watched in self._watched:
            watched.version = watched.parameter._version


def _bits(parameter: Tensor, runs: Runs | None) -> int:
    """Add up the bits of the entries outside the child, as whole numbers."""
    flat = parameter.detach().reshape(-1).view(_INTEGERS[parameter.element_size()])
    total = flat.sum(dtype=torch.int64)
    if runs is not None:
        total = total - runs.gather(flat).sum(dtype=torch.int64)
    return int(total)
