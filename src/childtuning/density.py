"""The density: the share of the eligible entries that is in the child (the paper's p)."""

from __future__ import annotations

import math
from numbers import Real

from childtuning.errors import ConfigError


def density_fault(density: object) -> str | None:
    """Return what is wrong with a density in one line, or None."""
    if isinstance(density, bool) or not isinstance(density, Real):
        return f"density must be a number in (0, 1], got {density!r}. Pass a share: density=0.3."
    value = float(density)
    if math.isfinite(value) and 0.0 < value <= 1.0:
        return None
    share = value / 100 if 1.0 < value <= 100.0 else 0.3
    return f"density must be in (0, 1], got {density:g}. Pass a share: density={share:g}."


def check_density(density: float) -> float:
    """Return the density as a float.

    Raises:
        ConfigError: it is not in (0, 1].
    """
    fault = density_fault(density)
    if fault:
        raise ConfigError(fault)
    return float(density)
