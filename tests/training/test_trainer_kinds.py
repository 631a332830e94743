"""What ChildTrainer has to know of a model: its head, its loss under accumulation, and who else trains it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tests.ranks import WORLD, on_ranks
from torch import Tensor

from childtuning import ChildConfig, Delta
from childtuning.errors import ConfigError
from childtuning.methods import Combination
from childtuning.training import ChildTrainer, task_head
from childtuning.training.child_choice import new_parameters

HEADS = {
    "CLIPForImageClassification": "classifier.",
    "SiglipForImageClassification": "classifier.",
    "WhisperForAudioClassification": ("projector.", "classifier.", "layer_weights"),
    "T5ForQuestionAnswering": "qa_outputs.",
    "UperNetForSemanticSegmentation": ("decode_head.", "auxiliary_head."),
    "PerceiverForSequenceClassification": ("perceiver.decoder.", "perceiver.input_preprocessor."),
    "BertForSequenceClassification": "classifier.",
    "ViTForImageClassification": "classifier.",
    "MPNetForSequenceClassification": "classifier.",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_what_the_base_model_does_not_have(name: str) -> None:
    cls = getattr(tf, name)
    with torch.device("meta"):
        model = cls(cls.config_class())
    head = task_head(model)
    assert head
    assert all(parameter.startswith(HEADS[name]) for parameter in head)


def test_language_models_have_none() -> None:
    with torch.device("meta"):
        for cls in (tf.GPT2LMHeadModel, tf.BertForMaskedLM, tf.T5ForConditionalGeneration):
            assert task_head(cls(cls.config_class())) == ()


class Tokens(torch.utils.data.Dataset):
    x = torch.randint(5, 40, (8, 7), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.x[index]
        return {"input_ids": ids, "attention_mask": torch.ones(7, dtype=torch.long), "labels": ids}


def a_t5() -> Any:
    config = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=40, decoder_start_token_id=0, **config))


def a_masked_bert() -> Any:
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tf.BertForMaskedLM(tf.BertConfig(vocab_size=40, max_position_embeddings=16, **config, **off))


def a_llama() -> Any:
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=40, max_position_embeddings=16, **config))


def arguments(output: Path, **options: Any) -> tf.TrainingArguments:
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    return tf.TrainingArguments(str(output), use_cpu=True, dataloader_pin_memory=False, **quiet, **options)


def a_classifier() -> Any:
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    return tf.BertForSequenceClassification(
        tf.BertConfig(vocab_size=40, max_position_embeddings=16, **config)
    )


class Labelled(Tokens):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**super().__getitem__(index), "labels": self.x[index, 0] % 2}


def a_sure_classifier() -> Any:
    config = {
        **a_classifier().config.to_dict(),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return tf.BertForSequenceClassification(tf.BertConfig(**config))


class RaggedClasses(Labelled):
    def __len__(self) -> int:
        return 7


class Ragged(Tokens):
    """Rows with more and more tokens without a label, as many as do not fill an update."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        labels = row["labels"].clone()
        labels[: index % len(labels)] = -100
        return {**row, "labels": labels}


def a_token_classifier() -> Any:
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tf.BertForTokenClassification(tf.BertConfig(vocab_size=40, num_labels=40, **config, **off))


@pytest.mark.parametrize(
    ("make", "data"),
    [
        *((make, data) for make in (a_t5, a_masked_bert, a_llama) for data in (Tokens, Ragged)),
        (a_token_classifier, Ragged),
        (a_sure_classifier, RaggedClasses),
    ],
)
def test_accumulated_batches_are_one_batch(make: Any, data: Any, tmp_path: Path) -> None:
    """Some losses divide by ``num_items_in_batch``; others take the argument and do not use it."""
    ends, logs = [], []
    for size, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = make()
        options = {"max_grad_norm": 0.0, "weight_decay": 0.0, "optim": "sgd", "lr_scheduler_type": "constant"}
        options |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        args = arguments(tmp_path / str(size), max_steps=4, learning_rate=0.1, **options)
        args.logging_strategy, args.logging_steps = "steps", 1
        trainer = ChildTrainer(
            model, args, train_dataset=data(), child=ChildConfig(density=1.0, rescale=False)
        )
        trainer.train()
        ends.append(dict(model.named_parameters()))
        logs.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(logs[0]) == 4 and logs[1] == pytest.approx(logs[0], rel=1e-3)
    for name, parameter in ends[0].items():
        torch.testing.assert_close(parameter, ends[1][name], rtol=1e-4, atol=1e-6)


