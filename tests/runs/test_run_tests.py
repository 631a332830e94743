"""What a run is measured on beside the reported examples, and what runs share."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import save_tiny_bert

from childtuning import ChildConfig
from childtuning.errors import ConfigError, DataError
from childtuning.methods import registry
from childtuning.methods.child import ChildD
from childtuning.methods.r_drop import RDrop
from childtuning.runs import FinishedRun, RunConfig, inputs, train_run
from childtuning.runs.inputs import Inputs
from childtuning.tasks import load_transfer_task
from childtuning.training import Prepared


def a_config(model: Path, data: Path, **options: Any) -> RunConfig:
    files = {"train": str(data / "train.jsonl"), "eval": str(data / "dev.jsonl"), "model": str(model)}
    return RunConfig(**{**files, "learning_rate": 1e-2, "epochs": 1.0, **options})


def test_what_is_held_out_is_the_same_for_every_training_size(tiny_bert: Path, sentiment: Path) -> None:
    config = a_config(tiny_bert, sentiment, held_out=0.25, data_seed=3)
    task, aside = inputs.read_run_task(config)
    small, same = inputs.read_run_task(replace(config, train_limit=10))
    everything, nothing = inputs.read_run_task(replace(config, held_out=0.0))
    assert aside is not None and nothing is None
    assert (len(task.train), len(aside), len(small.train)) == (72, 24, 10)
    assert same == aside
    assert set(small.train.text) <= set(task.train.text)
    assert sorted(task.train.text + aside.text) == sorted(everything.train.text)
    _, moved = inputs.read_run_task(replace(config, data_seed=4))
    assert moved != aside


def test_what_is_measured_can_be_limited(tiny_bert: Path, sentiment: Path) -> None:
    config = a_config(tiny_bert, sentiment, held_out=0.25, data_seed=3)
    whole, aside = inputs.read_run_task(config)
    few, some = inputs.read_run_task(replace(config, eval_limit=5))
    assert few.train == whole.train and aside is not None and some is not None
    for drawn, everything in ((few.dev, whole.dev), (some, aside)):
        assert len(drawn) == 5 and set(drawn.text) <= set(everything.text)
    assert inputs.read_run_task(replace(config, eval_limit=10**6)) == (whole, aside)
    with pytest.raises(ConfigError, match="eval_limit must be a whole number above 0"):
        replace(config, eval_limit=0)


def test_scores_are_those_of_a_run_on_these_examples(
    tiny_bert: Path, sentiment: Path, tmp_path: Path
) -> None:
    config = a_config(tiny_bert, sentiment, method="child-d", held_out=0.25)
    told = train_run(config, tmp_path / "run")
    assert told.train_examples == 72 and set(told.held_out or {}) == {"accuracy"}
    assert told.constant == {"accuracy": 0.5}
    run = FinishedRun(tmp_path / "run")
    _, aside = inputs.read_run_task(config)
    assert aside is not None
    assert run.evaluate(aside) == told.held_out
    assert run.metrics["held_out"] == told.held_out


@pytest.mark.parametrize("method", ["child-d", "lora", "child-f"])
def test_inputs_make_no_difference(
    method: str, tiny_bert: Path, sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [
        a_config(tiny_bert, sentiment, method=method, seed=seed, learning_rate=rate, held_out=0.25)
        for seed in (0, 1)
        for rate in (1e-2, 1e-3)
    ]
    counts = {"task": 0, "model": 0}

    def counted(name: str, inner: Any) -> Any:
        def call(*args: Any) -> Any:
            counts[name] += 1
            return inner(*args)

        return call

    monkeypatch.setattr(inputs, "read_run_task", counted("task", inputs.read_run_task))
    monkeypatch.setattr(inputs, "load_run_model", counted("model", inputs.load_run_model))
    shared = Inputs(keep=True)
    for index, config in enumerate(configs):
        train_run(config, tmp_path / f"shared{index}", inputs=shared)
    assert counts == {"task": 1, "model": 2}
    for index, config in enumerate(configs):
        train_run(config, tmp_path / f"alone{index}")
        for name in ("delta.safetensors", "delta.json"):
            alone, together = (tmp_path / f"{run}{index}" / name for run in ("alone", "shared"))
            assert alone.read_bytes() == together.read_bytes()


def test_a_method_that_takes_positions_cuts_its_own_examples_alone(sentiment: Path, tmp_path: Path) -> None:
    source = save_tiny_bert(tmp_path / "source")  # 64 positions
    rows = [{"text": f"the cat {word} " * 20, "label": word} for word in ("good", "bad")] * 4
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"train": str(tmp_path / "long.jsonl"), "eval": str(sentiment / "dev.jsonl")}
    configs = [a_config(source, sentiment, method=method, **files) for method in ("prefix:24", "full")]
    shared, lengths = Inputs(keep=True), []
    for index, config in enumerate(configs):
        train_run(config, tmp_path / f"run{index}", inputs=shared)
        lengths.append(FinishedRun(tmp_path / f"run{index}").metrics["understood"]["tokens"][1])
    assert lengths == [40, 62]


def test_scores_are_found_once(
    tiny_bert: Path, sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from childtuning.training import child_choice

    calls = []
    inner = child_choice.fisher_scores
    monkeypatch.setattr(
        child_choice, "fisher_scores", lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    )
    shared = Inputs(keep=True)
    config = a_config(tiny_bert, sentiment, method="child-d", train_limit=16)
    same = [
        config,
        replace(config, density=0.1, learning_rate=1e-3),
        replace(config, granularity="row"),
        replace(config, method="child-lowest"),
        replace(config, method="child-d+r-drop"),
    ]
    others = [
        replace(config, seed=1),
        replace(config, train_limit=17),
        replace(config, method="freeze:1+child-d"),
    ]
    for index, one in enumerate([*same, *others]):
        train_run(one, tmp_path / str(index), inputs=shared)
        assert len(calls) == max(1, index - len(same) + 2)


def test_kept_scores_are_those_of_the_methods_own_child(
    tiny_bert: Path, sentiment: Path, monkeypatch
) -> None:
    @dataclass(frozen=True)
    class Batches(ChildD):
        name = "batches"

        def child(self, config: ChildConfig) -> ChildConfig:
            return replace(super().child(config), estimator="per-batch")

    @dataclass(frozen=True)
    class Frozen(RDrop):
        name = "frozen"

        def prepare(self, prepared: Prepared) -> Prepared:
            return replace(prepared, eligible=("*.layer.*",))

    for method in (Batches, Frozen):
        monkeypatch.setitem(registry._methods, method.name, method)
    shared = Inputs(keep=True)
    config = a_config(tiny_bert, sentiment, method="child-d")
    for method, fresh in (("child-d", 1), ("child-lowest", 1), ("batches", 2), ("child-d+frozen", 3)):
        made: list[int] = shared.scores(replace(config, method=method))(lambda fresh=fresh: [fresh])  # type: ignore
        assert made == [fresh], method


def pairs(folder: Path, name: str, labels: list[str], split: str = "dev") -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    rows = [{"text1": f"a b {i}", "text2": f"c {i}", "label": label} for i, label in enumerate(labels)]
    (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_model_is_scored_on_other_tasks(tiny_bert: Path, tmp_path: Path) -> None:
    three = ["entailment", "neutral", "contradiction"]
    for split in ("train", "dev"):
        pairs(tmp_path, "mnli", three * 8, split)
    pairs(tmp_path, "sick", three[:2] * 10, "test")
    options: dict[str, Any] = {
        "task": "mnli",
        "data_dir": str(tmp_path),
        "model": str(tiny_bert),
        "method": "head",
    }
    pairs(tmp_path, "qqp", ["duplicate", *["not_duplicate"] * 4] * 4)  # classes that the model does not have
    config = RunConfig(**options, epochs=1.0, elsewhere=("mnli", "sick/test", "qqp"))
    told = train_run(config, tmp_path / "run")
    assert list(told.elsewhere) == ["mnli", "sick/test", "qqp"]
    assert told.elsewhere["mnli"] == told.metrics
    examples = load_transfer_task("qqp", three, tmp_path).examples
    answers = FinishedRun(tmp_path / "run").predict(replace(examples, labels=None))
    right = [
        (answer["prediction"] == "entailment") == (label == "duplicate")
        for answer, label in zip(answers, examples.labels or (), strict=True)
    ]
    assert told.elsewhere["qqp"] == {"accuracy": sum(right) / 20}
    for wrong, words in (("sick/dev", "no split 'dev'"), ("sic", "Did you mean 'sick'")):
        with pytest.raises(DataError, match=words):
            train_run(replace(config, elsewhere=(wrong,)), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_run_is_watched_elsewhere(tiny_bert: Path, sentiment: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = a_config(tiny_bert, sentiment, method="head", report_to=("tensorboard",))
    train_run(config, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in logged if "loss" in line}
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == pytest.approx(losses) and len(found) >= 5
    train_run(replace(config, report_to=None), tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "tensorboard").exists()
    for name, words in (("tensorbord", "Did you mean 'tensorboard'"), ("comet_ml", "is not installed")):
        with pytest.raises(ConfigError, match=words):
            train_run(replace(config, report_to=(name,)), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_shares_are_checked(tiny_bert: Path, sentiment: Path) -> None:
    with pytest.raises(ConfigError, match=r"held_out must be in \[0, 1\), got 1.0"):
        a_config(tiny_bert, sentiment, held_out=1.0)


@pytest.mark.parametrize("metric", ["macro-f1", "auroc"])
def test_the_main_metric_is_chosen(metric: str, tiny_bert: Path, sentiment: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = a_config(tiny_bert, sentiment, method="head", metric=metric, held_out=0.25)
    told = train_run(config, tmp_path / "run", tell=said.append)
    assert told.metric == {"name": metric, "value": told.metrics[metric]} and metric in (told.held_out or {})
    assert list(told.metrics) == [metric, "accuracy"]
    assert told.constant is not None and told.constant[metric] == pytest.approx(
        {"auroc": 0.5}.get(metric, 1 / 3)
    )
    assert FinishedRun(tmp_path / "run").evaluate(sentiment / "dev.jsonl") == told.metrics


@pytest.mark.parametrize(
    ("metric", "words"),
    [("rmse", "'rmse' does not fit classification"), ("macro_f1", "Did you mean 'macro-f1'")],
)
def test_a_metric_of_another_kind_is_refused(
    metric: str, words: str, tiny_bert: Path, sentiment: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        train_run(a_config(tiny_bert, sentiment, metric=metric), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_area_needs_two_classes(tiny_bert: Path, sentiment: Path, tmp_path: Path) -> None:
    rows = [line for line in (sentiment / "dev.jsonl").read_text().splitlines() if '"good"' in line]
    (tmp_path / "good.jsonl").write_text("\n".join(rows) + "\n")
    config = replace(a_config(tiny_bert, sentiment, metric="auroc"), eval=str(tmp_path / "good.jsonl"))
    with pytest.raises(DataError, match="auroc needs evaluation examples of two classes, got only 'good'"):
        train_run(config, tmp_path / "run")
