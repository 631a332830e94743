"""The task-free child: a fresh random mask each step (Child-Tuning_F)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from childtuning.density import check_density
from childtuning.errors import ConfigError
from childtuning.granularity import Granularity
from childtuning.kernels import MaskDraw, keep_mask
from childtuning.patterns import as_patterns


@dataclass(frozen=True)
class TaskFree:
    """A fresh mask M_t ~ Bernoulli(p) on the gradient at every step, g ← g ⊙ M_t / p. [Xu et al. 2021, eq. 4–5]

    The masks are a pure function of (seed, step, parameter name, index): the same on every rank, under any sharding
    and after resume, and nothing about them is stored.

    Args:
        density: p, the chance that a unit is trained in a step, in (0, 1].
        seed: names the sequence of masks.
        granularity: ``element``, ``row``, ``block`` or ``parameter``: what is drawn as one.
        always: patterns over parameter names whose gradient is never masked, such as a new head.
        row_axes: for ``row``, the output axis by parameter name where it is not 0 (GPT-2's Conv1D has 1).
    Raises:
        ConfigError: the density or granularity is outside its range.
    """

    density: float
    seed: int = 0
    granularity: str = "element"
    always: tuple[str, ...] = ()
    row_axes: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", check_density(self.density))
        object.__setattr__(self, "always", as_patterns(self.always))
        if not isinstance(self.seed, int):
            raise ConfigError(f"seed must be a whole number, got {self.seed!r}. Pass seed=0.")
        Granularity(self.granularity)
        object.__setattr__(self, "row_axes", dict(self.row_axes))

    def mask(self, name: str, shape: Sequence[int], step: int) -> Tensor:
        """Draw the bool mask of one parameter at one step, of the given shape, on the CPU.

        Args:
            name: the parameter's name before any wrapper.
            shape: the parameter's shape.
            step: the optimizer step, counted from 0.
        """
        granularity = self.units(name)
        return granularity.spread(self.kept_units(name, shape, step), shape)

    def units(self, name: str) -> Granularity:
        """Return how a parameter is cut into units."""
        return Granularity(self.granularity, self.row_axes.get(name, 0))

    def kept_units(self, name: str, shape: Sequence[int], step: int) -> Tensor:
        """Draw which units of a parameter are trained at a step: bool [num_units], on the CPU."""
        num_units = self.units(name).num_units(shape)
        return keep_mask(self.density, *self._coordinates(name, step), numel=num_units)

    def draw(self, name: str, step: int) -> MaskDraw | None:
        """Name the mask over a parameter's units at a step, for the kernels; ``None`` if it keeps everything."""
        return MaskDraw.of(self.density, *self._coordinates(name, step))

    def _coordinates(self, name: str, step: int) -> tuple[object, ...]:
        return "task-free", self.seed, step, name

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields; ``TaskFree(**fields)`` is equal to this."""
        return {**asdict(self), "always": list(self.always)}
