"""Which mask lies on which parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from childtuning.part import Part
from childtuning.task_free import TaskFree


class FixedMasks:
    """The same masks at every step: the official code's task-driven child."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = {name: part for name, part in parts.items() if not part.is_whole}

    def mask(self, name: str, step: int) -> Tensor | None:
        """Return the part's mask."""
        return self._parts[name].mask() if name in self._parts else None


class FreshMasks:
    """A fresh mask at every step, on all parameters but those exempt."""

    def __init__(self, free: TaskFree, shapes: Mapping[str, Sequence[int]], exempt: set[str]) -> None:
        self.free, self._shapes, self._exempt = free, dict(shapes), exempt

    def covers(self, name: str) -> bool:
        """Tell whether a parameter is masked at all."""
        return name not in self._exempt and self.free.density < 1

    def mask(self, name: str, step: int) -> Tensor | None:
        """Draw the parameter's mask."""
        return self.free.mask(name, self._shapes[name], step) if self.covers(name) else None
