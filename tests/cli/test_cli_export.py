"""From a run to what serves, and the check of it: export, certificate, verify."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli.conftest import Command

import childtuning as ct
from childtuning.child import Part
from childtuning.errors import BaseMismatchError, ConfigError
from childtuning.runs.certify import certify

FRESH = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification as Model
model = Model.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor([[2, 7, 9, 3]])
with torch.inference_mode():
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
print(json.dumps([logits.view(torch.int32).tolist(), model.config.id2label]))
"""


@pytest.fixture
def run(childtuning: Command, train_words: list[object], tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    words = [*train_words, "--method", "child-d", "--density", "0.1", "--output", folder]
    assert childtuning(*words).code == 0
    return folder


def test_the_exported_model_is_the_tuned_one_in_a_fresh_process(
    childtuning: Command, run: Path, tmp_path: Path
) -> None:
    done = childtuning("export", run, "--output", tmp_path / "model", "--json")
    assert done.json["to"] == "model" and done.json["bytes"] > 0
    words = [sys.executable, "-c", FRESH, str(tmp_path / "model")]
    fresh = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    model = ct.load(run).model()
    ids = torch.tensor([[2, 7, 9, 3]])
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert fresh == [logits.view(torch.int32).tolist(), {str(k): v for k, v in model.config.id2label.items()}]
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    again = childtuning("export", run, "--output", tmp_path / "model")
    assert again.code == 2 and "not an empty folder" in again.err


def test_other_forms(childtuning: Command, run: Path, train_words: list[object], tmp_path: Path) -> None:
    assert childtuning("export", run, "--to", "patch", "--output", tmp_path / "patch").code == 0
    about = json.loads((tmp_path / "patch" / "patch.json").read_text())
    written = load_file(tmp_path / "patch" / "patch.safetensors")
    delta = ct.load(run).delta
    assert sum(t.numel() for n, t in written.items() if n.endswith(".values")) == delta.num_trained
    assert [n for n, record in about["tensors"].items() if record.get("added")] == [
        "classifier.weight",
        "classifier.bias",
    ]
    wrong = childtuning("export", run, "--to", "pef", "--output", tmp_path / "x")
    assert wrong.code == 2 and "Did you mean 'peft'" in wrong.err
    none = childtuning("export", run, "--to", "peft", "--output", tmp_path / "x")
    assert none.code == 2 and "is not PEFT's" in none.err and not (tmp_path / "x").exists()
    lora = tmp_path / "lora"
    assert childtuning(*train_words, "--method", "lora:rank=2", "--output", lora).code == 0
    assert childtuning("export", lora, "--to", "peft", "--output", tmp_path / "adapter").code == 0
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    told = childtuning("export", lora, "--output", tmp_path / "merged")
    assert told.code == 0 and "put together in memory" in told.err
    assert childtuning("export", lora, "--to", "patch", "--output", tmp_path / "dense").code == 0


def test_a_certificate_names_what_moved(
    childtuning: Command, run: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    cert, model = tmp_path / "cert", tmp_path / "model"
    made = childtuning("inspect", run, "--verify", "--certificate", cert, "--json").json["certificate"]
    assert sum(made["trained"].values()) == ct.load(run).delta.num_trained
    assert set(made["sha256"]) == {"delta", "config", "data"} and made["base"]["sha256"]["model.safetensors"]
    childtuning("export", run, "--output", model)
    sides = ["--base", tiny_bert, "--model", model]
    yes = childtuning("verify", cert / "certificate.json", *sides, "--json")
    assert yes.code == 0 and yes.json["holds"] and yes.json["root"] == made["root"]
    assert 0 < yes.json["moved"] <= yes.json["trained"]
    for words, remedy in (((run, *sides), "inspect"), ((cert, *sides[:3], run), "export")):
        mixed_up = childtuning("verify", *words)
        assert mixed_up.code == 2 and f"Write one: childtuning {remedy}" in mixed_up.err

    weights = load_file(model / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    free = ~ct.load(run).delta.parts[name].mask()
    row, column = (int(i) for i in free.nonzero()[5])
    weights[name][row, column] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    no = childtuning("verify", cert, *sides)
    assert no.code == 1 and f"{name.removeprefix('bert.')}[{row}, {column}] moved" in no.out

    base = load_file(tiny_bert / "model.safetensors")
    base[name.removeprefix("bert.")][row, column] += 1
    (tmp_path / "other").mkdir()
    save_file(base, tmp_path / "other" / "model.safetensors")
    childtuning("export", run, "--output", tmp_path / "sound")
    other = childtuning("verify", cert, "--base", tmp_path / "other", "--model", tmp_path / "sound", "--json")
    assert other.code == 1 and "not that of the certificate's base" in other.json["reason"]


def test_models_of_other_origin(childtuning: Command, tmp_path: Path) -> None:
    base = {
        "embed.weight": torch.zeros(10, 4),
        "layers.0.w": torch.zeros(3, 3),
        "layers.1.w": torch.zeros(3, 3),
    }
    tuned = {name: tensor.clone() for name, tensor in base.items()} | {"head": torch.ones(2)}
    tuned["embed.weight"][8:, 1] = 1.0
    tuned["layers.1.w"][2, 0] = -0.0  # other bits, the same number
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    words = ["verify", "--base", tmp_path / "base", "--model", tmp_path / "tuned", "--json"]

    def reason(*trained: str) -> str:
        done = childtuning(*words, *(word for pattern in trained for word in ("--trained", pattern)))
        assert done.code == (1 if done.json["reason"] else 0)
        return done.json["reason"]

    assert reason().startswith(
        "'head' is in the model and neither in the base nor trained. Name with --trained"
    )
    assert reason("head") == "embed.weight[8, 1] moved, and was not to be trained"
    assert reason("head", "embed.weight[9:]") == "embed.weight[8, 1] moved, and was not to be trained"
    assert reason("head", "embed.weight[8:]") == "layers.1.w[2, 0] moved, and was not to be trained"
    assert reason("head", "embed.weight[8:10]", "layers.*") == ""
    del tuned["layers.0.w"]  # a model without it would be loaded with random weights
    save_file(tuned, tmp_path / "tuned" / "model.safetensors")
    assert reason("head", "embed.weight[8:]", "layers.1.*") == "'layers.0.w' is missing in the model"
    assert reason("head", "embed.weight[8:]", "layers.*") == ""
    for rows in ("[9:8]", "[0:99]", "[10:]"):
        none = childtuning(*words, "--trained", f"embed.weight{rows}")
        assert none.code == 2 and "Name rows that it has" in none.err
    wrong = childtuning(*words, "--trained", "nothing.*")
    assert wrong.code == 2 and "nothing.*" in wrong.err


def test_verify_reads_what_transformers_loads(
    childtuning: Command, run: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    cert, model = tmp_path / "cert", tmp_path / "model"
    childtuning("inspect", run, "--certificate", cert)
    childtuning("export", run, "--output", model)
    words = ["verify", cert, "--base", tiny_bert, "--model", model, "--json"]
    assert childtuning(*words).json["holds"]
    weights = load_file(model / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"

    def verdict(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        return childtuning(*words).json["reason"]

    renamed = {f"x.{name}" if n == name else n: t for n, t in weights.items()}
    assert "in the model and neither" in verdict(renamed)
    bare = {f"x.{n.removeprefix('bert.')}": t for n, t in weights.items()}
    assert verdict(bare)
    assert "was added as" in verdict({**weights, "classifier.bias": torch.zeros(7)})

    shard = tmp_path / "model" / "model-00001-of-00001.safetensors"  # transformers takes the single file
    save_file(weights, shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard.name)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    free = ~ct.load(run).delta.parts[name].mask()
    moved = weights[name].clone()
    moved[tuple(free.nonzero()[0])] += 1
    assert "moved, and was not to be trained" in verdict({**weights, name: moved})
    assert verdict(weights) == ""

    (model / "adapter_config.json").write_text("{}")
    assert "an adapter lies beside the model" in childtuning(*words).json["reason"]


def test_a_certificate_binds_what_was_added_and_where(
    childtuning: Command, run: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    made = certify(ct.load(run))
    name = "encoder.layer.0.output.dense.weight"
    forged = dataclasses.replace(made, added=(*made.added, name))
    assert forged.root != made.root
    moved = dataclasses.replace(made, parts={**made.parts, name: Part(made.parts[name].shape)})
    assert moved.root != made.root
    forged.save(tmp_path / "forged")
    childtuning("export", run, "--output", tmp_path / "model")
    sides = ["--base", tiny_bert, "--model", tmp_path / "model"]
    found = childtuning("verify", tmp_path / "forged", *sides, "--json")
    assert "says that it was added" in found.json["reason"]


def with_own_base(train_words: list[object], tiny_bert: Path, tmp_path: Path) -> tuple[Path, list[object]]:
    """Copy the base model, so that it can be changed; return the copy, and the words that train it."""
    base = tmp_path / "base"
    shutil.copytree(tiny_bert, base)
    return base, [base if word == tiny_bert else word for word in train_words]


def test_a_run_that_started_from_another_checks_the_whole_base(
    childtuning: Command, train_words: list[object], tiny_bert: Path, tmp_path: Path
) -> None:
    base, words = with_own_base(train_words, tiny_bert, tmp_path)
    common = [*words, "--method", "child-d", "--density", "0.1"]
    assert childtuning(*common, "--output", tmp_path / "a").code == 0
    assert (
        childtuning(*common, "--seed", 1, "--init-from", tmp_path / "a", "--output", tmp_path / "b").code == 0
    )
    certificate = certify(ct.load(tmp_path / "b"))
    frozen = {n for n, part in certificate.parts.items() if not part.is_whole}
    assert frozen == set(certificate.hashes)
    both = ct.load(tmp_path / "b").changes()
    name = next(n for n, part in both.parts.items() if 0 < part.num_trained < part.numel)
    weights = load_file(base / "model.safetensors")
    place = tuple((~both.parts[name].mask()).nonzero()[0])
    weights[name.removeprefix("bert.")][place] += 5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    refused = childtuning("export", tmp_path / "b", "--output", tmp_path / "out")
    assert refused.code == 2 and "another base model" in refused.err and not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    from childtuning.training import make_patch, write_model

    model = AutoModel.from_pretrained(tiny_bert)
    delta = ct.Delta.capture(model, ct.random_child(model, 0.1))
    base = tmp_path / "base"
    shutil.copytree(tiny_bert, base)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    with pytest.raises(ConfigError, match="not an empty folder"):
        write_model(make_patch(delta, model, base), model, base, base)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_a_changed_base_is_told_where_everything_was_trained(
    childtuning: Command, train_words: list[object], tiny_bert: Path, tmp_path: Path
) -> None:
    base, words = with_own_base(train_words, tiny_bert, tmp_path)
    assert childtuning(*words, "--method", "full", "--output", tmp_path / "run").code == 0
    weights = load_file(base / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][3] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for form in ("model", "patch"):
        refused = childtuning("export", tmp_path / "run", "--to", form, "--output", tmp_path / "out")
        assert refused.code == 2 and not (tmp_path / "out").exists()
    with pytest.raises(BaseMismatchError):
        certify(ct.load(tmp_path / "run"))
