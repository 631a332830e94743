"""What a run logs and measures while it trains: its own log, progress, trackers such as TensorBoard, peak memory."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from childtuning.errors import ConfigError, did_you_mean
from childtuning.runs.config import json_ready
from childtuning.runs.folder import TENSORBOARD

_SECONDS = 10.0  # between two lines of progress; a shorter run prints none


class RunLog(TrainerCallback):
    """Append every log entry of the trainer to a file.

    Args:
        path: the file; its folder exists once training starts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove entries that an interrupted run logged after the checkpoint it now resumes from."""
        if state.is_world_process_zero and self._path.is_file():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [
                line
                for line in lines
                if line.endswith("\n") and json.loads(line)["step"] <= state.global_step
            ]
            self._path.write_text("".join(kept if state.global_step else []), encoding="utf-8")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Write one line; stop training if the loss is not finite."""
        if state.is_world_process_zero and logs:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(json_ready({"step": state.global_step, **logs})) + "\n")
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            control.should_training_stop = True


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


def trackers(names: Sequence[str], folder: Path) -> list[TrainerCallback]:
    """Return callbacks that log to TensorBoard and similar trackers; TensorBoard's files are in the run's folder.

    Args:
        names: as in the Trainer's ``report_to``.
        folder: the run's folder.
    Raises:
        ConfigError: when a tracker is unknown to the Trainer or not installed.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    found: list[TrainerCallback] = []
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = sorted(INTEGRATION_TO_CALLBACK)
            raise ConfigError(f"report_to has no tracker {name!r}. {did_you_mean(name, known)}")
        try:
            callback = INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as fault:
            reason = " ".join(str(fault).split())
            raise ConfigError(
                f"report_to {name!r} is not installed ({reason}) Install it, or leave it out."
            ) from None
        if name == "tensorboard":
            callback.logging_dir = str(folder / TENSORBOARD)
        found.append(callback)
    return found


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Reset the peak; if the system does not support it, the peak remains that of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_memory_bytes() -> int:
    """Return the peak since ``reset_peak_memory``, in bytes; 0 if the system does not report it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        if sys.platform == "win32":
            return 0
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
