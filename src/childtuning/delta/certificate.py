"""A certificate: which entries of a checkpoint a training may have moved, and hashes of all others.

Whoever has the base model and the tuned one can check it, one tensor at a time, without this run and without its delta.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from childtuning.child.files import read_parts, write_parts
from childtuning.child.units import Part
from childtuning.delta.files import Format, frozen_hash, stream_tensor
from childtuning.delta.patch import Patch
from childtuning.errors import CorruptFileError, DeltaError

_FORMAT = Format("certificate")


@dataclass(frozen=True, eq=False)
class Certificate:
    """What a training may have moved.

    Args:
        parts: by the checkpoint's name, the entries that were trained; every tensor that the model takes is there.
        hashes: by name, ``frozen_hash`` of the others; a tensor that is trained whole has none.
        added: names that the base's checkpoint lacks.
        about: what else is known, JSON-ready: the base, hashes of files, the method, versions.
    """

    parts: dict[str, Part]
    hashes: dict[str, str]
    added: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, patch: Patch, about: Mapping[str, Any] | None = None) -> Self:
        """Return the certificate of what a patch writes."""
        parts = {}
        for name, shape in patch.shapes.items():
            if name not in patch.values:
                parts[name] = Part.none(shape)
            else:
                parts[name] = Part(shape, patch.indices[name]) if name in patch.indices else Part(shape)
        return cls(parts, dict(patch.hashes), patch.added, dict(about or {}))

    @property
    def root(self) -> str:
        """The Merkle root over all tensors, hexadecimal.

        Leaves are sha256(0, JSON) in order of names: name, shape, ``added``, the hash of what is frozen, that of the
        trained positions (little-endian int64). A node is sha256(1, left, right), and an odd one moves up.
        """
        level = [self._leaf(name) for name in sorted(self.parts)]
        while len(level) > 1:
            pairs = zip(level[::2], level[1::2], strict=False)
            odd = level[-1:] if len(level) % 2 else []
            level = [sha256(b"\1" + left + right).digest() for left, right in pairs] + odd
        return (level or [sha256(b"").digest()])[0].hex()

    def _leaf(self, name: str) -> bytes:
        part = self.parts[name]
        partial = not (part.is_empty or part.is_whole)
        places = (
            sha256(part.indices().numpy().astype("<i8").tobytes()).hexdigest() if partial else part.is_whole
        )
        content = [name, list(part.shape), name in self.added, self.hashes.get(name), places]
        return sha256(b"\0" + json.dumps(content).encode()).digest()

    @property
    def num_trained(self) -> int:
        """Number of entries that may have moved."""
        return sum(part.num_trained for part in self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields, without positions: trained counts by tensor, the root, and what else is known."""
        return {
            "root": self.root,
            "trained": {name: part.num_trained for name, part in self.parts.items() if not part.is_empty},
            "entries": sum(part.numel for part in self.parts.values()),
            "added": list(self.added),
            **self.about,
        }

    def is_base(self, name: str, tensor: Tensor) -> bool:
        """Tell whether a tensor is that of the base model, as far as it is frozen."""
        part, told = self.parts[name], self.hashes.get(name)
        if tuple(tensor.shape) != part.shape:
            return False
        return told is None or frozen_hash(tensor, None if part.is_empty else part.indices()) == told

    def save(self, folder: str | Path) -> None:
        """Write the certificate to a folder: ``certificate.json`` and the positions, ``certificate.safetensors``."""
        records, streams = write_parts(self.parts)
        for name, digest in self.hashes.items():
            records[name]["frozen_sha256"] = digest
        for name in self.added:
            records[name]["added"] = True
        body = {"root": self.root, "about": self.about, "tensors": records}
        _FORMAT.write(Path(folder), body, {name: stream_tensor(stream) for name, stream in streams.items()})

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a certificate that ``save`` wrote.

        Raises:
            CorruptFileError: a file is missing, truncated, changed, or of another format.
        """
        body, streams = _FORMAT.read(Path(folder))
        try:
            records = body["tensors"]
            if any(record["trained"] == "recipe" for record in records.values()):
                raise CorruptFileError(f"{folder} names no positions. Get the certificate anew.")
            found = cls(
                read_parts(records, {name: tensor.numpy() for name, tensor in streams.items()}, None),
                {
                    n: str(record["frozen_sha256"])
                    for n, record in records.items()
                    if "frozen_sha256" in record
                },
                tuple(name for name, record in records.items() if record.get("added")),
                dict(body["about"]),
            )
            if found.root != body["root"]:
                raise CorruptFileError(
                    f"{folder} has another root than its hashes. Get the certificate anew."
                )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as fault:
            raise CorruptFileError(f"{folder} is no certificate ({fault!r}). Get it anew.") from None
        return found


def first_moved(part: Part, before: Tensor, after: Tensor) -> tuple[int, int]:
    """Compare a tensor before and after a training, bit by bit.

    Args:
        part: the entries that may have moved.
        before, after: of one shape and dtype.
    Returns:
        the flat index of the first other entry that moved, -1 if none has; and how many entries moved in all.
    Raises:
        DeltaError: shape or dtype differ.
    """
    if before.shape != after.shape or before.dtype != after.dtype:
        raise DeltaError(
            f"it was {before.dtype} {list(before.shape)} and is {after.dtype} {list(after.shape)} now"
        )
    moved = (_bits(before) != _bits(after)).any(1)
    count = int(moved.sum())
    if not part.is_empty:
        moved[part.indices()] = False
    return (int(moved.int().argmax()) if bool(moved.any()) else -1), count


def _bits(tensor: Tensor) -> Tensor:
    return (
        tensor.contiguous().view(-1, 1).view(torch.uint8)
        if tensor.numel()
        else torch.zeros(0, 1, device="cpu")
    )
