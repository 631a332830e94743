"""Children and deltas as files: written completely or not at all, with compressed indices.

Sorted indices are stored as Golomb-Rice coded gaps [Rice 1979]. For indices i_1 < i_2 < … the gaps
g_j = i_j − i_{j−1} − 1 are split at bit k: the high parts in unary (all of them first, as one bitmap whose ones end
each gap), then the low k bits of each, packed. k is chosen by exact cost. With n of N entries the code never takes
more than n·(k + 1) + N / 2^k bits, and for entries chosen independently it is within a few per cent of the entropy.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from childtuning.child.ranking import Share, random_parts
from childtuning.child.units import Granularity, Part, as_axes
from childtuning.errors import ConfigError, CorruptFileError

Records = dict[str, dict[str, Any]]
Streams = dict[str, NDArray[np.uint8]]

RECIPES = ("random", "random-units")  # sources whose indices can be reproduced
LEAST_DRAWN = (
    1e-5  # the density from which a delta may name a recipe: to draw it takes memory by the model's size
)
_MAX_LOW_BITS = 40


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file next to the path, then move it into place.

    A reader sees either the old file or the new one, even if the process is killed. Who may read it is as for any file
    that a program makes there; safetensors would let the owner alone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode & 0o777
        write(partial)
        partial.chmod(mode)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def file_hash(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, row by row; a copy where they do not lie so."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if flat.stride(0) != 1:  # one entry that was expanded
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


def read_json(path: Path, remedy: str = "Copy the whole folder anew.") -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        CorruptFileError: it is missing or damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as fault:
        raise CorruptFileError(f"{path} cannot be read ({fault}). {remedy}") from None
    return found


def encode_gaps(indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], int]:
    """Code strictly increasing, non-negative indices.

    Args:
        indices: int64 [n], strictly increasing.
    Returns:
        (stream, k): the bytes, uint8, and the number of low bits. ``decode_gaps`` needs both, and n.
    """
    n = len(indices)
    if n == 0:
        return np.zeros(0, np.uint8), 0
    gaps = np.diff(indices, prepend=-1) - 1
    k = min(range(_MAX_LOW_BITS), key=lambda bits: n * (bits + 1) + int((gaps >> bits).sum()))
    ends = np.cumsum((gaps >> k) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1, np.uint8)
    unary[ends] = 1
    low = ((gaps[:, None] >> np.arange(k)) & 1).astype(np.uint8) if k else np.zeros((n, 0), np.uint8)
    return np.concatenate([np.packbits(unary), np.packbits(low)]), k


def decode_gaps(stream: NDArray[np.uint8], count: int, k: int) -> NDArray[np.int64]:
    """Return the int64 [count] indices that ``encode_gaps`` coded.

    Raises:
        ValueError: the stream does not hold count indices.
    """
    if count == 0:
        if len(stream):
            raise ValueError("an empty index list has a stream of no bytes")
        return np.zeros(0, np.int64)
    num_low_bytes = -(-count * k // 8)
    unary, low = stream[: len(stream) - num_low_bytes], stream[len(stream) - num_low_bytes :]
    ends = np.flatnonzero(np.unpackbits(unary))
    if len(stream) < num_low_bytes or len(ends) != count:
        raise ValueError(f"the stream does not hold {count} indices")
    gaps = (np.diff(ends, prepend=-1) - 1).astype(np.int64) << k
    if k:
        bits = np.unpackbits(low, count=count * k).reshape(count, k)
        for bit in range(k):
            gaps |= bits[:, bit].astype(np.int64) << bit
    return np.cumsum(gaps + 1) - 1


def write_parts(parts: Mapping[str, Part], from_recipe: Collection[str] = ()) -> tuple[Records, Streams]:
    """Return a JSON-ready record for each part, and the coded indices of those that need any.

    Args:
        parts: by parameter name.
        from_recipe: names whose indices are not written because a recipe reproduces them.
    """
    records: Records = {}
    streams: Streams = {}
    for name, part in parts.items():
        record: dict[str, Any] = {"shape": list(part.shape)}
        if name in from_recipe:
            record["trained"] = "recipe"
        elif part.units is None or part.is_empty:
            record["trained"] = "all" if part.units is None else "none"
        else:
            streams[name], low_bits = encode_gaps(part.units.numpy().astype(np.int64))
            record |= {"trained": "coded", "count": len(part.units), "low_bits": low_bits}
            unit = part.granularity
            if unit.kind != "element":
                record["granularity"] = unit.kind
            if (unit.kind == "row" and unit.axis != 0) or (unit.kind == "block" and unit.axis != ()):
                record["axis"] = unit.axis
            if unit.kind == "block":
                record["block_shape"] = list(unit.block_shape)
        records[name] = record
    return records, streams


def read_parts(
    records: Mapping[str, Any],
    streams: Streams,
    recipe: Mapping[str, Any] | None,
    num_values: int | None = None,
) -> dict[str, Part]:
    """Rebuild the parts that ``write_parts`` wrote.

    Args:
        records, streams: as it returned them.
        recipe: of the parts that are drawn.
        num_values: how many values come with them: a recipe that draws more is refused before it does.
    Raises:
        CorruptFileError: records, streams and recipe do not fit together.
    """
    try:
        shapes = {name: tuple(rec["shape"]) for name, rec in records.items() if rec["trained"] == "recipe"}
        made: dict[str, Part] = {}
        if shapes:
            if recipe is None or recipe["source"] not in RECIPES:
                raise CorruptFileError(
                    f"the child's recipe {recipe} is unknown. Use a newer version of this library."
                )
            numel = sum(math.prod(shape) for shape in shapes.values())
            share = float(recipe["density"])
            if num_values is not None and (share < LEAST_DRAWN or share * numel > 2 * num_values + 1000):
                raise CorruptFileError(
                    "the recipe draws more entries than there are values. Get the file anew."
                )
            by_units = recipe["source"] == "random-units"
            made = random_parts(shapes, Share.from_dict(recipe), recipe["seed"], by_units=by_units)
        return {
            name: made[name] if name in made else _read_part(record, streams.get(name))
            for name, record in records.items()
        }
    except (KeyError, TypeError, AttributeError, ValueError, ConfigError) as fault:
        raise CorruptFileError(
            f"the records of a child are damaged ({fault!r}). Get the file anew."
        ) from None


def _read_part(record: Mapping[str, Any], stream: NDArray[np.uint8] | None) -> Part:
    shape = tuple(int(size) for size in record["shape"])
    if record["trained"] == "all":
        return Part(shape)
    if record["trained"] == "none":
        return Part.none(shape)
    kind = record.get("granularity", "element")
    axis = as_axes(record.get("axis", () if kind == "block" else 0))
    granularity = Granularity(kind, axis, tuple(record.get("block_shape", (32, 32))))
    if stream is None:
        raise KeyError("indices")
    units = decode_gaps(stream, int(record["count"]), int(record["low_bits"]))
    return Part(shape, torch.from_numpy(units), granularity)
