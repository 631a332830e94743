"""Comparisons done: in this process, in several, stopped and killed; always the same runs, each once."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from tests.compare.tiny_comparisons import a_comparison, outcomes, read, write_tasks
from tests.tiny import save_tiny_bert

from childtuning.compare import Comparison, Recorded, compare, set_up
from childtuning.compare import work as working
from childtuning.compare.records import artifact_of
from childtuning.errors import ConfigError
from childtuning.runs.evaluate import RunTests

NUM_KILLS = int(os.environ.get("CHILDTUNING_KILLS", "1"))  # 20 take some minutes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), "alpha", "beta")


@pytest.fixture(scope="module")
def twelve(tiny_bert: Path, data: Path) -> Comparison:
    return a_comparison(tiny_bert, data)


@pytest.fixture(scope="module")
def undisturbed(twelve: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    path = tmp_path_factory.mktemp("undisturbed") / "runs.db"
    set_up(path, twelve)
    return compare(path, twelve)


def test_every_set_is_tried_and_the_best_gets_all_seeds(undisturbed: Recorded) -> None:
    assert len(undisturbed.records) == 12 and all(run.state == "done" for run in undisturbed.records)
    by_method = Counter((run.group.method, run.seed) for run in undisturbed.records)
    assert by_method == {(m, s): 2 if s == 0 else 1 for m in ("full", "child-d", "child-f") for s in range(3)}
    for method in ("full", "child-d", "child-f"):
        mine = [run for run in undisturbed.records if run.group.method == method]
        tried = {run.point["learning_rate"]: run.selection for run in mine if run.seed == 0}
        best = max(tried, key=lambda rate: tried[rate])
        assert {run.point["learning_rate"] for run in mine if run.seed > 0} == {best}
    for run in undisturbed.records:
        assert run.result is not None and run.result["train_examples"] == 43  # 48 but a tenth
        assert run.result["held_out"] and run.curve and run.parts and run.seconds
        assert run.result["output"] is None
    (digest,) = {run.result["examples"] for run in undisturbed.records}  # type: ignore[index]
    examples = undisturbed.artifacts[artifact_of(digest)]
    answers = [run.result["answers"] for run in undisturbed.records]  # type: ignore[index]
    assert {len(one) for one in (*answers, *examples.values())} == {
        undisturbed.records[0].result["eval_examples"]
    }  # type: ignore[index]
    for run in undisturbed.records:
        right = [a == b for a, b in zip(run.result["answers"], examples["labels"], strict=True)]  # type: ignore[index]
        assert run.score == sum(right) / len(right)
    shares = {run.group.method: sum(part[0] for part in run.parts.values()) for run in undisturbed.records}
    assert shares["child-d"] < shares["full"] == shares["child-f"]


def test_a_labelled_entry_trains_as_its_method_with_these_options(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"settings": {"num_seeds": 1}}
    both = a_comparison(
        tiny_bert,
        data,
        methods=["child-d,child-d@rows"],
        grid=["child-d@rows:density=0.1", "child-d@rows:granularity=row"],
        **common,
    )
    alone = a_comparison(
        tiny_bert,
        data,
        methods=["child-d"],
        grid=[],
        options={"density": 0.1, "granularity": "row"},
        **common,
    )
    found: dict[str, list[Any]] = {}
    for name, comparison in (("both", both), ("alone", alone)):
        set_up(tmp_path / f"{name}.db", comparison)
        found[name] = list(outcomes(compare(tmp_path / f"{name}.db", comparison)).values())
    plain, labelled = found["both"]
    (expected,) = found["alone"]
    assert [one[0].method for one in (plain, labelled)] == ["child-d", "child-d@rows"]
    assert labelled[3:] == expected[3:] and expected[3] == "done"
    assert plain[6] != expected[6]  # the parts that were trained


def test_nothing_is_left_beside_the_store(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    threads = torch.get_num_threads()
    short = a_comparison(tiny_bert, data, methods=["head"], grid=[], settings={"threads": threads + 1})
    set_up(path, short)
    compare(path, short)
    assert torch.get_num_threads() == threads
    assert not any((tmp_path / "runs.db.files" / "runs").iterdir())
    assert not any((tmp_path / "runs.db.files" / "locks").iterdir())


def test_what_is_done_is_not_done_again(
    twelve: Comparison, tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    inner = working.execute

    def counted(run: Any, *args: Any, **kwargs: Any) -> Any:
        done.append(run.id)
        if len(done) == 3:
            raise KeyboardInterrupt
        return inner(run, *args, **kwargs)

    monkeypatch.setattr(working, "execute", counted)
    path = tmp_path / "runs.db"
    small = a_comparison(tiny_bert, data, methods=["full,head"], settings={"num_seeds": 2})
    set_up(path, small)
    with pytest.raises(KeyboardInterrupt):
        compare(path, small)
    states = Counter(run.state for run in read(path).records)
    assert states == {"done": 2, "planned": 3}  # two of the head, and the other seed of the better full
    compare(path, small)
    assert len(done) == 3 + 4 and len(set(done)) == 6  # the one that was interrupted is begun again
    wider = a_comparison(tiny_bert, data, methods=["full,head"], settings={"num_seeds": 3})
    set_up(path, wider)
    assert Counter(run.state for run in read(path).records) == {"done": 6, "planned": 2}
    compare(path, wider)
    assert len(done) == 9
    set_up(path, small)  # what the narrower one does not need is set aside, not lost
    assert len(read(path).records) == 6
    set_up(path, wider)
    assert Counter(run.state for run in read(path).records) == {"done": 8}


def test_a_failed_run_is_recorded_and_the_rest_go_on(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    asked = a_comparison(tiny_bert, data, methods=["head,last-k:7"], grid=[], settings={"num_seeds": 1})
    set_up(path, asked)
    recorded = compare(path, asked)
    assert [run.state for run in recorded.records] == ["done", "failed"]
    assert "ModelError: " in (recorded.records[1].error or "") and "\n" not in (
        recorded.records[1].error or ""
    )
    assert compare(path, asked).records[1].finished == recorded.records[1].finished
    set_up(path, asked, retry_failed=True)
    assert [run.state for run in read(path).records] == ["done", "planned"]


def test_what_a_retry_supersedes_is_set_aside(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate that failed is the better one: the seeds of the other are not of the comparison any more."""
    path, fails = tmp_path / "runs.db", [1e-4]

    def execute(run: Any, *_: Any, **__: Any) -> Any:
        rate = run.point["learning_rate"]
        if rate in fails:
            return replace(run, state="failed", error="no")
        result = {"metric": {"name": "accuracy", "value": 0.5}, "held_out": {"accuracy": 1 - rate}}
        return replace(run, state="done", result=result)

    monkeypatch.setattr(working, "execute", execute)
    options = {
        "tasks": ["alpha"],
        "methods": ["head"],
        "grid": ["lr=1e-3,1e-4"],
        "settings": {"num_seeds": 3},
    }
    asked = a_comparison(tiny_bert, data, **options)
    set_up(path, asked)
    counts = Counter(run.point["learning_rate"] for run in compare(path, asked).records)
    assert counts == {1e-3: 3, 1e-4: 1}
    fails.clear()
    set_up(path, asked, retry_failed=True)
    counts = Counter(run.point["learning_rate"] for run in compare(path, asked).records)
    assert counts == {1e-3: 1, 1e-4: 3}


