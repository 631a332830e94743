"""What else writes into gradients: torch's clipping and a model's ``zero_grad`` miss those that were taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import ref

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
    """Tells of gradients that stay in ``.grad`` and are all written into between two steps, while taken ones are not.

    Args:
        trained: all parameters.
    """

    def __init__(self, trained: Sequence[Trained]) -> None:
        self._trained = trained
        self._handles: list[RemovableHandle] = []
        self._left: dict[str, _Seen] = {}  # in ``.grad``
        self._taken: dict[str, _Seen] = {}
        self._is_told = False

    def attach(self) -> None:
        """Note the gradients that are left in ``.grad`` when they arrive, if others are taken."""
        left = [t for t in self._trained if not t.released and t.leaf is None]
        for t in left if len(left) < len(self._trained) else ():
            if t.piece.is_all and t.holder.requires_grad:
                self._handles.append(t.holder.register_post_accumulate_grad_hook(_Note(self, t.name)))

    def remove(self) -> None:
        """Note no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    def forget(self) -> None:
        """Begin anew: the gradients were used, or are to be changed by the optimizer itself."""
        self._left.clear()
        self._taken.clear()

    def note(self, name: str, gradient: Tensor, *, taken: bool) -> None:
        """Note a gradient to which a backward pass has just added."""
        seen = self._taken if taken else self._left
        if gradient.is_sparse or gradient.requires_grad:  # the sum may be another tensor
            seen.pop(name, None)
            return
        before, num_writes = seen.get(name), 0
        if before is not None:
            is_same = before.gradient() is gradient
            num_writes = before.num_writes_now - 1 if is_same else before.num_writes + 1
        seen[name] = _Seen(TensorWeakRef(gradient), gradient._version, num_writes)

    def check(self) -> None:
        """Warn, once, if all gradients left in ``.grad`` were written into more often than any that was taken."""
        left = [seen.num_writes_now for seen in self._left.values()]
        taken = [seen.num_writes_now for seen in self._taken.values()]
        if left and min(left) > max(taken, default=0) and not self._is_told:
            self._is_told = True
            warn(
                f"something wrote into the gradients in .grad ({min(self._left)!r} and others) and missed those that "
                "the optimizer has taken, as torch.nn.utils.clip_grad_norm_ and model.zero_grad() do. Call the "
                "optimizer's own clip_grad_norm_ and zero_grad."
            )
        self.forget()


class _Note:
    """A hook that notes a gradient; it holds only a weak reference to the optimizer's part."""

    def __init__(self, writes: Writes, name: str) -> None:
        self._writes, self._name = ref(writes), name

    def __call__(self, tensor: Tensor) -> None:
        writes = self._writes()
        if writes is not None and tensor.grad is not None:
            writes.note(self._name, tensor.grad, taken=False)
