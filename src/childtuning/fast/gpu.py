"""The kernels on a GPU: one launch over all parameters, each described by a record in a table.

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

from childtuning.fast.library import POINTERS, RECORD, MaskDraw, Member
from childtuning.fast.runs import Runs

ENTRIES = 1024  # a program's; a multiple of the 32 that one Philox block serves
COMPILED = {"enable_fp_fusion": True}  # said, as Triton warns where it is not and will change its default
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes that one thread can load at once


@cache
def has_triton() -> bool:
    """Tell whether Triton is installed."""
    return find_spec("triton") is not None


def fits(*tensors: Tensor) -> bool:
    """Tell whether Triton is there and these are contiguous tensors of at most 32 bits on a CUDA device."""
    return (
        any(t.is_cuda for t in tensors)
        and has_triton()
        and all(
            t.dtype in _DTYPES and t.is_cuda and t.layout == torch.strided and t.is_contiguous()
            for t in tensors
        )
    )


def keep_mask(draw: MaskDraw, numel: int, start: int, device: torch.device | str) -> Tensor:
    """Draw the mask's entries start … start+numel on a GPU: bool [numel], bitwise what the CPU draws."""
    keep = torch.empty(numel, dtype=torch.bool, device=device)
    record = np.zeros(1, RECORD)
    fill_draw(record[0], draw._replace(start=start))
    record["weight"], record["count"] = keep.data_ptr(), numel
    launch("keep_kernel", record, [start % ENTRIES + numel], keep.device)
    return keep


def child_(runs: Sequence[Runs], members: Sequence[Member | None]) -> None:
    """Do as ``ChildTable.step_`` on a GPU, for runs that come once, one launch for each combination of dtypes.

    The update is computed in float32, of the master values where there are any; the weights are then rounded.
    """
    pairs = [(member, run) for member, run in zip(members, runs, strict=True) if member is not None]
    for alike in _by_kind(pairs):
        some = [member for member, _ in alike]
        records = _records(some)
        records["places"] = [run.starts.data_ptr() for _, run in alike]
        records["width"] = [run.width for _, run in alike]
        records["count"] = sizes = [len(run) for _, run in alike]
        records["compact_gradient"] = [m.gradient.numel() < m.weight.numel() for m in some]
        records["master"] = [0 if m.master is None else m.master.data_ptr() for m in some]
        one = some[0]
        dtypes = {"W": one.weight.dtype, "G": one.gradient.dtype}
        has_master = one.master is not None
        launch("child_kernel", records, sizes, one.weight.device, **dtypes, MASTER=has_master)


def masked_(members: Sequence[tuple[Member, MaskDraw]]) -> None:
    """Do as ``adamw.masked_`` on a GPU, one launch for each combination of dtypes.

    Weights, gradients and moments may be of different dtypes; the update is computed in float32, then rounded.
    """
    for alike in _by_kind(members):
        some = [member for member, _ in alike]
        records = _records(some)
        for record, (_, draw) in zip(records, alike, strict=True):
            fill_draw(record, draw)
        _launch_whole("masked_kernel", records, some, SHARD=bool(records["start"].any()))


def rows_(members: Sequence[tuple[Member, Tensor]]) -> None:
    """Do as ``adamw.rows_`` on a GPU; places may still be on the CPU, and then travel together."""
    for alike in _by_kind(members):
        some = [member for member, _ in alike]
        places = _together([place for _, place in alike], some[0].weight.device)
        records = _records(some)
        records["width"] = [member.weight[0].numel() if len(member.weight) else 1 for member in some]
        records["places"] = [place.data_ptr() for place in places]
        _launch_whole("rows_kernel", records, some)


def fill_draw(record: Any, draw: MaskDraw) -> None:
    """Write a draw's key, threshold and start into its columns."""
    record["key0"], record["key1"], record["threshold"] = *draw.key, draw.threshold
    record["start"] = draw.start


def launch(
    kernel: str, records: NDArray, sizes: Sequence[int], device: torch.device, **constants: Any
) -> None:
    """Run a kernel's programs over ``sizes[i]`` entries of each record i; dtypes among the constants are torch's."""
    owners, records["program"] = _owners(tuple(sizes), device)
    if not len(owners):
        return
    function = getattr(import_module("childtuning.fast.triton_kernels"), kernel)
    given = {key: _triton_dtype(c) if isinstance(c, torch.dtype) else c for key, c in constants.items()}
    table = torch.from_numpy(records.view(np.int64))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        function[(len(owners),)](_to(table, device), owners, ENTRIES=ENTRIES, **given, **COMPILED)


def _launch_whole(kernel: str, records: NDArray, members: Sequence[Member], **constants: Any) -> None:
    one = members[0]
    launch(
        kernel,
        records,
        (records["start"] % ENTRIES + records["count"]).tolist(),
        one.weight.device,
        W=one.weight.dtype,
        G=one.gradient.dtype,
        M=one.first.dtype,
        ALIGNED=all(not (records[name] % _ALIGNMENT).any() for name in POINTERS[:4]),
        **constants,
    )


def _records(members: Sequence[Member]) -> NDArray:
    records = np.zeros(len(members), RECORD)
    for name in ("weight", "gradient", "first", "second"):
        records[name] = [getattr(member, name).data_ptr() for member in members]
    records["count"] = [member.weight.numel() for member in members]
    records["numbers"] = [member.step.numbers()[()] for member in members]
    return records


def _by_kind(members: Iterable[tuple[Member, Any]]) -> Iterable[list[tuple[Member, Any]]]:
    """Part members by device and dtypes, which one launch must share."""
    kinds: dict[Hashable, list[tuple[Member, Any]]] = defaultdict(list)
    for pair in members:
        m = pair[0]
        dtypes = (m.weight.dtype, m.gradient.dtype, m.first.dtype)
        kinds[m.weight.device, dtypes, m.master is None].append(pair)
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
