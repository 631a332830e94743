"""A patch: what a delta writes, in the names and places of the checkpoint on disk.

A delta names parameters as the model has them; a server reads a checkpoint, in which the same weights may have other
names, be split or be joined. A patch is for it: for each tensor of the checkpoint flat positions and values. Every
patch is for the base model: none builds on another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from childtuning.delta.files import Format, frozen_hash
from childtuning.errors import BaseMismatchError, CorruptFileError, ParameterError

_FORMAT = Format("patch")
_INDICES, _VALUES = ".indices", ".values"


@dataclass(frozen=True, eq=False)
class Patch:
    """Values for entries of a checkpoint's tensors.

    Args:
        shapes: by the checkpoint's name, the shape of every tensor that the model has; those it adds as well.
        indices: by name, flat indices of the written entries, int32 [n], increasing; whole tensors have none.
        values: by name, of all tensors that are written: [n], or of the tensor's shape where it is written whole.
        hashes: by name, ``frozen_hash`` of what is not written, of the base.
        added: names that the base's checkpoint lacks, such as a new head's.
        base: what is known of the base model, JSON-ready.
    """

    shapes: dict[str, tuple[int, ...]]
    indices: dict[str, Tensor]
    values: dict[str, Tensor]
    hashes: dict[str, str] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    base: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, Tensor, Tensor, tuple[int, ...]]]:
        """Yield each tensor that is written: name, flat int32 indices [n], values [n], and the tensor's shape.

        These are the arguments of vLLM's ``SparseWeightPatch``, which names the shape ``full_shape``.
        """
        for name, values in self.values.items():
            indices = self.indices.get(name)
            flat = values.reshape(-1)
            every = torch.arange(len(flat), dtype=torch.int32, device="cpu") if indices is None else indices
            yield name, every, flat, self.shapes[name]

    @property
    def num_entries(self) -> int:
        """Number of entries that are written."""
        return sum(values.numel() for values in self.values.values())

    def __repr__(self) -> str:
        return f"Patch({self.num_entries:,} entries of {len(self.values)} tensors)"

    def apply_(self, name: str, tensor: Tensor, *, check: bool = True) -> Tensor:
        """Write the entries of one tensor of the checkpoint, in place, and return it.

        Args:
            name: the checkpoint's.
            tensor: as it is in the base model, contiguous.
            check: verify that it is the base model's.
        Raises:
            BaseMismatchError: it is another base model's; nothing was changed.
        """
        indices, values = self.indices.get(name), self.values.get(name)
        remedy = "Take the base model that it was made for."
        if tuple(tensor.shape) != self.shapes.get(name):
            raise BaseMismatchError(
                f"{name!r} has shape {list(tensor.shape)}, the patch is for {list(self.shapes.get(name, ()))}. "
                + remedy
            )
        if values is not None and values.dtype != tensor.dtype:
            raise BaseMismatchError(f"{name!r} is {tensor.dtype}, the patch is for {values.dtype}. {remedy}")
        written = indices.long() if indices is not None else None
        if check and name in self.hashes and frozen_hash(tensor, written) != self.hashes[name]:
            raise BaseMismatchError(f"the patch was made for another base model: {name!r} differs. {remedy}")
        if values is not None:
            with torch.no_grad():
                if written is None:
                    tensor.copy_(values.view_as(tensor))
                else:
                    tensor.view(-1)[written.to(tensor.device)] = values.to(tensor.device)
        return tensor

    def save(self, folder: str | Path) -> None:
        """Write the patch to a folder: ``patch.safetensors`` and ``patch.json``.

        Raises:
            ParameterError: a tensor has more entries than an int32 can count.
        """
        for name in self.indices:
            if math.prod(self.shapes[name]) > 2**31:
                raise ParameterError(
                    f"{name!r} has {math.prod(self.shapes[name]):,} entries, more than int32 indices can count. "
                    "Export the model."
                )
        records = {
            name: {
                "shape": list(shape),
                "written": "none" if name not in self.values else "some" if name in self.indices else "all",
                **({"frozen_sha256": self.hashes[name]} if name in self.hashes else {}),
                **({"added": True} if name in self.added else {}),
            }
            for name, shape in self.shapes.items()
        }
        tensors = {name + _VALUES: values for name, values in self.values.items()}
        tensors |= {name + _INDICES: indices for name, indices in self.indices.items()}
        _FORMAT.write(Path(folder), {"base": self.base, "tensors": records}, tensors)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a patch that ``save`` wrote.

        Raises:
            CorruptFileError: a file is missing, truncated, changed, or of another format.
        """
        about, tensors = _FORMAT.read(Path(folder))
        try:
            records = about["tensors"]
            shapes = {name: tuple(map(int, record["shape"])) for name, record in records.items()}
            written = {name: record["written"] for name, record in records.items()}
            values = {name: tensors.pop(name + _VALUES) for name in shapes if written[name] != "none"}
            indices = {name: tensors.pop(name + _INDICES) for name in shapes if written[name] == "some"}
            if tensors:
                raise CorruptFileError(
                    f"{folder} holds {min(tensors)!r}, which its patch.json does not name."
                )
            for name, value in values.items():
                _check(folder, name, shapes[name], indices.get(name), value)
            return cls(
                shapes=shapes,
                indices=indices,
                values=values,
                hashes={n: str(r["frozen_sha256"]) for n, r in records.items() if "frozen_sha256" in r},
                added=tuple(name for name, record in records.items() if record.get("added")),
                base=dict(about["base"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as fault:
            raise CorruptFileError(f"{folder} is no patch ({fault!r}). Get the folder anew.") from None


def _check(
    folder: str | Path, name: str, shape: tuple[int, ...], indices: Tensor | None, values: Tensor
) -> None:
    """Raise a CorruptFileError if indices and values do not fit a tensor of this shape."""
    count = math.prod(shape)
    if min(shape, default=0) < 0 or (indices is None and values.shape != shape):
        raise CorruptFileError(f"{folder} holds other values for {name!r} than its shape says. Get it anew.")
    if indices is None:
        return
    increases = (
        indices.dtype == torch.int32 and indices.dim() == 1 and bool((indices[1:] > indices[:-1]).all())
    )
    inside = increases and len(indices) and int(indices[0]) >= 0 and int(indices[-1]) < count
    if not inside or values.shape != indices.shape:
        raise CorruptFileError(f"{folder} holds indices of {name!r} that do not fit its shape. Get it anew.")
