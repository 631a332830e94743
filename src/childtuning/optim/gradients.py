"""How a gradient reaches the optimizer when it is not left in ``.grad``: taken as it is formed, or formed compact.

A fixed child's gradient can be taken over during the backward pass, so that at most one dense gradient lives at a time
(``Release``). With the model, its layers form no dense gradient at all where rows or tiles of their weights are
trained, or, under a task-free child, where rows are drawn (``DrawnRows``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import finalize, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from childtuning.child.pieces import gathered, is_sharded, local_of
from childtuning.child.task_free import TaskFree
from childtuning.errors import ConfigError, ParameterError
from childtuning.fast.layers import Leaf
from childtuning.fast.structured import Installed, install
from childtuning.optim.trained import Trained
from childtuning.optim.writes import Writes
from childtuning.ranks import Ranks, num_processes


class WholeGradients:
    """Leaves gradients in ``.grad``, whole."""

    attached = True

    def attach(self) -> None:
        """Do nothing, as all here."""

    def remove(self) -> None:
        """Do nothing."""

    def draw(self, step: int) -> None:
        """Do nothing."""

    def check(self, *, clips: bool) -> None:
        """Do nothing."""

    def average(self) -> None:
        """Do nothing: DDP and FSDP2 average whole gradients."""

    def forget(self) -> None:
        """Do nothing."""


class Release:
    """Moves a fixed child's gradients into ``Trained.value.grad`` and frees the dense ones.

    Among several processes it averages them too, in one message a step: that of the child's entries alone.

    Args:
        trained: what is trained; the partly trained parameters' gradients are taken.
        model: whose layers are to form the trained rows' or tiles' gradients alone, or ``None``.
    """

    def __init__(self, trained: Sequence[Trained], model: nn.Module | None) -> None:
        self._everything, self._model = trained, model
        self._trained = [t for t in trained if t.released]
        self._is_averaged = False
        self.writes = Writes(trained)
        self._handles: list[RemovableHandle] = []
        self._installed: Installed | None = None
        self.attached = False

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
                groups = t.whole.groups(t.parameter.device)
                if groups is not None:
                    leaves[name] = Leaf.of(groups, t.whole.num_trained, t.parameter, t.dtype)
            with gathered(self._model):
                self._installed = _install(self, self._model, leaves)
            for name in self._installed.names:
                by_name[name].leaf = leaves[name]
                taker = _Taker(self, by_name[name], compact=True)
                self._handles.append(leaves[name].tensor.register_post_accumulate_grad_hook(taker))
        whole = [t for t in self._everything if not t.released] if Ranks.everyone().size > 1 else []
        for t in whole:  # their gradients stay, and are to be averaged again when more has come
            self._handles.append(t.holder.register_post_accumulate_grad_hook(_Arrival(self)))
        for t in self._trained:
            taker = _Taker(self, t, compact=False)
            self._handles.append(t.holder.register_post_accumulate_grad_hook(taker))
            if t.leaf is not None:
                t.leaf.num_hooks = 1
        self.writes.attach()
        self.attached = True

    def remove(self) -> None:
        """Restore normal gradients; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.writes.remove()
        if self._installed is not None:
            self._installed.remove()
            self._installed = None
        for t in self._trained:
            t.leaf = None
        self.attached = False

    def draw(self, step: int) -> None:
        """Begin another step; a fixed child stays."""
        self.forget()

    def forget(self) -> None:
        """Forget what was averaged and noted: gradients were cleared."""
        self.go_on()
        self.writes.forget()

    def go_on(self) -> None:
        """Average again: more gradients have come."""
        self._is_averaged = False

    def check(self, *, clips: bool) -> None:
        """Warn if something else wrote into the gradients that it could reach."""
        self.writes.check(clips=clips)

    @torch.no_grad()
    def average(self) -> None:
        """Average the gradients over all processes; a second call does nothing until another one arrives.

        What FSDP2 has reduced already is left as it is.

        Raises:
            ParameterError: something else brings the dense gradients of a replica back, as DDP does.
        """
        everyone = Ranks.everyone()
        if everyone.size == 1 or self._is_averaged:
            return
        for t in self._trained:
            if t.piece.is_all and t.holder.grad is not None:
                raise ParameterError(
                    f"{t.name!r} has a gradient that its optimizer has taken already: DistributedDataParallel averages "
                    "it too. Leave the model unwrapped: with release_gradients or model the optimizer averages."
                )
        averaged = [t for t in self._everything if t.piece.is_all or t.leaf is not None]
        alike: dict[tuple[Ranks, torch.device, torch.dtype], list[Trained]] = {}
        for t in averaged:
            holders = everyone if t.piece.is_all else t.piece.ranks
            alike.setdefault((holders, t.parameter.device, t.dtype), []).append(t)
        for (ranks, device, dtype), some in alike.items():
            found = [t.gradient() if t.piece.is_all else t.formed for t in some]
            sizes = [t.whole.num_trained for t in some]
            flat = torch.zeros(sum(sizes) + len(some), dtype=dtype, device=device)
            *entries, present = flat.split([*sizes, len(some)])
            for i, (entry, gradient) in enumerate(zip(entries, found, strict=True)):
                if gradient is not None:
                    entry.copy_(gradient.reshape(-1))
                    present[i] = 1
            ranks.sum_(flat).div_(ranks.size)
            for t, entry, gradient, is_there in zip(some, entries, found, present.tolist(), strict=True):
                if not is_there:
                    continue
                if not t.piece.is_all:
                    own = entry[t.start : t.start + t.value.numel()].view_as(t.value).clone()
                    t.formed, t.value.grad = None, own if t.value.grad is None else t.value.grad + own
                elif gradient is not None:
                    gradient.copy_(entry.view_as(gradient))
                elif t.released:
                    t.value.grad = entry.clone()
                else:
                    t.holder.grad = entry.view_as(t.holder).to(t.holder.dtype, copy=True)
        self._is_averaged = True


