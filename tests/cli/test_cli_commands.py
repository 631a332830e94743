"""Every command on a tiny model, from train to merge."""

from __future__ import annotations

import csv
import gzip
import json
import re
import resource
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.killed import killed_at_batch

METHODS = ["full", "child-d", "child-f", "child-random", "child-lowest"]


@pytest.mark.parametrize("method", METHODS)
def test_train_predict_evaluate_inspect_merge(childtuning, train_words, sentiment, tmp_path, method) -> None:
    run = tmp_path / "run"
    done = childtuning(*train_words, "--method", method, "--output", run, "--epochs", 4)
    assert done.code == 0, done.err
    result = done.json
    assert (
        result["metric"]["name"] == "accuracy" and result["metric"]["value"] == result["metrics"]["accuracy"]
    )
    assert (result["method"], result["seed"], result["output"]) == (method, 0, str(run))
    assert result["train_examples"] == 96 and result["eval_examples"] == 24
    assert result["peak_memory_bytes"] > 10**7 and result["train_seconds"] > 0
    share = result["child_parameters"] / result["eligible_parameters"]
    assert share == pytest.approx(1.0 if method in ("full", "child-f") else 0.3, abs=1e-3)
    assert json.loads((run / "metrics.json").read_text()) == result
    assert not (run / "checkpoints").exists()

    again = childtuning("evaluate", run, "--eval", sentiment / "dev.jsonl", "--json")
    assert again.json["metrics"] == result["metrics"]

    predicted = childtuning("predict", run, "--input", sentiment / "dev.jsonl", "--json").json["predictions"]
    truth = [json.loads(line)["label"] for line in (sentiment / "dev.jsonl").read_text().splitlines()]
    right = sum(row["prediction"] == label for row, label in zip(predicted, truth, strict=True))
    assert right / len(truth) == pytest.approx(result["metrics"]["accuracy"])

    seen = childtuning("inspect", run, "--verify", "--json").json["verified"]
    assert seen["changed_outside"] == 0 and seen["new_entries"] == 34
    assert 0 < seen["changed_inside"] <= seen["entries_in_delta"] <= seen["entries"]

    assert childtuning("merge", run, "--output", tmp_path / "merged").code == 0
    assert plain_logits(tmp_path / "merged", sentiment) == [row["logits"] for row in predicted]


