"""Combinations of methods joined by ``+``: parse and check them, and apply them to a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from childtuning.child import ChildConfig
from childtuning.errors import ConfigError, did_you_mean
from childtuning.methods.registry import find_method
from childtuning.methods.whole import Full
from childtuning.training import PARTS, Method, Prepared


@dataclass(frozen=True)
class Combination:
    """One or more methods that are used together.

    Args:
        methods: the methods; they are sorted by ``part``, from ``start`` to ``update``, which is the order of use.
    Raises:
        ConfigError: when two of them cannot be combined; the message gives the reason.
    """

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        given = tuple(sorted(self.methods, key=lambda method: PARTS.index(method.part)))
        object.__setattr__(self, "methods", given)
        for index, first in enumerate(given):
            for second in given[index + 1 :]:
                reason = refusal(type(first), type(second))
                if reason:
                    raise ConfigError(
                        f"methods {first.name!r} and {second.name!r} cannot be combined: {reason}. "
                        "Leave one of them out."
                    )

    @classmethod
    def parse(cls, text: str) -> Combination:
        """Parse ``name``, ``name:value``, ``name:key=value,key=value``, or several of these joined by ``+``.

        Raises:
            ConfigError: for an unknown method or option, a value out of range, or methods that cannot be combined.

        Example:
            >>> [method.name for method in Combination.parse("child-d").methods]
            ['child-d']
        """
        words = [word.strip() for word in text.split("+")]
        if not all(words):
            raise ConfigError(f"method {text!r} has an empty part. Write child-d+r3f, for example.")
        return cls(tuple(_parse_one(word) for word in words))

    @property
    def density(self) -> float:
        """The default density."""
        return next((method.density for method in self.methods if method.part == "child"), 1.0)

    @property
    def rate(self) -> float:
        """The learning rate that suits them, as a multiple of full tuning's: that of added modules, or of the child.

        Layers that are trained in full bear no more than full tuning's.
        """
        parts = {method.part: method.rate for method in self.methods}
        rate = parts.get("modules", parts.get("child", 1.0))
        return min(rate, 1.0) if any(method.redraws for method in self.methods) else rate

    @property
    def takes_density(self) -> bool:
        """Whether a method trains a share of the entries, which the user may set."""
        return any(method.part == "child" and method.density < 1 for method in self.methods)

    @property
    def num_positions(self) -> int:
        """How many of a model's positions they take from the input."""
        return sum(method.num_positions for method in self.methods)

    @property
    def chooses(self) -> bool:
        """Whether a method sets the parameters that a child is chosen from."""
        return any(method.chooses for method in self.methods)

    def child(self, config: ChildConfig) -> ChildConfig:
        """Return the configuration of the child, given the user's options.

        Raises:
            ConfigError: for options that a method does not accept.
        """
        if self.chooses and config.eligible is not None:
            name = next(method.name for method in self.methods if method.chooses)
            raise ConfigError(f"method {name!r} sets the eligible parameters itself. Leave out eligible.")
        children = [method for method in self.methods if method.part == "child"]
        if not children and config.density != 1.0:
            raise ConfigError(
                f"nothing in {'+'.join(method.name for method in self.methods)!r} chooses a child, "
                f"got density {config.density}. Leave it out, or add child-d or child-f."
            )
        if config.budget is not None and not self.takes_density:
            raise ConfigError(
                f"nothing in {'+'.join(method.name for method in self.methods)!r} chooses a child, "
                f"got budget {config.budget}. Leave it out, or add child-d."
            )
        added = [method.name for method in self.methods if method.part == "modules"]
        if config.budget is not None and added:
            raise ConfigError(
                f"a budget is a share of what full fine-tuning costs, which does not have {added[0]}'s modules, "
                f"got budget {config.budget}. Pass a density."
            )
        for method in children or [Full()]:
            config = method.child(config)
        return config

    def prepare(self, model: nn.Module, always: Iterable[str]) -> Prepared:
        """Apply the methods' changes to a pretrained model before training.

        Args:
            model: the model with a new head.
            always: names of the head's parameters, which are trained in full.
        Raises:
            ModelError: when a method does not apply to this model.
        """
        prepared = Prepared(model, tuple(always))
        for method in self.methods:
            prepared = method.prepare(prepared)
        return prepared

    def merge(self, model: nn.Module) -> nn.Module:
        """Return a tuned model in the base model's own architecture.

        Raises:
            ModelError: when the added modules cannot be merged into it.
        """
        for method in reversed(self.methods):
            model = method.merge(model)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the methods' files for other libraries, in addition to the delta."""
        for method in self.methods:
            method.save(model, folder)


def _parse_one(word: str) -> Method:
    name, colon, given = word.partition(":")
    method = find_method(name.strip())
    types = {field.name: str(field.type) for field in fields(method)}  # type: ignore[arg-type]
    takes_density = method.part == "child" and method.density < 1
    options: dict[str, Any] = {}
    for position, piece in enumerate(given.split(",") if colon else ()):
        key, equals, value = piece.partition("=")
        if not equals:
            if position or not types:
                none = "It takes none; a density is --density." if takes_density else "It takes none."
                takes = f"It takes {', '.join(types)}." if types else none
                raise ConfigError(f"method {name!r} got {piece!r} without an option's name. {takes}")
            key, value = next(iter(types)), piece
        key = key.strip().replace("-", "_")
        if key not in types:
            remedy = "Pass --density." if key == "density" and takes_density else did_you_mean(key, types)
            raise ConfigError(f"method {name!r} has no option {key!r}. {remedy}")
        if key in options:
            raise ConfigError(f"method {name!r} got {key!r} twice. Pass it once.")
        options[key] = _typed(name, key, value.strip(), types[key])
    return method(**options)


def _typed(method: str, key: str, value: str, kind: str) -> Any:
    kind = kind.removesuffix(" | None")
    try:
        if kind == "bool":
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[value]
        if kind in ("int", "float"):
            return {"int": int, "float": float}[kind](value)
    except (ValueError, KeyError):
        words = {"int": "a whole number", "float": "a number", "bool": "true or false"}
        raise ConfigError(f"{key} of method {method!r} must be {words[kind]}, got {value!r}.") from None
    return value


def refusal(first: type[Method], second: type[Method]) -> str | None:
    """Return why two methods cannot be used together, or ``None`` if they can.

    All other methods compose: terms of the loss are added; start, child and update are independent.
    """
    if first.name == second.name:
        return "it is given twice"
    if first.part == second.part and first.part in ("child", "modules"):
        what = (
            "which parameters are trained" if first.part == "child" else "what is added to a frozen network"
        )
        return f"each sets {what}"
    for one, other in ((first, second), (second, first)):
        if one.part == "modules" and other.acts_on_pretrained:
            return f"{other.name!r} acts on the pretrained weights, which {one.name!r} freezes"
    return first.excludes.get(second.name) or second.excludes.get(first.name)