class DrawnRows:
    """Draws a task-free child's rows for the next step and lets the layers form only their gradients.

    Rows are drawn once per step, before its forward passes, so that accumulated batches share them.

    Args:
        free: the child, of rows.
        trained: the parameters.
        model: that they belong to.
    """

    def __init__(
        self, free: TaskFree, trained: Sequence[Trained], model: nn.Module, *, clips: bool = False
    ) -> None:
        self._free, self._model = free, model
        self._candidates = [t for t in trained if t.draws and _has_several_rows(t)]
        self._drawn: list[Trained] = []
        self._installed: Installed | None = None
        self._writes = Writes(trained)

    @property
    def attached(self) -> bool:
        """Whether the model's layers form the drawn rows' gradients alone."""
        return self._installed is not None

    def attach(self) -> None:
        """Put the layers into the model; a second call does nothing. The rows are still to be drawn."""
        if self.attached:
            return
        for t in self._candidates:
            _forget_takers(t.parameter)
        by_name = _in_model(self._model, self._candidates)
        leaves = {name: Leaf.of([], 0, t.parameter) for name, t in by_name.items()}
        self._installed = _install(self, self._model, leaves)
        self._drawn = [by_name[name] for name in self._installed.names]
        for name in self._installed.names:
            by_name[name].leaf = leaves[name]
        self._writes.attach()

    def check(self, *, clips: bool) -> None:
        """Warn if something else wrote into the gradients that it could reach."""
        self._writes.check(clips=clips)

    def average(self) -> None:
        """Do nothing: drawn rows are for one process."""

    def forget(self) -> None:
        """Forget what was noted: gradients were cleared. The rows of a step stay."""
        self._writes.forget()

    def draw(self, step: int) -> None:
        """Draw the rows of a step; gradients formed for another step are dropped."""
        self.forget()
        for t in self._drawn:
            shape, device = t.parameter.shape, t.parameter.device
            t.rows = self._free.kept_units(t.name, shape, step).nonzero().squeeze(1).to(device)
            size = len(t.rows) * (t.parameter.numel() // max(shape[t.row_axis], 1))
            assert t.leaf is not None
            t.leaf.groups = t.units.groups(t.rows, shape)
            t.leaf.tensor = Leaf.of([], size, t.parameter).tensor

    def remove(self) -> None:
        """Let the model's layers form dense gradients again; a second call does nothing.

        What the drawn rows have received moves to the parameters.
        """
        if self._installed is not None:
            self._installed.remove()
            self._installed = None
        self._writes.remove()
        for t in self._drawn:
            formed = t.gradient()
            t.parameter.grad = None if formed is None else t.dense(formed)
            t.leaf = t.rows = None
        self._drawn = []


def _has_several_rows(t: Trained) -> bool:
    """Whether a parameter is cut into more than one row or column of a matrix."""
    shape = t.parameter.shape
    return t.units.kind == "row" and t.units.is_of_matrix(shape) and t.units.num_units(shape) > 1


def _install(owner: object, model: nn.Module, leaves: Mapping[str, Leaf]) -> Installed:
    """Install leaves that are removed when their owner is deleted."""
    installed = install(model, leaves)
    finalize(owner, installed.remove).atexit = False
    return installed


def _in_model(model: nn.Module, trained: Sequence[Trained]) -> Mapping[str, Trained]:
    """Return the trained parameters that belong to a model, by name."""
    by_id = {id(t.holder): t for t in trained}
    return {name: by_id[id(p)] for name, p in model.named_parameters() if id(p) in by_id}


class _Taker:
    """A hook that takes a gradient; it holds only a weak reference to its optimizer."""

    def __init__(self, release: Release, trained: Trained, *, compact: bool) -> None:
        self._release, self._trained, self._compact = ref(release), ref(trained), compact

    @property
    def is_live(self) -> bool:
        """Whether the optimizer still exists."""
        return self._trained() is not None

    def __call__(self, tensor: Tensor) -> None:
        trained, release = self._trained(), self._release()
        if trained is not None and release is not None and tensor.grad is not None:
            trained.accept(local_of(tensor.grad), compact=self._compact)
            release.writes.take(trained, tensor)
            release.go_on()


class _Arrival:
    """A hook that notes that a gradient has come; it holds only a weak reference."""

    def __init__(self, release: Release) -> None:
        self._release = ref(release)

    def __call__(self, tensor: Tensor) -> None:
        release = self._release()
        if release is not None:
            release.go_on()


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


def total_norm(trained: Sequence[Trained], norm_type: float, density: float) -> Tensor:
    """Return the norm of the gradients that a step uses, over all processes that hold pieces of them.

    Args:
        trained: what has a gradient counts; where only drawn rows have one, the whole one's norm is estimated from it.
        norm_type: the p of the norm.
        density: the share of rows that is drawn.
    """
    held: dict[Ranks, list[Tensor]] = {t.piece.ranks: [] for t in trained}
    drawn: list[Tensor] = []
    for t in trained:
        gradient = t.gradient()
        if gradient is None:
            continue
        if t.rows is not None:
            drawn += [gradient] if gradient.numel() else []  # no row may have been drawn
        else:
            own = gradient if t.released else t.of(gradient)
            held[t.piece.ranks] += [own] if own.numel() else []
    norms = [_over(ranks, own, norm_type, trained[0]) for ranks, own in held.items() if own or ranks.size > 1]
    if drawn:
        norms.append(nn.utils.get_total_norm(drawn, norm_type) * density ** (-1 / norm_type))
    if len(norms) == 1:
        return norms[0]
    if not norms:
        return nn.utils.get_total_norm([], norm_type)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)


