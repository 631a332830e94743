"""inspect, merge and predict on a folder that ChildTrainer saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.test_child_trainer import a_trainer
from transformers import AutoConfig, AutoTokenizer

from childtuning import TaskFree, load
from childtuning.errors import ModelError

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
    (tmp_path / "new.csv").write_text("id,text,user\n1,a great film,ann\n")
    done = childtuning("predict", tmp_path / "saved", "--input", tmp_path / "new.csv", "--json")
    assert done.code == 0 and len(done.json["predictions"]) == 1, done.err
    (tmp_path / "old.csv").write_bytes("text,label\nхорошо,LABEL_0\nплохо,LABEL_1\n".encode("cp1251"))
    for words in (["predict", tmp_path / "saved", "--input"], ["evaluate", tmp_path / "saved", "--eval"]):
        assert childtuning(*words, tmp_path / "old.csv", "--encoding", "cp1251").code == 0
        done = childtuning(*words, tmp_path / "old.csv", "--encoding", "cp9999")
        assert done.code == 2 and "there is no encoding 'cp9999'" in done.err, done.err
        done = childtuning(*words, tmp_path / "old.csv", "--sheet", "two")
        assert done.code == 2 and "a sheet of a workbook, got" in done.err, done.err
    done = childtuning("predict", tmp_path / "saved", "--text", "a", "--encoding", "cp1251")
    assert done.code == 2 and "are of a file, got --text" in done.err


def test_the_loss_says_what_the_outputs_are(tiny_bert: Path, tmp_path: Path) -> None:
    """A model of one class has several labels, or several numbers, where its configuration says so."""
    trainer = a_trainer(tiny_bert, tmp_path / "out", "child-d", max_steps=1, child_density=0.1)
    trainer.train()
    saved = tmp_path / "saved"
    trainer.save_model(str(saved))
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(saved)
    names = {0: "short", 1: "sweet"}
    assert load(saved).kind.name == "classification"
    config = AutoConfig.from_pretrained(saved)
    config.update({"problem_type": "multi_label_classification", "id2label": names})
    config.save_pretrained(saved)
    run = load(saved)
    (row,) = run.predict(["a great film"])
    logits = torch.tensor(row["logits"], dtype=torch.double)
    assert run.kind.name == "multi-label"
    assert row["prediction"] == [names[i] for i, logit in enumerate(logits) if logit >= 0]
    torch.testing.assert_close(torch.from_numpy(run.predict_proba(["a great film"])[0]), logits.sigmoid())
    config.problem_type = "regression"
    config.save_pretrained(saved)
    with pytest.raises(ModelError, match="predicts nothing with a BertForSequenceClassification"):
        load(saved).predict(["a great film"])
