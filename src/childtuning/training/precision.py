"""What number format this machine computes in at full speed."""

from __future__ import annotations

import torch


def has_fast_bf16() -> bool:
    """Tell whether bf16 is native here: on the GPU, or on a CPU with AMX or AVX512-BF16.

    TransferTask torch emulates it, which is slower than float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(
        getattr(torch.cpu, name, lambda: False)()
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
