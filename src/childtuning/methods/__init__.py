"""Layer 3: ways to fine-tune, one a file, by name."""

from childtuning.methods import child_d, child_f, child_lowest, child_random, full
from childtuning.methods.registry import all_methods, find_method, register

__all__ = [
    "all_methods",
    "child_d",
    "child_f",
    "child_lowest",
    "child_random",
    "find_method",
    "full",
    "register",
]
