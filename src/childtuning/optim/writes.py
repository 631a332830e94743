"""What else writes into gradients: torch's clipping and a model's ``zero_grad`` miss those that were taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

from childtuning.errors import warn
from childtuning.optim.trained import Trained


@dataclass
class _Seen:
    """A gradient as the backward pass left it, and how often something else has written into it before."""

    gradient: TensorWeakRef
    version: int
    num_writes: int

    @property
    def num_writes_now(self) -> int:
        """How often until now; a gradient that was dropped has been written into."""
        gradient = self.gradient()
        return self.num_writes + (1 if gradient is None else gradient._version - self.version)


class Writes:
    """Tells of gradients that stay in ``.grad`` and are all changed between two steps, while taken ones are not.

    One of them, the smallest, is looked at: trainers measure norms by clipping to infinity, which writes and changes
    nothing. Where none stays, the smallest parameter is left a gradient of zeros; a write into it is told unless the
    optimizer clips.

    Args:
        trained: all parameters.
    """

    def __init__(self, trained: Sequence[Trained]) -> None:
        self._trained = trained
        self._handles: list[RemovableHandle] = []
        self._left: dict[str, _Seen] = {}  # in ``.grad``
        self._taken: dict[str, _Seen] = {}
        self._smallest: Trained | None = None
        self._copy: Tensor | None = None
        self._zeros: TensorWeakRef | None = None
        self._is_told = False

    def attach(self) -> None:
        """Note the gradients that are left in ``.grad`` when they arrive, if others are taken."""
        left = [t for t in self._trained if not t.released and t.leaf is None and t.holder.requires_grad]
        if len(left) == len(self._trained) or not all(t.piece.is_all for t in self._trained):
            return
        for t in left:
            self._handles.append(t.holder.register_post_accumulate_grad_hook(_Note(self, t)))
        self._smallest = min(left or self._trained, key=lambda t: t.holder.numel())

    def remove(self) -> None:
        """Note no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()
        self._smallest = None

    def forget(self) -> None:
        """Begin anew: the gradients were used, or are to be changed by the optimizer itself."""
        self._left.clear()
        self._taken.clear()
        self._copy = None
        zeros, self._zeros = self._zeros and self._zeros(), None
        if self._smallest is None or zeros is None or self._smallest.holder.grad is not zeros:
            return
        if not (zeros._version and bool(zeros.any())):  # else a gradient was put there by hand
            self._smallest.holder.grad = None

    def take(self, t: Trained, tensor: Tensor) -> None:
        """Note a gradient that was just added to ``t.value.grad``, and remove it from the tensor on which it came."""
        if t.value.grad is not None:
            self._note(self._taken, t.name, t.value.grad)
        came = tensor.grad if tensor is t.holder else None
        if t is self._smallest and came is not None and t.name in self._left:
            self._note(self._left, t.name, came)
        tensor.grad = None
        if t is self._smallest and t.holder.grad is None:
            zeros, before = torch.zeros_like(t.holder), self._left.get(t.name)
            num_writes = 0 if before is None else before.num_writes + (came is None)  # it was cleared
            t.holder.grad, self._zeros = zeros, TensorWeakRef(zeros)
            self._left[t.name] = _Seen(self._zeros, zeros._version, num_writes)

    def leave(self, t: Trained, gradient: Tensor) -> None:
        """Note a gradient in ``.grad`` to which a backward pass has just added."""
        self._note(self._left, t.name, gradient)
        if t is self._smallest:
            self._copy = gradient.detach().clone()

    @staticmethod
    def _note(seen: dict[str, _Seen], name: str, gradient: Tensor) -> None:
        if gradient.is_sparse or gradient.requires_grad:  # the sum may be another tensor
            seen.pop(name, None)
            return
        before, num_writes = seen.get(name), 0
        if before is not None:
            is_same = before.gradient() is gradient
            num_writes = before.num_writes_now - 1 if is_same else before.num_writes + 1
        seen[name] = _Seen(TensorWeakRef(gradient), gradient._version, num_writes)

    def check(self, *, clips: bool) -> None:
        """Warn, once, if all gradients left in ``.grad`` were changed, and none that was taken.

        Args:
            clips: whether the optimizer clips by itself.
        """
        taken = max((seen.num_writes_now for seen in self._taken.values()), default=0)
        before = min((seen.num_writes for seen in self._left.values()), default=0)
        now = min((seen.num_writes_now for seen in self._left.values()), default=0)
        is_changed = self._left and (before > taken or (now > taken and self._is_changed(clips)))
        if is_changed and not self._is_told:
            self._is_told = True
            warn(
                f"something wrote into the gradients in .grad ({min(self._left)!r} and others) and missed those that "
                "the optimizer has taken, as torch.nn.utils.clip_grad_norm_ and model.zero_grad() do. Call the "
                "optimizer's own clip_grad_norm_ and zero_grad; where a trainer clips, set its max_grad_norm to 0."
            )
        self.forget()

    def _is_changed(self, clips: bool) -> bool:
        """Whether the smallest gradient is other than it came, or one that is always zeros was written into."""
        if self._smallest is None or self._smallest.holder.grad is None:
            return self._smallest is not None
        if self._smallest.released:
            return not clips
        return self._copy is not None and not torch.equal(self._smallest.holder.grad, self._copy)


class _Note:
    """A hook that notes a gradient; it holds only weak references to the optimizer's parts."""

    def __init__(self, writes: Writes, trained: Trained) -> None:
        self._writes, self._trained = ref(writes), ref(trained)

    def __call__(self, tensor: Tensor) -> None:
        writes, trained = self._writes(), self._trained()
        if writes is not None and trained is not None and tensor.grad is not None:
            writes.leave(trained, tensor.grad)
