"""The command that does a recorded run again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from childtuning.runs.config import RunConfig

_DEFAULTS = {field.name: field.default for field in fields(RunConfig)}
# Options that are on or off: the words for each; None where there are none, since it is the default.
_SWITCHES: Mapping[str, Mapping[bool, str | None]] = {
    "rescale": {True: "--rescale", False: "--no-rescale"},
    "release_gradients": {True: "--release-gradients", False: "--keep-gradients"},
    "compile": {True: "--compile", False: "--no-compile"},
}


def train_words(config: Mapping[str, Any]) -> str:
    """Return the options of ``childtuning train`` for a run, quoted for a shell; those at a default are left out."""
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
