"""Where in a network a parameter is, read off its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Region = Literal["layer", "embeddings", "head", "other"]

_EMBEDDINGS = re.compile(r"embed|^(wte|wpe|cls_token|tok|pos)$", re.IGNORECASE)
_HEAD = re.compile(r"classifier|^score$|head|pooler|^fc$|qa_outputs|^cls$", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """Where a parameter is.

    Attributes:
        region: a numbered layer, the embeddings, the head, or none of these.
        stack: what the numbers of layers count: ``bert.encoder.layer``, ``layer1``; empty outside the layers.
        number: of the layer, from 0; -1 outside the layers.
        kind: the rest of the name: ``attention.self.query``, ``attention.self.query bias``.
    """

    region: Region
    stack: str
    number: int
    kind: str


def place_of(name: str) -> Place:
    """Return where a parameter is: its first component that is a number is the layer, what follows the kind.

    Further numbers are dropped, so that equal parts of a layer count as one kind; a weight has its module's name, and
    anything else adds its own: ``query``, ``query bias``.
    """
    path = name.split(".")
    number = next((place for place, part in enumerate(path) if part.isdecimal()), None)
    if number is None:
        words = path[-2:] if path[-1] in ("weight", "bias") else path[-1:]
        region: Region = "other"
        if any(_EMBEDDINGS.search(part) for part in path):
            region = "embeddings"
        elif any(_HEAD.search(part) for part in path):
            region = "head"
        return Place(region, "", -1, _kind(path if len(words) > 1 else words))
    rest = [part for part in path[number + 1 :] if not part.isdecimal()]
    stack = ".".join(path[:number])
    region = "head" if _HEAD.search(stack) else "embeddings" if _EMBEDDINGS.search(stack) else "layer"
    if region != "layer":  # the layers of a head are not the network's
        return Place(region, "", -1, _kind([part for part in path if not part.isdecimal()]))
    return Place("layer", stack, int(path[number]), _kind(rest))


def short_names(kinds: Iterable[str], *, fewest: int = 1) -> dict[str, str]:
    """Return each kind's shortest ending of at least so many words between dots that no other kind has."""
    kinds = list(dict.fromkeys(kinds))
    return {
        kind: next(ending for ending in _endings(kind, fewest) if _is_alone(ending, kind, kinds))
        for kind in kinds
    }


def _kind(parts: Sequence[str]) -> str:
    *module, last = parts or [""]
    path = ".".join(module)
    if last == "weight" and path:
        return path
    return f"{path} {last}".strip()


def _endings(kind: str, fewest: int) -> list[str]:
    parts = kind.split(".")
    return [".".join(parts[place:]) for place in range(max(0, len(parts) - fewest), -1, -1)]


def _is_alone(ending: str, kind: str, kinds: Sequence[str]) -> bool:
    return ending == kind or not any(
        other != kind and (other == ending or other.endswith("." + ending)) for other in kinds
    )
