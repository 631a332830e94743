"""Join several comparisons into one: tasks that were compared separately, or on several machines."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from childtuning.compare.records import Group, Recorded, artifact_of
from childtuning.errors import ConfigError

_UNITED = ("tasks", "methods", "train_sizes", "transfer_to")


def joined(parts: Mapping[str, Recorded]) -> Recorded:
    """Return the contents of several stores as one; each method on a task comes from a single store.

    Settings and environment facts that differ are left out; all commands are kept.

    Args:
        parts: the stores' contents, keyed by a name for error messages; at least one.
    Raises:
        ConfigError: the comparisons follow different rules, or two of them contain the same results.
    """
    for (first, one), (second, other) in combinations(parts.items(), 2):
        _check(first, one, second, other)
    contents = list(parts.values())
    if len(contents) == 1:
        return contents[0]
    baseline = _rules(contents[0])["baseline"]
    settings = _common([{**one.comparison, "baseline": baseline} for one in contents])
    return Recorded(
        comparison={
            **{key: value for key, value in settings.items() if key not in ("command", "commands")},
            **{name: _united(name, contents) for name in _UNITED},
            "commands": [command for one in contents for command in commands(one.comparison)],
        },
        records=[record for one in contents for record in one.records],
        artifacts={name: content for one in contents for name, content in one.artifacts.items()},
        environment=_common([one.environment for one in contents]),
    )


def commands(comparison: Mapping[str, Any]) -> list[str]:
    """Return the command of a comparison, or of each joined comparison."""
    return [*filter(None, comparison.get("commands") or [comparison.get("command")])]


def _check(first: str, one: Recorded, second: str, other: Recorded) -> None:
    theirs = _rules(other)
    for rule, value in _rules(one).items():
        if theirs[rule] != value:
            raise ConfigError(
                f"{first!r} and {second!r} differ in their {rule}: {value!r} and {theirs[rule]!r}. Report them apart."
            )
    for task, base in _bases(one).items():
        if _bases(other).get(task, base) != base:
            raise ConfigError(
                f"{first!r} and {second!r} have different base models on {task}: their weights differ. "
                "Report them apart."
            )
    measured = _measured(other)
    for task, (metric, examples) in _measured(one).items():
        there, others = measured.get(task, (metric, examples))
        if metric != there or (examples and others and examples.isdisjoint(others)):
            what = (
                f"its metrics, {metric} and {there}"
                if metric != there
                else "the examples that it is measured on"
            )
            raise ConfigError(f"{first!r} and {second!r} differ on {task} in {what}. Report them apart.")
    held = {record.group for record in other.records}
    shared = next((record.group for record in one.records if record.group in held), None)
    if shared is not None:
        raise ConfigError(
            f"{first!r} and {second!r} both hold {_named(shared)}. Report them apart, or leave one out."
        )
    for name in one.artifacts:
        if name in other.artifacts and not name.startswith(artifact_of("")):
            raise ConfigError(
                f"{first!r} and {second!r} both hold the {name} of children. Report them apart."
            )


def _rules(recorded: Recorded) -> dict[str, Any]:
    """What must be the same for scores to be comparable."""
    asked = recorded.comparison
    return {
        "baseline": asked.get("baseline") or next(iter(asked.get("methods") or ()), None),
        "model": (asked.get("options") or {}).get("model"),
        "selection": asked.get("selection", "held-out"),
        "tune_seeds": asked.get("tune_seeds") or 1,
    }


def _bases(recorded: Recorded) -> dict[str, str]:
    """Task -> hash of the base model that its runs were trained on, where it is recorded."""
    results = ((record.group.task, record.result or {}) for record in recorded.records)
    return {task: result["base_hash"] for task, result in results if result.get("base_hash")}


def _measured(recorded: Recorded) -> dict[str, tuple[str | None, set[str]]]:
    """Task -> its metric, and hashes of the examples on which its finished runs were measured, as far as recorded."""
    found: dict[str, tuple[str | None, set[str]]] = {}
    for record in recorded.records:
        if record.result is not None:
            _, examples = found.setdefault(record.group.task, (record.metric, set()))
            examples |= {record.result["examples"]} if record.result.get("examples") else set()
    return found


def _named(group: Group) -> str:
    size = "" if group.train_size is None else f" with {group.train_size:,} examples"
    return f"{group.method} on {group.task}{size}" + ("" if group.start is None else f" from {group.start}")


def _united(name: str, contents: list[Recorded]) -> list[Any]:
    return [*dict.fromkeys(value for one in contents for value in one.comparison.get(name) or ())]


def _common(contents: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The keys whose values are the same in all of them."""
    first, *others = contents
    found: dict[str, Any] = {}
    for key, value in first.items():
        values = [value, *(other.get(key) for other in others)]
        if all(isinstance(one, Mapping) for one in values):
            found[key] = _common(values)
        elif all(one == value for one in values):
            found[key] = value
    return found