def plain_logits(folder: Path, sentiment: Path) -> list[list[float]]:
    """Logits by transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in (sentiment / "dev.jsonl").read_text().splitlines()]
    with torch.inference_mode():
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.tolist()


def test_human_output(childtuning, train_words, sentiment, tmp_path) -> None:
    words = [word for word in train_words if word != "--json"]
    done = childtuning(*words, "--output", tmp_path / "run")
    assert done.code == 0 and "accuracy" in done.out and "optimizer state" in done.out
    assert "the child trains" in done.err
    assert "differ, bit by bit" in childtuning("inspect", tmp_path / "run", "--verify").out
    layers = childtuning("inspect", tmp_path / "run", "--layers").out
    assert "bert.encoder.layer.0.attention.self.query.weight" in layers.replace("\n", "")
    one = childtuning("predict", tmp_path / "run", "--text", "what a great film")
    assert one.out.split("\t")[0] in ("good", "bad") and "what a great film" in one.out
    judged = childtuning("evaluate", tmp_path / "run", "--eval", sentiment / "dev.jsonl").out
    for words in ("95% interval", "precision", "most confident errors", "but the label is"):
        assert words in judged, judged
    assert "95% interval" in done.out and "precision" in done.out and "confident" not in done.out
    assert re.search(r"differences below 0\.[12]\d are noise", done.err)
    many = childtuning(
        "predict", tmp_path / "run", "--input", sentiment / "dev.jsonl", "--output", tmp_path / "out.jsonl"
    )
    assert many.code == 0 and len((tmp_path / "out.jsonl").read_text().splitlines()) == 24
    assert "child-d" in childtuning("methods").out


def test_pairs_and_regression(childtuning, tiny_bert, tmp_path) -> None:
    rows = [{"premise": "a cat sat", "hypothesis": "the dog ran", "label": i / 7} for i in range(32)]
    file = tmp_path / "pairs.csv"
    lines = ["premise,hypothesis,label", *(f"{r['premise']},{r['hypothesis']},{r['label']}" for r in rows)]
    file.write_text("\n".join(lines) + "\n")
    words = ["train", "--train", file, "--eval", file, "--model", tiny_bert, "--epochs", 1, "--json"]
    done = childtuning(*words, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    assert list(done.json["metrics"]) == ["pearson", "spearman"]
    one = childtuning("predict", tmp_path / "run", "--text", "a cat", "--text-pair", "a dog", "--json").json
    assert isinstance(one["predictions"][0]["prediction"], float)
    several = ["--text", "a cat", "--text", "a film", "--text-pair", "a dog"]
    assert "got 2 and 1" in childtuning("predict", tmp_path / "run", *several).err
    both = childtuning("predict", tmp_path / "run", *several, "--text-pair", "a book", "--json").json
    again, _ = both["predictions"]
    assert again["prediction"] == pytest.approx(one["predictions"][0]["prediction"])
    done = childtuning("predict", tmp_path / "run", "--text", "a cat")
    assert done.code == 2 and "pairs" in done.err


def test_a_task_of_the_data_dir(childtuning, tiny_bert, tmp_path) -> None:
    folder = tmp_path / "data" / "rte"
    folder.mkdir(parents=True)
    for split, count in (("train", 32), ("dev", 8)):
        rows = [
            {"text1": "the cat sat", "text2": "a dog ran", "label": ("entailment", "not_entailment")[i % 2]}
            for i in range(count)
        ]
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    words = [
        "train",
        "--task",
        "rte",
        "--data-dir",
        tmp_path / "data",
        "--model",
        tiny_bert,
        "--epochs",
        1,
        "--json",
    ]
    done = childtuning(*words, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    assert done.json["task"] == "rte" and done.json["metrics"] == {"accuracy": 0.5}
    again = childtuning("evaluate", tmp_path / "run", "--eval", folder / "dev.jsonl.gz", "--json")
    assert again.json["metrics"] == done.json["metrics"]
    predicted = childtuning("predict", tmp_path / "run", "--input", folder / "dev.jsonl.gz", "--json").json
    assert predicted["label_names"] == ["entailment", "not_entailment"]


def test_score(childtuning, train_words, tmp_path) -> None:
    words = [
        "score",
        *train_words[1:7],
        "--output",
        tmp_path / "fisher.safetensors",
        "--density",
        0.1,
        "--json",
    ]
    done = childtuning(*words)
    assert done.code == 0, done.err
    scores = load_file(tmp_path / "fisher.safetensors")
    assert set(done.json["parameters"]) == set(scores) and "classifier.weight" not in scores
    assert all((score >= 0).all() for score in scores.values())
    done = childtuning(*words)
    assert done.code == 2 and "already exists" in done.err


def test_config_file_reproduces_a_run(childtuning, train_words, tmp_path) -> None:
    done = childtuning(*train_words, "--density", 0.2, "--seed", 3, "--output", tmp_path / "first")
    assert done.code == 0, done.err
    written = tomllib.loads((tmp_path / "first" / "config.toml").read_text())
    assert written["density"] == 0.2 and written["learning_rate"] == 1e-2
    done = childtuning(
        "train", "--config", tmp_path / "first" / "config.toml", "--output", tmp_path / "again", "--json"
    )
    assert done.code == 0, done.err
    assert same_delta(tmp_path / "first", tmp_path / "again")
    done = childtuning(
        "train", "--config", tmp_path / "first" / "config.toml", "--seed", 4, "--output", tmp_path / "other"
    )
    assert done.code == 0 and not same_delta(tmp_path / "first", tmp_path / "other")


def same_delta(left: Path, right: Path) -> bool:
    return (left / "delta.safetensors").read_bytes() == (right / "delta.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["child-d", pytest.param("child-f", marks=pytest.mark.nightly)])
def test_a_killed_run_resumes_bitwise(childtuning, train_words, tmp_path, method) -> None:
    words = [*train_words, "--method", method, "--save-steps", 4, "--epochs", 3]
    straight = childtuning(*words, "--output", tmp_path / "straight")
    assert straight.code == 0, straight.err
    run = tmp_path / "killed"
    killed_at_batch(6, words, run)
    assert childtuning("predict", run, "--text", "a cat").code == 2
    resumed = childtuning(*words, "--output", run, "--resume")
    assert resumed.code == 0, resumed.err
    assert "continuing from checkpoint-" in resumed.err
    assert same_delta(run, tmp_path / "straight")
    assert resumed.json["metrics"] == straight.json["metrics"]
    once_more = childtuning(*words, "--output", run, "--resume")
    assert once_more.code == 0 and once_more.json == resumed.json and "already finished" in once_more.err


def test_a_half_written_checkpoint_is_passed_over(childtuning, train_words, tmp_path) -> None:
    words = [*train_words, "--epochs", 2]
    run = tmp_path / "run"
    straight = childtuning(*words, "--output", run).json
    (run / "metrics.json").unlink()
    (run / "checkpoints" / "checkpoint-9").mkdir(parents=True)
    resumed = childtuning(*words, "--output", run, "--resume")
    assert resumed.code == 0 and resumed.json["metrics"] == straight["metrics"]


def test_the_default_folder_is_named_for_the_run(
    childtuning, train_words, sentiment, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = childtuning(*train_words, "--method", "last-k:layers=1 + smart:weight=0.5", "--train-limit", 8)
    assert done.code == 0, done.err
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == [
        f"{sentiment.name}-last-k-layers-1-+-smart-weight-0.5-0"
    ]


def test_predictions_are_written_beside_the_input(childtuning, train_words, tmp_path) -> None:
    run = tmp_path / "run"
    assert childtuning(*train_words, "--method", "head", "--output", run).code == 0
    file = tmp_path / "new.csv"
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows(
            [["id", "text", "note"], ["7", "a great film", "x, y"], ["8", "awful", ""]]
        )
    known = childtuning("predict", run, "--input", file, "--json").json["predictions"]
    for ending in ("csv", "jsonl"):
        assert childtuning("predict", run, "--input", file, "--output", tmp_path / f"out.{ending}").code == 0
    with (tmp_path / "out.csv").open(newline="") as opened:
        table = list(csv.DictReader(opened))
    assert list(table[0]) == ["id", "text", "note", "prediction", "confidence", "p_bad", "p_good"]
    objects = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert list(objects[0]) == ["id", "text", "note", "prediction", "confidence", "probabilities"]
    for row, line, prediction in zip(table, objects, known, strict=True):
        assert row["prediction"] == line["prediction"] == prediction["prediction"]
        chances = torch.tensor(prediction["logits"]).softmax(0).tolist()
        assert [float(row["p_bad"]), float(row["p_good"])] == pytest.approx(chances)
        assert list(line["probabilities"].values()) == pytest.approx(chances)
        assert float(row["confidence"]) == pytest.approx(max(chances))
    assert table[0]["note"] == objects[0]["note"] == "x, y" and objects[1]["text"] == "awful"
    for words, fault in (
        (["--input", file, "--output", tmp_path / "out.xlsx"], "must end in .csv or .jsonl"),
        (["--input", file, "--output", tmp_path / "out.csv"], "already exists"),
        (["--input", tmp_path / "out.csv", "--output", tmp_path / "two.csv"], "a column 'prediction'"),
    ):
        done = childtuning("predict", run, *words)
        assert done.code == 2 and fault in done.err
    assert not (tmp_path / "two.csv").exists()


def test_half_a_character_is_written_as_it_came(childtuning, train_words, tmp_path) -> None:
    run = tmp_path / "run"
    assert childtuning(*train_words, "--method", "head", "--output", run).code == 0
    file = tmp_path / "cut.jsonl"
    file.write_text(json.dumps({"text": "\ud83d is bad", "note": "\ud83d"}) + "\n")
    for ending in ("csv", "jsonl"):
        done = childtuning("predict", run, "--input", file, "--output", tmp_path / f"out.{ending}")
        assert done.code == 0, done.err
    assert json.loads((tmp_path / "out.jsonl").read_text())["note"] == "\ud83d"
    assert (tmp_path / "out.csv").read_text().splitlines()[1].startswith("? is bad,?,")


def test_a_full_disk_is_one_line(childtuning, train_words, tmp_path) -> None:
    """A limit on the size of files stands for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        done = childtuning(*train_words, "--output", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.code == 2
    assert done.err.splitlines()[-1] == (
        "childtuning: cannot read or write: File too large. Check the path and the disk."
    )
    assert childtuning(*train_words, "--output", tmp_path / "run", "--resume").code == 0
