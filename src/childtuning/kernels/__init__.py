"""Layer 0: the few inner loops, each behind one function that looks the same on every device."""

from childtuning.kernels.adamw import AdamWStep, ChildTable, WholeTensors, adamw_masked_, adamw_rows_
from childtuning.kernels.gap_code import decode_gaps, encode_gaps
from childtuning.kernels.native_ranking import NotNumbersError
from childtuning.kernels.philox import MaskDraw, keep_mask, mask_scale_, uniform
from childtuning.kernels.places import Places, fits_kernels
from childtuning.kernels.ranking import top_entries, top_units

__all__ = [
    "AdamWStep",
    "ChildTable",
    "MaskDraw",
    "NotNumbersError",
    "Places",
    "WholeTensors",
    "adamw_masked_",
    "adamw_rows_",
    "decode_gaps",
    "encode_gaps",
    "fits_kernels",
    "keep_mask",
    "mask_scale_",
    "top_entries",
    "top_units",
    "uniform",
]
