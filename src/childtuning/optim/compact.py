"""The compact step: a fixed child's entries live in a few flat tensors, and only those are optimised.

For each (group, device, dtype) one bucket holds the child's entries of every partly trained parameter: values,
gradient, and the inner optimizer's state, each [n]. A step gathers the gradients, lets the inner optimizer update the
flat values, and writes them back. Entries outside the child are never written. A parameter that is trained whole is
handed to the inner optimizer as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from childtuning.errors import ParameterError
from childtuning.kernels import gather, scatter_
from childtuning.part import Part


@dataclass(eq=False)
class Slot:
    """One parameter's place in a bucket: entries ``start … stop`` are its ``indices``."""

    parameter: nn.Parameter
    indices: Tensor
    start: int
    stop: int
    known: bool = False
    gathered: tuple[ReferenceType[Tensor] | None, int] | None = None

    def remember(self) -> None:
        """Note which gradient was gathered, and its state."""
        gradient = self.parameter.grad
        self.gathered = (None, 0) if gradient is None else (ref(gradient), gradient._version)

    @property
    def is_current(self) -> bool:
        """Whether what was gathered is the parameter's gradient as it is now."""
        if self.gathered is None:
            return False
        reference, version = self.gathered
        gradient = self.parameter.grad
        if gradient is None or reference is None:
            return gradient is None and reference is None
        return reference() is gradient and version == gradient._version

    def take(self, flat: Tensor) -> Tensor:
        """Return this slot's stretch of a flat tensor."""
        return flat[self.start : self.stop]


class Bucket:
    """The child's entries of several parameters, flat.

    Args:
        members: (parameter, part) pairs on one device, of one dtype, each partly trained.
    """

    def __init__(self, members: Iterable[tuple[nn.Parameter, Part]]) -> None:
        self.slots: list[Slot] = []
        stop = 0
        for parameter, part in members:
            indices = part.indices()
            if part.numel < 2**31:
                indices = indices.int()
            start, stop = stop, stop + len(indices)
            self.slots.append(Slot(parameter, indices.to(parameter.device), start, stop))
        first = self.slots[0].parameter
        dtype = torch.promote_types(first.dtype, torch.float32)
        self.is_master = dtype != first.dtype
        self.values = nn.Parameter(torch.empty(stop, dtype=dtype, device=first.device))
        self.gradient = torch.zeros(stop, dtype=dtype, device=first.device)
        self.missing: list[Slot] = []
        self.read_values()

    @property
    def is_current(self) -> bool:
        """Whether the gathered gradient is that of the parameters as they are now."""
        return all(slot.is_current for slot in self.slots)

    def check_device(self) -> None:
        """Raise a ParameterError if the model was moved since."""
        for slot in self.slots:
            if slot.parameter.device != self.values.device:
                raise ParameterError(
                    f"the model was moved from {self.values.device} to {slot.parameter.device} after its optimizer was "
                    "built. Move it first, then build the optimizer."
                )

    @torch.no_grad()
    def read_values(self) -> None:
        """Take over values that were changed from outside, keeping the master precision of those that were not."""
        for slot in self.slots:
            known = slot.take(self.values)
            current = gather(slot.parameter, slot.indices, torch.empty_like(known))
            if slot.known and slot.parameter.dtype != known.dtype:
                current = torch.where(
                    known.to(slot.parameter.dtype).to(known.dtype) == current, known, current
                )
            known.copy_(current)
            slot.known = True

    @torch.no_grad()
    def restore(self, values: Tensor) -> None:
        """Take master values from a saved state; the model's weights win where the two disagree."""
        self.values.copy_(values)

    @torch.no_grad()
    def gather_gradient(self) -> None:
        """Collect the child's gradient; parameters without one count as zero and are kept still."""
        self.missing = []
        for slot in self.slots:
            stretch = slot.take(self.gradient)
            if slot.parameter.grad is None:
                self.missing.append(slot)
                stretch.zero_()
            else:
                gather(slot.parameter.grad, slot.indices, stretch)
            slot.remember()
        self.values.grad = None if len(self.missing) == len(self.slots) else self.gradient

    @torch.no_grad()
    def write_back(self) -> None:
        """Write the updated values into the parameters."""
        if self.values.grad is None:
            return
        for slot in self.slots:
            if slot not in self.missing:
                scatter_(slot.parameter, slot.indices, slot.take(self.values))

    @property
    def num_bytes(self) -> int:
        """Bytes held for the child's entries, the inner optimizer's state aside."""
        indices = sum(slot.indices.nbytes for slot in self.slots)
        return indices + self.values.nbytes + self.gradient.nbytes


