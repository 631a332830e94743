"""Parts of a child as they stand in a file: JSON records, and coded indices where there are any."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from childtuning.errors import ConfigError, CorruptFileError
from childtuning.part import Part
from childtuning.ranked_parts import Share, random_parts

Records = dict[str, dict[str, Any]]
Streams = dict[str, NDArray[np.uint8]]


def write_parts(parts: Mapping[str, Part], from_recipe: Collection[str] = ()) -> tuple[Records, Streams]:
    """Return a record for each part, and the coded indices of those that need any.

    Args:
        parts: by parameter name.
        from_recipe: names whose indices are not written because a recipe makes them again.
    """
    records: Records = {}
    streams: Streams = {}
    for name, part in parts.items():
        if name in from_recipe:
            records[name] = {"shape": list(part.shape), "trained": "recipe"}
            continue
        records[name], stream = part.to_record()
        if stream is not None:
            streams[name] = stream
    return records, streams


def read_parts(
    records: Mapping[str, Any], streams: Streams, recipe: Mapping[str, Any] | None
) -> dict[str, Part]:
    """Rebuild the parts that ``write_parts`` wrote.

    Raises:
        CorruptFileError: records, streams and recipe do not fit together.
    """
    try:
        shapes = {name: tuple(rec["shape"]) for name, rec in records.items() if rec["trained"] == "recipe"}
        made: dict[str, Part] = {}
        if shapes:
            if recipe is None or recipe["source"] != "random":
                raise CorruptFileError(
                    f"the child's recipe {recipe} is unknown. Use a newer version of this library."
                )
            made = random_parts(shapes, Share.from_dict(recipe), recipe["seed"])
        return {
            name: made[name] if name in made else Part.from_record(record, streams.get(name))
            for name, record in records.items()
        }
    except (KeyError, TypeError, AttributeError, ConfigError) as fault:
        raise CorruptFileError(
            f"the records of a child are damaged ({fault!r}). Get the file anew."
        ) from None
