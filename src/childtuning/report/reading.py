"""Read a comparison from a store or from its JSON export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from childtuning.compare.records import Recorded
from childtuning.errors import ConfigError
from childtuning.runs.folder import RunResult

_SQLITE = b"SQLite format 3\x00"
_KINDS: dict[str, Any] = {"int": int, "float": int | float, "str": str}
_MAY_LACK = ("output",)  # where the folder was not kept


def read_recorded(path: str | Path) -> Recorded:
    """Return everything that was recorded.

    Args:
        path: a store's file, or its export.
    Raises:
        ConfigError: there is no such file, or it is neither.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "there is no such file"
        raise ConfigError(f"{str(path)!r} is no store: {what}. Pass the --store of `childtuning compare`.")
    content = path.read_bytes()
    if content.startswith(_SQLITE):
        from childtuning.compare.store import Store

        with Store.open(path) as store:
            return store.read()
    return _from_export(path, content)


def _from_export(path: Path, content: bytes) -> Recorded:
    try:
        recorded = Recorded.from_dict(json.loads(content))
        if not _is_sound(recorded):
            raise ValueError
        return recorded
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        if isinstance(fault, ConfigError):
            raise ConfigError(f"{str(path)!r}: {fault}") from None
        raise ConfigError(
            f"{str(path)!r} is neither a store nor the JSON of one. Pass the --store of `childtuning compare`."
        ) from None


def _is_sound(recorded: Recorded) -> bool:
    """Whether an export, which may have been edited, has what every report reads."""
    parts = (recorded.comparison, recorded.environment, recorded.artifacts)
    if not all(isinstance(part, Mapping) for part in parts):
        return False
    if not isinstance(recorded.comparison.get("options", {}), Mapping):
        return False
    return all(
        isinstance(record.seed, int)
        and isinstance(record.point, Mapping)
        and isinstance(record.config, Mapping)
        and (record.state != "done" or _is_result(record.result))
        for record in recorded.records
    )


def _is_result(result: Any) -> bool:
    """Whether a finished run's result has the fields that every version writes, each of its kind."""
    if not isinstance(result, Mapping):
        return False
    for one in fields(RunResult):
        if one.default is MISSING and one.default_factory is MISSING:
            kind = _KINDS.get(str(one.type), Mapping)
            if not isinstance(result.get(one.name), kind) and one.name not in _MAY_LACK:
                return False
    metric = result["metric"]
    return isinstance(metric.get("name"), str) and isinstance(metric.get("value"), int | float | None)
