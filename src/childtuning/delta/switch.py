"""Several children of one base model in one live model: written in and taken out, bitwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from childtuning.child.eligible import named
from childtuning.child.pieces import local_of, piece_of, reshard
from childtuning.child.units import Part
from childtuning.delta.delta import Delta, persistent_buffers
from childtuning.errors import DeltaError, did_you_mean
from childtuning.fast.exchange import exchange_
from childtuning.fast.runs import Runs


class Held:
    """Values for some entries of a model's parameters and for its buffers, to be exchanged with those in the model.

    Of a sharded model each process holds its pieces.

    Args:
        model: whose entries they are.
        parts: by parameter name, which entries.
        values: their values, as a ``Delta`` has them; ``None``: what the model has now.
        buffers: values for buffers.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Mapping[str, Part],
        values: Mapping[str, Tensor] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> None:
        reshard(model)
        self._buffers = dict(buffers or {})
        self._back = False
        self._is_own = values is None  # the tensors of values are this object's; else those of a delta
        self._entries: dict[str, tuple[Runs | None, Tensor]] = {}
        parameters = named(model, sharded=True)
        for name, part in parts.items():
            if part.is_empty:
                continue
            parameter = parameters[name]
            piece, local = piece_of(name, parameter), local_of(parameter).detach()
            mine = piece.part(part)
            runs = None if mine.is_whole else mine.runs()
            if values is None:
                own = local.clone() if runs is None else runs.to(local.device).gather(local)
            else:
                own = values[name].reshape(-1).narrow(0, piece.before(part), mine.num_trained)
            self._entries[name] = None if runs is None else runs.to(own.device), own

    @property
    def num_bytes(self) -> int:
        """Bytes of the positions and values."""
        held = [t for runs, own in self._entries.values() for t in (own, *([runs.starts] if runs else ()))]
        return sum(tensor.nbytes for tensor in (*held, *self._buffers.values()))

    def tensors(self, model: nn.Module, parameters: Mapping[str, nn.Parameter] | None = None) -> list[Tensor]:
        """Return what ``exchange_`` writes to: this process's tensors."""
        parameters = named(model, sharded=True) if parameters is None else parameters
        return [local_of(parameters[name]).detach() for name in self._entries]

    @torch.no_grad()
    def exchange_(self, model: nn.Module, parameters: Mapping[str, nn.Parameter] | None = None) -> None:
        """Write the values into the model, and hold what was there; the same again is the way back.

        Args:
            model: whose entries they are.
            parameters: its parameters by name, if the caller has them and nothing is gathered.
        Raises:
            DeltaError: a tensor has another shape or dtype now, or cannot be written to; nothing was changed.
        """
        if parameters is None:
            reshard(model)
        there = self.tensors(model, parameters)
        members = [
            (name, runs, local, own)
            for (name, (runs, own)), local in zip(self._entries.items(), there, strict=True)
        ]
        buffers = persistent_buffers(model) if self._buffers else {}
        members += [(name, None, buffers[name].detach(), own) for name, own in self._buffers.items()]
        for member in members:
            _check_room(*member)
        # Where parameters share memory, the way back is the other way round, one by one.
        storages = [local.untyped_storage().data_ptr() for _, _, local, _ in members if local.numel()]
        at_once = len(members) if len({*storages}) == len(storages) else 1
        members = members[::-1] if self._back else members
        for start in range(0, len(members), max(at_once, 1)):
            some = members[start : start + at_once]
            before = exchange_([(runs, local, own) for _, runs, local, own in some], in_place=self._is_own)
            for (name, runs, _, _), own in zip(some, before, strict=True):
                if name in self._buffers:
                    self._buffers[name] = own
                else:
                    self._entries[name] = runs, own
        self._back, self._is_own = not self._back, True


def _check_room(name: str, runs: Runs | None, tensor: Tensor, values: Tensor) -> None:
    """Raise a DeltaError if values cannot be written into a tensor."""
    reason = None
    if tensor.dtype != values.dtype:
        reason = f"is {tensor.dtype} now, and was {values.dtype}"
    elif tensor.is_meta or 0 in tensor.stride():
        reason = "has no memory of its own"
    elif tensor.is_inference() and not torch.is_inference_mode_enabled():
        reason = "was made in inference mode"
    elif tensor.numel() != values.numel() if runs is None else tensor.numel() < runs.end:
        reason = f"has shape {list(tensor.shape)} now"
    if reason:
        raise DeltaError(
            f"{name!r} {reason}, so that the delta cannot be written. Use the model that it was added for."
        )