def of_sequences(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The mean over sequences, however many tokens each has."""
    losses = torch.nn.functional.cross_entropy(outputs["logits"].transpose(1, 2), labels, reduction="none")
    return (losses.sum(1) / (labels != -100).sum(1)).mean()


def test_a_loss_of_the_users_own_is_added_up_as_it_is(tmp_path: Path) -> None:
    ends = []
    for size, steps in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        model = a_token_classifier()
        options = {"max_grad_norm": 0.0, "weight_decay": 0.0, "optim": "sgd", "lr_scheduler_type": "constant"}
        options |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        args = arguments(tmp_path / str(size), learning_rate=0.1, **options)
        child = ChildConfig(variant="task-free", density=1.0)
        ChildTrainer(model, args, train_dataset=Ragged(), child=child, compute_loss_func=of_sequences).train()
        ends.append(dict(model.named_parameters()))
    for name, parameter in ends[0].items():
        torch.testing.assert_close(parameter, ends[1][name], rtol=1e-4, atol=1e-6)


def test_sharding_that_is_asked_for_and_not_done_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(tf.Trainer, "create_accelerator_and_postprocess", _without_sharding)
    with pytest.raises(ConfigError, match="ACCELERATE_USE_FSDP is set"):
        ChildTrainer(a_llama(), args, train_dataset=Tokens(), child=ChildConfig())


def _without_sharding(self: tf.Trainer, original=tf.Trainer.create_accelerator_and_postprocess) -> None:
    original(self)
    self.is_fsdp_enabled = False


def _train(rank: int, folder: Path) -> None:
    """The data draw noise of their own, as augmentations do: each rank would choose another child."""
    noise = torch.Generator().manual_seed(rank)

    class Noisy(torch.utils.data.Dataset):
        x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))

        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> dict[str, Any]:
            seen = self.x[index] + 0.05 * torch.randn(3, 8, 8, generator=noise)
            return {"pixel_values": seen, "labels": index % 3}

    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    os.environ.update({key: str(value) for key, value in ranks.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # not used: the group is there
    torch.manual_seed(0)
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = tf.ViTForImageClassification(tf.ViTConfig(image_size=8, patch_size=4, num_labels=3, **config))
    options = {"ddp_backend": "gloo", "remove_unused_columns": False, "ddp_find_unused_parameters": False}
    args = arguments(
        folder / "out", max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, **options
    )
    ChildTrainer(model, args, train_dataset=Noisy(), child=ChildConfig(density=0.1)).train()
    save_file({n: p.detach().clone() for n, p in model.named_parameters()}, folder / f"{rank}.safetensors")


@pytest.mark.slow
def test_ranks_train_one_child(tmp_path: Path) -> None:
    on_ranks(_train, tmp_path)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(WORLD))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_first_step_under_accumulation_is_as_long_as_the_others(smoothing: float, tmp_path: Path) -> None:
    """Also behind a label smoother, which divides by the number of items itself."""
    moves = []
    for size, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        config = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
        }
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = tf.BertForTokenClassification(tf.BertConfig(vocab_size=40, num_labels=40, **config, **off))
        options = {"max_grad_norm": 0.0, "weight_decay": 0.0, "optim": "sgd", "lr_scheduler_type": "constant"}
        options |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        options |= {"label_smoothing_factor": smoothing, "max_steps": 2, "learning_rate": 0.1}
        args = arguments(tmp_path / str(size), **options)
        ChildTrainer(model, args, train_dataset=Tokens(), child=ChildConfig(density=1.0)).train()
        moves.append(dict(model.named_parameters()))
    for name, parameter in moves[0].items():
        torch.testing.assert_close(parameter, moves[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["child-d", "child-f", "mixout", "child-dynamic", "child-pruned"])
def test_every_training_starts_from_model_init(tmp_path: Path, method: str) -> None:
    """As hyperparameter_search trains: a new model for each trial, with a child and methods of its own."""
    parsed = Combination.parse(method)
    trainer = ChildTrainer(
        None,
        arguments(tmp_path, num_train_epochs=2, learning_rate=1e-2),
        model_init=a_classifier,
        train_dataset=Labelled(),
        child=parsed.child(ChildConfig(density=parsed.density)),
        methods=parsed.methods,
    )
    trained = []
    for _ in range(2):
        trainer.train()
        trained.append({name: p.detach().clone() for name, p in trainer.bare_model.named_parameters()})
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    start = dict(a_classifier().named_parameters())
    assert not torch.equal(start["classifier.weight"], trained[0]["classifier.weight"])


def test_what_the_checkpoint_does_not_hold_is_new(tmp_path: Path) -> None:
    """A pooler is, where a masked language model was saved: it is trained whole, and stands in the delta."""
    a_masked_bert().save_pretrained(tmp_path / "base")

    def fresh(seed: int) -> Any:
        torch.manual_seed(seed)
        return tf.BertForSequenceClassification.from_pretrained(tmp_path / "base")

    trainer = ChildTrainer(
        fresh(1),
        arguments(tmp_path / "out", num_train_epochs=1),
        train_dataset=Labelled(),
        child=ChildConfig(density=0.1),
    )
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert set(trainer.always) == pooler | {"classifier.weight", "classifier.bias"}
    trainer.train()
    trainer.save_model(str(tmp_path / "delta"))
    other = fresh(2)
    Delta.load(tmp_path / "delta").apply_(other)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, trainer.bare_model.get_parameter(name)), name
    assert new_parameters(a_classifier()) == ()  # nothing is known of a model that was not loaded