def _over(ranks: Ranks, gradients: list[Tensor], norm_type: float, like: Trained) -> Tensor:
    norm = nn.utils.get_total_norm(gradients, norm_type)
    if ranks.size == 1:
        return norm
    norm = norm.to(like.parameter.device)
    if norm_type == float("inf"):
        return ranks.max_(norm)
    return (ranks.sum_(norm.double() ** norm_type) ** (1 / norm_type)).to(like.dtype)


def check_first_gradients(trained: Sequence[Trained], *, are_copies: bool) -> None:
    """Refuse a first step without gradients, or with others than those of another process's copy.

    Args:
        trained: what is trained.
        are_copies: whether each process holds the whole model, and something else averages the gradients.
    Raises:
        ParameterError: on every process.
    """
    gradients = [gradient for t in trained if (gradient := t.gradient()) is not None]
    if are_copies and num_processes() > 1:
        norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device="cpu")
        if len(set(Ranks.everyone().gather(float(norm).hex()))) > 1:
            raise ParameterError(
                "the processes' gradients differ at the first step, so that their copies would train apart. Wrap the "
                "model in DistributedDataParallel, or pass model= (rows, columns, blocks) or release_gradients=True."
            )
    if not gradients:
        raise ParameterError(
            "no trained parameter has a gradient at the first step. Call backward() before step(); and build the "
            "optimizer after the model was copied, sharded or moved into another framework."
        )


def check_released(is_fixed: bool, release_gradients: bool, model: nn.Module | None) -> None:
    """Refuse to release gradients that a step needs in full or that processes would have to average."""
    if release_gradients and not is_fixed:
        raise ConfigError(
            "release_gradients=True keeps a fixed child's entries only, but a task-free child and preset='official' "
            "need every gradient whole. Leave it out, or use a fixed child."
        )
    if model is not None and not is_fixed and num_processes() > 1:
        raise ConfigError(
            "the gradients of a task-free child's rows alone are not averaged between processes. Leave out model."
        )


def check_sharded(parameters: Mapping[str, Tensor], preset: str | None, *, is_released: bool) -> None:
    """Refuse what is not defined, or not built, where this process holds pieces of the parameters."""
    for name, parameter in parameters.items():
        if not is_sharded(parameter):
            raise ParameterError(
                f"{name!r} is whole, and others are sharded. Shard the model as well: fully_shard(model). If it is, a "
                "forward pass without a backward pass has left it gathered: call reshard() on each module, then build "
                "the optimizer."
            )
    if preset is not None or is_released:
        raise ConfigError(
            "on a sharded model neither preset nor release_gradients without model is supported. Leave them out."
        )


def no_scaler() -> ConfigError:
    """Return the error for a GradScaler, which has looked at whole gradients of this process."""
    return ConfigError(
        "a GradScaler sees neither the gradients of a task-free child's rows alone nor those of other processes. "
        "Leave out the scaler: train in bf16 or fp32."
    )
