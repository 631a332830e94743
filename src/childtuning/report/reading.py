"""Read a comparison from a store or from its JSON export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from childtuning.compare.records import Recorded
from childtuning.errors import ConfigError

_SQLITE = b"SQLite format 3\x00"


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
    results = [record.result for record in recorded.records if record.state == "done"]
    metrics = [result.get("metric") if isinstance(result, Mapping) else None for result in results]
    return all(isinstance(part, Mapping) for part in (*parts, *metrics)) and all(
        isinstance(metric.get("name"), str) and isinstance(metric.get("value"), int | float | None)
        for metric in metrics
        if isinstance(metric, Mapping)
    )
