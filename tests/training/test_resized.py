"""Models that are not as their folder is when the trainer gets them: resized, or copied."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_tiny_bert
from tests.tiny_kinds import save_tiny_lm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
)

import childtuning
from childtuning import ChildConfig, Delta
from childtuning.training import ChildTrainer
from childtuning.training.child_choice import resized_embeddings


def trainer_of(
    model: Any, folder: Path, rows: list[dict[str, Any]], epochs: int = 2, **more: Any
) -> ChildTrainer:
    plain: dict[str, Any] = {
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "epoch",
    }
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        dataloader_pin_memory=False,
        **plain,
    )
    return ChildTrainer(model, arguments, train_dataset=rows, child=ChildConfig(density=0.1), **more)


@pytest.mark.parametrize("family", ["gpt2", "llama"])  # tied, and not
def test_a_resized_model_is_saved_resumed_and_loaded(family: str, tmp_path: Path) -> None:
    base = save_tiny_lm(tmp_path / "base", family)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.pad_token = tokenizer.eos_token
    ids = tokenizer("the <a> cat <b> sat")["input_ids"]
    rows = [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}] * 12

    def resized() -> Any:
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(len(tokenizer))
        return model

    start = resized()
    trainer = trainer_of(start, tmp_path / "run", rows, processing_class=tokenizer)
    assert trainer.always == () and trainer.select().density == pytest.approx(0.1, abs=0.01)
    trainer.train()
    trainer.save_model(str(tmp_path / "run"))
    tuned = {name: p.detach().clone() for name, p in start.named_parameters()}
    other = resized()
    Delta.load(tmp_path / "run").apply_(other)
    for found in (childtuning.load(tmp_path / "run").model(), other):
        for name, value in tuned.items():
            assert torch.equal(found.get_parameter(name), value), name
    again = trainer_of(resized(), tmp_path / "run", rows, epochs=3, processing_class=tokenizer)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 9


def test_a_model_from_the_hub_is_compared_with_its_copy_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny_lm(tmp_path / "tiny")
    snapshots = tmp_path / "cache" / "models--me--tiny"
    revision = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(base, snapshots / "snapshots" / revision)
    (snapshots / "refs").mkdir()
    (snapshots / "refs" / "main").write_text(revision)
    model = AutoModelForCausalLM.from_pretrained(
        "me/tiny", cache_dir=tmp_path / "cache", local_files_only=True
    )
    assert model.name_or_path == "me/tiny"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert resized_embeddings(model) == ()
    model.resize_token_embeddings(model.config.vocab_size + 2)
    assert resized_embeddings(model) == ("model.embed_tokens.weight", "lm_head.weight")
    model.name_or_path = "me/gone"
    assert resized_embeddings(model) == ()


def test_a_copied_model_knows_what_its_folder_lacks(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "tiny")
    AutoModelForMaskedLM.from_pretrained(tmp_path / "tiny").save_pretrained(
        tmp_path / "base"
    )  # without a pooler
    AutoTokenizer.from_pretrained(tmp_path / "tiny").save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    rows = [{"input_ids": [2, 7 + i % 2, 3], "labels": i % 2, "attention_mask": [1] * 3} for i in range(12)]
    always = trainer_of(model, tmp_path / "one", rows).always
    assert "bert.pooler.dense.weight" in always
    trainer = trainer_of(copy.deepcopy(model), tmp_path / "two", rows)
    assert trainer.always == always
    trainer.train()
    trainer.save_model(str(tmp_path / "two"))
    found = childtuning.load(tmp_path / "two").model()
    for name, value in trainer.bare_model.named_parameters():
        assert torch.equal(found.get_parameter(name), value), name
