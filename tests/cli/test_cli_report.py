"""`childtuning report`: what it reads, writes and refuses."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.report import synthetic

from childtuning.cli.printing import json_text
from childtuning.compare.records import Recorded
from childtuning.compare.store import Store
from childtuning.report import html_page, joined, json_content, latex_tables, markdown_tables


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return synthetic.odd()["nan"]


@pytest.fixture
def export(tmp_path: Path, recorded: Recorded) -> Path:
    path = tmp_path / "rte.json"
    path.write_text(json_text(recorded.to_dict()))
    return path


def test_the_page_lies_beside_the_store_or_where_asked(childtuning, export: Path, recorded: Recorded) -> None:
    done = childtuning("report", export)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{export.with_suffix('.html')}\n"
    assert export.with_suffix(".html").read_text(encoding="utf-8") == html_page(recorded)
    page = export.parent / "page.html"
    assert childtuning("report", export, "-o", page).code == 0
    assert page.read_text(encoding="utf-8") == html_page(recorded)


@pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")
def test_links_and_pipes_are_written_through(childtuning, export: Path, recorded: Recorded) -> None:
    real, link, pipe = (export.parent / name for name in ("real.html", "link.html", "pipe"))
    real.write_text("old")
    link.symlink_to(real)
    assert childtuning("report", export, "-o", link).code == 0
    assert link.is_symlink() and real.read_text(encoding="utf-8") == html_page(recorded)
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True) as reader:
        assert childtuning("report", export, "--format", "md", "-o", pipe).code == 0
        assert reader.communicate(timeout=60)[0] == markdown_tables(recorded)
    assert pipe.is_fifo()


def test_tables_go_to_standard_output_or_a_file(childtuning, export: Path, recorded: Recorded) -> None:
    assert childtuning("report", export, "--format", "md").out == markdown_tables(recorded)
    assert childtuning("report", export, "--format", "latex").out == latex_tables(recorded)
    table = export.parent / "table.tex"
    assert childtuning("report", export, "-o", table).out == f"{table}\n"
    assert table.read_text(encoding="utf-8") == latex_tables(recorded)


def test_json_is_one_object_that_can_be_shown_again(childtuning, export: Path, recorded: Recorded) -> None:
    done = childtuning("report", export, "--format", "json")
    assert done.code == 0
    assert done.json == json.loads(json_text(json_content(recorded)))
    again = export.parent / "again.json"
    again.write_text(done.out)
    assert childtuning("report", again, "--format", "md").out == markdown_tables(recorded)


def test_json_tells_what_was_written(childtuning, export: Path) -> None:
    done = childtuning("report", export, "--json")
    assert done.json == {
        "stores": [str(export)],
        "output": str(export.with_suffix(".html")),
        "format": "html",
        "runs": 9,
    }
    done = childtuning("report", export, "--format", "md", "--json")
    assert done.code == 2 and "-o FILE" in done.err


def test_a_report_to_share_has_no_texts(childtuning, export: Path, recorded: Recorded) -> None:
    examples = {"labels": ["yes", "no"], "shown": ["a secret text", "another secret"]}
    runs = [
        replace(run, result={**run.result, "examples": "d", "answers": ["yes", "no" if row % 2 else "yes"]})
        if run.result
        else run
        for row, run in enumerate(recorded.records)
    ]
    told = replace(recorded, records=runs, artifacts={"examples d": examples, "other": {}})
    export.write_text(json_text(told.to_dict()))
    for format in ("html", "json"):
        page = export.parent / f"page.{format}"
        assert childtuning("report", export, "-o", page).code == 0
        assert "secret" in page.read_text(encoding="utf-8")
        assert childtuning("report", export, "-o", page, "--no-examples").code == 0
        assert "secret" not in page.read_text(encoding="utf-8")
    assert json.loads(page.read_text())["artifacts"] == {"other": {}}


def test_several_stores_are_joined(childtuning, export: Path, recorded: Recorded) -> None:
    other = export.parent / "mrpc.json"
    runs = [synthetic.record("mrpc", method, seed) for method in ("full", "child-d") for seed in range(3)]
    more = Recorded(synthetic.comparison(["mrpc"], ["full", "child-d"], 3), runs)
    other.write_text(json_text(more.to_dict()))
    page = export.parent / "both.html"
    done = childtuning("report", export, other, "-o", page, "--json")
    assert done.code == 0, done.err
    assert done.json == {
        "stores": [str(export), str(other)],
        "output": str(page),
        "format": "html",
        "runs": len(recorded.records) + 6,
    }
    assert page.read_text(encoding="utf-8") == html_page(joined({"rte": recorded, "mrpc": more}))
    done = childtuning("report", export, other)
    assert done.code == 2 and "Pass -o FILE" in done.err
    done = childtuning("report", export, other, "-o", other, "--format", "json")
    assert done.code == 2 and "the store itself" in done.err
    done = childtuning("report", export, export, "--format", "md")
    assert done.out == markdown_tables(recorded)


def test_a_store_is_shown_while_others_write_to_it(childtuning, tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with Store.open(path, create=True) as store:
        asked = synthetic.comparison(["rte"], ["full"], 2)
        store.set_comparison(asked, {"python": "3.11"})
        store.plan([synthetic.record(seed=seed, state="planned", result=None) for seed in range(2)], asked)
        done = childtuning("report", path, "--format", "json")
        assert done.code == 0, done.err
        expected = json.loads(json_text(json_content(store.read())))
    assert done.json == expected
    assert len(done.json["records"]) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no such file"),
        (b"", "neither a store nor the JSON"),
        (b"\x00\xff\x13binary", "neither a store nor the JSON"),
        (b"[1, 2]", "schema 1"),
        (b'{"schema": 7, "comparison": {}, "records": []}', "schema 1"),
        (b'{"schema": 1, "comparison": {}, "records": [{"id": 3}], "environment": {}, "artifacts": {}}', "neither"),
        (b'{"schema": 1, "records": []}', "neither"),
        ("sqlite", "not a store of runs"),
        ("folder", "it is a folder"),
    ],
)  # fmt: skip
def test_what_is_no_store_is_refused_in_one_line(childtuning, tmp_path: Path, content, words: str) -> None:
    path = tmp_path / "x.db"
    if content == "folder":
        path.mkdir()
    elif content == "sqlite":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE t (x)")
        connection.close()
    elif content is not None:
        path.write_bytes(content)
    done = childtuning("report", path)
    assert done.code == 2
    assert done.err.count("\n") == 1 and words in done.err and str(path) in done.err, done.err
    assert done.out == "" and not path.with_suffix(".html").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(comparison=None),
        lambda content: content.update(artifacts=[]),
        lambda content: content["records"][0].update(result=None),
        lambda content: content["records"][0]["result"].update(metric={}),
        lambda content: content["records"][0]["result"]["metric"].update(value="high"),
        lambda content: content["records"][0]["result"].pop("eval_examples"),
        lambda content: content["records"][0]["result"].update(train_seconds=None),
        lambda content: content["records"][0].update(seed="x"),
        lambda content: content["records"][0].update(point=None),
        lambda content: content["comparison"].update(options="x"),
    ],
)
def test_an_edited_export_is_refused_in_one_line(childtuning, export: Path, tmp_path: Path, change) -> None:
    content = json.loads(export.read_text())
    change(content)
    (tmp_path / "edited.json").write_text(json.dumps(content))
    done = childtuning("report", tmp_path / "edited.json")
    assert done.code == 2 and "neither a store nor the JSON" in done.err and done.err.count("\n") == 1


def test_a_table_is_printed_where_signs_cannot_be(export: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "childtuning", "report", str(export), "--format", "md"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"\\xb1" in done.stdout and done.stdout.isascii()


def test_the_store_is_never_overwritten(childtuning, export: Path) -> None:
    before = export.read_bytes()
    done = childtuning("report", export, "--format", "json", "-o", export)
    assert done.code == 2 and "the store itself" in done.err
    assert export.read_bytes() == before


def test_an_unknown_ending_needs_a_format(childtuning, export: Path) -> None:
    done = childtuning("report", export, "-o", export.parent / "page.pdf")
    assert done.code == 2 and "--format" in done.err
