"""The trained values of a child, stored apart from the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from childtuning.child import Child, Part, TaskFree
from childtuning.child.eligible import bare_model, canonical_name, named, refuse_rewritten
from childtuning.child.files import LEAST_DRAWN, RECIPES, read_parts, write_parts
from childtuning.child.pieces import local_of, piece_of, reshard, whole_of
from childtuning.delta.files import INDEX_SUFFIX, Format, frozen_hash, stream_tensor
from childtuning.errors import BaseMismatchError, CorruptFileError, DeltaError, ParameterError

_FORMAT = Format("delta")


@dataclass(frozen=True, eq=False)
class Delta:
    """The trained entries of each parameter and their values, which overwrite those of the base model.

    A delta stores values, not differences, so that applying it is bitwise exact. It also stores a hash of each
    parameter's frozen entries, so that it refuses a base it was not made for. A parameter that is overwritten
    completely leaves nothing to verify but its shape and dtype.

    Args:
        parts: by parameter name, which entries; every parameter of the model is there, frozen ones with none.
        values: by parameter name the trained values, [num_trained] for a partial part and of the parameter's shape
            for a whole one, in the model's dtype, on the CPU.
        buffers: the model's persistent buffers (BatchNorm's running statistics), whole.
        hashes: by parameter name, sha256 of what is frozen, see ``frozen_hash``.
        base: what is known of the base model, JSON-ready: its name, its hash.
        recipe: fields that reproduce the parts instead of storing them, see ``Child``.
    """

    parts: dict[str, Part]
    values: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    from_recipe: frozenset[str] = frozenset()

    @classmethod
    def capture(
        cls,
        model: nn.Module,
        child: Child | TaskFree,
        *,
        base: Mapping[str, Any] | str | None = None,
        also: Collection[str] = (),
        trained: Collection[str] | None = None,
    ) -> Self:
        """Copy the child's values out of a trained model.

        Args:
            model: the model that the child was trained in. Of a sharded one every process calls this, and has all
                values; weights are gathered one at a time.
            child: which entries to take; a task-free child trains all that require a gradient.
            base: the base model's name, or JSON-ready facts about it.
            also: names of parameters to take whole besides, such as a new head that was not trained: the base's files
                have none.
            trained: names of the parameters that a task-free child has trained; ``None``: those that require a
                gradient now.
        Raises:
            ParameterError: the child does not fit the model.
        """
        reshard(model)
        parameters = named(model, sharded=True)
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        recipe: dict[str, Any] | None = None
        from_recipe: frozenset[str] = frozenset()
        if isinstance(child, TaskFree):
            parts = {
                name: Part(shape)
                if p.is_floating_point() and (p.requires_grad if trained is None else name in trained)
                else Part.none(shape)
                for (name, p), shape in zip(parameters.items(), shapes.values(), strict=True)
            }
            recipe = {"source": "task-free", **child.to_dict()}
        else:
            parts = child.resolve(shapes)
            refuse_rewritten(model, [n for n, part in parts.items() if not part.is_whole])
            is_drawn = child.recipe is not None and child.recipe.get("source") in RECIPES
            if is_drawn and child.parts.keys().isdisjoint(also):  # the draw is one for all parts
                recipe, from_recipe = child.recipe, frozenset(child.parts)
        parts |= {name: Part(shapes[name]) for name in also}
        values: dict[str, Tensor] = {}
        hashes: dict[str, str] = {}
        for name, part in parts.items():
            parameter = whole_of(parameters[name])
            if not part.is_empty:
                values[name] = read(parameter, part)
            if not part.is_whole:
                hashes[name] = _hash(parameter, part)
        return cls(
            parts=parts,
            values=values,
            buffers={
                name: buffer.detach().to("cpu", copy=True)
                for name, buffer in persistent_buffers(model).items()
            },
            hashes=hashes,
            base={"name": base} if isinstance(base, str) else dict(base or {}),
            recipe=recipe,
            from_recipe=from_recipe,
        )

    def __repr__(self) -> str:
        entries = sum(part.numel for part in self.parts.values())
        base = f", base={self.base['name']!r}" if self.base.get("name") else ""
        share = self.num_trained / max(entries, 1)
        return f"Delta(num_trained={self.num_trained:,} of {entries:,}, {share:.2%}{base})"

    @property
    def num_trained(self) -> int:
        """Number of stored parameter entries."""
        return sum(part.num_trained for part in self.parts.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored values, indices aside."""
        return sum(value.nbytes for value in (*self.values.values(), *self.buffers.values()))

    def check_base(self, model: nn.Module, only: Collection[str] | None = None) -> None:
        """Check that the delta was made for this model's weights.

        Args:
            model: the base model.
            only: names of the parameters to compare, and no other; ``None``: all, and the buffers' shapes.
        Raises:
            BaseMismatchError: a name, shape, dtype or frozen value differs; nothing was changed.
        """
        parameters = {n: p for n, p in named(model, sharded=True).items() if only is None or n in only}
        base = f" ({self.base['name']})" if self.base.get("name") else ""
        remedy = f"Load the base model that it was made from{base}."
        if list(parameters) != [name for name in self.parts if only is None or name in only]:
            other = next(iter(set(parameters) ^ set(self.parts)), "the order of parameters")
            raise BaseMismatchError(f"the delta is for another architecture ({other!r} differs). {remedy}")
        for name, parameter in parameters.items():
            part = self.parts[name]
            value = self.values.get(name)
            if tuple(parameter.shape) != part.shape:
                raise BaseMismatchError(
                    f"{name!r} has shape {list(parameter.shape)}, the delta is for {list(part.shape)}. {remedy}"
                )
            if value is not None and parameter.dtype != value.dtype:
                raise BaseMismatchError(
                    f"{name!r} is {_short(parameter.dtype)}, the delta is for {_short(value.dtype)}. "
                    f"Load the base model in {_short(value.dtype)}."
                )
            if name in self.hashes and _hash(whole_of(parameter), part) != self.hashes[name]:
                raise BaseMismatchError(
                    f"the delta was made for another base model: {name!r} differs. {remedy}"
                )
        buffers = {} if only is not None else persistent_buffers(model)
        if only is None and {n: tuple(b.shape) for n, b in buffers.items()} != {
            n: tuple(b.shape) for n, b in self.buffers.items()
        }:
            raise BaseMismatchError(f"the delta is for a model with other buffers. {remedy}")

    @torch.no_grad()
    def apply_(self, model: nn.Module, *, check: bool = True) -> Delta:
        """Write the trained values into a model, in place.

        Args:
            model: the base model, or one with another delta of the same child applied. Of a sharded one every process
                calls this.
            check: verify first that the base is the right one (it reads every weight once).
        Returns:
            the delta that restores what was there: ``displaced.apply_(model)`` is bitwise the way back.
        Raises:
            BaseMismatchError: it is another base model; nothing was changed.
        """
        reshard(model)
        if check:
            self.check_base(model)
        parameters, buffers = named(model, sharded=True), persistent_buffers(model)
        for name, tensor in (*parameters.items(), *buffers.items()):
            is_written = name in self.values or name in self.buffers
            if is_written and 0 in local_of(tensor).stride() and local_of(tensor).numel() > 1:
                raise ParameterError(
                    f"{name!r} is an expanded view, which cannot be written to. Make it contiguous."
                )
        displaced = replace(
            self,
            values={name: read(whole_of(parameters[name]), self.parts[name]) for name in self.values},
            buffers={name: buffers[name].detach().to("cpu", copy=True) for name in self.buffers},
        )
        for name, value in self.values.items():
            piece, part = piece_of(name, parameters[name]), self.parts[name]
            mine = value.reshape(-1).narrow(0, piece.before(part), (local := piece.part(part)).num_trained)
            write(local_of(parameters[name]), local, mine)
        for name, value in self.buffers.items():
            buffers[name].copy_(value)
        return displaced

    def then(self, later: Delta) -> Delta:
        """Return one delta equivalent to applying this one and then ``later``.

        The frozen entries of a parameter that both change cannot be hashed without the base, so the result verifies
        its base by the other parameters only.

        Raises:
            DeltaError: they are for different models, or ``later`` was made on a base that this does not lead to.
        """
        if [(n, p.shape) for n, p in self.parts.items()] != [(n, p.shape) for n, p in later.parts.items()]:
            raise DeltaError(
                "the two deltas are for different architectures. Compose deltas of one base model."
            )
        parts: dict[str, Part] = {}
        values: dict[str, Tensor] = {}
        for name, first in self.parts.items():
            second = later.parts[name]
            one, two = self.values.get(name), later.values.get(name)
            if one is not None and two is not None and one.dtype != two.dtype:
                raise DeltaError(
                    f"{name!r} is {_short(one.dtype)} in one delta and {_short(two.dtype)} in the other. "
                    "Compose deltas of one dtype."
                )
            told = later.hashes.get(name) if first.is_whole and second.is_empty else None
            if one is not None and told is not None and frozen_hash(one, None) != told:
                raise DeltaError(
                    f"the later delta was made on another model: {name!r} differs. Make it on this one."
                )
            mask = first.mask() | second.mask()
            parts[name] = Part.from_mask(mask) if mask.any() else Part.none(first.shape)
            if not parts[name].is_empty:
                dtype = (later if name in later.values else self).values[name].dtype
                dense = torch.zeros(first.shape, dtype=dtype, device="cpu")
                for part, source in ((first, self.values), (second, later.values)):
                    if not part.is_empty:
                        write(dense, part, source[name])
                values[name] = read(dense, parts[name])
        untouched = {
            n: h for n, h in later.hashes.items() if self.parts[n].is_empty or later.parts[n].is_whole
        }
        same = {n: h for n, h in self.hashes.items() if later.parts[n].is_empty}
        for name in set(untouched) & set(same):
            if untouched[name] != same[name]:
                raise DeltaError(f"the two deltas were made for different base models ({name!r} differs).")
        return Delta(parts, values, later.buffers, {**same, **untouched}, self.base)

    def hashed(self, model: nn.Module) -> Delta:
        """Return the delta with the hashes that it lacks, of a model that is known to be its base.

        ``then`` leaves out those of parameters that both deltas change.
        """
        known = named(model)
        missing = [n for n, part in self.parts.items() if not part.is_whole and n not in self.hashes]
        found = {name: _hash(known[name], self.parts[name]) for name in missing}
        return replace(self, hashes={**self.hashes, **found})

    def save(self, folder: str | Path) -> None:
        """Write the delta to a folder: ``delta.safetensors`` and ``delta.json``."""
        drawn = self.from_recipe if (self.recipe or {}).get("density", 0) >= LEAST_DRAWN else ()
        records, streams = write_parts(self.parts, from_recipe=drawn)
        for name, digest in self.hashes.items():
            records[name]["frozen_sha256"] = digest
        tensors = dict(self.values)
        tensors |= {name + INDEX_SUFFIX: stream_tensor(stream) for name, stream in streams.items()}
        tensors |= self.buffers
        about = {
            "base": self.base,
            "recipe": self.recipe,
            "buffers": list(self.buffers),
            "parameters": records,
        }
        _FORMAT.write(Path(folder), about, tensors)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a delta that ``save`` wrote.

        Raises:
            CorruptFileError: a file is missing, truncated, changed, or of another format.
        """
        about, tensors = _FORMAT.read(Path(folder))
        try:
            records, recipe = about["parameters"], about["recipe"]
            streams = {
                name.removesuffix(INDEX_SUFFIX): tensor.numpy()
                for name, tensor in tensors.items()
                if name.endswith(INDEX_SUFFIX)
            }
            num_values = sum(tensor.numel() for name, tensor in tensors.items() if name not in streams)
            parts = read_parts(records, streams, recipe, num_values)
            values = {name: tensors[name] for name, part in parts.items() if not part.is_empty}
            for name, value in values.items():
                if value.numel() != parts[name].num_trained:
                    raise CorruptFileError(
                        f"{folder} holds {value.numel()} values for {name!r}. Get it anew."
                    )
            return cls(
                parts=parts,
                values=values,
                buffers={name: tensors[name] for name in about["buffers"]},
                hashes={
                    name: rec["frozen_sha256"] for name, rec in records.items() if "frozen_sha256" in rec
                },
                base=about["base"],
                recipe=recipe,
                from_recipe=frozenset(name for name, rec in records.items() if rec["trained"] == "recipe"),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as fault:
            raise CorruptFileError(f"{folder} lacks {fault}. Get the folder anew.") from None


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a model's ``state_dict`` has, by name."""
    model = bare_model(model)
    saved = {canonical_name(name) for name in model.state_dict(keep_vars=True)}
    buffers = {canonical_name(name): buffer for name, buffer in model.named_buffers()}
    return {name: buffer for name, buffer in buffers.items() if name in saved}


def read(tensor: Tensor, part: Part) -> Tensor:
    """Copy a part's entries to the CPU: [num_trained], or of the tensor's shape where all are trained."""
    tensor = tensor.detach()
    if part.is_whole:
        return tensor.to("cpu", copy=True).contiguous()
    return part.runs().to(tensor.device).gather(tensor).cpu()


def write(tensor: Tensor, part: Part, value: Tensor) -> None:
    """Write a part's entries, in place; all others keep their bits."""
    if part.is_whole:
        tensor.detach().copy_(value.view_as(tensor))
    else:
        part.runs().to(tensor.device).scatter_(tensor.detach(), value.to(tensor.device))


def _hash(tensor: Tensor, part: Part) -> str:
    return frozen_hash(tensor, None if part.is_empty else part.indices())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