@pytest.mark.slow
def test_processes_share_the_work(twelve: Comparison, undisturbed: Recorded, tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    set_up(path, twelve)
    assert outcomes(compare(path, twelve, jobs=2)) == outcomes(undisturbed)


def _work(path: str, comparison: dict[str, Any], log: str) -> None:

    torch.set_num_threads(1)
    inner = working.execute

    def logged(run: Any, *args: Any, **kwargs: Any) -> Any:
        with Path(log).open("a") as file:
            file.write(run.id + "\n")
        return inner(run, *args, **kwargs)

    working.execute = logged
    compare(path, Comparison.from_dict(comparison))


@pytest.mark.slow
@pytest.mark.nightly
def test_two_that_work_on_one_store_never_do_a_run_twice(
    twelve: Comparison, undisturbed: Recorded, tmp_path: Path
) -> None:
    path = tmp_path / "runs.db"
    set_up(path, twelve)
    context = multiprocessing.get_context("spawn")
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    both = [context.Process(target=_work, args=(str(path), twelve.to_dict(), str(log))) for log in logs]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    done = [line for log in logs if log.is_file() for line in log.read_text().split()]
    assert len(done) == len(set(done)) == 12
    assert outcomes(read(path)) == outcomes(undisturbed)


@pytest.mark.slow
def test_killed_at_random_moments(twelve: Comparison, undisturbed: Recorded, tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    set_up(path, twelve)
    command = [sys.executable, "-m", "childtuning", "compare", "--store", str(path)]
    rng = random.Random(5)
    for _ in range(NUM_KILLS):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and all(run.state != "running" for run in read(path).records):
            time.sleep(0.1)
        try:
            process.wait(timeout=rng.uniform(0.0, 3.0))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    compare(path, twelve)
    recorded = read(path)
    assert len(recorded.records) == 12
    assert outcomes(recorded) == outcomes(undisturbed)


def test_what_is_not_done_takes_the_data_where_it_is_now(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before, after = tmp_path / "runs.db", tmp_path / "before", tmp_path / "after"

    def of(place: Path) -> Comparison:
        return a_comparison(tiny_bert, place, methods=["head"], grid=[], settings={"num_seeds": 2})

    write_tasks(before, "alpha")
    set_up(path, of(before))
    whole = RunTests.measure

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunTests, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(path, of(before))
    monkeypatch.setattr(RunTests, "measure", whole)
    before.rename(after)
    set_up(path, of(after))
    recorded = compare(path, of(after)).records
    assert [(run.state, run.config["data_dir"]) for run in recorded] == [("done", str(after))] * 2


def test_a_size_that_the_data_does_not_have_fails(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    sizes = {"train_sizes": "12,1000", "settings": {"num_seeds": 1}}
    asked = a_comparison(tiny_bert, data, tasks=["alpha"], methods=["head"], grid=[], **sizes)
    set_up(tmp_path / "runs.db", asked)
    states = {
        run.group.train_size: (run.state, run.error) for run in compare(tmp_path / "runs.db", asked).records
    }
    assert states[12] == ("done", None) and states[1000][0] == "failed"
    assert "there are 48 training examples, got a size of 1,000. Pass a smaller one" in states[1000][1]


@pytest.mark.slow
def test_a_replaced_base_model_fails(data: Path, tmp_path: Path) -> None:
    base, path = save_tiny_bert(tmp_path / "base"), tmp_path / "runs.db"
    for seeds in (1, 2, 3):
        asked = a_comparison(base, data, methods=["head"], grid=[], settings={"num_seeds": seeds})
        set_up(path, asked, retry_failed=True)
        recorded = compare(path, asked).records
        if seeds == 2:
            assert recorded[1].state == "failed" and recorded[1].error is not None
            assert f"BaseMismatchError: the weights of {str(base)!r} have changed since" in recorded[1].error
        save_tiny_bert(base, seed=seeds % 2)
    assert [run.state for run in recorded] == ["done"] * 3
    assert len({run.result["base_hash"] for run in recorded if run.result}) == 1


def test_heads_are_trained_on_tuned_networks(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    asked = a_comparison(
        tiny_bert,
        data,
        methods=["full,child-d"],
        grid=[],
        train_sizes="24",
        settings={"num_seeds": 2, "transfer_to": ("alpha", "beta")},
    )
    set_up(path, asked)
    recorded = compare(path, asked)
    assert len(recorded.records) == 8 and all(run.state == "done" for run in recorded.records)
    after = [run for run in recorded.records if run.group.start is not None]
    assert {(run.group.start, run.group.task, run.group.method, run.seed) for run in after} == {
        ("alpha", "beta", method, seed) for method in ("full", "child-d") for seed in (0, 1)
    }
    for run in after:
        assert run.config["method"] == "head" and run.config["train_limit"] == 24
        assert all("classifier" in name for name in run.parts)
    assert outcomes(compare(path, asked)) == outcomes(recorded)


def test_a_full_disk_ends_the_work_and_no_run_fails(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    asked = a_comparison(tiny_bert, data, methods=["full"], grid=[], settings={"num_seeds": 1})
    set_up(tmp_path / "runs.db", asked)
    with monkeypatch.context() as changed:
        changed.setattr(working, "train_run", full)
        with pytest.raises(OSError, match="No space left on device"):
            compare(tmp_path / "runs.db", asked)
    (run,) = compare(tmp_path / "runs.db", asked).records
    assert run.state == "done"


def test_every_method_has_the_time_of_the_pass_that_it_needs(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    asked = a_comparison(
        tiny_bert,
        data,
        methods=["child-d@a,child-d@b"],
        grid=["child-d@a:density=0.1", "child-d@b:density=0.3"],
        settings={"num_seeds": 1},
    )
    set_up(tmp_path / "runs.db", asked)
    one, other = (
        run.result["fisher_seconds"] for run in compare(tmp_path / "runs.db", asked).records if run.result
    )
    assert 0.5 * one < other < 2 * one


def test_another_comparisons_examples_are_not_given_away(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    path, words = tmp_path / "runs.db", {"methods": ["full"], "grid": [], "settings": {"num_seeds": 1}}
    for task in ("alpha", "beta"):
        asked = a_comparison(tiny_bert, data, tasks=[task], **{**words, "settings": {"num_seeds": 1}})
        told = set_up(path, asked)
        (artifact,) = compare(path, asked).artifacts
    assert told == ["1 finished run of other options set aside, for when they are needed again"]
    (run,) = read(path).records
    assert run.result is not None and artifact == artifact_of(run.result["examples"])


def test_another_comparison_waits_for_who_is_at_work(twelve: Comparison, tmp_path: Path) -> None:
    from dataclasses import replace

    from childtuning.compare import Store
    from childtuning.compare.files import Owner

    path = tmp_path / "runs.db"
    set_up(path, twelve)
    with Store.open(path, create=True) as store, Owner(store.locks) as owner:
        assert store.claim(owner) is not None
        with pytest.raises(ConfigError, match="another process is working on another comparison"):
            set_up(path, replace(twelve, num_seeds=2))
        set_up(path, replace(twelve, command="typed in another way"))
    set_up(path, replace(twelve, num_seeds=2))  # the owner is gone
