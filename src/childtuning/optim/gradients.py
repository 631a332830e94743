"""How a gradient reaches the optimizer when it is not left in ``.grad``: taken as it is formed, or formed compact.

A fixed child's gradient can be taken over during the backward pass, so that at most one dense gradient lives at a time
(``Release``). With the model, its layers form no dense gradient at all where rows or tiles of their weights are
trained, or, under a task-free child, where rows are drawn (``DrawnRows``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import finalize, ref

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from childtuning.child.task_free import TaskFree
from childtuning.errors import ConfigError, ParameterError
from childtuning.fast.layers import Leaf
from childtuning.fast.structured import Installed, install
from childtuning.optim.processes import num_processes
from childtuning.optim.trained import Trained


class Release:
    """Moves a fixed child's gradients into ``Trained.value.grad`` and frees the dense ones.

    Args:
        trained: the partly trained parameters.
        model: whose layers are to form the trained rows' or tiles' gradients alone, or ``None``.
    """

    def __init__(self, trained: Sequence[Trained], model: nn.Module | None) -> None:
        self._trained, self._model = trained, model
        self._handles: list[RemovableHandle] = []
        self._installed: Installed | None = None
        self.attached = False
        self.attach()

    def attach(self) -> None:
        """Start taking gradients; a second call does nothing.

        Raises:
            ParameterError: another optimizer does so.
        """
        if self.attached:
            return
        for t in self._trained:
            _forget_takers(t.parameter)
        if self._model is not None:
            leaves: dict[str, Leaf] = {}
            by_name = _in_model(self._model, self._trained)
            for name, t in by_name.items():
                groups = t.part.groups(t.parameter.device)
                if groups is not None:
                    leaves[name] = Leaf.of(groups, t.part.num_trained, t.parameter, t.dtype)
            self._installed = _install(self, self._model, leaves)
            for name in self._installed.names:
                by_name[name].leaf = leaves[name]
                taker = _Taker(by_name[name], compact=True)
                self._handles.append(leaves[name].tensor.register_post_accumulate_grad_hook(taker))
        for t in self._trained:
            taker = _Taker(t, compact=False)
            self._handles.append(t.parameter.register_post_accumulate_grad_hook(taker))
        self.attached = True

    def remove(self) -> None:
        """Restore normal gradients; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._installed is not None:
            self._installed.remove()
            self._installed = None
        for t in self._trained:
            t.leaf = None
        self.attached = False

    def draw(self, step: int) -> None:
        """Do nothing: a fixed child stays."""


class DrawnRows:
    """Draws a task-free child's rows for the next step and lets the layers form only their gradients.

    Rows are drawn once per step, before its forward passes, so that accumulated batches share them.

    Args:
        free: the child, of rows.
        trained: the parameters.
        model: that they belong to.
    """

    def __init__(self, free: TaskFree, trained: Sequence[Trained], model: nn.Module) -> None:
        self._free, self._model = free, model
        self._candidates = [t for t in trained if t.draws and t.units.kind == "row" and _has_several(t)]
        self._drawn: list[Trained] = []
        self._installed: Installed | None = None
        self.attach()

    @property
    def attached(self) -> bool:
        """Whether the model's layers form the drawn rows' gradients alone."""
        return self._installed is not None

    def attach(self) -> None:
        """Put the layers into the model; a second call does nothing. The rows are still to be drawn."""
        if self.attached:
            return
        by_name = _in_model(self._model, self._candidates)
        leaves = {name: Leaf.of([], 0, t.parameter) for name, t in by_name.items()}
        self._installed = _install(self, self._model, leaves)
        self._drawn = [by_name[name] for name in self._installed.names]
        for name in self._installed.names:
            by_name[name].leaf = leaves[name]

    def draw(self, step: int) -> None:
        """Draw the rows of a step; gradients formed for another step are dropped."""
        for t in self._drawn:
            shape, device = t.parameter.shape, t.parameter.device
            t.rows = self._free.kept_units(t.name, shape, step).nonzero().squeeze(1).to(device)
            axis = t.units.axis % len(shape)
            size = len(t.rows) * (t.parameter.numel() // max(shape[axis], 1))
            assert t.leaf is not None
            t.leaf.groups = t.units.groups(t.rows, shape)
            t.leaf.tensor = Leaf.of([], size, t.parameter).tensor

    def remove(self) -> None:
        """Let the model's layers form dense gradients again; a second call does nothing."""
        if self._installed is not None:
            self._installed.remove()
            self._installed = None
        for t in self._drawn:
            t.leaf = t.rows = None
        self._drawn = []


def _has_several(t: Trained) -> bool:
    """Whether a parameter is a matrix or more, and has more than one unit."""
    return t.parameter.dim() > 1 and t.units.num_units(t.parameter.shape) > 1


def _install(owner: object, model: nn.Module, leaves: Mapping[str, Leaf]) -> Installed:
    """Install leaves that are removed when their owner is deleted."""
    installed = install(model, leaves)
    finalize(owner, installed.remove).atexit = False
    return installed


def _in_model(model: nn.Module, trained: Sequence[Trained]) -> Mapping[str, Trained]:
    """Return the trained parameters that belong to a model, by name."""
    by_id = {id(t.parameter): t for t in trained}
    return {name: by_id[id(p)] for name, p in model.named_parameters() if id(p) in by_id}


class _Taker:
    """A hook that takes a gradient; it holds only a weak reference to its optimizer."""

    def __init__(self, trained: Trained, *, compact: bool) -> None:
        self._trained, self._compact = ref(trained), compact

    @property
    def is_live(self) -> bool:
        """Whether the optimizer still exists."""
        return self._trained() is not None

    def __call__(self, tensor: Tensor) -> None:
        trained = self._trained()
        if trained is not None and tensor.grad is not None:
            trained.accept(tensor.grad, compact=self._compact)
            tensor.grad = None


def _forget_takers(parameter: nn.Parameter) -> None:
    """Unhook a deleted optimizer; refuse a live one, since only one can take a gradient."""
    hooks = parameter._post_accumulate_grad_hooks or {}
    takers = {key: hook for key, hook in hooks.items() if isinstance(hook, _Taker)}
    if any(taker.is_live for taker in takers.values()):
        raise ParameterError(
            "another optimizer takes the gradients of these parameters. Call its remove() first, or delete it."
        )
    for key in takers:
        del hooks[key]


def check_released(is_fixed: bool, release_gradients: bool, model: nn.Module | None) -> None:
    """Refuse to release gradients that a step needs in full or that processes would have to average."""
    if release_gradients and not is_fixed:
        raise ConfigError(
            "release_gradients=True keeps a fixed child's entries only, but a task-free child and preset='official' "
            "need every gradient whole. Leave it out, or use a fixed child."
        )
    if (release_gradients or model is not None) and num_processes() > 1:
        raise ConfigError(
            "gradients that are released or formed for the child alone are not averaged between processes. "
            "Leave out release_gradients and model."
        )
