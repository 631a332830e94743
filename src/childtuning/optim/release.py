"""Gradients that are taken over and freed as the backward pass forms them."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import ref

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from childtuning.errors import ParameterError
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
        """Take gradients over from now on; a second call does nothing.

        Raises:
            ParameterError: another optimizer does so.
        """
        if self.attached:
            return
        places = {id(slot.parameter): (bucket, slot) for bucket, slot in self._work.slots()}
        for _, slot in places.values():
            _forget_takers(slot.parameter)
        if self._model is not None:
            self._structure(self._model, places)
        for bucket, slot in places.values():
            hook = _Taker(bucket, slot, compact=False)
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
            hook = _Taker(*places[id(named[name])], compact=True)
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


class _Taker:
    """A hook that moves a gradient into the bucket; it keeps neither bucket nor slot alive."""

    def __init__(self, bucket: Bucket, slot: Slot, *, compact: bool) -> None:
        self._bucket, self._slot, self._compact = ref(bucket), ref(slot), compact

    @property
    def is_live(self) -> bool:
        """Whether there still is someone to take gradients for."""
        return self._bucket() is not None

    def __call__(self, tensor: Tensor) -> None:
        bucket, slot = self._bucket(), self._slot()
        if bucket is not None and slot is not None and tensor.grad is not None:
            bucket.accept(slot, tensor.grad, compact=self._compact)
            tensor.grad = None


def _forget_takers(parameter: nn.Parameter) -> None:
    """Unhook an optimizer that is gone; refuse one that is not, since the first to take a gradient leaves none."""
    hooks = parameter._post_accumulate_grad_hooks or {}
    takers = {key: hook for key, hook in hooks.items() if isinstance(hook, _Taker)}
    if any(taker.is_live for taker in takers.values()):
        raise ParameterError(
            "another optimizer takes the gradients of these parameters. Call its remove() first, or delete it."
        )
    for key in takers:
        del hooks[key]
