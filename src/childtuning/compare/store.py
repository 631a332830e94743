"""`Store`: the runs of a comparison in one SQLite file, each recorded once, as soon as it ends."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from childtuning.compare.files import Owner, check_place, is_alive
from childtuning.compare.records import SCHEMA, Record, Recorded, artifact_of
from childtuning.errors import ConfigError
from childtuning.runs.folder import check_data

_TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE runs (
    id TEXT PRIMARY KEY,
    position INTEGER,           -- in the plan; NULL: not of the comparison that the store is about now
    shares TEXT NOT NULL,       -- runs with the same text share data, model and scores
    fixed TEXT NOT NULL,        -- group, seed, point and config, JSON
    state TEXT NOT NULL CHECK (state IN ('planned', 'running', 'done', 'failed')),
    owner TEXT,                 -- of a running one
    result TEXT,                -- of a done one, JSON
    details TEXT                -- curve, parts, error, seconds and finished, JSON
) WITHOUT ROWID;
CREATE TABLE artifacts (name TEXT PRIMARY KEY, content TEXT NOT NULL) WITHOUT ROWID;
"""
_FIXED = ("group", "seed", "point", "config")
_DETAILS = ("curve", "parts", "error", "seconds", "finished")
_APPLICATION = 0x43544E47  # marks our files among SQLite files


