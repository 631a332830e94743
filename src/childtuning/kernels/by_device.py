"""One name for each kernel, whatever the device: compiled C on the CPU, Triton on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor
from torch.autograd.graph import increment_version

from childtuning.kernels import adamw, philox
from childtuning.kernels.gpu import (
    adamw_masked_gpu_,
    adamw_rows_gpu_,
    fits_gpu_kernels,
    mask_scale_gpu_,
)
from childtuning.kernels.gpu_child import GpuChildTable
from childtuning.kernels.places import Places, fits_kernels

_T = TypeVar("_T")


def has_kernels(*tensors: Tensor) -> bool:
    """Tell whether the one-pass kernels can work on these tensors, which are on one device."""
    return fits_kernels(*tensors) or fits_gpu_kernels(*tensors)


def child_table(places: Sequence[Places]) -> adamw.ChildTable | GpuChildTable:
    """Return the tasks of a fixed child on the device that its places are on."""
    on_gpu = len(places) > 0 and places[0].units.is_cuda
    return GpuChildTable(places) if on_gpu else adamw.ChildTable(places)


def adamw_masked_(members: Sequence[tuple[adamw.WholeTensors, philox.MaskDraw]]) -> None:
    """Update parameters under masks of single entries that are drawn on the way; gradients are not written to."""
    _where_they_are(members, adamw.adamw_masked_, adamw_masked_gpu_)


def adamw_rows_(members: Sequence[tuple[adamw.WholeTensors, Tensor]]) -> None:
    """Update parameters [R, …] of which some rows have a gradient: row r ``gradient[place[r]]``, if not negative."""
    _where_they_are(members, adamw.adamw_rows_, adamw_rows_gpu_)


def mask_scale_(gradient: Tensor, draw: philox.MaskDraw, scale: float) -> None:
    """Multiply a contiguous gradient with its mask and a scale, in place; on the CPU it is float32."""
    (mask_scale_gpu_ if gradient.is_cuda else philox.mask_scale_)(gradient, draw, scale)
    increment_version(gradient)


def _where_they_are(
    members: Sequence[tuple[adamw.WholeTensors, _T]],
    on_cpu: Callable[[Sequence[tuple[adamw.WholeTensors, _T]]], None],
    on_gpu: Callable[[Sequence[tuple[adamw.WholeTensors, _T]]], None],
) -> None:
    """Run each kernel on the members of its device, and tell autograd what was written, which kernels do not."""
    for kernel, is_cuda in ((on_gpu, True), (on_cpu, False)):
        there = [member for member in members if member[0].weight.is_cuda is is_cuda]
        if there:
            kernel(there)
    increment_version([tensors.weight for tensors, _ in members])
