"""Checkpoints that do not quite fit: labels in another order, other padding, too few positions or embeddings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import WORDS, save_tiny_bert

from childtuning.errors import ConfigError, ModelError
from childtuning.runs import FinishedRun, RunConfig, train_run
from childtuning.tasks import Examples


def a_config(model: Path, data: Path, **options: Any) -> RunConfig:
    files = {"train": str(data / "train.jsonl"), "eval": str(data / "dev.jsonl"), "model": str(model)}
    return RunConfig(**{**files, "epochs": 1.0, "batch_size": 8, **options})


@pytest.fixture(scope="module")
def classifier(tiny_bert: Path, sentiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that tells bad (0) from good (1)."""
    folder = tmp_path_factory.mktemp("classifier")
    config = a_config(tiny_bert, sentiment, method="full", learning_rate=3e-3, epochs=12.0)
    assert train_run(config, folder / "run").metric["value"] > 0.9
    run = FinishedRun(folder / "run")
    run.merged().save_pretrained(folder / "model")
    run.processor().save_pretrained(folder / "model")
    return folder / "model"


def rewritten(source: Path, target: Path, names: list[str], *, flip: bool = False) -> Path:
    """The checkpoint under other names of its classes, and with its outputs the other way round."""
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(source)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    if flip:
        with torch.no_grad():
            for parameter in model.classifier.parameters():
                parameter.copy_(parameter.flip(0))
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


@pytest.mark.parametrize("flip", [False, True])
def test_a_head_for_these_labels_keeps_its_order(
    classifier: Path, sentiment: Path, tmp_path: Path, flip: bool
) -> None:
    names = ["good", "bad"] if flip else ["bad", "good"]
    model = rewritten(classifier, tmp_path / "model", names, flip=flip)
    config = a_config(model, sentiment, method="child-random", learning_rate=1e-6)
    assert train_run(config, tmp_path / "run").metric["value"] > 0.9
    run = FinishedRun(tmp_path / "run")
    assert run.label_names == names
    examples = run.read_input(sentiment / "dev.jsonl", labelled=True)
    assert run.evaluate(examples)["accuracy"] > 0.9
    assert run.merged().config.id2label == dict(enumerate(names))


@pytest.mark.parametrize("method", ["bitfit", "adapter:4", "head", "lora:rank=2"])
def test_a_head_that_fits_is_trained_where_the_method_trains_the_head(
    classifier: Path, sentiment: Path, tmp_path: Path, method: str
) -> None:
    train_run(a_config(classifier, sentiment, method=method), tmp_path / "run")
    trained = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        for name, part in FinishedRun(tmp_path / "run").delta.parts.items()
        if part.is_whole
    }
    assert {"classifier.weight", "classifier.bias"} <= trained


def test_a_head_for_other_classes_is_replaced(classifier: Path, sentiment: Path, tmp_path: Path) -> None:
    model = rewritten(classifier, tmp_path / "model", ["cats", "dogs"])
    said: list[str] = []
    train_run(a_config(model, sentiment, method="head"), tmp_path / "run", tell=said.append)
    assert any("is for other classes (cats, dogs); it is replaced" in line for line in said)
    about = FinishedRun(tmp_path / "run").about
    assert about["new_parameters"] == ["classifier.bias", "classifier.weight"]


def test_a_head_without_names_is_told(classifier: Path, sentiment: Path, tmp_path: Path) -> None:
    model = rewritten(classifier, tmp_path / "model", ["LABEL_0", "LABEL_1"])
    said: list[str] = []
    config = a_config(model, sentiment, method="child-random", learning_rate=1e-6)
    assert train_run(config, tmp_path / "run", tell=said.append).metric["value"] > 0.9
    assert any("names no classes; its outputs are assumed to be bad, good" in line for line in said)


