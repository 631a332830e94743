"""Peak memory of a stretch of work: the GPU's where there is one, else this process's resident memory."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Start counting anew; where the system cannot, the peak stays that of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_memory_bytes() -> int:
    """Return the peak since ``reset_peak_memory``, in bytes; 0 where the system does not tell."""
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