class CompactStep:
    """What the optimizer does for a fixed child.

    Args:
        groups: for each parameter group the (parameter, part) pairs, empty parts left out.
        scale: what the gradient of the child's eligible entries is multiplied with (1/p, or 1).
        scaled: the parameters trained whole to which this applies: the eligible ones.
    """

    def __init__(
        self, groups: list[list[tuple[nn.Parameter, Part]]], scale: float, scaled: Iterable[nn.Parameter]
    ) -> None:
        self.scale = scale
        self.whole: list[list[nn.Parameter]] = []
        self.buckets: list[list[Bucket]] = []
        self._scaled = list(scaled)
        self._unscaled: list[tuple[nn.Parameter, Tensor]] = []
        for members in groups:
            self.whole.append([parameter for parameter, part in members if part.is_whole])
            partial: dict[Any, list[tuple[nn.Parameter, Part]]] = {}
            for parameter, part in members:
                if not part.is_whole:
                    partial.setdefault((parameter.device, parameter.dtype), []).append((parameter, part))
            self.buckets.append([Bucket(pairs) for pairs in partial.values()])

    def inner_parameters(self) -> list[list[nn.Parameter]]:
        """Return what the inner optimizer is given, group by group."""
        return [
            [*whole, *(bucket.values for bucket in buckets)]
            for whole, buckets in zip(self.whole, self.buckets, strict=True)
        ]

    def all_buckets(self) -> Iterator[Bucket]:
        """Iterate over the buckets of every group."""
        for buckets in self.buckets:
            yield from buckets

    def prepare(self) -> None:
        """Bring values and gradients into the flat tensors, unless they are there already."""
        for bucket in self.all_buckets():
            bucket.check_device()
            bucket.read_values()
            if not bucket.is_current:
                bucket.gather_gradient()

    def gradients(self) -> list[Tensor]:
        """Return the gradients that the step will use, unscaled: those of the child and nothing else."""
        self.prepare()
        return [p.grad for group in self.inner_parameters() for p in group if p.grad is not None]

    @torch.no_grad()
    def before_inner(self) -> None:
        """Gather, and scale the child's gradient."""
        self.prepare()
        if self.scale != 1.0:
            for bucket in self.all_buckets():
                bucket.gradient.mul_(self.scale)
            for parameter in self._scaled:
                if parameter.grad is not None:
                    self._unscaled.append((parameter, parameter.grad))
                    parameter.grad = parameter.grad * self.scale

    def held_still(self, state: dict[Any, Any]) -> list[tuple[Tensor, Tensor]]:
        """Copy what belongs to parameters without a gradient: (stretch, its content) pairs to put back."""
        kept = []
        for bucket in self.all_buckets():
            flats = [bucket.values, *state.get(bucket.values, {}).values()]
            flats = [
                flat.detach()
                for flat in flats
                if isinstance(flat, Tensor) and flat.shape == bucket.values.shape
            ]
            kept += [(slot.take(flat), slot.take(flat).clone()) for slot in bucket.missing for flat in flats]
        return kept

    def after_inner(self) -> None:
        """Write the child's values back into the model."""
        for bucket in self.all_buckets():
            bucket.write_back()

    def forget(self) -> None:
        """Leave the gradients of whole parameters as they were, and gather anew next time."""
        for parameter, gradient in self._unscaled:
            parameter.grad = gradient
        self._unscaled.clear()
        for bucket in self.all_buckets():
            for slot in bucket.slots:
                slot.gathered = None
