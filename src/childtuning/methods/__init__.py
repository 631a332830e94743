"""Layer 3: ways to fine-tune, one a file, by name, and their combinations."""

from childtuning.methods.child_d import ChildD
from childtuning.methods.child_f import ChildF
from childtuning.methods.child_lowest import ChildLowest
from childtuning.methods.child_random import ChildRandom
from childtuning.methods.combination import Combination
from childtuning.methods.full import Full
from childtuning.methods.registry import ENTRY_POINTS, all_methods, find_method, register

__all__ = [
    "ENTRY_POINTS",
    "ChildD",
    "ChildF",
    "ChildLowest",
    "ChildRandom",
    "Combination",
    "Full",
    "all_methods",
    "find_method",
    "register",
]