class Store:
    """The record of a comparison, in one file; safe against kills at any moment and for use by several processes.

    A folder of the same name with the suffix ``.files`` holds the runs' own folders and the locks of processes that
    work on the store. The record is complete without it.

    Use ``open`` and ``close``, or ``with Store.open(…) as store``.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, *, writes: bool) -> None:
        self.path = path
        self._db = connection
        self._writes = writes

    @classmethod
    def open(cls, path: str | Path, *, create: bool = False) -> Self:
        """Open a store.

        Args:
            path: the file.
            create: create it if it does not exist, and open it for writing.
        Raises:
            ConfigError: when there is no such file, it is not a store, or it cannot be used at this path.
        """
        path = Path(path).expanduser()
        if path.is_dir():
            raise ConfigError(f"store {str(path)!r} is a folder. Pass a file.")
        if not create and not path.is_file():
            raise ConfigError(f"there is no store {str(path)!r}. Check the path.")
        if create:
            check_place(path)
            path.parent.mkdir(parents=True, exist_ok=True)
        with told(path):
            connection = connect(path, create)
            try:
                _check(connection, path, create)
            except BaseException:
                connection.close()
                raise
        return cls(path, connection, writes=create)

    def close(self) -> None:
        """Close the file; it is complete by itself then, unless another process writes to it."""
        if self._writes:
            with suppress(sqlite3.Error):  # what is not moved into the file stays in the one beside it
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def files(self) -> Path:
        """The store's folder of files."""
        return self.path.with_name(self.path.name + ".files")

    @property
    def locks(self) -> Path:
        """The folder of the locks of processes that work on the store."""
        return self.files / "locks"

    def folder_of(self, run_id: str) -> Path:
        """Return a run's own folder."""
        return (self.files / "runs" / run_id).resolve()

    # What is compared

    def comparison(self) -> dict[str, Any] | None:
        """Return the store's comparison; ``None`` if the store is new."""
        return self._fact("comparison")

    def set_comparison(self, comparison: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Set the store's comparison; finished runs that it does not need are set aside.

        Raises:
            ConfigError: when another process is working on another comparison, or a file of examples has changed since
                runs were recorded.
        """
        with self._writing():
            known = self._fact("files") or {}
            files = dict(known)
            for task in (*comparison["tasks"], *comparison.get("transfer_to", ())):
                options = {**comparison["options"], "task": task}
                files |= check_data(known, options, "pass another --store")
            if self._fact("comparison") is not None and not self._is_about(comparison):
                if self._is_live():
                    raise ConfigError(
                        f"another process is working on another comparison in {str(self.path)!r}. "
                        "Wait for it, or pass another --store."
                    )
                self._db.execute("UPDATE runs SET position = NULL")
                self._db.execute(
                    "UPDATE runs SET state = 'done', owner = NULL, details = json_remove(details, '$.error') "
                    "WHERE state != 'done' AND result IS NOT NULL"  # not repeated yet, or in vain
                )
                self._db.execute("DELETE FROM runs WHERE state = 'planned'")
                self._db.execute(
                    "DELETE FROM artifacts WHERE name = 'overlap' AND json_extract(content, '$.runs') IS NULL"
                )
            for name, value in (("comparison", comparison), ("environment", environment), ("files", files)):
                self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def plan(self, runs: Iterable[Record], comparison: Mapping[str, Any]) -> None:
        """Add new runs of a comparison, and put all runs in this order; what is not finished takes the options given.

        Raises:
            ConfigError: when the store's comparison is another one by now.
        """
        with self._writing():
            if not self._is_about(comparison):
                raise ConfigError(
                    f"another comparison was started in {str(self.path)!r}. Wait for it, or pass another --store; "
                    "recorded runs are safe."
                )
            for position, run in enumerate(runs):
                fixed = {name: value for name, value in run.to_dict().items() if name in _FIXED}
                self._db.execute(
                    "INSERT INTO runs (id, position, shares, fixed, state) VALUES (?, ?, ?, ?, 'planned') "
                    "ON CONFLICT (id) DO UPDATE SET position = excluded.position, "
                    "fixed = CASE state WHEN 'done' THEN fixed ELSE excluded.fixed END "
                    "WHERE position IS NOT excluded.position OR state != 'done' AND fixed != excluded.fixed",
                    (run.id, position, _shares(run), json.dumps(fixed)),
                )

    # Work

    def claim(self, owner: Owner, like: Record | None = None) -> Record | None:
        """Claim the next planned run; runs that share their inputs with ``like`` come first.

        Runs of a process that no longer exists become available again. A run is never given to two processes.
        """
        with self._writing():
            for run_id, name in self._db.execute(
                "SELECT id, owner FROM runs WHERE state = 'running'"
            ).fetchall():
                if not owner.is_alive(name):
                    self._db.execute(
                        "UPDATE runs SET state = 'planned', owner = NULL WHERE id = ?", (run_id,)
                    )
            row = self._db.execute(
                "SELECT * FROM runs WHERE state = 'planned' AND position IS NOT NULL "
                "ORDER BY shares IS NOT ?, position LIMIT 1",
                (None if like is None else _shares(like),),
            ).fetchone()
            if row is None:
                return None
            self._db.execute(
                "UPDATE runs SET state = 'running', owner = ? WHERE id = ?", (owner.name, row["id"])
            )
            return replace(_record(row), state="running")

    def finish(self, run: Record, owner: Owner) -> bool:
        """Record the result of a run; return whether the run still belonged to this owner."""
        details = {name: value for name, value in run.to_dict().items() if name in _DETAILS}
        details["finished"] = run.finished or datetime.now(UTC).isoformat(timespec="seconds")
        result = None if run.result is None else json.dumps(run.result)
        with self._writing():
            done = self._db.execute(
                "UPDATE runs SET state = ?1, owner = NULL, result = coalesce(?2, result), details = "
                "CASE WHEN ?2 IS NULL AND result IS NOT NULL THEN json_set(details, '$.error', ?4) ELSE ?3 END "
                "WHERE id = ?5 AND state = 'running' AND owner = ?6",
                (run.state, result, json.dumps(details), run.error, run.id, owner.name),
            )
        return done.rowcount == 1

    def release(self, run: Record, owner: Owner) -> None:
        """Return a run to the plan."""
        with self._writing():
            self._db.execute(
                "UPDATE runs SET state = 'planned', owner = NULL WHERE id = ? AND state = 'running' AND owner = ?",
                (run.id, owner.name),
            )

    def retry_failed(self) -> int:
        """Plan failed runs again; return their number. What was chosen without them is set aside."""
        with self._writing():
            number = self._db.execute(
                "UPDATE runs SET state = 'planned', details = CASE WHEN result IS NULL THEN NULL "
                "ELSE json_remove(details, '$.error') END WHERE state = 'failed'"
            ).rowcount
            if number:
                self._db.execute("UPDATE runs SET position = NULL")
            return number

    def repeat(
        self, ids: Sequence[str], is_lost: Callable[[str], bool], comparison: Mapping[str, Any]
    ) -> int:
        """Plan finished runs of a comparison again; what they found stays until it is found again.

        Args:
            ids: the runs.
            is_lost: whether a run is still to be repeated, now that nobody else writes.
            comparison: nothing is done if the store is about another one by now.
        Returns:
            how many.
        """
        if not ids:
            return 0
        with self._writing():
            lost = [(run_id,) for run_id in ids if is_lost(run_id)] if self._is_about(comparison) else []
            return self._db.executemany(
                "UPDATE runs SET state = 'planned' WHERE id = ? AND state = 'done'", lost
            ).rowcount

    # What is recorded

    def set_aside(self) -> list[str]:
        """Return the finished runs that are not in the plan."""
        with told(self.path):
            rows = self._db.execute(
                "SELECT id FROM runs WHERE state = 'done' AND position IS NULL"
            ).fetchall()
        return [row["id"] for row in rows]

    def records(self) -> list[Record]:
        """Return the runs of the comparison, in the order of the plan."""
        with told(self.path):
            rows = self._db.execute(
                "SELECT * FROM runs WHERE position IS NOT NULL ORDER BY position"
            ).fetchall()
        return [_record(row) for row in rows]

    def known(self) -> dict[str, Record]:
        """Return id -> run for every recorded or planned run, without details."""
        with told(self.path):
            rows = self._db.execute("SELECT id, fixed, state, result, NULL AS details FROM runs").fetchall()
        return {row["id"]: _record(row) for row in rows}

    def records_in_brief(self) -> list[Record]:
        """Return the runs of the comparison in the order of the plan, without learning curves."""
        with told(self.path):
            rows = self._db.execute(
                "SELECT id, fixed, state, result, json_remove(details, '$.curve', '$.parts') AS details FROM runs "
                "WHERE position IS NOT NULL ORDER BY position"
            ).fetchall()
        return [_record(row) for row in rows]

    def num_running(self) -> int:
        """Return the number of running runs, of all processes."""
        with told(self.path):
            return self._db.execute("SELECT count(*) FROM runs WHERE state = 'running'").fetchone()[0]

    def read(self) -> Recorded:
        """Return the whole content."""
        with told(self.path), self._reading():
            artifacts = self._db.execute("SELECT name, content FROM artifacts ORDER BY name").fetchall()
            records = self.records()
            shown = {artifact_of((record.result or {}).get("examples") or "") for record in records}
            ids = {record.id for record in records}
            return Recorded(
                comparison=self._fact("comparison") or {},
                environment=self._fact("environment") or {},
                records=records,
                artifacts={
                    name: json.loads(content)
                    for name, content in artifacts
                    if name in shown  # not of runs that were set aside
                    or (not name.startswith(artifact_of("")) and ids.issuperset(_runs_of(content)))
                },
            )

    def artifact(self, name: str) -> Any:
        """Return a result that belongs to no single run; ``None`` if there is none of this name."""
        with told(self.path):
            row = self._db.execute("SELECT content FROM artifacts WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set_artifact(self, name: str, content: Mapping[str, Any]) -> None:
        """Record a result that belongs to no single run."""
        with self._writing():
            self._db.execute("INSERT OR REPLACE INTO artifacts VALUES (?, ?)", (name, json.dumps(content)))

    def _is_about(self, comparison: Mapping[str, Any]) -> bool:
        return _asked(self._fact("comparison") or {}) == _asked(json.loads(json.dumps(comparison)))

    def _is_live(self) -> bool:
        """Whether a process works on the store, also between two runs."""
        return any(is_alive(self.locks, path.stem) for path in self.locks.glob("*.lock"))

    def _fact(self, name: str) -> Any:
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with told(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")


def _check(connection: sqlite3.Connection, path: Path, create: bool) -> None:
    """Create the tables of a new file; refuse files that are not stores or have another version."""
    if create:
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            for statement in _TABLES.split(";\n"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {SCHEMA}")
        connection.execute("COMMIT")
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != _APPLICATION:
        raise ConfigError(f"{str(path)!r} is an SQLite file, but not a store of runs. Pass another --store.")
    if version != SCHEMA:
        raise ConfigError(
            f"store {str(path)!r} has schema {version}, but this version of childtuning reads {SCHEMA}. "
            "Use the version that wrote it."
        )
    if create:
        connection.execute("PRAGMA journal_mode = WAL")


def _asked(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison without the command that was typed."""
    return {name: value for name, value in comparison.items() if name != "command"}


def _runs_of(artifact: str) -> list[str]:
    """The runs that a result of several is about, where it says so."""
    content = json.loads(artifact)
    return content.get("runs", []) if isinstance(content, dict) else []


def _shares(run: Record) -> str:
    return json.dumps([run.group.task, run.group.train_size, run.group.start, run.seed])


def _record(row: sqlite3.Row) -> Record:
    fixed = json.loads(row["fixed"])
    details = {"parts": {}, **(json.loads(row["details"]) if row["details"] else {})}
    is_done = row["state"] == "done"  # a run that is to be repeated keeps its result, which counts no more
    result = json.loads(row["result"]) if row["result"] and is_done else None
    for name in ("learning_rate", "epochs"):  # what the run chose for them
        chosen = (result or {}).get(name)
        if fixed["config"].get(name) == "auto" and chosen is not None:
            fixed["config"][name] = chosen
    return Record.from_dict({"id": row["id"], "state": row["state"], **fixed, "result": result, **details})


def connect(path: Path, create: bool) -> sqlite3.Connection:
    """Open an SQLite file, for reading and writing if ``create``, else for reading only."""
    if create:
        connection = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
    else:
        connection = _connect_to_read(path)
    connection.row_factory = sqlite3.Row
    return connection


def _connect_to_read(path: Path) -> sqlite3.Connection:
    """Open a file read-only; as immutable if its folder is not writable either."""
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
        beside = path.with_name(path.name + "-wal")
        if beside.is_file() and beside.stat().st_size:
            raise ConfigError(
                f"store {str(path)!r} is in a folder that cannot be written to, and its last runs are in "
                f"{beside.name!r}. Copy both files to another folder."
            ) from None
        connection = sqlite3.connect(f"{address}?mode=ro&immutable=1", **options)
    return connection


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn SQLite errors into one line with a remedy."""
    try:
        yield
    except sqlite3.Error as fault:
        raise ConfigError(f"store {str(path)!r}: {fault}. {_remedy(str(fault))}") from fault


def _remedy(fault: str) -> str:
    if "full" in fault:
        return "Free space on the disk and start again; recorded runs are safe."
    if "readonly" in fault or "unable to open" in fault:
        return "Pass a --store that is writable."
    if "not a database" in fault or "malformed" in fault:
        return "Pass another --store."
    if "locked" in fault:
        return "Another process is using it; start again when it has finished."
    return "Check the path and the disk; recorded runs are safe."
