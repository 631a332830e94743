"""Runs that start where another run ended."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from childtuning.errors import ConfigError, ModelError, ParameterError
from childtuning.runs import FinishedRun, RunConfig, train_run
from childtuning.runs.inputs import base_model


def a_config(model: Path | None, data: Path, **options: Any) -> RunConfig:
    files = {"train": str(data / "train.jsonl"), "eval": str(data / "dev.jsonl")}
    settings: dict[str, Any] = {"learning_rate": 1e-2, "epochs": 1.0, "train_limit": 32}
    settings |= {"model": str(model)} if model else {}
    return RunConfig(**{**files, **settings, **options})


@pytest.fixture(scope="module")
def first_run(tiny_bert: Path, sentiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    train_run(a_config(tiny_bert, sentiment, method="full"), folder)
    return folder


@pytest.mark.parametrize("method", ["child-d", "child-f", "adapter:4"])
def test_it_starts_from_the_tuned_network(
    tiny_bert: Path, sentiment: Path, first_run: Path, tmp_path: Path, method: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(first_run, source)
    tuned = dict(FinishedRun(source).model().named_parameters())
    train_run(a_config(tiny_bert, sentiment, method=method, init_from=str(source)), tmp_path / "second")
    shutil.rmtree(source)  # the second run stands on its own
    opened = FinishedRun(tmp_path / "second")
    start = dict(base_model(opened).model.named_parameters())
    assert all(torch.equal(start[name], tuned[name]) for name in start if not name.startswith("classifier"))
    counts = opened.verify()
    assert counts["changed_outside"] == 0 and counts["changed_inside"] + counts["new_entries"] > 40
    answers = opened.predict(opened.read_input(sentiment / "dev.jsonl", labelled=False))
    assert len(answers) == 24


@pytest.mark.parametrize("method", ["lora:rank=2", "child-d", "prompt:3"])
def test_what_is_exported_has_the_start(
    tiny_bert: Path, sentiment: Path, first_run: Path, tmp_path: Path, method: str
) -> None:
    from transformers import AutoModelForSequenceClassification

    train_run(a_config(tiny_bert, sentiment, method=method, init_from=str(first_run)), tmp_path / "run")
    run = FinishedRun(tmp_path / "run")
    if not method.startswith("child"):  # its files would be read beside the base model, without the start
        with pytest.raises(ConfigError, match=r"started from another run.*Export to model or patch"):
            run.export(tmp_path / "adapter", "peft")
        assert not (tmp_path / "adapter").exists() and not (tmp_path / "run" / "method").exists()
    if method.startswith("prompt"):
        with pytest.raises(ModelError, match="cannot be merged"):
            run.export(tmp_path / "model")
        return
    assert (run.export(tmp_path / "patch", "patch") / "patch.safetensors").is_file()
    served = AutoModelForSequenceClassification.from_pretrained(run.export(tmp_path / "model")).eval()
    texts = ["a great film", "the dog sat on the mat"]
    inputs = run.processor()(texts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        logits = served(**inputs).logits
    wanted = torch.tensor([row["logits"] for row in run.predict(texts)])
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


def test_a_model_folder_is_the_model(tiny_bert: Path, sentiment: Path, tmp_path: Path) -> None:
    plain = train_run(a_config(tiny_bert, sentiment, method="head"), tmp_path / "a")
    named = train_run(a_config(None, sentiment, method="head", init_from=str(tiny_bert)), tmp_path / "b")
    assert plain.metrics == named.metrics
    with pytest.raises(ConfigError, match="Pass one of them"):
        train_run(a_config(tiny_bert, sentiment, method="head", init_from=str(tiny_bert)), tmp_path / "c")


def test_wrong_starts_are_refused(tiny_bert: Path, sentiment: Path, first_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run folder"):
        train_run(a_config(tiny_bert, sentiment, init_from=str(tmp_path / "none")), tmp_path / "c")
    from transformers import BertConfig, BertModel

    other = tmp_path / "other"
    shutil.copytree(tiny_bert, other)
    config = BertConfig.from_pretrained(tiny_bert)
    config.intermediate_size *= 2
    BertModel(config).save_pretrained(other)
    with pytest.raises(ModelError, match="Start from a run of the same base model"):
        train_run(a_config(other, sentiment, init_from=str(first_run)), tmp_path / "d")
    assert not (tmp_path / "c").exists() and not (tmp_path / "d").exists()


def test_what_a_method_draws_anew_is_trained_whole_beside_patterns(
    tiny_bert: Path, sentiment: Path, tmp_path: Path
) -> None:
    config = a_config(tiny_bert, sentiment, method="reinit:1+child-random", always=("classifier.*",))
    train_run(config, tmp_path / "run")
    parts = FinishedRun(tmp_path / "run").delta.parts
    drawn = [name for name in parts if "layer.1." in name or "pooler" in name]
    assert len(drawn) > 10 and all(parts[name].is_whole for name in (*drawn, "classifier.weight"))


@pytest.mark.parametrize("method", ["lora", "head", "bitfit", "adapter:4"])
def test_the_users_patterns_stand_in_the_heads_place(
    method: str, tiny_bert: Path, sentiment: Path, tmp_path: Path
) -> None:
    config = a_config(tiny_bert, sentiment, method=method, always=("classifier.*", "bert.pooler.*"))
    train_run(config, tmp_path / "run")
    run = FinishedRun(tmp_path / "run")
    trained = {
        name.replace("base_model.model.", "").replace(".modules_to_save.default", "")
        for name in run.delta.parts
    }
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= trained
    assert run.model() is not None


def test_a_pattern_that_matches_nothing_is_refused(tiny_bert: Path, sentiment: Path, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="clasifier"):
        train_run(a_config(tiny_bert, sentiment, method="lora", always=("clasifier.*",)), tmp_path / "run")
