"""The command that repeats a recorded run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from childtuning.options import options_of
from childtuning.runs.config import RunConfig

_OPTIONS = options_of(RunConfig)


def train_words(config: Mapping[str, Any]) -> str:
    """Return the options of ``childtuning train`` for a run, quoted for a shell, without those at their default."""
    words: list[str] = []
    for name, value in config.items():
        declared = _OPTIONS.get(name)
        if value is None or (declared is not None and value == declared.default):
            continue
        if declared is not None and isinstance(value, bool):
            words.append(declared.flags[0].split("/")[not value])  # "--on/--off"
            continue
        option = "--" + name.replace("_", "-")
        for item in value if isinstance(value, (list, tuple)) else [value]:
            text = str(item)
            words += [f"{option}={text}"] if text.startswith("-") else [option, text]
    return shlex.join(words)
