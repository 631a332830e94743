"""Save and resume a training that several processes share."""

from childtuning.optim.checkpoint import load, save

__all__ = ["load", "save"]
