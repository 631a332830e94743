"""What the held-out training examples decide: the checkpoint, when training stops, and the temperature."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import save_tiny_bert

from childtuning.delta import Delta
from childtuning.errors import BaseMismatchError, ConfigError
from childtuning.runs import FinishedRun, RunConfig, inputs, train_run
from childtuning.runs.evaluate import RunTests
from childtuning.runs.temperature import fitted_temperature, output_layer, scale
from childtuning.runs.trainer import EarlyStopping
from childtuning.tasks.metrics import compute_metrics, probabilities


def a_config(model: Path, data: Path, **options: Any) -> RunConfig:
    files = {"train": str(data / "train.jsonl"), "eval": str(data / "dev.jsonl"), "model": str(model)}
    return RunConfig(**{**files, "learning_rate": 3e-3, "epochs": 4.0, "method": "child-d", **options})


def stop_at_the_end(config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt a run after its training, before anything of the result is saved."""

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunTests, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_run(config, folder)


def logged(run: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line[name] for line in lines if name in line]


def same_delta(one: Path, other: Path) -> bool:
    return all(
        a.dtype == b.dtype and bool((a == b).all())
        for a, b in zip(Delta.load(one).values.values(), Delta.load(other).values.values(), strict=True)
    )


@pytest.mark.parametrize("method", ["child-d", "lora", "child-f"])
def test_the_best_checkpoint_is_kept(tiny_bert: Path, sentiment: Path, tmp_path: Path, method: str) -> None:
    config = a_config(
        tiny_bert, sentiment, method=method, best_checkpoint=True, metric="log-loss", learning_rate=0.03
    )
    result = train_run(config, tmp_path / "best")
    values = logged(tmp_path / "best", "eval_log-loss")
    assert len(values) == 4 and result.checkpoint is not None
    steps = result.checkpoint["of"] / 4
    assert result.checkpoint["step"] == steps * (1 + int(np.argmin(values)))
    assert result.checkpoint["log-loss"] == min(values) == (result.held_out or {})["log-loss"]
    _, aside = inputs.read_run_task(config.resolved())
    assert aside is not None and len(aside) == 10
    again = FinishedRun(tmp_path / "best").evaluate(aside)
    assert again["log-loss"] == pytest.approx(min(values))
    if np.argmin(values) < 3:
        plain = train_run(replace(config, best_checkpoint=False, held_out=0.1), tmp_path / "last")
        assert plain.checkpoint is None and plain.held_out != result.held_out


def test_measuring_does_not_change_training(tiny_bert: Path, sentiment: Path, tmp_path: Path) -> None:
    config = a_config(tiny_bert, sentiment, held_out=0.1)
    train_run(config, tmp_path / "last")
    train_run(replace(config, best_checkpoint=True), tmp_path / "best")
    assert logged(tmp_path / "last", "loss") == logged(tmp_path / "best", "loss") != []


def test_training_stops_without_a_better_checkpoint(tiny_bert: Path, sentiment: Path, tmp_path: Path) -> None:
    config = a_config(tiny_bert, sentiment, early_stopping=2, learning_rate=1e-12, epochs=9.0)
    result = train_run(config, tmp_path / "run")
    assert logged(tmp_path / "run", "eval_accuracy") == [result.checkpoint["accuracy"]] * 3  # type: ignore[index]
    assert result.checkpoint is not None
    assert result.checkpoint["of"] == 3 * result.checkpoint["step"]


