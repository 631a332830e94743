"""The compact step: a fixed child's entries live in a few flat tensors, and only those are optimised.

For each (group, device, dtype) one bucket holds the child's entries of every partly trained parameter. With Adam and
AdamW, in float32 on the CPU and on a GPU, one pass over the gradient, the weights and the compact moments does the
step; for any other inner optimizer the gradients are gathered, the inner optimizer updates flat values, and these are
written back. Entries outside the child are never written. A parameter that is trained whole is handed to the inner
optimizer as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from childtuning.kernels import Places
from childtuning.optim.anchored import START
from childtuning.optim.bucket import Bucket, Slot
from childtuning.optim.fused_adamw import next_step
from childtuning.part import Part


class CompactStep:
    """What the optimizer does for a fixed child.

    Args:
        groups: for each parameter group the (parameter, part) pairs, empty parts left out.
        scale: what the gradient of the child's eligible entries is multiplied with (1/p, or 1).
        scaled: the parameters trained whole to which this applies: the eligible ones.
        can_fuse: for each group, whether the kernels know the inner optimizer's update.
        released: whether dense gradients are freed as soon as the child's entries of them are gathered.
    """

    def __init__(
        self,
        groups: list[list[tuple[nn.Parameter, Part]]],
        scale: float,
        scaled: Iterable[nn.Parameter],
        *,
        can_fuse: Sequence[bool],
        released: bool = False,
    ) -> None:
        self.scale = scale
        self.whole: list[list[nn.Parameter]] = []
        self.buckets: list[list[Bucket]] = []
        self._scaled = list(scaled)
        self._unscaled: list[tuple[nn.Parameter, Tensor]] = []
        for members, fuse in zip(groups, can_fuse, strict=True):
            self.whole.append([parameter for parameter, part in members if part.is_whole])
            partial: dict[Any, list[tuple[nn.Parameter, Part]]] = {}
            for parameter, part in members:
                if not part.is_whole:
                    partial.setdefault((parameter.device, parameter.dtype), []).append((parameter, part))
            self.buckets.append(
                [Bucket(pairs, can_fuse=fuse, released=released) for pairs in partial.values()]
            )

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

    def slots(self) -> Iterator[tuple[Bucket, Slot]]:
        """Iterate over every partly trained parameter's place."""
        for bucket in self.all_buckets():
            for slot in bucket.slots:
                yield bucket, slot

    def trained(self) -> Iterator[tuple[nn.Parameter, Places | None]]:
        """Iterate over every trained parameter and where its entries lie in it, ``None`` being everywhere."""
        for whole in self.whole:
            yield from ((parameter, None) for parameter in whole)
        for _, slot in self.slots():
            yield slot.parameter, slot.places

    def _gather(self, bucket: Bucket) -> None:
        if bucket.released or not bucket.is_current:
            bucket.gather_gradient()

    def gradients(self) -> list[Tensor]:
        """Return the gradients that the step will use, unscaled: those of the child and nothing else."""
        for bucket in self.all_buckets():
            bucket.check_unmoved()
            self._gather(bucket)
        return [p.grad for group in self.inner_parameters() for p in group if p.grad is not None]

    def sampled_gradients(self) -> tuple[list[Tensor], float]:
        """Return none: a fixed child's gradients are whole."""
        return [], 1.0

    def draw(self, step: int) -> None:
        """Do nothing: a fixed child stays."""

    def zero_grad(self) -> None:
        """Forget dense gradients that ``param_groups`` does not show, such as older ones than this optimizer."""
        for bucket, slot in self.slots():
            if bucket.released:
                slot.parameter.grad = None

    @torch.no_grad()
    def run(self, inner: Optimizer, step: int) -> None:
        """Update the child by one step of the inner optimizer."""
        try:
            hidden = self._before_inner()
            kept = self._held_still(inner)
            new = [b for b in self.all_buckets() if b.missing and START not in inner.state.get(b.values, {})]
            inner.step()
            for stretch, content in kept:
                stretch.copy_(content)
            for bucket in new:  # its start was copied while the values were hidden
                if (start := inner.state.get(bucket.values, {}).get(START)) is not None:
                    for slot in bucket.missing:
                        slot.take(start).copy_(slot.take(bucket.values))
            for bucket, gradient in hidden:
                bucket.values.grad = gradient
            for group, buckets in zip(inner.param_groups, self.buckets, strict=True):
                for bucket in buckets:
                    if bucket.fused:
                        self._fused_step(inner, group, bucket)
                    else:
                        bucket.write_back()
        finally:
            self._forget()

    def _before_inner(self) -> list[tuple[Bucket, Tensor | None]]:
        """Gather and scale gradients; hide those that the inner optimizer is not to see."""
        hidden = []
        for bucket in self.all_buckets():
            bucket.check_unmoved()
            bucket.read_values()
            if bucket.fused:
                if bucket.released:
                    bucket.gather_gradient()
                hidden.append((bucket, bucket.values.grad))
                bucket.values.grad = None
            else:
                self._gather(bucket)
                if self.scale != 1.0:
                    bucket.gradient.mul_(self.scale)
        if self.scale != 1.0:
            for parameter in self._scaled:
                if parameter.grad is not None:
                    self._unscaled.append((parameter, parameter.grad))
                    parameter.grad = parameter.grad * self.scale
        return hidden

    def _fused_step(self, inner: Optimizer, group: dict[str, Any], bucket: Bucket) -> None:
        if bucket.released and bucket.values.grad is None:
            return
        if not bucket.released and all(slot.parameter.grad is None for slot in bucket.slots):
            return
        size = bucket.values.shape
        step, first, second = next_step(inner, group, bucket.values, size, self.scale)
        bucket.fused_step(first, second, step)

    def _held_still(self, inner: Optimizer) -> list[tuple[Tensor, Tensor]]:
        """Copy what belongs to parameters without a gradient: (stretch, its content) pairs to put back.

        Torch's own optimizers see zeros in their place: else weight decay would enter a state that this step makes.
        Others may keep the values they see.
        """
        kept, state = [], inner.state
        hides_values = type(inner).__module__.startswith("torch.optim.")
        for bucket in self.all_buckets():
            if bucket.fused:
                continue
            flats = [bucket.values, *state.get(bucket.values, {}).values()]
            flats = [
                flat.detach()
                for flat in flats
                if isinstance(flat, Tensor) and flat.shape == bucket.values.shape
            ]
            kept += [(slot.take(flat), slot.take(flat).clone()) for slot in bucket.missing for flat in flats]
            for slot in bucket.missing if hides_values else ():
                slot.take(bucket.values.detach()).zero_()
        return kept

    def _forget(self) -> None:
        """Leave the gradients of whole parameters as they were, and gather anew next time."""
        for parameter, gradient in self._unscaled:
            parameter.grad = gradient
        self._unscaled.clear()
        for bucket, slot in self.slots():
            slot.gathered = None
            bucket.values.grad = None
