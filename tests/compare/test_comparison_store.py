"""The store: what it refuses, what it survives."""

from __future__ import annotations

import json
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from childtuning.compare import Comparison, Recorded, Store, read_comparison, set_up
from childtuning.compare import files as store_places
from childtuning.compare import store as store_module
from childtuning.compare.files import Owner, is_alive
from childtuning.errors import ConfigError


@pytest.fixture
def four() -> Comparison:
    settings = {"num_seeds": 2, "threads": 1}
    return read_comparison(None, tasks=["rte"], methods=["full,head"], settings=settings)


def test_a_run_is_claimed_once(four: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    set_up(path, four)
    with (
        Store.open(path, create=True) as one,
        Store.open(path, create=True) as two,
        Owner(one.locks) as first,
        Owner(two.locks) as second,
    ):
        claimed = [store.claim(owner) for store, owner in ((one, first), (two, second)) * 3]
        ids = [run.id for run in claimed if run is not None]
        assert len(ids) == len(set(ids)) == 2  # the other seeds are planned when these are done
        assert one.num_running() == 2
        theirs = claimed[1]
        assert theirs is not None
        assert not one.finish(replace(theirs, state="failed", error="not mine"), first)
        assert one.finish(replace(theirs, state="failed", error="mine"), second)
        assert {run.error for run in one.records()} == {None, "mine"}


@pytest.mark.slow
def test_the_runs_of_the_dead_are_taken_over(four: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    set_up(path, four)
    script = (
        "import os, sys\n"
        "from childtuning.compare.files import Owner\n"
        "from childtuning.compare.store import Store\n"
        "store = Store.open(sys.argv[1], create=True)\n"
        "owner = Owner(store.locks).__enter__()\n"
        "print(store.claim(owner).id, store.claim(owner).id, owner.name, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False
    )
    first, second, name = done.stdout.split()
    with Store.open(path, create=True) as store, Owner(store.locks) as owner:
        assert store.num_running() == 2
        claimed = [store.claim(owner), store.claim(owner)]
        assert [run.id for run in claimed if run] == [first, second]
        assert not is_alive(store.locks, name) and owner.is_alive(owner.name)


def test_runs_that_share_inputs_come_one_after_the_other(tmp_path: Path) -> None:
    asked = read_comparison(
        None,
        tasks=["rte,mrpc"],
        methods=["full,head"],
        settings={"num_seeds": 2, "tune_seeds": 2, "threads": 1},
    )
    path = tmp_path / "runs.db"
    set_up(path, asked)
    with Store.open(path, create=True) as store, Owner(store.locks) as owner:
        last = next(run for run in store.records() if (run.group.task, run.seed) == ("mrpc", 1))
        order = []
        for _ in range(4):
            last = store.claim(owner, last)
            assert last is not None
            order.append((last.group.task, last.seed))
    assert order == [("mrpc", 1), ("mrpc", 1), ("rte", 0), ("rte", 0)]


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, " * 100)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE things (name)")
    later = tmp_path / "later.db"
    Store.open(later, create=True).close()
    with sqlite3.connect(later) as connection:
        connection.execute("PRAGMA user_version = 99")
    for path, words in (
        (tmp_path / "none.db", "there is no store"),
        (tmp_path, "is a folder"),
        (text, "not a database"),
        (other, "not a store of runs"),
        (later, "has schema 99"),
    ):
        before = path.read_bytes() if path.is_file() else None
        for create in (False, True):
            if create and not path.exists():
                continue
            with pytest.raises(ConfigError, match=words):
                Store.open(path, create=create)
        assert before is None or path.read_bytes() == before


def test_a_network_file_system_is_refused(
    four: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store_places.file_system(tmp_path / "not" / "there.db") not in ("nfs", None)
    monkeypatch.setattr(store_places, "file_system", lambda path: "nfs4")
    with pytest.raises(ConfigError, match=r"network file system \(nfs4\)"):
        set_up(tmp_path / "runs.db", four)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_loses_nothing(four: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    set_up(path, four)
    with Store.open(path, create=True) as store, Owner(store.locks) as owner:
        first, second = store.claim(owner), store.claim(owner)
        assert first is not None and second is not None
        assert store.finish(replace(first, state="failed", error="recorded"), owner)
        (pages,) = store._db.execute("PRAGMA page_count").fetchone()
        store._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(ConfigError, match="full. Free space on the disk and start again"):
            store.finish(replace(second, state="failed", error="x" * 1_000_000), owner)
        store._db.execute("PRAGMA max_page_count = 100000")
        assert [run.error for run in store.records()] == ["recorded", None]
        assert store.finish(replace(second, state="failed", error="later"), owner)


def _as_nobody(path: Path, said: Any) -> None:
    if os.getuid() == 0:  # root may write anyway
        os.setgid(65534)
        os.setuid(65534)
    with Store.open(path) as store:
        said.put(len(store.read().records))
    try:
        with Store.open(path, create=True) as store:
            store.set_comparison({}, {})
    except ConfigError as fault:
        said.put(str(fault))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="permissions are POSIX's")
def test_a_store_that_cannot_be_written_to_can_be_read(four: Comparison) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is for its user alone
        path = Path(folder) / "runs.db"
        set_up(path, four)
        path.chmod(0o444)
        Path(folder).chmod(0o555)
        context = multiprocessing.get_context("fork")
        said = context.SimpleQueue()
        process = context.Process(target=_as_nobody, args=(path, said))
        process.start()
        process.join()
        Path(folder).chmod(0o755)
        assert said.get() == 2
        assert "Pass a --store that is writable" in said.get()


def test_it_is_complete_in_one_file_while_others_read_it(four: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with Store.open(path, create=True) as first:
        first.set_comparison(four.to_dict(), {})
        with Store.open(path) as reader:
            reader.known()
            first.plan(four.first_runs, four.to_dict())
            first.close()
            (tmp_path / "copy.db").write_bytes(path.read_bytes())
    with Store.open(tmp_path / "copy.db") as copy:
        assert len(copy.known()) == len(four.first_runs)


def test_runs_that_lie_beside_a_file_that_cannot_be_written_to_are_not_left_out(
    four: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs.db"
    set_up(path, four)
    opened = sqlite3.connect

    class Refused:
        def execute(self, statement: str) -> None:
            raise sqlite3.OperationalError("unable to open database file")

        def close(self) -> None: ...

    def connect(address: Any, **options: Any) -> Any:
        return opened(address, **options) if "immutable" in str(address) else Refused()

    monkeypatch.setattr(store_module.sqlite3, "connect", connect)
    with Store.open(path) as store:
        assert len(store.known()) == 2
    (tmp_path / "runs.db-wal").write_bytes(b"more runs")
    with pytest.raises(ConfigError, match="its last runs are in 'runs.db-wal'. Copy both files to another"):
        Store.open(path)


def test_another_comparison_is_not_planned(four: Comparison, tmp_path: Path) -> None:
    path, other = tmp_path / "runs.db", replace(four, num_seeds=four.num_seeds + 1)
    with Store.open(path, create=True) as store:
        store.set_comparison(four.to_dict(), {})
        with Owner(store.locks), pytest.raises(ConfigError, match="another process is working on another"):
            store.set_comparison(other.to_dict(), {})  # that process is between two runs
        store.set_comparison(other.to_dict(), {})
        with pytest.raises(ConfigError, match="another comparison was started in"):
            store.plan(four.first_runs, four.to_dict())


def test_it_is_exported(four: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    set_up(path, four)
    with Store.open(path, create=True) as store:
        store.set_artifact("overlap", {"tasks": ["rte"]})
        recorded = store.read()
    again = Recorded.from_dict(json.loads(json.dumps(recorded.to_dict())))
    assert again.records == recorded.records and again.artifacts == {"overlap": {"tasks": ["rte"]}}
    assert Comparison.from_dict(again.comparison) == four
    for wrong in ({}, [], {"schema": 99, "records": []}):
        with pytest.raises(ConfigError, match="not an export of a store"):
            Recorded.from_dict(wrong)
