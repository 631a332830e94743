"""Layer 1: optimizers that train a child."""

from childtuning.optim.anchored import anchored
from childtuning.optim.child_optimizer import ChildOptimizer
from childtuning.optim.official import OfficialAdamW
from childtuning.optim.recadam import RecAdam

__all__ = ["ChildOptimizer", "OfficialAdamW", "RecAdam", "anchored"]
