"""Every error the library raises on purpose, drawn as a tree.

    ChildTuningError
    ├── ConfigError      an option or argument outside its range (also a ValueError)
    ├── ParameterError   parameter names or patterns that do not fit the model (also a ValueError)
    ├── DataError        the user's examples: files, columns, labels (also a ValueError)
    ├── ModelError       a model folder or name that cannot be loaded
    └── DeltaError       a delta that cannot be used
        ├── CorruptFileError    truncated, tampered with or not one of ours
        └── BaseMismatchError   made for another base model

A message is one line: what is wrong, what was got, and the remedy.
The command line turns each of these into exit code 2.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class ChildTuningError(Exception):
    """The root: catch this to catch everything the library raises on purpose."""


class ConfigError(ChildTuningError, ValueError):
    """An option or argument is outside its range, or options contradict each other."""


class ParameterError(ChildTuningError, ValueError):
    """Parameter names, shapes or patterns do not fit the model."""


class DataError(ChildTuningError, ValueError):
    """The user's examples cannot be used as they are."""


class ModelError(ChildTuningError):
    """A model folder or name cannot be loaded."""


class DeltaError(ChildTuningError):
    """A delta cannot be used."""


class CorruptFileError(DeltaError):
    """A file is truncated, was tampered with, or is not one of ours."""


class BaseMismatchError(DeltaError):
    """A delta was made for another base model."""


class LostProcessError(RuntimeError):
    """Another process of a distributed training has ended: no fault of the input."""


def no_file(path: object) -> DataError:
    """Return the error of a path where nothing is."""
    return DataError(f"There is no file {path}. Check the path.")


def as_os_error(fault: BaseException) -> OSError | None:
    """Return a failure to read or write as Python's; safetensors, which is written in Rust, has errors of its own."""
    number = re.search(r"\(os error (\d+)\)", str(fault))
    if isinstance(fault, OSError):
        return fault
    return None if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


def no_method(name: str, known: Iterable[str]) -> ConfigError:
    """Return the error of a method that does not exist."""
    return ConfigError(f"there is no method {name!r}. {did_you_mean(name, sorted(known))}")


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """Return the remedy half of an "unknown …" message: the nearest known name, then all of them.

    Args:
        got: what the user wrote.
        known: the names that exist, in the order to show them.
    Returns:
        A sentence such as ``Did you mean 'child-d'? Known: full, child-d.``
    """
    names = list(known)
    listing = f"Known: {', '.join(names)}." if names else "There are none."
    near = get_close_matches(got, names, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}? {listing}" if near else listing


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun: ``1 run``, ``2,000 runs``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def warn(message: str) -> None:
    """Warn with the stack level of the caller outside this package, and outside of what wraps its functions."""
    wrappers = (
        "contextlib.py",
        os.path.join("optim", "optimizer.py"),
        os.path.join("optim", "lr_scheduler.py"),
    )
    package, level, frame = str(Path(__file__).parent), 1, sys._getframe()
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(package) or frame.f_code.co_filename.endswith(wrappers)
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