def test_f1_of_the_other_class_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        tiny_bert, id2label={0: "equivalent", 1: "not_equivalent"}
    )
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "model")
    (tmp_path / "data" / "mrpc").mkdir(parents=True)
    rows = [{"text1": "a cat", "text2": "the cat", "label": index % 2} for index in range(8)]
    for name in ("train", "dev"):
        (tmp_path / "data" / "mrpc" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = RunConfig(task="mrpc", data_dir=str(tmp_path / "data"), model=str(tmp_path / "model"))
    with pytest.raises(ConfigError, match="f1 of 'mrpc' measures the class 'equivalent'"):
        train_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_decoders_padding_is_the_tokenizers(tiny_bert: Path, sentiment: Path, tmp_path: Path) -> None:
    """The config names a padding token that the tokenizer, which has none, does not pad with."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    decoder = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, unk_token="[UNK]", eos_token="[SEP]"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=5 + len(WORDS), pad_token_id=1, eos_token_id=3, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    decoder.save_pretrained(tmp_path / "llama")
    train_run(a_config(tmp_path / "llama", sentiment, method="child-random"), tmp_path / "run")
    run = FinishedRun(tmp_path / "run")

    def logits(texts: list[str]) -> list[float]:
        return run.predict(Examples(texts, None, None))[0]["logits"]

    assert logits(["a great cat"]) == pytest.approx(logits(["a great cat", "the dog " * 20]), abs=1e-5)


@pytest.mark.parametrize(("method", "length"), [("child-random", 50), ("prompt:5", 45), ("prefix:5", 45)])
def test_texts_are_cut_where_positions_end(method: str, length: int, sentiment: Path, tmp_path: Path) -> None:
    import transformers

    source = save_tiny_bert(tmp_path / "source")
    config = transformers.BertConfig.from_pretrained(source, max_position_embeddings=50)
    transformers.BertModel(config).save_pretrained(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, model_max_length=10**9)
    tokenizer.save_pretrained(source)
    row = {"text": "the cat " * 60, "label": "good"}
    rows = [row, {**row, "label": "bad"}]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said: list[str] = []
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows[::-1])))
    files = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "long.jsonl")}
    config = a_config(source, sentiment, method=method, **files)
    result = train_run(config, tmp_path / "run", tell=said.append)
    assert result.cut_by_length == 4
    assert any(f"texts are cut at {length} tokens" in line for line in said)
    assert len(FinishedRun(tmp_path / "run").predict(Examples(["a dog " * 90], None, None))) == 1
    if method.startswith("pr"):
        with pytest.raises(ConfigError, match="leaves none of the model's 50 positions"):
            train_run(replace(config, method=method.replace("5", "50")), tmp_path / "none")


def test_tokens_without_embedding_are_refused(tmp_path: Path) -> None:
    import transformers

    source = save_tiny_bert(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(source)
    rows = [
        {"text": f"a cat {'extra' if index == 9 else ''}", "label": "xy"[index % 2]} for index in range(10)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows[:8])))
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows[8:])))
    with pytest.raises(ModelError, match="the model has only 42 embeddings"):
        train_run(a_config(source, tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_without_its_tokenizer_is_refused(tiny_bert: Path, sentiment: Path, tmp_path: Path) -> None:
    import transformers

    transformers.AutoModel.from_pretrained(tiny_bert).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"it has no tokenizer: call tokenizer.save_pretrained"):
        train_run(a_config(tmp_path / "model", sentiment), tmp_path / "run")


def test_true_and_false_are_these_labels(classifier: Path, tmp_path: Path) -> None:
    model = rewritten(classifier, tmp_path / "model", ["False", "True"])
    rows = [{"text": "a great cat", "label": True}, {"text": "an awful cat", "label": False}] * 4
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = a_config(model, tmp_path, method="child-random", learning_rate=1e-6)
    assert train_run(config, tmp_path / "run").metric["value"] == 1.0
    assert FinishedRun(tmp_path / "run").about["new_parameters"] == []


def test_a_diverged_run_predicts_nothing(tiny_bert: Path, sentiment: Path, tmp_path: Path) -> None:
    """Also where the loss was last logged before the weights went."""
    options = {"method": "full", "learning_rate": 1e38, "warmup_ratio": 0.0, "batch_size": 96}
    result = train_run(a_config(tiny_bert, sentiment, **options), tmp_path / "run")
    assert result.diverged_at == 1 and result.fault is not None
    run = FinishedRun(tmp_path / "run")
    for act in (lambda: run.predict(Examples(["a"], None, None)), run.merged):
        with pytest.raises(ModelError, match="diverged at step 1"):
            act()
