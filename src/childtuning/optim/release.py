"""Gradients that are taken over and freed as the backward pass forms them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from weakref import ref

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from childtuning.optim.bucket import Bucket, Slot
from childtuning.optim.compact import CompactStep
from childtuning.part import Part
from childtuning.structured import Installed, Trained, install


class GradientRelease:
    """Collect a fixed child's gradient during the backward pass, so that at most one dense gradient lives at a time.

    With a model, its layers form no dense gradient at all where rows or tiles of their weights are trained.

    Args:
        work: the step that takes the gradients.
        parts: what is trained of each parameter, by its ``id``.
        model: whose layers are to form the trained rows' or tiles' gradients alone, or ``None``.
    """

    def __init__(self, work: CompactStep, parts: Mapping[int, Part], model: nn.Module | None) -> None:
        self._work, self._parts, self._model = work, parts, model
        self._handles: list[RemovableHandle] = []
        self._installed: Installed | None = None
        self.attached = False
        self.attach()

    @property
    def structured(self) -> tuple[str, ...]:
        """Names in the model of the parameters whose dense gradient is not formed."""
        return () if self._installed is None else self._installed.names

    def attach(self) -> None:
        """Take gradients over from now on; a second call does nothing."""
        if self.attached:
            return
        places = {id(slot.parameter): (bucket, slot) for bucket, slot in self._work.slots()}
        if self._model is not None:
            self._structure(self._model, places)
        for bucket, slot in places.values():
            hook = _taker(bucket, slot, compact=False)
            self._handles.append(slot.parameter.register_post_accumulate_grad_hook(hook))
        self.attached = True

    def _structure(self, model: nn.Module, places: Mapping[int, tuple[Bucket, Slot]]) -> None:
        trained: dict[str, Trained] = {}
        named = dict(model.named_parameters())
        for name, parameter in named.items():
            if id(parameter) in places:
                bucket, _ = places[id(parameter)]
                found = Trained.from_part(self._parts[id(parameter)], parameter, bucket.dtype)
                if found is not None:
                    trained[name] = found
        self._installed = install(model, trained)
        for name in self._installed.names:
            hook = _taker(*places[id(named[name])], compact=True)
            self._handles.append(trained[name].leaf.register_post_accumulate_grad_hook(hook))

    def remove(self) -> None:
        """Let gradients be as ever; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._installed is not None:
            self._installed.remove()
            self._installed = None
        self.attached = False


def _taker(bucket: Bucket, slot: Slot, *, compact: bool) -> Callable[[Tensor], None]:
    """Make a hook that moves a gradient into the bucket; it keeps neither bucket nor slot alive."""
    bucket_ref, slot_ref = ref(bucket), ref(slot)

    def take(tensor: Tensor) -> None:
        bucket, slot = bucket_ref(), slot_ref()
        if bucket is not None and slot is not None and tensor.grad is not None:
            bucket.accept(slot, tensor.grad, compact=compact)
            tensor.grad = None

    return take
