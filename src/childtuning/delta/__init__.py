"""Layer 1: the trained values of a child, apart from the model."""

from childtuning.delta.delta import Delta
from childtuning.delta.files import frozen_hash, model_hash

__all__ = ["Delta", "frozen_hash", "model_hash"]
