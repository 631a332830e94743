"""Resident memory of this process: now, and its peak over a stretch of work. Linux only."""

from __future__ import annotations

import gc
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Return what is resident now."""
    gc.collect()
    return _field("VmRSS")


def peak_bytes() -> int:
    """Return the peak since ``start_peak``."""
    return _field("VmHWM")


def start_peak() -> None:
    """Let the peak begin at what is resident now."""
    gc.collect()
    _CLEAR.write_text("5")


def _field(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
