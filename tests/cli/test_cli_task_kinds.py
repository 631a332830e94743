"""Every kind of task through the command line, from train to merge; a language model's run through a kill."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.cli.killed import killed_at_batch
from tests.tiny_kinds import (
    color_images,
    save_tiny_lm,
    save_tiny_vision,
    write_image_folders,
    write_instructions,
    write_sentences,
)

from childtuning import load

REAL = Path(os.environ.get("CHILDTUNING_DATA", Path(__file__).parents[3] / "shared" / "data"))


def train(childtuning, files, model, output, *words: object):
    given = ["train", "--train", files[0], "--eval", files[1], "--model", model, "--output", output, "--json"]
    return childtuning(*given, "--batch-size", 8, "--lr", 1e-2, *words)


def finish(childtuning, run: Path, result: dict, evaluated: object, merged: Path) -> None:
    """What holds for each kind: evaluating again agrees, nothing changed outside the delta, and the run merges."""
    again = childtuning("evaluate", run, "--eval", evaluated, "--json")
    assert again.code == 0, again.err
    assert again.json["metrics"] == result["metrics"]
    seen = childtuning("inspect", run, "--verify", "--json").json["verified"]
    assert seen["changed_outside"] == 0 < seen["changed_inside"]
    done = childtuning("merge", run, "--output", merged)
    assert done.code == 0, done.err


@pytest.mark.parametrize("method", ["child-d", "r3f"])
def test_several_labels(childtuning, tiny_bert, tmp_path, method) -> None:
    path = tmp_path / "train.jsonl"
    words = {"animal": "cat", "place": "house"}
    kinds = [[], ["animal"], ["place"], ["animal", "place"]] * 24
    rows = [{"text": " ".join(["the", *map(words.get, names), "was"]), "label": names} for names in kinds]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = train(childtuning, (path, path), tiny_bert, tmp_path / "run", "--epochs", 10, "--method", method)
    assert done.code == 0, done.err
    # The tiny model, as plain torch trains it, learns one of the two labels.
    assert done.json["metric"] == {"name": "micro-f1", "value": done.json["metrics"]["micro-f1"]}
    assert done.json["metrics"]["micro-f1"] > done.json["constant"]["micro-f1"]
    finish(childtuning, tmp_path / "run", done.json, path, tmp_path / "merged")
    said = childtuning("predict", tmp_path / "run", "--input", path, "--json").json
    for row in said["predictions"]:
        assert row["prediction"] == [
            n for n, logit in zip(["animal", "place"], row["logits"], strict=True) if logit >= 0
        ]
    wanted = torch.tensor([row["logits"] for row in said["predictions"]]).double().sigmoid()
    for name in ("said.csv", "said.jsonl"):  # labels do not exclude each other: no softmax
        args = ("predict", tmp_path / "run", "--input", path, "--output", tmp_path / name)
        assert childtuning(*args).code == 0
    with (tmp_path / "said.csv").open() as file:
        written = [[float(row["p_animal"]), float(row["p_place"])] for row in csv.DictReader(file)]
    torch.testing.assert_close(torch.tensor(written).double(), wanted)
    lines = (tmp_path / "said.jsonl").read_text().splitlines()
    again = [[*json.loads(line)["probabilities"].values()] for line in lines]
    assert again == written
    chances = load(tmp_path / "run").predict_proba([row["text"] for row in rows])
    torch.testing.assert_close(torch.from_numpy(chances), wanted)


def test_token_classification(childtuning, tiny_bert, tmp_path) -> None:
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    files = write_sentences(tmp_path)
    done = train(childtuning, files, tiny_bert, tmp_path / "run", "--epochs", 6)
    assert done.code == 0, done.err
    assert list(done.json["metrics"]) == ["span_f1", "accuracy"] and done.json["metric"]["name"] == "span_f1"
    assert done.json["metrics"]["span_f1"] > 0.9
    finish(childtuning, tmp_path / "run", done.json, files[1], tmp_path / "merged")

    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    said = childtuning("predict", tmp_path / "run", "--input", files[1], "--json").json
    assert said["label_names"] == ["B-ANIMAL", "B-PLACE", "I-PLACE", "O"]
    assert [len(row["prediction"]) for row in said["predictions"]] == [len(row["tokens"]) for row in rows]
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    with torch.inference_mode():
        best = model(**tokenizer(" ".join(rows[0]["tokens"]), return_tensors="pt")).logits.argmax(-1)[0]
    plain = [model.config.id2label[int(index)] for index in best[1:-1]]
    assert plain == said["predictions"][0]["prediction"]
    one = childtuning("predict", tmp_path / "run", "--text", "the house was nice")
    assert one.out.strip() == "the/B-PLACE house/I-PLACE was/O nice/O"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_causal_lm(childtuning, tmp_path, family) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = save_tiny_lm(tmp_path / "model", family, bos=family == "llama")
    files = write_instructions(tmp_path)
    done = train(childtuning, files, model, tmp_path / "run", "--epochs", 10, "--method", "child-d")
    assert done.code == 0, done.err
    metrics = done.json["metrics"]
    assert done.json["metric"] == {"name": "loss", "value": metrics["loss"]} and metrics["loss"] < 0.1
    assert metrics["perplexity"] == pytest.approx(2.718281828 ** metrics["loss"])
    assert done.json["trained_parameters"] == done.json["child_parameters"]
    finish(childtuning, tmp_path / "run", done.json, files[1], tmp_path / "merged")

    said = childtuning("predict", tmp_path / "run", "--input", files[1], "--max-new-tokens", 8, "--json").json
    wanted = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [row["prediction"] for row in said["predictions"]] == [row["response"] for row in wanted]
    assert all(row["ended"] for row in said["predictions"])
    cut = childtuning("predict", tmp_path / "run", "--text", "nice cat ?", "--max-new-tokens", 2)
    assert cut.out == "nice cat ?\tsat on\n"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    asked = tokenizer(wanted[0]["prompt"], return_tensors="pt")
    written = merged.generate(**asked, max_new_tokens=8, do_sample=False, pad_token_id=2, eos_token_id=2)[0]
    text = tokenizer.decode(written[asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == said["predictions"][0]["prediction"]


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_image_classification(childtuning, tmp_path, family) -> None:
    image_files = pytest.importorskip("PIL.Image", reason="images need Pillow")
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = save_tiny_vision(tmp_path / "model", family)
    files = write_image_folders(tmp_path)
    done = train(childtuning, files, model, tmp_path / "run", "--epochs", 5)
    assert done.code == 0, done.err
    assert done.json["metrics"]["accuracy"] > 0.9
    finish(childtuning, tmp_path / "run", done.json, files[1], tmp_path / "merged")

    said = childtuning("predict", tmp_path / "run", "--input", files[1], "--json").json
    assert said["label_names"] == ["blue", "green", "red"]
    truth = [Path(row["image"]).parent.name for row in said["predictions"]]
    right = [row["prediction"] == label for row, label in zip(said["predictions"], truth, strict=True)]
    assert sum(right) / len(right) == done.json["metrics"]["accuracy"]
    processor = AutoImageProcessor.from_pretrained(tmp_path / "merged")
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    with image_files.open(said["predictions"][0]["image"]) as image, torch.inference_mode():
        logits = plain(**processor(images=image, return_tensors="pt")).logits[0]
    torch.testing.assert_close(logits, torch.tensor(said["predictions"][0]["logits"]))
    one = childtuning("predict", tmp_path / "run", "--input", files[1] / "red" / "0.png")
    assert one.code == 0 and one.out.split("\t")[0] in said["label_names"]
    refused = childtuning("predict", tmp_path / "run", "--text", "red")
    assert refused.code == 2 and "--input FILE" in refused.err
    arrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from pyarrow import parquet

    content = (files[1] / "red" / "0.png").read_bytes()
    rows = [{"id": 7, "image": {"bytes": content, "path": None}, "who": "ann"}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "new.parquet")
    out = tmp_path / "out.csv"
    done = childtuning("predict", tmp_path / "run", "--input", tmp_path / "new.parquet", "--output", out)
    assert done.code == 0 and out.read_text().startswith("id,who,prediction,confidence,image,"), done.err


def test_one_bright_image_is_read_as_the_training_images_were(childtuning, tmp_path) -> None:
    pytest.importorskip("PIL.Image", reason="images need Pillow")
    pixels, labels = color_images(24)
    pixels[0, 0, :2] = ((0, 0, 0), (255, 255, 255))
    bright = np.maximum(pixels[1:2], 128)
    np.savez(tmp_path / "train.npz", images=pixels / 127.5 - 1, labels=labels)
    np.savez(tmp_path / "floats.npz", images=bright / 127.5 - 1)
    np.savez(tmp_path / "bytes.npz", images=bright)
    model, files = save_tiny_vision(tmp_path / "model"), (tmp_path / "train.npz", tmp_path / "train.npz")
    assert train(childtuning, files, model, tmp_path / "run").code == 0
    floats, whole = (
        childtuning("predict", tmp_path / "run", "--input", tmp_path / f"{name}.npz", "--json").json[
            "predictions"
        ]
        for name in ("floats", "bytes")
    )
    assert floats == whole
    labels = json.loads((tmp_path / "run" / "labels.json").read_text())
    assert labels["columns"].pop("pixel_range") == [-1, 1]
    (tmp_path / "run" / "labels.json").write_text(json.dumps(labels))  # as an earlier version wrote it
    done = childtuning("evaluate", tmp_path / "run", "--eval", tmp_path / "train.npz", "--json")
    assert done.code == 0, done.err


@pytest.mark.parametrize(("family", "code"), [("vit", 0), ("resnet", 2)])
def test_an_adapter_is_exported_where_it_is_all(childtuning, tmp_path, family, code) -> None:
    """PEFT's files do not hold the statistics of BatchNorm, which training moves."""
    model = save_tiny_vision(tmp_path / "model", family)
    method = "lora:rank=2" if family == "vit" else "lora:rank=2,targets=*.convolution"
    done = train(childtuning, write_image_folders(tmp_path), model, tmp_path / "run", "--method", method)
    assert done.code == 0, done.err
    done = childtuning("export", tmp_path / "run", "--to", "peft", "--output", tmp_path / "adapter")
    assert done.code == code and (code == 0 or "running_mean', which PEFT's files do not hold" in done.err)
    assert (tmp_path / "adapter").exists() == (code == 0)


