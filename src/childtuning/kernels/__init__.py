"""Layer 0: the few inner loops, each behind one function that looks the same on every device."""

from childtuning.kernels.adamw import AdamWStep, ChildTable, WholeTensors
from childtuning.kernels.by_device import (
    adamw_masked_,
    adamw_rows_,
    child_table,
    has_kernels,
    mask_scale_,
)
from childtuning.kernels.gap_code import decode_gaps, encode_gaps
from childtuning.kernels.gpu import fits_gpu_kernels
from childtuning.kernels.native_ranking import NotNumbersError
from childtuning.kernels.philox import MaskDraw, keep_mask, random_bits, uniform
from childtuning.kernels.places import Places, fits_kernels
from childtuning.kernels.ranking import top_entries, top_units
from childtuning.kernels.rounding import add_rounded_

__all__ = [
    "AdamWStep",
    "ChildTable",
    "MaskDraw",
    "NotNumbersError",
    "Places",
    "WholeTensors",
    "adamw_masked_",
    "adamw_rows_",
    "add_rounded_",
    "child_table",
    "decode_gaps",
    "encode_gaps",
    "fits_gpu_kernels",
    "fits_kernels",
    "has_kernels",
    "keep_mask",
    "mask_scale_",
    "random_bits",
    "top_entries",
    "top_units",
    "uniform",
]
