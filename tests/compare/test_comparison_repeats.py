"""What is trained again: runs whose folder is needed and gone, on the very examples of before; and what needs it."""

from __future__ import annotations

import shutil
import sqlite3
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.compare.tiny_comparisons import a_comparison, outcomes, read, write_tasks
from tests.tiny_kinds import write_image_folders

from childtuning.compare import Store, compare, foreseen, set_up
from childtuning.compare import work as working
from childtuning.errors import ConfigError
from childtuning.runs.config import RunConfig
from childtuning.runs.inputs import Inputs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), "alpha", "beta")


def test_what_was_not_kept_is_trained_again_where_it_is_needed(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "runs.db"
    words: dict[str, Any] = {"tasks": ["alpha,beta"], "methods": ["full,child-d"], "grid": []}
    rate = {"learning_rate": 2e-5}  # the protocol's
    first = a_comparison(tiny_bert, data, **words, options={**rate}, settings={"num_seeds": 1})
    assert set_up(path, first) == []
    before = outcomes(compare(path, first))
    heads = a_comparison(
        tiny_bert, data, **words, options={**rate}, settings={"num_seeds": 1, "transfer_to": ("beta",)}
    )
    assert [run.state for run in foreseen(path, heads)].count("done") == 2, "beta's are sources of none"
    assert set_up(path, heads) == ["2 finished runs will be repeated: the folders are needed, and not there"]
    assert set_up(path, first) == [] and outcomes(read(path)) == before, "nothing is lost by asking"
    set_up(path, heads)
    recorded = compare(path, heads)
    assert len(recorded.records) == 6 and all(run.state == "done" for run in recorded.records)
    after = outcomes(recorded)
    assert before == {run_id: after[run_id] for run_id in before}
    assert set_up(path, heads) == []
    words["protocol"] = "overlap"
    overlap = a_comparison(tiny_bert, data, **words, options={**rate}, settings={"num_seeds": 1})
    again, aside = set_up(path, overlap)
    assert again.startswith("1 finished run will be repeated") and aside.startswith(
        "2 finished runs of other options"
    )
    found = compare(path, overlap).artifacts["overlap"]
    assert found["method"] == "child-d" and found["density"] == pytest.approx(0.3, abs=1e-3)
    shutil.rmtree(tmp_path / "runs.db.files")
    assert not any("repeated" in line for line in set_up(path, overlap)), "the overlap is recorded"
    more = replace(overlap, num_seeds=2)
    assert not any("repeated" in line for line in set_up(path, more)), "and of the first seed"
    assert Counter(run.state for run in foreseen(path, more)) == {"done": 4, "planned": 4}
    assert compare(path, more).artifacts["overlap"] == found


def test_a_repeat_that_fails_loses_nothing(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs.db"
    words: dict[str, Any] = {"tasks": ["alpha,beta"], "methods": ["full"], "grid": []}
    first = a_comparison(tiny_bert, data, **words, settings={"num_seeds": 1})
    set_up(path, first)
    before = outcomes(compare(path, first))
    heads = a_comparison(tiny_bert, data, **words, settings={"num_seeds": 1, "transfer_to": ("beta",)})
    set_up(path, heads)
    with monkeypatch.context() as patched:
        patched.setattr(
            working, "execute", lambda run, *_, **__: replace(run, state="failed", error="the base is gone")
        )
        recorded = compare(path, heads)
    assert [(run.state, run.error) for run in recorded.records if run.group.task == "alpha"] == [
        ("failed", "the base is gone")
    ]
    set_up(path, first)
    assert outcomes(read(path)) == before and all(run.error is None for run in read(path).records)
    set_up(path, heads)
    set_up(path, heads, retry_failed=True)
    recorded = compare(path, heads)
    assert [run.state for run in recorded.records] == ["done"] * 3
    assert before.items() <= outcomes(recorded).items()


def test_runs_on_other_examples_than_those_recorded_fail(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """As where an earlier version of this library drew other evaluation examples from the same file."""
    path = tmp_path / "runs.db"
    one = a_comparison(tiny_bert, data, methods=["full"], grid=[], settings={"num_seeds": 1})
    set_up(path, one)
    compare(path, one)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE runs SET result = json_set(result, '$.examples', 'others')")
    two = replace(one, num_seeds=2)
    set_up(path, two)
    before, after = compare(path, two).records
    assert before.state == "done" and after.state == "failed"
    assert after.error is not None and "an earlier version drew others" in after.error


def test_images_are_the_same_examples_wherever_they_lie(tmp_path: Path) -> None:
    found = []
    for place in ("here", "there"):
        write_image_folders(tmp_path / place)
        config = RunConfig(
            train=str(tmp_path / place / "train"), eval=str(tmp_path / place / "eval"), model="vit"
        )
        found.append(working._examples(Inputs(), config)[0])
    assert found[0] == found[1]
    moved = next((tmp_path / "there" / "eval").rglob("*.png"))
    moved.write_bytes(next((tmp_path / "there" / "train").rglob("*.png")).read_bytes())
    assert working._examples(Inputs(), config)[0] != found[0]


def test_children_of_tasks_are_compared(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    asked = a_comparison(
        tiny_bert,
        data,
        tasks=["alpha,beta"],
        methods=None,
        grid=[],
        protocol="overlap",
        settings={"num_seeds": 1},
    )
    set_up(path, asked)
    found = compare(path, asked).artifacts["overlap"]
    assert found["tasks"] == ["alpha", "beta"] and found["density"] == pytest.approx(0.3, abs=1e-3)
    (one, across), (back, other) = found["overall"]
    assert one == other == 1.0 and across == back and 0.3 < across < 1.0
    assert {"embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"} <= set(found["by_layer"])
    assert "attention.self.query" in found["by_kind"]
    from childtuning import Child

    first, second = (
        Child.load(tmp_path / "runs.db.files" / "runs" / run.id / "child.safetensors")
        for run in read(path).records
    )
    assert across == pytest.approx(first.overlap(second))
    other = a_comparison(tiny_bert, data, methods=["head"], grid=[], settings={"num_seeds": 1})
    set_up(path, other)
    assert "overlap" not in read(path).artifacts, "it is of the comparison before"


def test_layers_trained_whole_are_no_children_to_compare(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    words: dict[str, Any] = {"tasks": ["alpha,beta"], "methods": ["last-k:1,bitfit,child-d"], "grid": []}
    asked = a_comparison(tiny_bert, data, **words, protocol="overlap", settings={"num_seeds": 1})
    set_up(path, asked)
    assert compare(path, asked).artifacts["overlap"]["method"] == "child-d"


def test_another_comparisons_runs_are_not_repeated(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    words: dict[str, Any] = {"tasks": ["alpha,beta"], "methods": ["full"], "grid": []}
    one = a_comparison(tiny_bert, data, **words, settings={"num_seeds": 1})
    set_up(path, one)
    compare(path, one)
    heads = a_comparison(tiny_bert, data, **words, settings={"num_seeds": 1, "transfer_to": ("beta",)})
    with Store.open(path, create=True) as store, pytest.raises(ConfigError, match="another comparison was"):
        working.plan(store, heads)
    assert [run.state for run in read(path).records] == ["done", "done"]
