"""Patterns over parameter names, as a shell writes them: ``classifier.*``, ``*.LayerNorm.*``."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from childtuning.errors import ParameterError, did_you_mean


def as_patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """Return the patterns as a tuple; a lone string is one pattern."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether the name fits any of the patterns (case matters)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def match_names(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """Return the names that fit any of the patterns.

    Raises:
        ParameterError: a pattern fits no name; all such patterns are named.
    """
    names = list(names)
    found: set[str] = set()
    unmatched: list[str] = []
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        found |= hits
        if not hits:
            unmatched.append(pattern)
    if unmatched:
        listing = ", ".join(repr(p) for p in unmatched)
        shown = names if len(names) <= 8 else [*names[:4], "…", *names[-2:]]
        hint = did_you_mean(unmatched[0], names).split(" Known:")[0] if len(names) else "There are none."
        hint = "" if hint.startswith("Known:") else f" {hint}"
        raise ParameterError(f"pattern {listing} matched no parameter. Names are {', '.join(shown)}.{hint}")
    return found


_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def canonical_names(names: Iterable[str]) -> list[str]:
    """Return the names a model's parameters have before torch.compile, DDP or FSDP wrap it."""
    plain = list(names)
    for wrapper in _WRAPPERS:
        plain = [name.replace(wrapper, "") for name in plain]
    while plain and all(name.startswith("module.") for name in plain):
        plain = [name.removeprefix("module.") for name in plain]
    return plain
