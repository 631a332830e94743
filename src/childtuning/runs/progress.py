"""`ProgressLines`: the progress of training in plain lines, where a bar cannot be drawn."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

_SECONDS = 10.0  # between two lines; a shorter run prints none


class ProgressLines(TrainerCallback):
    """Tell the step, the last logged loss and the time left, every ten seconds.

    Args:
        tell: called with each line.
        clock_fn: returns the time in seconds.
    """

    def __init__(self, tell: Callable[[str], None], clock_fn: Callable[[], float] = time.monotonic) -> None:
        self._tell, self._clock_fn = tell, clock_fn
        self._loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock; a resumed run starts at a later step."""
        self._start = self._told = self._clock_fn()
        self._first_step = state.global_step

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Keep the loss."""
        self._loss = (logs or {}).get("loss", self._loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell a line if it is time."""
        now = self._clock_fn()
        if now - self._told < _SECONDS or state.global_step >= state.max_steps:
            return
        self._told = now
        left = (now - self._start) / (state.global_step - self._first_step)
        left *= state.max_steps - state.global_step
        loss = "" if self._loss is None else f", loss {self._loss:.3f}"
        self._tell(f"step {state.global_step}/{state.max_steps}{loss}, {duration(left)} left")


def duration(seconds: float) -> str:
    """Return a duration in its two largest units.

    Example:
        >>> duration(9.6), duration(80), duration(7500)
        ('10 s', '1 min 20 s', '2 h 5 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
