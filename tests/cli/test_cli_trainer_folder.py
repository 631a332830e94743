"""inspect, merge and predict on a folder that ChildTrainer saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.training.test_child_trainer import a_trainer
from transformers import AutoTokenizer

from childtuning import TaskFree

CHILDREN = {"child-d": ("child-d", 0.1), "child-f": (TaskFree(density=0.3, seed=0), None)}


@pytest.mark.parametrize("name", CHILDREN)
def test_the_folder_of_a_trainer(childtuning: Any, tiny_bert: Path, tmp_path: Path, name: str) -> None:
    child, density = CHILDREN[name]
    trainer = a_trainer(tiny_bert, tmp_path / "out", child, max_steps=2, child_density=density)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    done = childtuning("inspect", tmp_path / "saved", "--verify", "--json")
    assert done.code == 0, done.err
    assert done.json["base"] == str(tiny_bert.resolve()) and done.json["verified"]["changed_outside"] == 0
    done = childtuning("inspect", tmp_path / "saved")
    assert str(tiny_bert.resolve()) in done.out
    done = childtuning("merge", tmp_path / "saved", "--output", tmp_path / "model")
    assert done.code == 2 and "has no tokenizer or image processor. Save it there" in done.err
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "saved")
    done = childtuning("merge", tmp_path / "saved", "--output", tmp_path / "model")
    assert done.code == 0 and "AutoModelForSequenceClassification" in done.out, done.err
    done = childtuning("predict", tmp_path / "saved", "--text", "a great film", "--json")
    assert done.json["predictions"][0]["prediction"] in ("LABEL_0", "LABEL_1")
