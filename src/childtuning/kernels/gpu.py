"""The GPU's side of the kernels: one launch over all parameters, each described by a record in a table.

Triton is imported with the first launch; this module needs torch and numpy only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from contextlib import nullcontext
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from childtuning.kernels.adamw import WholeTensors
from childtuning.kernels.native_library import NUMBERS
from childtuning.kernels.philox import MaskDraw

ENTRIES = 1024  # a program's; a multiple of the 32 that one Philox block serves
POINTERS = ["weight", "gradient", "first", "second", "values", "places"]
# Every column is 8 bytes wide, so that kernels find them by number; ``program`` is the record's first one.
RECORD = np.dtype(
    [(name, np.int64) for name in [*POINTERS, "program", "count", "width", "compact_gradient", "start"]]
    + [(name, np.uint64) for name in ["key0", "key1", "threshold"]]
    + [("numbers", NUMBERS), ("padding", np.float32)]
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes that one thread can load at once


@cache
def has_triton() -> bool:
    """Tell whether Triton is installed."""
    return find_spec("triton") is not None


def fits_gpu_kernels(*tensors: Tensor) -> bool:
    """Tell whether Triton is there and these are contiguous tensors of at most 32 bits on a CUDA device."""
    return has_triton() and all(
        t.dtype in _DTYPES and t.is_cuda and t.layout == torch.strided and t.is_contiguous() for t in tensors
    )


def keep_mask_gpu(draw: MaskDraw, numel: int, start: int, device: torch.device | str) -> Tensor:
    """Draw the mask's entries start … start+numel on a GPU: bool [numel], bitwise what ``keep_mask`` draws."""
    keep = torch.empty(numel, dtype=torch.bool, device=device)
    record = np.zeros(1, RECORD)
    fill_draw(record[0], draw)
    record["weight"], record["count"], record["start"] = keep.data_ptr(), numel, start
    launch("masks", "keep_kernel", record, [start % ENTRIES + numel], keep.device)
    return keep


def mask_scale_gpu_(gradient: Tensor, draw: MaskDraw, scale: float) -> None:
    """Multiply a contiguous gradient on a GPU with its mask and a scale, in place."""
    record = np.zeros(1, RECORD)
    fill_draw(record[0], draw)
    record["gradient"], record["count"] = gradient.data_ptr(), gradient.numel()
    record["numbers"]["scale"] = scale
    launch("masks", "scale_kernel", record, [gradient.numel()], gradient.device, G=gradient.dtype)


def adamw_masked_gpu_(members: Sequence[tuple[WholeTensors, MaskDraw]]) -> None:
    """Do as ``adamw_masked_`` on a GPU, one launch for each combination of dtypes.

    Weights, gradients and moments may be of different dtypes; the update is computed in float32, then rounded.
    """
    for alike in _by_kind(members):
        tensors = [member for member, _ in alike]
        records = _whole_records(tensors)
        for record, (_, draw) in zip(records, alike, strict=True):
            fill_draw(record, draw)
        _launch_whole("masked_kernel", records, tensors)


def adamw_rows_gpu_(members: Sequence[tuple[WholeTensors, Tensor]]) -> None:
    """Do as ``adamw_rows_`` on a GPU; places may still be on the CPU, and then travel together."""
    for alike in _by_kind(members):
        tensors = [member for member, _ in alike]
        device = tensors[0].weight.device
        places = _together([place for _, place in alike], device)
        records = _whole_records(tensors)
        records["width"] = [member.weight[0].numel() if len(member.weight) else 1 for member in tensors]
        records["places"] = [place.data_ptr() for place in places]
        _launch_whole("rows_kernel", records, tensors)


def fill_draw(record: Any, draw: MaskDraw) -> None:
    """Write a draw's key and threshold into its columns."""
    record["key0"], record["key1"], record["threshold"] = *draw.key, draw.threshold


def launch(
    module: str, kernel: str, records: NDArray, sizes: Sequence[int], device: torch.device, **constants: Any
) -> None:
    """Run a kernel's programs over ``sizes[i]`` entries of each record i; dtypes among the constants are torch's."""
    owners, records["program"] = _owners(tuple(sizes), device)
    if not len(owners):
        return
    function = _kernel(module, kernel)
    named = {key: _triton_dtype(c) if isinstance(c, torch.dtype) else c for key, c in constants.items()}
    table = torch.from_numpy(records.view(np.int64))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        function[(len(owners),)](_to(table, device), owners, ENTRIES=ENTRIES, **named)


def _launch_whole(kernel: str, records: NDArray, tensors: Sequence[WholeTensors]) -> None:
    one = tensors[0]
    launch(
        "adamw",
        kernel,
        records,
        records["count"].tolist(),
        one.weight.device,
        W=one.weight.dtype,
        G=one.gradient.dtype,
        M=one.first.dtype,
        ALIGNED=all(not (records[name] % _ALIGNMENT).any() for name in POINTERS[:4]),
    )


def _whole_records(tensors: Sequence[WholeTensors]) -> NDArray:
    records = np.zeros(len(tensors), RECORD)
    for name in ("weight", "gradient", "first", "second"):
        records[name] = [getattr(member, name).data_ptr() for member in tensors]
    records["count"] = [member.weight.numel() for member in tensors]
    records["numbers"] = [member.step.numbers()[()] for member in tensors]
    return records


def _by_kind(members: Iterable[tuple[WholeTensors, Any]]) -> Iterable[list[tuple[WholeTensors, Any]]]:
    """Part members by device and dtypes, which one launch must share."""
    kinds: dict[Hashable, list[tuple[WholeTensors, Any]]] = defaultdict(list)
    for member in members:
        t = member[0]
        kinds[t.weight.device, t.weight.dtype, t.gradient.dtype, t.first.dtype].append(member)
    return kinds.values()


def _together(places: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Bring places to the device in one copy."""
    if all(place.device == device for place in places):
        return places
    moved = _to(torch.cat([place.cpu() for place in places]), device)
    return moved.split([len(place) for place in places])


def _to(table: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for what it is doing."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@lru_cache(maxsize=32)
def _owners(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, NDArray[np.int64]]:
    """Say which record each program works on, int32 on the device, and each record's first program."""
    programs = -(-np.array(sizes, np.int64) // ENTRIES)
    owners = np.repeat(np.arange(len(sizes), dtype=np.int32), programs)
    return torch.from_numpy(owners).to(device), np.cumsum(programs) - programs


def _triton_dtype(dtype: torch.dtype) -> Any:
    return getattr(import_module("triton.language"), str(dtype).removeprefix("torch."))


@cache
def _kernel(module: str, name: str) -> Any:
    return getattr(import_module(f"childtuning.kernels.triton_kernels.{module}"), name)
