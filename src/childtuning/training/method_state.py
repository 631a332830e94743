"""Methods that follow a training's events, and whose state checkpoints keep."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class MethodCallback(TrainerCallback):
    """A ``TrainerCallback`` with a state, for what a method has to remember between steps."""

    def gradients_ready(self) -> None:
        """Called once a step when its gradient is complete, unscaled, and not yet clipped."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a bitwise resume needs: tensors and JSON-ready values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict``."""
