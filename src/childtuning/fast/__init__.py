"""Layer 0: what only makes things faster. Whatever stands here has a definition in plain torch elsewhere.

A path of this room says in one place what it serves (``supports``, ``fits``); everything else goes by the definition.
``CHILDTUNING_FAST=0`` in the environment shuts the room: then nothing is served, and results are the same to rounding.
"""

from __future__ import annotations

import os


def enabled() -> bool:
    """Tell whether the fast paths are in use."""
    return os.environ.get("CHILDTUNING_FAST") != "0"
