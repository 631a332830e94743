"""Layer 0: the few inner loops, each behind one function that looks the same on every device."""

from childtuning.kernels.gap_code import decode_gaps, encode_gaps
from childtuning.kernels.indexed import gather, scatter_
from childtuning.kernels.philox import keep_mask, uniform
from childtuning.kernels.ranking import top_entries, top_units

__all__ = [
    "decode_gaps",
    "encode_gaps",
    "gather",
    "keep_mask",
    "scatter_",
    "top_entries",
    "top_units",
    "uniform",
]