@pytest.mark.nightly
def test_a_killed_language_model_resumes_bitwise(childtuning, tmp_path) -> None:
    model = save_tiny_lm(tmp_path / "model")
    files = write_instructions(tmp_path)
    words = ["--epochs", 4, "--save-steps", 3, "--gradient-accumulation", 2]
    straight = train(childtuning, files, model, tmp_path / "straight", *words)
    assert straight.code == 0, straight.err
    run = tmp_path / "killed"
    given = ["train", "--train", files[0], "--eval", files[1], "--model", model]
    killed_at_batch(8, [*given, "--batch-size", 8, "--lr", 1e-2, *words], run)
    resumed = train(childtuning, files, model, run, *words, "--resume")
    assert resumed.code == 0, resumed.err
    assert "continuing from checkpoint-" in resumed.err
    assert (run / "delta.safetensors").read_bytes() == (tmp_path / "straight/delta.safetensors").read_bytes()
    assert resumed.json["metrics"] == straight.json["metrics"]


def test_running_text(childtuning, tmp_path) -> None:
    model = save_tiny_lm(tmp_path / "model")
    for name in ("train", "eval"):
        (tmp_path / f"{name}.txt").write_text("the cat sat on the mat . the dog ran in the house .\n" * 20)
    files = (tmp_path / "train.txt", tmp_path / "eval.txt")
    words = ["--epochs", 8, "--max-length", 16, "--lr", 2e-2]
    done = train(childtuning, files, model, tmp_path / "run", *words)
    assert done.code == 0, done.err
    assert done.json["train_examples"] == -(-(20 * 14 - 1) // 15) and done.json["metrics"]["perplexity"] < 2
    finish(childtuning, tmp_path / "run", done.json, files[1], tmp_path / "merged")
    said = childtuning("predict", tmp_path / "run", "--text", "the cat sat", "--max-new-tokens", 3)
    assert said.out == "the cat sat\ton the mat\n"
    (tmp_path / "prompts.txt").write_text("the dog\n\nthe cat\n")
    said = childtuning(
        "predict", tmp_path / "run", "--input", tmp_path / "prompts.txt", "--max-new-tokens", 1, "--json"
    )
    assert [row["prediction"] for row in said.json["predictions"]] == ["ran", "sat"]


def test_what_the_length_limit_cuts_is_reported(childtuning, tiny_bert, tmp_path) -> None:
    files = write_sentences(tmp_path)
    done = train(childtuning, files, tiny_bert, tmp_path / "run", "--max-length", 5, "--epochs", 1)
    words = [len(json.loads(line)["tokens"]) for file in files for line in file.read_text().splitlines()]
    cut = sum(max(0, count - 3) for count in words)
    assert done.code == 0 and done.json["cut_by_length"] == cut > 0
    assert "words of the training examples were cut at 5 tokens" in done.err
    said = childtuning("predict", tmp_path / "run", "--text", "the cat sat on the mat")
    assert said.out.count("/?") == 3 and "3 words of the input were cut" in said.err
    model = save_tiny_lm(tmp_path / "model")
    files = write_instructions(tmp_path)
    done = train(childtuning, files, model, tmp_path / "lm", "--max-length", 6, "--epochs", 1)
    assert done.code == 0 and done.json["cut_by_length"] > 0
    assert "rows of the evaluation examples were cut at 6 tokens" in done.err


def test_scores_of_a_language_model(childtuning, tmp_path) -> None:
    from safetensors.torch import load_file

    model = save_tiny_lm(tmp_path / "model")
    files = write_instructions(tmp_path, count=6)
    output = tmp_path / "fisher.safetensors"
    done = childtuning(
        "score", "--train", files[0], "--eval", files[1], "--model", model, "--output", output, "--json"
    )
    assert done.code == 0, done.err
    found = load_file(output)
    assert set(found) == set(done.json["parameters"]) and "model.embed_tokens.weight" in found
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model).eval(),
        AutoTokenizer.from_pretrained(model),
    )
    total = torch.zeros_like(plain.model.layers[0].mlp.down_proj.weight)
    for row in (json.loads(line) for line in files[0].read_text().splitlines()):  # one row after another
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["response"])["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        plain.zero_grad()
        plain(input_ids=torch.tensor([prompt + answer]), labels=labels).loss.backward()
        total += plain.model.layers[0].mlp.down_proj.weight.grad ** 2 / 6
    torch.testing.assert_close(found["model.layers.0.mlp.down_proj.weight"], total, rtol=1e-4, atol=1e-9)


def refused(done, *words: str) -> None:
    assert done.code == 2, (done.code, done.out, done.err)
    line = done.err.strip().splitlines()[-1]
    assert line.startswith("childtuning: ") and done.err.count("childtuning: ") == 1
    for word in words:
        assert word in line, line


def test_wrong_input_is_one_line(childtuning, tiny_bert, tmp_path) -> None:
    def write(name: str, *rows: dict) -> Path:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    good = write("good.jsonl", {"tokens": ["a", "cat"], "tags": ["O", "B-X"]})
    short = write("short.jsonl", {"tokens": ["a", "cat"], "tags": ["O"]})
    other = write("other.jsonl", {"tokens": ["a"], "tags": ["B-Y"]})
    silent = write("silent.jsonl", {"prompt": "a", "response": ""})
    (tmp_path / "empty.conll").write_text("")
    output = tmp_path / "o"
    refused(train(childtuning, (short, good), tiny_bert, output), "short.jsonl line 1", "1 tags for 2 words")
    refused(train(childtuning, (good, other), tiny_bert, output), "'B-Y'", "Known: 'B-X', 'O'")
    refused(
        train(childtuning, (good, good), tiny_bert, output, "--label", "tag"), "no column 'tag'", "'tags'"
    )
    refused(train(childtuning, (tmp_path / "empty.conll", good), tiny_bert, output), "empty.conll is empty")
    refused(
        train(childtuning, (good, good), tiny_bert, output, "--task-kind", "tokens"), "'tokens'", "Known:"
    )
    refused(
        train(childtuning, (silent, silent), tiny_bert, output), "silent.jsonl line 1 has an empty response"
    )
    fine = write("fine.jsonl", {"prompt": "a", "response": "cat"})
    refused(
        train(childtuning, (fine, fine), tiny_bert, output), "not pretrained for causal-lm", "lacks 'cls."
    )
    refused(
        childtuning("train", "--train", fine, "--eval", fine, "--output", output),
        "causal-lm has no default model",
        "--model",
    )
    refused(
        childtuning("train", "--task", "docstrings", "--task-kind", "causal-lm", "--output", output),
        "'docstrings' is classification",
    )
    assert not output.exists()


@pytest.mark.skipif(not REAL.is_dir(), reason="no real data: set CHILDTUNING_DATA to a folder of tasks")
def test_real_digits(childtuning, tmp_path) -> None:
    pytest.importorskip("PIL.Image", reason="images need Pillow")
    model = save_tiny_vision(tmp_path / "model")
    words = ["train", "--task", "usps", "--data-dir", REAL, "--model", model, "--output", tmp_path / "run"]
    done = childtuning(*words, "--train-limit", 64, "--epochs", 1, "--json")
    assert done.code == 0, done.err
    assert (done.json["train_examples"], done.json["eval_examples"]) == (64, 2007)
    again = childtuning("evaluate", tmp_path / "run", "--eval", REAL / "usps" / "usps.npz", "--json")
    assert again.json["metrics"] == done.json["metrics"]
