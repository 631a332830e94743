"""Layer 3: fine-tuning methods, one per file, their registry, and their combinations."""

from childtuning.methods.adapter import Adapter
from childtuning.methods.child import ChildD, ChildF, ChildLowest, ChildRandom
from childtuning.methods.child_dynamic import ChildDynamic
from childtuning.methods.child_pruned import ChildPruned
from childtuning.methods.combination import Combination
from childtuning.methods.l2_sp import L2SP
from childtuning.methods.llrd import LayerwiseDecay
from childtuning.methods.lora import Lora
from childtuning.methods.mixout import Mixout
from childtuning.methods.prefix import Prefix
from childtuning.methods.prompt import Prompt
from childtuning.methods.r3f import R3F
from childtuning.methods.r_drop import RDrop
from childtuning.methods.recadam import RecallAdam
from childtuning.methods.registry import ENTRY_POINTS, all_methods, described, find_method, register
from childtuning.methods.reinit import Reinit
from childtuning.methods.sam import Sam
from childtuning.methods.smart import Smart
from childtuning.methods.whole import BitFit, Freeze, Full, Head, LastK

__all__ = [
    "Adapter",
    "BitFit",
    "ChildD",
    "ChildDynamic",
    "ChildF",
    "ChildLowest",
    "ChildPruned",
    "ChildRandom",
    "Combination",
    "ENTRY_POINTS",
    "Freeze",
    "Full",
    "Head",
    "L2SP",
    "LastK",
    "LayerwiseDecay",
    "Lora",
    "Mixout",
    "Prefix",
    "Prompt",
    "R3F",
    "RDrop",
    "RecallAdam",
    "Reinit",
    "Sam",
    "Smart",
    "all_methods",
    "described",
    "find_method",
    "register",
]
