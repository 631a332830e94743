"""Layer 0: code that only makes things faster. Everything here has a definition in plain torch elsewhere.

Each fast path states in one place what it supports (``supports``, ``fits``); the definition handles the rest. With
``CHILDTUNING_FAST=0`` in the environment the fast paths are off, and results are the same up to rounding and to the
random numbers of dropouts.
"""

from __future__ import annotations

import os


def enabled() -> bool:
    """Return whether the fast paths are in use."""
    return os.environ.get("CHILDTUNING_FAST") != "0"
