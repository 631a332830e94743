"""Layer 0: what only makes it faster. Without this room everything is computed as well, by the definitions."""

import os

from childtuning.fast.gradients import Computed, Dense, ExampleGradients, Outer, Rows
from childtuning.fast.per_example import PerExampleEngine
from childtuning.fast.vectorised import vectorised_squares


def enabled() -> bool:
    """Tell whether fast paths may be used: unless ``CHILDTUNING_FAST=0`` stands in the environment."""
    return os.environ.get("CHILDTUNING_FAST", "1") != "0"


__all__ = [
    "Computed",
    "Dense",
    "ExampleGradients",
    "Outer",
    "PerExampleEngine",
    "Rows",
    "enabled",
    "vectorised_squares",
]
