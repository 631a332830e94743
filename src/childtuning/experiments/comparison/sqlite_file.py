"""Open SQLite files, and say what they meet in one line with a remedy."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from childtuning.errors import ConfigError


def connect(path: Path, create: bool) -> sqlite3.Connection:
    """Open an SQLite file: to read and write it where it may be made, else to read it."""
    if create:
        connection = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
    else:
        connection = _connect_to_read(path)
    connection.row_factory = sqlite3.Row
    return connection


def _connect_to_read(path: Path) -> sqlite3.Connection:
    """Open a file without writing to it; where its folder cannot be written to either, as it lies."""
    address = path.resolve().as_uri()
    options: dict[str, Any] = {
        "timeout": 60,
        "isolation_level": None,
        "check_same_thread": False,
        "uri": True,
    }
    connection = sqlite3.connect(f"{address}?mode=ro", **options)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        connection.close()
        connection = sqlite3.connect(f"{address}?mode=ro&immutable=1", **options)
    return connection


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Say what SQLite meets in one line with a remedy."""
    try:
        yield
    except sqlite3.Error as fault:
        raise ConfigError(f"store {str(path)!r}: {fault}. {_remedy(str(fault))}") from fault


def _remedy(fault: str) -> str:
    if "full" in fault:
        return "Make room on the disk and start again; what is recorded is safe."
    if "readonly" in fault or "unable to open" in fault:
        return "Pass a --store that can be written to."
    if "not a database" in fault or "malformed" in fault:
        return "Pass another --store."
    if "locked" in fault:
        return "Another process holds it; start again when that is done."
    return "Check the path and the disk; what is recorded is safe."
