"""Layer 1: the trained values of a child, apart from the model."""

from childtuning.delta.delta import Delta
from childtuning.delta.files import frozen_hash, model_hash
from childtuning.delta.merging import merge_deltas
from childtuning.delta.switch import ChildSwitch

__all__ = ["ChildSwitch", "Delta", "frozen_hash", "merge_deltas", "model_hash"]
