"""The command that repeats a recorded run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from childtuning.runs.config import RunConfig

_DEFAULTS = {field.name: field.default for field in fields(RunConfig)}
# On/off options: the flag for each value; None if no flag is needed because the value is the default.
_SWITCHES: Mapping[str, Mapping[bool, str | None]] = {
    "rescale": {True: "--rescale", False: "--no-rescale"},
    "release_gradients": {True: "--release-gradients", False: "--keep-gradients"},
    "compile": {True: "--compile", False: "--no-compile"},
}


def train_words(config: Mapping[str, Any]) -> str:
    """Return the options of ``childtuning train`` for a run, quoted for a shell, without those at their default."""
    words: list[str] = []
    for name, value in config.items():
        if value is None or value == _DEFAULTS.get(name):
            continue
        if name in _SWITCHES and isinstance(value, bool):
            words += filter(None, [_SWITCHES[name][value]])
            continue
        option = "--" + name.replace("_", "-")
        for item in value if isinstance(value, (list, tuple)) else [value]:
            text = str(item)
            words += [f"{option}={text}"] if text.startswith("-") else [option, text]
    return shlex.join(words)
