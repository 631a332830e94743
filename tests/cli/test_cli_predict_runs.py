"""``predict --runs``: several runs on one base model answer as each alone does."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import Command

import childtuning as ct
from childtuning.runs.several import RunsOfOneBase

METHODS = ["child-d", "child-f", "full", "lora:rank=2", "reinit", "prefix"]
TEXTS = ["a lovely film", "a dull film", "never again"]


def trained(childtuning: Command, words: list[object], folder: Path, method: str) -> Path:
    density = ["--density", "0.1"] if method == "child-d" else []
    assert childtuning(*words, "--method", method, *density, "--output", folder).code == 0
    return folder


@pytest.fixture
def topics(tmp_path: Path) -> Path:
    """Three classes, other than those of the other runs."""
    rows = [{"text": f"text {i} of {'abc'[i % 3]}", "label": "abc"[i % 3]} for i in range(24)]
    path = tmp_path / "topics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_answers_as_alone(
    childtuning: Command, train_words: list[object], tiny_bert: Path, topics: Path, tmp_path: Path
) -> None:
    runs = {
        m.split(":")[0]: trained(childtuning, train_words, tmp_path / m.split(":")[0], m) for m in METHODS
    }
    words = ["train", "--train", topics, "--model", tiny_bert, "--epochs", 1, "--json"]
    runs["topics"] = trained(childtuning, words, tmp_path / "topics", "child-d")
    opened = {name: ct.load(folder) for name, folder in runs.items()}
    together = RunsOfOneBase(opened)
    for name in [*together, *together]:
        with together.using(name) as run:
            told = run.predict(TEXTS)
        assert told == ct.load(runs[name]).predict(TEXTS), name
    bodies = {id(p) for p in opened["child-d"].model().base_model.parameters()}
    for name in ("child-f", "full", "lora", "prefix", "topics"):
        own = {id(p) for p in opened[name].model().parameters()}
        assert bodies <= own, name  # one base model in memory
    assert not bodies <= {id(p) for p in opened["reinit"].model().parameters()}
    base = {n: p.clone() for n, p in ct.load(runs["child-d"]).base().model.base_model.named_parameters()}
    assert all(torch.equal(p, base[n]) for n, p in opened["child-d"].model().base_model.named_parameters())


def test_the_command(childtuning: Command, train_words: list[object], topics: Path, tmp_path: Path) -> None:
    a = trained(childtuning, train_words, tmp_path / "a", "child-d")
    b = trained(childtuning, train_words, tmp_path / "b", "full")
    texts = [word for text in TEXTS for word in ("--text", text)]
    both = childtuning("predict", "--runs", a, b, *texts, "--json").json["runs"]
    for name, folder in (("a", a), ("b", b)):
        alone = childtuning("predict", folder, *texts, "--json").json
        assert both[name] == {key: alone[key] for key in ("label_names", "predictions")}
    said = childtuning("predict", a, b, "--text", TEXTS[0]).out.splitlines()
    assert said[0] == "a:" and said[2] == "b:"

    out = tmp_path / "out.csv"
    assert childtuning("predict", "--runs", a, b, "--input", topics, "--output", out).code == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len(rows) == 24 and rows[0]["text"] == "text 0 of a"
    assert {"a_prediction", "b_prediction", "a_confidence"} <= set(rows[0])

    lines, out = tmp_path / "lines.jsonl", tmp_path / "lines.csv"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one\rtwo", 'three "quoted"')))
    assert childtuning("predict", a, "--input", lines, "--output", out).code == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == ["one\rtwo", 'three "quoted"'] and rows[0]["prediction"]

    twice = childtuning("predict", a, a, *texts)
    assert twice.code == 2 and "given twice" in twice.err
    none = childtuning("predict", *texts)
    assert none.code == 2 and "pass a run's folder" in none.err


def test_runs_of_different_base_models_are_refused(
    childtuning: Command, train_words: list[object], tiny_bert: Path, tmp_path: Path
) -> None:
    from transformers import AutoModel, AutoTokenizer

    a = trained(childtuning, train_words, tmp_path / "a", "child-d")
    other = AutoModel.from_pretrained(tiny_bert)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "other")
    words = [tmp_path / "other" if word is tiny_bert else word for word in train_words]
    b = trained(childtuning, words, tmp_path / "b", "child-d")
    refused = childtuning("predict", "--runs", a, b, "--text", "good")
    assert refused.code == 2 and "different base models" in refused.err


def test_a_run_beside_the_one_that_it_started_from(
    childtuning: Command, train_words: list[object], tmp_path: Path
) -> None:
    """The first run moved every parameter, so that the second shares none with the base model."""
    full = trained(childtuning, train_words, tmp_path / "full", "full")
    second = tmp_path / "second"
    assert childtuning(*train_words, "--method", "head", "--init-from", full, "--output", second).code == 0
    runs = {"full": ct.load(full), "second": ct.load(second)}
    together = RunsOfOneBase(runs)
    for name, folder in (("full", full), ("second", second), ("full", full)):
        with together.using(name) as run:
            assert run.predict(TEXTS) == ct.load(folder).predict(TEXTS)


def test_runs_of_two_kinds_share_what_both_load(
    childtuning: Command, train_words: list[object], tiny_bert: Path, tmp_path: Path
) -> None:
    tags = tmp_path / "tags.conll"
    tags.write_text("the O\ncat B-ANIMAL\nsat O\n\n" * 12 + "a O\nfilm O\n\n" * 12)
    words = ["train", "--train", tags, "--model", tiny_bert, "--epochs", 1, "--json"]
    runs = {
        "mood": trained(childtuning, train_words, tmp_path / "mood", "child-d"),
        "tags": trained(childtuning, words, tmp_path / "tags", "child-d"),
    }
    for order in (["mood", "tags"], ["tags", "mood"]):
        opened = {name: ct.load(runs[name]) for name in order}
        together = RunsOfOneBase(opened)
        for name in [*together, *together]:
            with together.using(name) as run:
                told = run.predict(TEXTS)
            assert told == ct.load(runs[name]).predict(TEXTS), name
        encoders = [{id(p) for p in opened[name].model().base_model.encoder.parameters()} for name in order]
        assert encoders[0] == encoders[1]
