"""An option is declared once: a typed field of a frozen dataclass, with its help and its range.

From the declaration follow the check of a value, its spelling as text, and what the command line and the documentation
show. It needs nothing but the standard library, so that a command line can be read without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from childtuning.errors import ConfigError, did_you_mean

_NAMES = {
    "bool": "True or False",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "list": "a list of texts",
}


@dataclass(frozen=True)
class Option:
    """A declared option.

    Attributes:
        name: of the field.
        kind: ``bool``, ``int``, ``float``, ``str`` or ``list`` (of texts).
        words: what else it may be; all that it may be where the kind is ``str``.
        optional: whether it may be ``None``.
        default: what it is where nothing is said.
        help: one sentence.
        panel: the part of the help it stands in.
        flags: its names on the command line, where they do not follow from its own.
        unset: what ``None`` means, in a few words.
        within: the interval of numbers, such as ``(0, 1]``.
        check: a function that returns what is wrong with a value, or ``None``; in place of the other checks.
        argument: what transformers' ``TrainingArguments`` call it, where they have the same.
    """

    name: str
    kind: str
    words: tuple[str, ...]
    optional: bool
    default: Any
    help: str
    panel: str = ""
    flags: tuple[str, ...] = ()
    unset: str = ""
    within: str = ""
    check: Callable[[object], str | None] | None = None
    argument: str = ""

    @property
    def shown_default(self) -> str:
        """The default as help shows it."""
        if self.default is None or isinstance(self.default, bool):
            return self.unset
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    def converted(self, value: Any) -> Any:
        """Return a value in the option's own type where it is meant: one text as a list, 1 as 1.0."""
        if self.kind == "list" and isinstance(value, (str, list, tuple, set, frozenset)):
            return (value,) if isinstance(value, str) else tuple(value)
        if self.kind == "int" and isinstance(value, Integral) and not isinstance(value, bool):
            return int(value)
        if self.kind == "float" and isinstance(value, Real) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                return math.copysign(math.inf, value)
        return value

    def fault(self, value: Any) -> str | None:
        """Return what is wrong with a converted value, in one line with a remedy; ``None`` if nothing is."""
        if value in self.words if isinstance(value, str) else value is None and self.optional:
            return None
        if self.check is not None:
            return self.check(value)
        got = f"{self.name} must be {self._wanted}, got {value!r}."
        if self.kind == "str" and self.words:
            return f"{got} {did_you_mean(str(value), self.words)}"
        kinds = {"bool": bool, "int": int, "float": float, "str": str, "list": tuple}[self.kind]
        is_right = isinstance(value, kinds) and (self.kind == "bool" or not isinstance(value, bool))
        if is_right and isinstance(value, tuple):
            is_right = all(isinstance(one, str) for one in value)
        if is_right and self.within:
            is_right = _lies_in(value, self.within)
        if not is_right and self.kind == "float" and not isinstance(value, float):
            got = (
                f"{self.name} must be a number {self._wanted if self.within else ''}".rstrip()
                + f", got {value!r}."
            )
        return None if is_right else f"{got} {self._remedy}"

    @property
    def _wanted(self) -> str:
        if self.kind == "str" and self.words:
            return f"one of {', '.join(self.words)}"
        bounds = {
            "(0, inf)": "above 0",
            "(0, 2147483648)": "above 0 (and below 2^31)",
            "[0, inf)": "0 or more",
            "[1, inf)": "from 1 up",
            "[2, inf)": "from 2 up",
        }
        place = bounds.get(self.within, f"in {self.within}") if self.within else ""
        return f"{_NAMES[self.kind]} {place}".strip() if self.kind == "int" else place or _NAMES[self.kind]

    @property
    def _remedy(self) -> str:
        if self.kind == "list":
            return f"Pass for example {self.name}=['classifier.*']."
        return (
            "Leave it out for the default." if self.default is None else f"Pass {self.name}={self.default}."
        )

    def parse(self, text: str) -> Any:
        """Return the value that a text spells: ``2e-5``, ``row``, ``true``.

        Raises:
            ConfigError: it spells none.
        """
        if text in self.words or self.kind in ("str", "list"):
            return self.converted(text)
        try:
            if self.kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            return int(text) if self.kind == "int" else float(text)
        except (ValueError, KeyError):
            words = f", or {self.words[0]}" if self.words else ""
            raise ConfigError(f"{self.name} must be {_NAMES[self.kind]}{words}, got {text!r}.") from None


def option(default: Any, help: str, **about: Any) -> Any:
    """Declare an option: the field of a frozen dataclass; ``about`` are attributes of ``Option``."""
    return field(default=default, metadata={"help": help, **about})


@cache
def options_of(config: type) -> dict[str, Option]:
    """Return the options that a dataclass declares, by name, in order."""
    hints = get_type_hints(config)
    return {f.name: _option(f, hints[f.name]) for f in fields(config) if "help" in f.metadata}


def own_first(config: type) -> list[str]:
    """Return the names of a dataclass's options, its own before those that it inherits."""
    own = vars(config).get("__annotations__", {})
    return sorted(options_of(config), key=lambda name: name not in own)


def settle(config: Any) -> list[str]:
    """Bring a frozen dataclass's options to their types, in place; return all that is wrong with them."""
    faults = []
    for name, declared in options_of(type(config)).items():
        value = declared.converted(getattr(config, name))
        object.__setattr__(config, name, value)
        fault = declared.fault(value)
        faults += [fault] if fault else []
    return faults


def _option(declared: Any, hint: Any) -> Option:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    words = tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))
    plain = [get_origin(part) or part for part in parts if part is not type(None)]
    kind = next((k for k in (bool, int, float, str, tuple) if k in plain), str)
    assert declared.default is not MISSING
    return Option(
        declared.name,
        "list" if kind is tuple else kind.__name__,
        tuple(word for word in words if word is not None),
        type(None) in parts or None in words,
        declared.default,
        **declared.metadata,
    )


def _lies_in(value: Any, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    if isinstance(value, float) and not math.isfinite(value):
        return False
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    return above and below
