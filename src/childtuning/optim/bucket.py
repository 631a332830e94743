"""The child's entries of several parameters as flat tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from childtuning.errors import ParameterError
from childtuning.kernels import AdamWStep, Places, child_table, has_kernels
from childtuning.part import Part


@dataclass(eq=False)
class Slot:
    """One parameter's place in a bucket: entries ``start … stop`` are those at its ``places``."""

    parameter: nn.Parameter
    places: Places
    start: int
    stop: int
    known: bool = False
    shape: torch.Size = field(init=False)
    gathered: tuple[ReferenceType[Tensor] | None, int] | None = None
    filled: bool = False  # whether the flat gradient holds a released gradient of this parameter

    def __post_init__(self) -> None:
        self.shape = self.parameter.shape

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
    """The child's entries of several parameters, flat: values, gradient, and the inner optimizer's state, each [n].

    Where the one-pass kernels do the step (``fused``), float32 values stay in the parameters alone, ``values`` being a
    stand-in of that shape, and a gradient is gathered only where someone needs to see it.

    Args:
        members: (parameter, part) pairs on one device, of one dtype, each partly trained.
        can_fuse: whether the kernels know the inner optimizer's update.
        released: whether gradients arrive during the backward pass, instead of being read from ``.grad``.
    """

    def __init__(
        self, members: Iterable[tuple[nn.Parameter, Part]], *, can_fuse: bool = False, released: bool = False
    ) -> None:
        self.slots: list[Slot] = []
        stop = 0
        for parameter, part in members:
            places = part.places().to(parameter.device)
            start, stop = stop, stop + len(places)
            self.slots.append(Slot(parameter, places, start, stop))
        first = self.slots[0].parameter
        self.dtype = torch.promote_types(first.dtype, torch.float32)
        self._weight_dtype = first.dtype
        self.is_master = self.dtype != first.dtype
        self.released = released
        self.fused = can_fuse and all(
            slot.places.units.dtype == torch.int32 and has_kernels(slot.parameter) for slot in self.slots
        )
        self._stands_in = self.fused and not self.is_master
        values = torch.empty(1 if self._stands_in else stop, dtype=self.dtype, device=first.device)
        self.values = nn.Parameter(values.expand(stop))
        self._gradient: Tensor | None = None
        self._table = child_table([slot.places for slot in self.slots]) if self.fused else None
        self.missing: list[Slot] = []
        self.read_values()

    @property
    def gradient(self) -> Tensor:
        """The flat gradient, made on first use."""
        if self._gradient is None:
            self._gradient = torch.zeros(len(self.values), dtype=self.dtype, device=self.values.device)
        return self._gradient

    @property
    def is_current(self) -> bool:
        """Whether the gathered gradient is that of the parameters as they are now."""
        return all(slot.is_current for slot in self.slots)

    def check_unmoved(self) -> None:
        """Raise a ParameterError if the model was moved, cast or resized since."""
        for slot in self.slots:
            if slot.parameter.device != self.values.device:
                raise ParameterError(
                    f"the model was moved from {self.values.device} to {slot.parameter.device} after its optimizer was "
                    "built. Move it first, then build the optimizer."
                )
            if slot.parameter.shape != slot.shape:
                raise ParameterError(
                    f"a parameter of shape {list(slot.shape)} became {list(slot.parameter.shape)} after its optimizer "
                    "was built. Resize the model first, then choose its child and build the optimizer."
                )
            if self.fused and not (
                has_kernels(slot.parameter) and slot.parameter.dtype == self._weight_dtype
            ):
                raise ParameterError(
                    f"a parameter was cast to {slot.parameter.dtype} or laid out anew after its optimizer was built. "
                    "Cast the model first, then build the optimizer."
                )

    @torch.no_grad()
    def read_values(self) -> None:
        """Take over values that were changed from outside, keeping the master precision of those that were not."""
        if self._stands_in:
            return
        for slot in self.slots:
            known = slot.take(self.values)
            current = slot.places.gather(slot.parameter, torch.empty_like(known))
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
    def accept(self, slot: Slot, gradient: Tensor, *, compact: bool = False) -> None:
        """Add a gradient that has just been formed, dense or compact, to what this step has so far."""
        if self.values.grad is None:  # a new step: the last one was done, or zero_grad() called
            for other in self.slots:
                other.filled = False
            self.values.grad = self.gradient
        stretch = slot.take(self.gradient)
        if not compact:
            self._collect(slot, gradient, add=slot.filled)
        elif slot.filled:
            stretch.add_(gradient)
        else:
            stretch.copy_(gradient)
        slot.filled = True

    def _collect(self, slot: Slot, gradient: Tensor, *, add: bool) -> None:
        """Bring the entries of a dense gradient into the slot's stretch."""
        if self._table is not None and has_kernels(gradient):
            self._table.gather_one(self.slots.index(slot), gradient, self.gradient, add=add)
        else:
            slot.places.gather(gradient, slot.take(self.gradient), add=add)

    @torch.no_grad()
    def gather_gradient(self) -> None:
        """Collect the child's gradient; parameters without one count as zero and are kept still."""
        if self.released:
            for slot in self.slots:
                if (
                    slot.parameter.grad is not None
                ):  # put there by hand, or before the backward pass was watched
                    self.accept(slot, slot.parameter.grad)
                    slot.parameter.grad = None
            self.missing = [slot for slot in self.slots if self.values.grad is None or not slot.filled]
        else:
            self.missing = [slot for slot in self.slots if slot.parameter.grad is None]
            dense = [slot.parameter.grad for slot in self.slots]
            in_table = [
                g if self._table is not None and g is not None and has_kernels(g) else None for g in dense
            ]
            if self._table is not None:
                self._table.gather(in_table, self.gradient)
            for slot, gradient, done in zip(self.slots, dense, in_table, strict=True):
                if gradient is not None and done is None:
                    slot.places.gather(gradient, slot.take(self.gradient))
                slot.remember()
        for slot in self.missing:
            slot.take(self.gradient).zero_()
        self.values.grad = None if len(self.missing) == len(self.slots) else self.gradient

    @torch.no_grad()
    def write_back(self) -> None:
        """Write the updated values into the parameters."""
        if self.values.grad is None:
            return
        for slot in self.slots:
            if slot not in self.missing:
                slot.places.scatter_(slot.parameter, slot.take(self.values))

    def fused_step(self, first: Tensor, second: Tensor, step: AdamWStep) -> None:
        """Update the entries of the parameters that have a gradient, dense or gathered already."""
        assert self._table is not None
        gradients: list[Tensor | None] = []
        for slot in self.slots:
            gradient = None if self.released else slot.parameter.grad
            if self.released or slot.is_current:
                gradient = None if slot in self.missing else slot.take(self.gradient)
            elif gradient is not None and not has_kernels(gradient):
                gradient = slot.places.gather(gradient, slot.take(self.gradient))
            gradients.append(gradient)
        values = self.values.detach() if self.is_master else None
        weights = [slot.parameter for slot in self.slots]
        self._table.adamw_(weights, gradients, first, second, step, values)  # type: ignore[arg-type]
        increment_version(weights)

    @property
    def num_bytes(self) -> int:
        """Bytes held for the child's entries, the inner optimizer's state aside."""
        indices = sum(slot.places.units.nbytes for slot in self.slots)
        gradient = 0 if self._gradient is None else self._gradient.nbytes
        return indices + self.values.untyped_storage().nbytes() + gradient
