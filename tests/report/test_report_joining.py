"""Stores shown together say what one store of all their runs would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from tests.report import synthetic

from childtuning.cli.printing import json_text
from childtuning.compare.records import Recorded
from childtuning.errors import ConfigError
from childtuning.report import html_page, joined, json_content, latex_tables, markdown_tables

Change = Callable[[Recorded], Recorded]


def by_task(whole: Recorded) -> dict[str, Recorded]:
    """The runs of each task as a store of their own."""
    asked = whole.comparison
    return {
        f"{task}.db": replace(
            whole,
            comparison={**asked, "tasks": [task], "command": f"childtuning compare --task {task}"},
            records=[record for record in whole.records if record.group.task == task],
            artifacts={},
        )
        for task in asked["tasks"]
    }


def read_comparison(**changed: object) -> Change:
    return lambda one: replace(one, comparison={**one.comparison, **changed})


def test_the_ranking_is_that_of_one_store() -> None:
    whole = replace(synthetic.glue(4), artifacts={})
    both = joined(by_task(whole))
    assert sorted(r.id for r in both.records) == sorted(r.id for r in whole.records)
    assert json_content(both)["summary"] == json_content(whole)["summary"]
    assert "Across tasks" in markdown_tables(both)


def test_every_command_is_shown() -> None:
    parts = by_task(synthetic.glue(3))
    both = joined(parts)
    typed = [f"childtuning compare --task {task}" for task in ("rte", "mrpc", "cola")]
    assert both.comparison["commands"] == typed
    assert "command" not in both.comparison
    for text in (html_page(both), markdown_tables(both), latex_tables(both)):
        assert all(command in text for command in typed)
    assert "Each command continues" in html_page(both)


def test_settings_in_which_they_differ_are_left_out() -> None:
    first, second, _ = by_task(synthetic.glue(3)).values()
    second = read_comparison(num_seeds=9, options={"data_dir": "/data/glue", "epochs": 1.0}, train_sizes=[7])(
        second
    )
    second = replace(second, environment={**second.environment, "cores": 64})
    both = joined(
        {"a": read_comparison(options={"data_dir": "/data/glue", "epochs": 3.0})(first), "b": second}
    )
    assert "num_seeds" not in both.comparison
    assert both.comparison["options"] == {"data_dir": "/data/glue"}
    assert both.comparison["train_sizes"] == [None, 7]
    assert both.comparison["methods"] == list(synthetic.FIVE)
    assert both.environment == {key: v for key, v in synthetic.ENVIRONMENT.items() if key != "cores"}


def test_what_was_joined_is_joined_again() -> None:
    parts = by_task(synthetic.glue(3))
    rte, mrpc, cola = parts.items()
    again = joined({"two": Recorded.from_dict(joined(dict([rte, mrpc])).to_dict()), cola[0]: cola[1]})
    assert json_text(again.to_dict()) == json_text(joined(parts).to_dict())
    assert joined({rte[0]: rte[1]}) is rte[1]


def test_a_baseline_that_only_one_names_is_the_first_method() -> None:
    first, second, _ = by_task(synthetic.glue(3)).values()
    both = joined({"a": read_comparison(baseline=None)(first), "b": second})
    assert both.comparison["baseline"] == "full"


def test_base_models_of_a_task_are_the_same() -> None:
    def on(base: str, method: str) -> Recorded:
        whole = synthetic.glue(3)
        mine = [run for run in whole.records if run.group.method == method and run.group.task == "rte"]
        based = [replace(run, result={**(run.result or {}), "base_hash": base}) for run in mine]
        return replace(whole, records=based, artifacts={})

    joined({"a": on("one", "full"), "b": on("one", "child-d")})
    with pytest.raises(ConfigError, match="'a' and 'b' have different base models on rte"):
        joined({"a": on("one", "full"), "b": on("two", "child-d")})


def test_a_task_is_measured_in_one_way() -> None:
    def measured(method: str, metric: str, examples: str) -> Recorded:
        whole = synthetic.glue(3)
        mine = [run for run in whole.records if run.group.method == method and run.group.task == "rte"]
        result = {"metric": {"name": metric, "value": 0.5}, "examples": examples}
        changed = [replace(run, result={**(run.result or {}), **result}) for run in mine]
        return replace(whole, records=changed, artifacts={})

    one = measured("full", "accuracy", "1")
    joined({"a": one, "b": measured("child-d", "accuracy", "1")})
    with pytest.raises(
        ConfigError, match="differ on rte in its metrics, accuracy and rmse. Report them apart"
    ):
        joined({"a": one, "b": measured("child-d", "rmse", "1")})
    with pytest.raises(ConfigError, match="differ on rte in the examples that it is measured on"):
        joined({"a": one, "b": measured("child-d", "accuracy", "2")})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (read_comparison(baseline="lora"), "differ in their baseline: 'full' and 'lora'"),
        (read_comparison(selection="reported"), "differ in their selection"),
        (read_comparison(options={"model": "other"}), "differ in their model: None and 'other'"),
        (read_comparison(tune_seeds=2), "differ in their tune_seeds: 1 and 2"),
        (lambda one: replace(one, records=synthetic.glue(3).records), "both hold full on rte. Report them apart"),
        (lambda one: replace(one, artifacts={"overlap": {}}), "both hold the overlap of children"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(change: Change, words: str) -> None:
    rte, mrpc, _ = by_task(synthetic.glue(3)).items()
    with pytest.raises(ConfigError, match=words) as caught:
        joined({rte[0]: replace(rte[1], artifacts={"overlap": {}}), mrpc[0]: change(mrpc[1])})
    assert "'rte.db' and 'mrpc.db'" in str(caught.value)
