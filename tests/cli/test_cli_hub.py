"""A run on the hub: what is uploaded, what is not, and that it is opened elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cli.conftest import Command
from tests.cli.fake_hub import fake_hub

import childtuning as ct
from childtuning.errors import ConfigError
from childtuning.runs.certify import verify

TEXTS = ["a lovely film", "a dull film"]


@pytest.fixture
def run(childtuning: Command, train_words: list[object], tmp_path: Path) -> Path:
    words = [*train_words, "--method", "child-d", "--density", "0.1", "--output", tmp_path / "run"]
    assert childtuning(*words).code == 0
    return tmp_path / "run"


def command(server: Any, home: Path, *words: object, token: str = "hf_right") -> tuple[int, str, str]:
    """Run the command line in a process of its own, with the hub that is given."""
    there = {"HF_ENDPOINT": server.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": token}
    there |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "childtuning", *map(str, words)],
        env={**os.environ, **there},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_run_goes_to_the_hub_and_is_opened_elsewhere(
    run: Path, tiny_bert: Path, sentiment: Path, tmp_path: Path
) -> None:
    alone = ct.load(run).predict(TEXTS)
    home = tmp_path / "home"
    with fake_hub() as hub:
        code, _, said = command(hub, home, "push", run, "me/run")
        assert code == 2 and "its name on the hub" in said and not hub.asked
        code, _, said = command(hub, home, "push", run, "me/run", "--base", "me/base", token="hf_wrong")
        assert code == 2 and "Check the name, the token" in said and len(said.splitlines()) == 1
        code, told, said = command(hub, home, "push", run, "me/run", "--base", "me/base", "--private")
        assert code == 0, said
        assert told.splitlines() == [
            f"{hub.address}/me/run/commit/0123456789abcdef0123456789abcdef01234567",
            'childtuning.load("hf://me/run")',
        ]
        assert hub.created.get("private") or hub.created.get("visibility") == "private"
        shutil.rmtree(run)
        texts = [word for text in TEXTS for word in ("--text", text)]
        code, told, said = command(hub, home, "predict", "hf://me/run", *texts, "--json")
        assert code == 2 and "me/base" in said  # the fake hub has no base model
        code, _, said = command(hub, home, "predict", "hf://me/other", "--text", "x")
        assert code == 2 and "the hub does not give 'me/other'" in said and len(said.splitlines()) == 1
    folder = next((home / "hub").glob("models--me--run/snapshots/*"))
    assert ct.load(folder, model=tiny_bert).predict(TEXTS) == alone


def test_what_is_published(run: Path, tiny_bert: Path, sentiment: Path, tmp_path: Path) -> None:
    place = tmp_path / "published"
    opened = ct.load(run)
    with pytest.raises(ConfigError, match="its name on the hub"):
        opened.export(place, "hub")
    assert not place.exists()
    opened.export(place, "hub", base="me/base")
    assert (
        f"| longest input | at most {opened.config.max_length} tokens |" in (place / "README.md").read_text()
    )
    texts = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for path, content in texts.items():
        assert str(tmp_path).encode() not in content, path
        assert str(tiny_bert).encode() not in content, path
        if path.name != "tokenizer.json":
            for row in (sentiment / "train.jsonl").read_text().splitlines():
                assert json.loads(row)["text"].encode() not in content, path
    _, head, body = (place / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["base_model"] == "me/base" and about["pipeline_tag"] == "text-classification"
    (result,) = about["model-index"][0]["results"]
    name, value = next(iter(opened.metrics["metrics"].items()))
    assert result["dataset"]["name"] == "dev.jsonl"
    assert result["metrics"][0]["type"] == name and result["metrics"][0]["value"] == pytest.approx(value)
    low, high = opened.metrics["interval"]
    assert f"{low:.4f} to {high:.4f}" in body
    root = json.loads((place / "certificate" / "certificate.json").read_text())["root"]
    assert f"`{root}`" in body and "method `child-d`" in body

    again = ct.load(place, model=tiny_bert)
    assert again.predict(TEXTS) == opened.predict(TEXTS)
    assert again.delta.base["name"] == "me/base"
    assert again.verify()["changed_outside"] == 0
    again.export(tmp_path / "model")
    assert verify(tiny_bert, tmp_path / "model", place / "certificate").holds


def test_a_trainers_folder_is_published(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertForSequenceClassification, TrainingArguments

    from childtuning.training import ChildTrainer

    model = BertForSequenceClassification.from_pretrained(tiny_bert, id2label={0: "bad", 1: "good"})
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    rows = [{**tokenizer(text), "labels": i % 2} for i, text in enumerate(TEXTS * 4)]
    trainer = ChildTrainer(
        model,
        TrainingArguments(str(tmp_path / "t"), max_steps=2, report_to="none", use_cpu=True),
        train_dataset=rows,
        child="child-d",
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "t"))
    opened = ct.load(tmp_path / "t", model=tiny_bert)
    opened.export(tmp_path / "published", "hub", base="me/base")
    again = ct.load(tmp_path / "published", model=tiny_bert)
    assert again.predict(TEXTS) == opened.predict(TEXTS)
    card = (tmp_path / "published" / "README.md").read_text()
    assert "base_model: me/base" in card and "measured on" not in card
    assert not list((tmp_path / "published").glob("*.bin")) and not list(
        (tmp_path / "published").glob("*.pt")
    )


def test_a_run_that_lost_its_base_is_told_where_it_is(run: Path, tiny_bert: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny_bert, moved)
    opened = ct.load(run, model=moved)
    assert opened.predict(TEXTS) == ct.load(run).predict(TEXTS)
    with pytest.raises(ConfigError, match="model must be a folder or a hub name"):
        ct.load(run, model=object())


def test_no_path_is_published_of_a_start_or_an_adapter(
    childtuning: Command, train_words: list[object], run: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    for name, words in (("later", ["--init-from", run]), ("lora", ["--method", "lora:rank=2"])):
        assert childtuning(*train_words, *words, "--output", tmp_path / name).code == 0
        place = tmp_path / f"{name}-published"
        opened = ct.load(tmp_path / name)
        opened.export(place, "hub", base="me/base")
        for path in place.rglob("*"):
            assert path.is_dir() or str(tmp_path.parent).encode() not in path.read_bytes(), path
        assert ct.load(place, model=tiny_bert).predict(TEXTS) == opened.predict(TEXTS)
