"""The child network: the entries of each named parameter that are trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from childtuning.child.eligible import as_patterns, canonical_name, match_names, matches
from childtuning.child.files import RECIPES, read_parts, write_atomically, write_parts
from childtuning.child.units import Part
from childtuning.errors import CorruptFileError, ParameterError, did_you_mean

_FORMAT = "childtuning-child"
_VERSION = 1


class Child:
    """The set of trained entries of a model; ``True`` in a mask always means *trained*.

    A child is immutable. It refers to parameters by name, so it fits any model with the same names and shapes.

    Args:
        parts: for every *eligible* parameter, in the model's order, which of its units are trained.
        always: patterns over the names of parameters to train in full besides the child, such as a new head. These
            parameters do not count as eligible. Patterns are matched when the child is applied to a model.
        recipe: JSON-ready fields that reproduce the same parts (set by ``random_child``), so that a file needs no
            indices.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        *,
        always: Iterable[str] = (),
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        self.parts: dict[str, Part] = dict(parts)
        self.always: tuple[str, ...] = as_patterns(always)
        self.recipe: dict[str, Any] | None = dict(recipe) if recipe is not None else None

    @classmethod
    def whole(cls, shapes: Mapping[str, Sequence[int]], *, always: Iterable[str] = ()) -> Self:
        """Return the child that is the network itself: full fine-tuning of the named parameters."""
        return cls({name: Part(tuple(shape)) for name, shape in shapes.items()}, always=always)

    @classmethod
    def from_masks(cls, masks: Mapping[str, Tensor], *, always: Iterable[str] = ()) -> Self:
        """Return the child given by bool masks, one for each eligible parameter."""
        return cls({name: Part.from_mask(mask) for name, mask in masks.items()}, always=always)

    @property
    def num_trained(self) -> int:
        """Number of eligible entries that are trained (what ``always`` adds is not counted)."""
        return sum(part.num_trained for part in self.parts.values())

    @property
    def num_eligible(self) -> int:
        """Number of entries that the selection could choose from."""
        return sum(part.numel for part in self.parts.values())

    @property
    def density(self) -> float:
        """``num_trained / num_eligible``: the paper's p (1.0 when nothing is eligible)."""
        return self.num_trained / self.num_eligible if self.num_eligible else 1.0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the eligible parameters that have trained entries, in the model's order."""
        return tuple(name for name, part in self.parts.items() if not part.is_empty)

    def mask(self, name: str) -> Tensor:
        """Return the bool mask of an eligible parameter, of its shape, on the CPU.

        Raises:
            ParameterError: the parameter is not eligible, or not known.
        """
        if name not in self.parts:
            if matches(name, self.always):
                raise ParameterError(f"{name!r} has no mask: it is always trained whole. It is not eligible.")
            raise ParameterError(f"the child has no parameter {name!r}. " + did_you_mean(name, self.parts))
        return self.parts[name].mask()

    def overlap(self, other: Child) -> float:
        """Return the share of common entries, |A ∩ B| / min(|A|, |B|): 1 for equal children, p for random ones.

        Raises:
            ParameterError: the two children are not over the same parameters.
        """
        smaller = min(self.num_trained, other.num_trained)
        common = sum(part.num_trained for part in self._with(other, Part.__and__).values())
        return common / smaller if smaller else 0.0

    def __or__(self, other: Child) -> Child:
        """Return the union: what either trains. Raises a ``ParameterError`` as ``overlap`` does."""
        return Child(self._with(other, Part.__or__), always=dict.fromkeys([*self.always, *other.always]))

    def __and__(self, other: Child) -> Child:
        """Return the intersection: what both train. Raises as ``-`` does."""
        own = self._always_alone(other)
        return Child(self._with(other, Part.__and__), always=[p for p in self.always if p not in own])

    def __sub__(self, other: Child) -> Child:
        """Return the difference: what this trains and the other does not.

        Raises:
            ParameterError: as ``overlap``; or each has patterns in ``always`` that the other lacks: without a model
                nobody knows what they have in common.
        """
        return Child(self._with(other, Part.__sub__), always=self._always_alone(other))

    def _always_alone(self, other: Child) -> list[str]:
        """Return the patterns of what this child always trains and the other never."""
        ours = [pattern for pattern in self.always if pattern not in other.always]
        theirs = [pattern for pattern in other.always if pattern not in self.always]
        common = any(
            not part.is_empty and matches(name, patterns)
            for patterns, child in ((ours, other), (theirs, self))
            for name, part in child.parts.items()
        )
        if (ours and theirs) or common:
            raise ParameterError(
                f"one child always trains {list(self.always)} and the other {list(other.always)}. Give both the same."
            )
        return ours

    def _with(self, other: Child, of_parts: Callable[[Part, Part], Part]) -> dict[str, Part]:
        ours = {name: part.shape for name, part in self.parts.items()}
        theirs = {name: part.shape for name, part in other.parts.items()}
        if ours != theirs:
            differing = next(iter(set(ours.items()) ^ set(theirs.items())))
            raise ParameterError(
                f"the children are over different parameters ({differing[0]!r}). Choose both from the same model."
            )
        return {name: of_parts(part, other.parts[name]) for name, part in self.parts.items()}

    def resolve(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Part]:
        """Match the child against a model: return the trained units of every parameter, with shapes checked.

        Args:
            shapes: the model's parameter names, wrapped or not, and their shapes.
        Returns:
            one part per name, in the given order; empty for a frozen parameter.
        Raises:
            ParameterError: a name, shape or pattern of the child does not fit the model.
        """
        plain = {name: canonical_name(name) for name in shapes}
        if self.parts and not any(
            name in self.parts for name in plain.values()
        ):  # under DistributedDataParallel
            plain = {name: bare.removeprefix("module.") for name, bare in plain.items()}
        always = match_names(self.always, plain.values())
        missing = [name for name in self.parts if name not in set(plain.values())]
        if missing:
            raise ParameterError(
                f"the child names {missing[0]!r} ({len(missing)} such), which the model does not have. "
                "Use the model that the child was chosen for."
            )
        resolved: dict[str, Part] = {}
        for name, shape in shapes.items():
            part = self.parts.get(plain[name])
            if plain[name] in always:
                part = Part(tuple(shape))
            elif part is None:
                part = Part.none(shape)
            elif part.shape != tuple(shape):
                raise ParameterError(
                    f"{name!r} has shape {list(shape)} in the model and {list(part.shape)} in the child. "
                    "Use the model that the child was chosen for."
                )
            resolved[name] = part
        return resolved

    def fingerprint(self) -> str:
        """Return a sha256 that two children share exactly if they train the same entries."""
        digest = hashlib.sha256(json.dumps(sorted(self.always)).encode())
        for name, part in self.parts.items():
            digest.update(json.dumps([name, list(part.shape), part.num_trained]).encode())
            if not (part.is_whole or part.is_empty):
                digest.update(part.indices().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the child to one safetensors file, with compressed indices."""
        is_made = self.recipe is not None and self.recipe.get("source") in RECIPES
        records, streams = write_parts(self.parts, from_recipe=self.parts if is_made else ())
        about = {
            "format": _FORMAT,
            "version": _VERSION,
            "always": list(self.always),
            "recipe": self.recipe,
            "parts": records,
            "fingerprint": self.fingerprint(),
        }
        metadata = {"childtuning": json.dumps(about)}
        write_atomically(path, lambda partial: save_file(streams, partial, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a child that ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            CorruptFileError: it is damaged or of another kind.
        """
        try:
            with safe_open(str(path), framework="numpy") as file:
                about = json.loads((file.metadata() or {})["childtuning"])
                if about["format"] != _FORMAT or about["version"] != _VERSION:
                    raise CorruptFileError(f"{path} is no child of format version {_VERSION}. Write it anew.")
                streams = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            child = cls(
                read_parts(about["parts"], streams, about["recipe"]),
                always=about["always"],
                recipe=about["recipe"],
            )
            intact = child.fingerprint() == about["fingerprint"]
        except (
            SafetensorError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            OverflowError,
            MemoryError,
            RuntimeError,
        ) as fault:
            raise CorruptFileError(f"{path} is not a readable child ({fault}). Save it anew.") from None
        if not intact:
            raise CorruptFileError(f"{path} was changed after it was saved. Save it anew.")
        return child

    def __repr__(self) -> str:
        return (
            f"Child(density={self.density:.4g}, num_trained={self.num_trained:,} of {self.num_eligible:,}"
            + (f", always={list(self.always)}" if self.always else "")
            + ")"
        )