class ChildSwitch:
    """Holds several deltas of one base model, and puts one of them at a time into a live model.

    A switch reads and writes the entries that differ, and nothing else; the way back is bitwise. A delta that is not
    active is held as positions and values, on the CPU unless its tensors lie elsewhere. After a switch that was
    interrupted half-way, by a signal or a fault, all others are refused: the weights are of no delta.

    Args:
        model: the base model, which the deltas were made for. Nothing else may write to it while a delta is active.
        deltas: by name.
    Raises:
        BaseMismatchError: a delta was made for another base model.

    Example:
        >>> import torch
        >>> from childtuning import Child
        >>> line = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(line.weight)
        >>> base = line.weight.tolist()
        >>> tuned = Delta.capture(line, Child.from_masks({"weight": torch.tensor([[True, False]])}))
        >>> tuned.values["weight"][0] = 5.0
        >>> switch = ChildSwitch(line, {"five": tuned})
        >>> with switch.using("five"):
        ...     line.weight.tolist()
        [[5.0, 1.0]]
        >>> line.weight.tolist() == base
        True
    """

    def __init__(self, model: nn.Module, deltas: Mapping[str, Delta] | None = None) -> None:
        self._model = model
        self._held: dict[str, tuple[nn.Module, Held]] = {}
        self._active: str | None = None
        self._is_between = False
        for name, delta in (deltas or {}).items():
            self.add(name, delta)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the deltas."""
        return tuple(self._held)

    @property
    def active(self) -> str | None:
        """The name of the delta that is in the model; ``None``: the base model's values are."""
        return self._active

    @property
    def num_bytes(self) -> int:
        """Bytes that the deltas take besides the model."""
        return sum(held.num_bytes for _, held in self._held.values())

    def add(self, name: str, delta: Delta, *, check: bool = True, model: nn.Module | None = None) -> None:
        """Hold another delta; the base model's values must be in the model.

        Args:
            name: it is called by, and no other.
            delta: of this model; its tensors are held as they are.
            check: verify that the model is its base (it reads every weight once).
            model: for a delta of other shape, with a head or modules of its own: the model that it is of, in which all
                else is this model's own tensors.
        Raises:
            BaseMismatchError: it is another base model.
            DeltaError: a delta is active, or the name is taken.
        """
        if self._active is not None:
            raise DeltaError(f"{self._active!r} is active. Call deactivate() before adding {name!r}.")
        if name in self._held:
            raise DeltaError(
                f"there is a delta {name!r} already. Call remove() first, or choose another name."
            )
        if not isinstance(delta, Delta):
            raise DeltaError(f"a Delta is needed, got {type(delta).__name__}. Pass Delta.load(folder).")
        model = self._model if model is None else model
        if check:
            delta.check_base(model)
        self._held[name] = model, Held(model, delta.parts, delta.values, delta.buffers)

    def remove(self, name: str) -> None:
        """Forget a delta, which is deactivated first.

        Raises:
            DeltaError: there is no delta of this name.
        """
        self._find(name)
        if self._active == name:
            self.deactivate()
        del self._held[name]

    def activate(self, name: str) -> None:
        """Put a delta into the model, in place of the one that is there.

        Raises:
            DeltaError: there is no delta of this name.
        """
        model, held = self._find(name)
        with self._moving():
            if self._active == name:
                return
            before, other = self._held.get(self._active or "", (None, None))
            parameters = None
            if other is not None and before is model:  # looked up once for both
                reshard(model)
                parameters = named(model, sharded=True)
                other.exchange_(model, parameters)
                self._active = None
            else:
                self._take_out()
            held.exchange_(model, parameters)
            self._active = name

    def deactivate(self) -> None:
        """Put the base model's values back; without an active delta nothing changes."""
        with self._moving():
            self._take_out()

    def _take_out(self) -> None:
        if self._active is not None:
            model, held = self._held[self._active]
            held.exchange_(model)
            self._active = None

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """Note that values are being exchanged, so that an interruption is not forgotten."""
        if self._is_between:
            raise DeltaError(
                "a switch was interrupted half-way: the weights are of no delta. Load the model anew."
            )
        self._is_between = True
        try:
            yield
        except DeltaError:  # raised before anything is exchanged
            self._is_between = False
            raise
        self._is_between = False

    @contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        """Activate a delta (``None``: the base) for a block, and then what was active before; yields its model."""
        before = self._active
        try:
            self.deactivate() if name is None else self.activate(name)
            yield self._model if name is None else self._find(name)[0]
        finally:
            self.activate(before) if before in self._held else self.deactivate()

    def _find(self, name: str) -> tuple[nn.Module, Held]:
        if name not in self._held:
            raise DeltaError(f"there is no delta {name!r}. {did_you_mean(name, self._held)}")
        return self._held[name]

    def __repr__(self) -> str:
        return f"ChildSwitch({', '.join(map(repr, self._held))}; active: {self._active!r})"