def test_a_run_that_stopped_resumes_to_the_same_result(
    tiny_bert: Path, sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after training has stopped early."""
    config = a_config(tiny_bert, sentiment, early_stopping=1, epochs=8.0, learning_rate=0.03)
    whole = train_run(config, tmp_path / "whole")
    assert whole.checkpoint is not None and whole.checkpoint["of"] < 8 * 6
    stop_at_the_end(config, tmp_path / "run", monkeypatch)
    with pytest.raises(
        ConfigError, match="was started with save_steps=None, got 9. Resume with the same options"
    ):
        train_run(replace(config, save_steps=9), tmp_path / "run", resume=True)
    resumed = train_run(config, tmp_path / "run", resume=True)
    assert (resumed.checkpoint, resumed.metrics) == (whole.checkpoint, whole.metrics)
    assert logged(tmp_path / "run", "eval_accuracy") == logged(tmp_path / "whole", "eval_accuracy")
    assert same_delta(tmp_path / "run", tmp_path / "whole")


def test_a_run_is_not_resumed_on_another_base(
    sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny_bert(tmp_path / "base")
    config = a_config(base, sentiment, save_steps=2)
    stop_at_the_end(config, tmp_path / "run", monkeypatch)
    save_tiny_bert(base, seed=1)
    with pytest.raises(
        BaseMismatchError, match="the weights of '.*base' have changed since it was trained on"
    ):
        train_run(config, tmp_path / "run", resume=True)
    save_tiny_bert(base)
    result = train_run(config, tmp_path / "run", resume=True)
    about = json.loads((tmp_path / "run" / "labels.json").read_text())
    assert result.base_hash == about["base_hash"]


@pytest.mark.parametrize(
    ("greater", "values", "stops"),
    [
        (True, [0.5, 0.6, 0.6, 0.5], True),
        (True, [0.5, 0.6, 0.6, 0.7], False),
        (True, [0.5, 0.6, 0.5], False),
        (False, [0.5, 0.4, 0.4, 0.6], True),
        (True, [float("nan"), 0.1, 0.2], False),
        (True, [float("nan")] * 3, True),
        (True, [0.5], False),
    ],
)
def test_patience_counts_from_the_best(greater: bool, values: list[float], stops: bool) -> None:
    args = SimpleNamespace(metric_for_best_model="accuracy", greater_is_better=greater)
    lines = [{"loss": 1.0, "step": 1}, *({"eval_accuracy": value} for value in values)]
    control = SimpleNamespace(should_training_stop=False, should_save=True)
    EarlyStopping(2).on_evaluate(args, SimpleNamespace(log_history=lines), control)
    assert (control.should_training_stop, control.should_save) == (stops, not stops)


def test_the_temperature_minimises_the_log_loss() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=400)
    logits = 6 * (rng.normal(size=(400, 3)) + np.eye(3)[truth])
    found = fitted_temperature(logits, truth)
    grid = np.geomspace(0.05, 20, 4001)
    losses = [-np.log(probabilities(logits / t)[np.arange(400), truth]).mean() for t in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=2e-3) and found > 2


@pytest.mark.parametrize("method", ["child-d", "lora", "prefix", "head"])
def test_the_served_model_has_the_temperature(
    tiny_bert: Path, sentiment: Path, tmp_path: Path, method: str
) -> None:
    config = a_config(tiny_bert, sentiment, method=method, held_out=0.25, epochs=2.0)
    plain = train_run(config, tmp_path / "plain")
    result = train_run(replace(config, temperature_scaling=True), tmp_path / "scaled")
    assert result.temperature is not None and result.temperature != pytest.approx(1, abs=1e-3)
    assert result.metrics["accuracy"] == plain.metrics["accuracy"]
    task, aside = inputs.read_run_task(config)
    assert aside is not None
    before, after = (FinishedRun(tmp_path / name) for name in ("plain", "scaled"))
    logits = np.array([row["logits"] for row in before.predict(task.dev)])
    served = after.predict_proba(task.dev)
    assert np.allclose(served, probabilities(logits / result.temperature), atol=1e-5)
    own = np.array([row["logits"] for row in after.predict(aside)])
    truth = [after.label_names.index(label) for label in aside.labels]  # type: ignore[attr-defined]
    found = compute_metrics(["log-loss"], own.argmax(1), truth, logits=own)["log-loss"]
    assert found == pytest.approx((result.held_out or {})["log-loss"])
    assert (
        found
        <= compute_metrics(["log-loss"], own.argmax(1), truth, logits=own * result.temperature)["log-loss"]
    )


def test_no_layer_below_the_last_is_scaled(tiny_bert: Path, sentiment: Path, tmp_path: Path) -> None:
    """A new head's bias is 0, so that halving a layer below a ReLU would halve the logits too."""
    from transformers import AutoModelForSequenceClassification, DistilBertConfig

    config = DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    model = AutoModelForSequenceClassification.from_config(config)
    tests = SimpleNamespace(
        held_out_answers=lambda model: SimpleNamespace(
            outputs=model.eval()(torch.arange(12).view(3, 4)).logits.detach().numpy()
        )
    )
    names = ("pre_classifier.*", "classifier.*")
    found = output_layer(model, names, tests)  # type: ignore[arg-type]
    assert [id(p) for p in found] == [id(p) for p in model.classifier.parameters()]
    assert not model.classifier.bias.detach().any()  # as before
    with pytest.raises(ConfigError, match="needs a linear layer that makes the logits"):
        output_layer(model, names[:1], tests)  # type: ignore[arg-type]


@pytest.mark.parametrize("sure", [True, False])
def test_without_a_wrong_answer_the_logits_stay(sure: bool) -> None:
    truth = [0, 1, 1, 0]
    logits = [np.eye(2)[one if sure or place else 1 - one] for place, one in enumerate(truth)]
    tests = SimpleNamespace(
        held_out_answers=lambda model: SimpleNamespace(outputs=logits, split=None),
        task=SimpleNamespace(rules=SimpleNamespace(truth=lambda split, names: truth), label_names=()),
    )
    told: list[str] = []
    weight = torch.ones(2)
    found = scale(torch.nn.Linear(1, 1), [weight], tests, told.append)  # type: ignore[arg-type]
    if sure:
        assert found is None and weight.eq(1).all()
        assert "none of the 4 held-out examples is answered wrong" in told[0]
    else:  # three in four are right: p / (1 - p) = exp(1 / T)
        assert found == pytest.approx(1 / np.log(3), rel=1e-4)
        assert weight.tolist() == pytest.approx([np.log(3)] * 2, rel=1e-4)
        assert "log loss of the 4 held-out" in told[0] and "4 examples say little" in told[1]


def test_a_child_that_changes_cannot_go_back(tiny_bert: Path, sentiment: Path, tmp_path: Path) -> None:
    config = a_config(tiny_bert, sentiment, method="child-dynamic", best_checkpoint=True)
    with pytest.raises(ConfigError, match="'child-dynamic' changes which entries are trained"):
        train_run(config, tmp_path / "run")


def test_a_temperature_needs_classes_and_a_trained_head(
    tiny_bert: Path, sentiment: Path, tmp_path: Path
) -> None:
    config = a_config(tiny_bert, sentiment, temperature_scaling=True, always=("*embeddings.LayerNorm*",))
    with pytest.raises(ConfigError, match="needs a linear layer that makes the logits"):
        train_run(config, tmp_path / "run")
    numbers = tmp_path / "numbers.csv"
    numbers.write_text("text,label\n" + "".join(f"good {i},{i / 7}\n" for i in range(30)))
    with pytest.raises(ConfigError, match="needs one class per example, got regression"):
        train_run(replace(config, train=str(numbers), eval=None, always=None), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_something_is_held_out_where_something_is_chosen(tiny_bert: Path, sentiment: Path) -> None:
    for options in ({"best_checkpoint": True}, {"early_stopping": 1}, {"temperature_scaling": True}):
        config = a_config(tiny_bert, sentiment, **options)
        assert config.resolved().held_out == 0.1 == config.resolved().resolved().held_out
        assert replace(config, held_out=0.3).resolved().held_out == 0.3
    assert a_config(tiny_bert, sentiment).resolved().held_out == 0.0
