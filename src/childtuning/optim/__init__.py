"""Layer 1: optimizers that train a child."""

from childtuning.optim.child_optimizer import ChildOptimizer
from childtuning.optim.inner import OfficialAdamW

__all__ = ["ChildOptimizer", "OfficialAdamW"]
