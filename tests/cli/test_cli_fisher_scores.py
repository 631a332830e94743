"""Fisher scores kept in bf16 and on the CPU: from the command line to a file, and from the file to a child."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from childtuning import Child, ChildConfig
from childtuning.training import choose_child


def test_score_writes_bf16_and_a_child_is_chosen_from_it(
    childtuning, train_words, tiny_bert, tmp_path
) -> None:
    files = train_words[1:7]
    found = {}
    for dtype in ("float32", "bfloat16"):
        output = tmp_path / f"{dtype}.safetensors"
        options = ["--fisher-dtype", dtype, "--fisher-device", "cpu", "--density", 0.1]
        done = childtuning("score", *files, "--output", output, "--batch-size", 8, "--json", *options)
        assert done.code == 0, done.err
        found[dtype] = load_file(output)
        assert {score.dtype for score in found[dtype].values()} == {getattr(torch, dtype)}
        means = {name: entry["mean"] for name, entry in done.json["parameters"].items()}
        assert means == {name: float(score.float().mean()) for name, score in found[dtype].items()}
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    config = ChildConfig(density=0.1, fisher_dtype="bfloat16")
    children = [
        choose_child(config, model, list, always=("classifier.*",), scores=scores)
        for scores in found.values()
    ]
    assert all(isinstance(child, Child) for child in children)
    plain, half = children
    assert plain.num_trained == half.num_trained == round(0.1 * plain.num_eligible)
    assert plain.overlap(half) >= 0.95


def test_train_takes_the_same_options_and_writes_them(childtuning, train_words, tmp_path) -> None:
    output = tmp_path / "run"
    words = [*train_words, "--output", output, "--density", 0.1]
    done = childtuning(*words, "--fisher-dtype", "bfloat16", "--fisher-device", "cpu")
    assert done.code == 0, done.err
    written = (output / "config.toml").read_text()
    assert 'fisher_dtype = "bfloat16"' in written and 'fisher_device = "cpu"' in written
    assert childtuning("inspect", output, "--json", "--verify").json["verified"]["changed_outside"] == 0
    wrong = childtuning(*train_words, "--fisher-dtype", "bf16", "--output", tmp_path / "other")
    assert wrong.code == 2 and "fisher_dtype must be one of float32, bfloat16" in wrong.err


@pytest.mark.parametrize(
    "options",
    [
        ["--estimator", "per-example"],
        ["--estimator", "per-batch"],
        ["--fisher-labels", "sampled"],
        ["--fisher-examples", 20],
        ["--estimator", "per-batch", "--fisher-examples", 20, "--seed", 3],
    ],
    ids=str,
)
def test_score_and_train_choose_the_same_child(
    childtuning, train_words, tiny_bert, tmp_path, options
) -> None:
    """Both score the same batches: padding and the order of examples decide what per-batch scores are."""
    density = ["--density", 0.1]
    done = childtuning(*train_words, *options, *density, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    trained = Child.load(tmp_path / "run" / "child.safetensors")
    output = tmp_path / "scores.safetensors"
    words = ["score", *train_words[1:9], *options, *density, "--output", output, "--json"]
    said = childtuning(*words)
    assert said.code == 0, said.err
    assert said.json["examples"] == (20 if 20 in options else 96)
    shares = {name: part.num_trained / part.numel for name, part in trained.parts.items()}
    assert {name: entry["share"] for name, entry in said.json["parameters"].items()} == shares
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    chosen = choose_child(
        ChildConfig(density=0.1), model, list, always=trained.always, scores=load_file(output)
    )
    assert isinstance(chosen, Child) and chosen.fingerprint() == trained.fingerprint()


def test_a_full_runs_config_is_scored_too(childtuning, train_words, tmp_path) -> None:
    output = tmp_path / "scores.safetensors"
    words = ["score", *train_words[1:9], "--density", 1.0, "--output", output, "--json"]
    done = childtuning(*words)
    assert done.code == 0, done.err
    assert done.json["density"] == 1.0 and set(load_file(output)) == set(done.json["parameters"])
    assert all(entry["share"] == 1.0 for entry in done.json["parameters"].values())
