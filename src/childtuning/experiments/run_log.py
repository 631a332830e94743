"""What happens during a run, a line of JSON at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class RunLog(TrainerCallback):
    """Append every log of the trainer to a file.

    Args:
        path: the file; its folder exists once training starts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Write one line."""
        if state.is_world_process_zero and logs:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
