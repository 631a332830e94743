"""Save and resume a training that several processes share."""

from childtuning.distributed.checkpoint import load, save

__all__ = ["load", "save"]
