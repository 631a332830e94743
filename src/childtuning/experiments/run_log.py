"""What happens during a run: a line of JSON at a time, and whatever else people watch runs with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from childtuning.errors import ConfigError, did_you_mean
from childtuning.experiments.run_files import TENSORBOARD


class RunLog(TrainerCallback):
    """Append every log of the trainer to a file.

    Args:
        path: the file; its folder exists once training starts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop what a run that was stopped had logged after the checkpoint it now goes on from."""
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
        """Write one line."""
        if state.is_world_process_zero and logs:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def trackers(names: Sequence[str], folder: Path) -> list[TrainerCallback]:
    """Return what logs to TensorBoard and its like while training; TensorBoard's files are the run's own.

    Args:
        names: as the Trainer's ``report_to`` takes them.
        folder: the run's.
    Raises:
        ConfigError: the Trainer does not know one of them, or it is not installed.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    found: list[TrainerCallback] = []
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = sorted(INTEGRATION_TO_CALLBACK)
            raise ConfigError(f"report_to knows no {name!r}. {did_you_mean(name, known)}")
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
