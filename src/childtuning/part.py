"""One parameter's share of a child: which of its units are trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from childtuning.errors import CorruptFileError, ParameterError
from childtuning.granularity import Granularity
from childtuning.kernels import Places, decode_gaps, encode_gaps

_INT32_ENTRIES = 2**31


@dataclass(frozen=True, eq=False)
class Part:
    """The trained units of one parameter.

    Args:
        shape: the parameter's shape.
        units: sorted unit indices [n] without repeats, int32 (int64 for parameters of 2^31 entries or more), on the
            CPU; ``None`` means every unit.
        granularity: what the indices count.
    """

    shape: tuple[int, ...]
    units: Tensor | None = None
    granularity: Granularity = field(default_factory=Granularity)

    def __post_init__(self) -> None:
        if self.units is None:
            return
        index_dtype = torch.int32 if self.numel < _INT32_ENTRIES else torch.int64
        units = self.units.detach().to(device="cpu", dtype=index_dtype)
        num_units = self.granularity.num_units(self.shape)
        if len(units) and (
            int(units[0]) < 0 or int(units[-1]) >= num_units or bool((units.diff() <= 0).any())
        ):
            raise ParameterError(
                f"unit indices must increase within 0 … {num_units - 1}, got {units[:4].tolist()} …. Sort them."
            )
        object.__setattr__(self, "units", None if len(units) == num_units and num_units else units)

    @classmethod
    def from_sorted(cls, shape: Sequence[int], units: Tensor, granularity: Granularity) -> Part:
        """Return the part of unit indices that are known to be sorted, in range and without repeats, unchecked."""
        part = cls(tuple(shape), None, granularity)
        index_dtype = torch.int32 if part.numel < _INT32_ENTRIES else torch.int64
        if len(units) != granularity.num_units(shape) or not len(units):
            object.__setattr__(part, "units", units.detach().to(device="cpu", dtype=index_dtype))
        return part

    @classmethod
    def none(cls, shape: Sequence[int]) -> Part:
        """Return the part of a parameter of which nothing is trained."""
        return cls(tuple(shape), torch.zeros(0, dtype=torch.int32))

    @classmethod
    def from_mask(cls, mask: Tensor) -> Part:
        """Return the part whose entries are those where the bool mask is True."""
        return cls(tuple(mask.shape), mask.reshape(-1).nonzero().squeeze(1))

    @property
    def numel(self) -> int:
        """Number of entries of the parameter."""
        return math.prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether every entry is trained."""
        return self.units is None

    @property
    def is_empty(self) -> bool:
        """Whether no entry is trained."""
        return self.units is not None and len(self.units) == 0

    @property
    def num_trained(self) -> int:
        """Number of trained entries."""
        if self.units is None:
            return self.numel
        if self.granularity.kind == "element":
            return len(self.units)
        return int(self.granularity.sizes(self.shape)[self.units.long()].sum())

    def indices(self) -> Tensor:
        """List the trained entries' flat indices: int64 [num_trained], increasing, on the CPU."""
        if self.units is None:
            return torch.arange(self.numel)
        return self.granularity.entries(self.units, self.shape)

    def places(self) -> Places:
        """Say where the trained entries lie, in units as wide as their layout allows, on the CPU."""
        units = torch.arange(self.numel) if self.units is None else self.units
        width = 1 if self.units is None else self.granularity.run_length(self.shape)
        if self.units is not None and not self.granularity.is_run(self.shape):
            units = self.indices()[::width] // width
        small = self.numel < _INT32_ENTRIES
        return Places(units.to(torch.int32 if small else torch.int64), width)

    def mask(self) -> Tensor:
        """Return the bool tensor of the parameter's shape that is True where trained."""
        mask = torch.zeros(self.numel, dtype=torch.bool)
        mask[self.indices()] = True
        return mask.view(self.shape)

    def to_record(self) -> tuple[dict[str, Any], NDArray[np.uint8] | None]:
        """Return the part as JSON-ready fields and, unless whole or empty, the coded indices."""
        record: dict[str, Any] = {"shape": list(self.shape)}
        if self.units is None or self.is_empty:
            return {**record, "trained": "all" if self.units is None else "none"}, None
        stream, low_bits = encode_gaps(self.units.numpy().astype(np.int64))
        record |= {"trained": "coded", "count": len(self.units), "low_bits": low_bits}
        if self.granularity.kind != "element":
            record["granularity"] = self.granularity.kind
        if self.granularity.kind == "row" and self.granularity.axis != 0:
            record["axis"] = self.granularity.axis
        if self.granularity.kind == "block":
            record["block_shape"] = list(self.granularity.block_shape)
        return record, stream

    @classmethod
    def from_record(cls, record: Mapping[str, Any], stream: NDArray[np.uint8] | None) -> Part:
        """Rebuild what ``to_record`` returned.

        Raises:
            CorruptFileError: the fields and the stream do not fit together.
        """
        try:
            shape = tuple(int(size) for size in record["shape"])
            if record["trained"] == "all":
                return cls(shape)
            if record["trained"] == "none":
                return cls.none(shape)
            granularity = Granularity(
                record.get("granularity", "element"),
                int(record.get("axis", 0)),
                tuple(record.get("block_shape", (32, 32))),
            )
            if stream is None:
                raise KeyError("indices")
            units = decode_gaps(stream, int(record["count"]), int(record["low_bits"]))
            return cls(shape, torch.from_numpy(units), granularity)
        except (KeyError, TypeError, ValueError) as fault:
            raise CorruptFileError(f"a child's indices are damaged ({fault}). Get the file anew.") from None
