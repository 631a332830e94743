"""ChildTrainer: protocol, exactness, resume."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import without_dropout
from transformers import BertForSequenceClassification, TrainerCallback, TrainingArguments, set_seed

from childtuning import Child, ChildConfig, TaskFree
from childtuning.child.eligible import unit_axes
from childtuning.child.units import Granularity, Part
from childtuning.errors import ConfigError, CorruptFileError, DeltaError, ParameterError
from childtuning.training import ChildTrainer, task_head
from childtuning.training.child_choice import saves_computation

Example = dict[str, torch.Tensor]


def examples(count: int = 40) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(5, 40, (12,), generator=generator),
            "attention_mask": torch.ones(12, dtype=torch.long),
            "labels": torch.randint(0, 2, (), generator=generator),
        }
        for _ in range(count)
    ]


_TRAINER_ARGUMENTS = ("always", "callbacks", "train_batches", "data_collator", "eval_dataset")


def a_trainer(
    model_folder: Path, output: Path, child: Any, *, child_density: float | None = None, **options: Any
) -> ChildTrainer:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "warmup_steps": 0.1,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_steps": 7,
        "logging_steps": 1,
        "seed": 1,
        "disable_tqdm": True,
    }
    extra = {key: options.pop(key) for key in _TRAINER_ARGUMENTS if key in options}
    set_seed(0)
    model = BertForSequenceClassification.from_pretrained(model_folder, num_labels=2)
    arguments = TrainingArguments(
        str(output),
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to="none",
        **(settings | options),
    )
    return ChildTrainer(
        model, arguments, train_dataset=examples(), child=child, density=child_density, **extra
    )


def test_a_child_that_is_given_has_its_own_always(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"got always=. Pass it to select_child, or to TaskFree"):
        a_trainer(tiny_bert, tmp_path, TaskFree(0.3), always=("classifier.*",))


def weights(trainer: ChildTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.bare_model.named_parameters()}


CHILDREN = {
    "task-driven": ChildConfig(density=0.3),
    "task-free": ChildConfig("task-free", density=0.3),
    "rows": ChildConfig(density=0.2, granularity="row"),
    "blocks": ChildConfig(density=0.2, granularity="block"),
    "columns": ChildConfig(density=0.2, granularity="column"),
    "task-free columns": ChildConfig("task-free", density=0.3, granularity="column"),
    "task-free rows": ChildConfig("task-free", density=0.3, granularity="row"),
    "kept gradients": ChildConfig(density=0.2, release_gradients=False),
    "random": ChildConfig(density=0.3, scores="random"),
    "full": ChildConfig(density=1.0),
    "official": ChildConfig(density=0.3, preset="official"),
    "official task-free": ChildConfig("task-free", density=0.3, preset="official"),
}


@pytest.mark.parametrize("kind", list(CHILDREN))
def test_resume_in_mid_epoch_is_bitwise(tiny_bert: Path, tmp_path: Path, kind: str) -> None:
    straight = a_trainer(tiny_bert, tmp_path, CHILDREN[kind], gradient_accumulation_steps=2)
    straight.train()
    resumed = a_trainer(tiny_bert, tmp_path, CHILDREN[kind], gradient_accumulation_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    ours, theirs = weights(straight), weights(resumed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    files = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert files <= {".json", ".safetensors"}


@pytest.mark.parametrize(
    "options", [{}, {"bf16": True}, {"optim": "sgd"}, {"optim": "adamw_torch_fused"}], ids=str
)
def test_outside_the_child_nothing_moves(tiny_bert: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = a_trainer(tiny_bert, tmp_path, ChildConfig(density=0.2), save_strategy="no", **options)
    before = weights(trainer)
    trainer.train()
    child, after = trainer.select(), weights(trainer)
    assert isinstance(child, Child) and child.num_trained == round(0.2 * child.num_eligible)
    moved = 0
    for name, part in child.parts.items():
        assert torch.equal(before[name][~part.mask()], after[name][~part.mask()])
        moved += int((before[name] != after[name]).sum())
    assert moved > 0.9 * child.num_trained
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])


def test_choosing_the_child_does_not_disturb_the_run(tiny_bert: Path, tmp_path: Path) -> None:
    """Equal seed, equal data order and dropout, whether or not there was a Fisher pass."""
    seen: list[list[Any]] = []

    def run(child: Any) -> list[Any]:
        batches: list[Any] = []

        def collate(rows: list[Example]) -> dict[str, torch.Tensor]:
            batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            batches.append((batch["input_ids"].tolist(), torch.random.get_rng_state().sum().item()))
            return batch

        trainer = a_trainer(tiny_bert, tmp_path, child, save_strategy="no", data_collator=collate)
        trainer.select()
        batches.clear()
        trainer.train()
        return batches

    for child in (
        ChildConfig(density=0.3),
        ChildConfig(density=1.0),
        TaskFree(0.3, always=task_head_patterns()),
    ):
        seen.append(run(child))
    assert seen[0] == seen[1] == seen[2]


def task_head_patterns() -> tuple[str, ...]:
    return ("classifier.*",)


def test_density_one_is_plain_fine_tuning_bitwise(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import Trainer

    ours = a_trainer(tiny_bert, tmp_path, ChildConfig(density=1.0), save_strategy="no", max_grad_norm=0.0)
    ours.train()
    set_seed(0)
    model = BertForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    plain = Trainer(model, ours.args, train_dataset=examples())
    plain.train()
    theirs = dict(model.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in weights(ours).items())


def test_the_fisher_pass_has_a_bar(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_trainer(tiny_bert, tmp_path, ChildConfig(density=0.3), disable_tqdm=False).select()
    assert "Fisher information: 100%" in capsys.readouterr().err
    a_trainer(tiny_bert, tmp_path, ChildConfig(density=0.3)).select()
    assert "Fisher information" not in capsys.readouterr().err


def test_warm_up_ratio_is_honoured(tiny_bert: Path, tmp_path: Path) -> None:
    trainer = a_trainer(
        tiny_bert, tmp_path, ChildConfig("task-free", 0.3), save_strategy="no", warmup_steps=0.2
    )
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert len(rates) == 30
    assert rates[:6] == pytest.approx([1e-2 * step / 6 for step in range(6)])
    assert rates[6:] == pytest.approx([1e-2 * (30 - step) / 24 for step in range(6, 30)])


def test_accumulated_batches_are_one_larger_batch(tiny_bert: Path, tmp_path: Path) -> None:
    norms = []
    for size, accumulation in ((8, 1), (4, 2)):
        trainer = a_trainer(
            tiny_bert,
            tmp_path,
            ChildConfig("task-free", density=0.5),
            save_strategy="no",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
        )
        trainer.bare_model.config.hidden_dropout_prob = 0.0
        for module in trainer.bare_model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train()
        norms.append([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_logged_norm_is_that_of_the_child(tiny_bert: Path, tmp_path: Path) -> None:
    class Look(TrainerCallback):
        def __init__(self) -> None:
            self.norms: list[float] = []

        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            child = trainer.select()
            assert isinstance(child, Child)
            parts = child.resolve({name: p.shape for name, p in model.named_parameters()})
            squares = [
                (p.grad * parts[name].mask()).square().sum()
                for name, p in model.named_parameters()
                if p.grad is not None
            ]
            self.norms.append(float(torch.stack(squares).sum().sqrt()))  # type: ignore[arg-type]

    look = Look()
    trainer = a_trainer(
        tiny_bert,
        tmp_path,
        ChildConfig(density=0.3, release_gradients=False),
        save_strategy="no",
        max_steps=4,
        max_grad_norm=0.0,
        callbacks=[look],
    )
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(look.norms, rel=1e-5)


def test_best_model_is_loaded_from_its_delta(tiny_bert: Path, tmp_path: Path) -> None:
    trainer = a_trainer(
        tiny_bert,
        tmp_path,
        ChildConfig(density=0.3),
        eval_strategy="steps",
        eval_steps=7,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        eval_dataset=examples(8),
    )
    trainer.train()
    best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best)


def test_the_best_model_is_found_after_the_folder_has_moved(tiny_bert: Path, tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_score", "greater_is_better": True}
    options = {
        "eval_strategy": "steps",
        "eval_steps": 7,
        "eval_dataset": examples(8),
        "save_total_limit": 2,
        **best,
    }
    child = ChildConfig(density=0.3, scores="random")

    def trained(folder: Path, last: int | None = None, resume: str | None = None) -> ChildTrainer:
        trainer = a_trainer(tiny_bert, folder, child, **options)
        trainer.compute_metrics = lambda _: {"score": -trainer.state.global_step}  # the first is the best
        if last is not None:
            trainer.add_callback(StopAt(last))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = weights(trained(tmp_path / "straight"))
    trained(tmp_path / "old", last=14)
    (tmp_path / "old").rename(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "copy")
    moved = trained(tmp_path / "new", resume=str(tmp_path / "new" / "checkpoint-14"))
    assert moved.state.best_model_checkpoint == str(tmp_path / "new" / "checkpoint-7")
    elsewhere = trained(tmp_path / "another", resume=str(tmp_path / "copy" / "checkpoint-14"))
    assert elsewhere.state.best_model_checkpoint == str(tmp_path / "copy" / "checkpoint-7")
    assert all(torch.equal(value, straight[name]) for name, value in weights(moved).items())


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_a_new_head_is_in_the_delta_although_it_was_not_trained(tiny_bert: Path, tmp_path: Path) -> None:
    body = {"eligible": ("bert.encoder.*",), "always": (), "scores": "random", "density": 0.3}
    for child in (ChildConfig(**body), "frozen"):
        trainer = a_trainer(tiny_bert, tmp_path, ChildConfig(density=0.3) if child == "frozen" else child)
        if child == "frozen":
            trainer.model.classifier.requires_grad_(False)
        head = trainer.model.classifier.weight.detach().clone()
        trainer.train()
        assert torch.equal(trainer.model.classifier.weight, head)  # as the user has left it
        set_seed(1)  # draws another head
        base = BertForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
        trainer.delta().apply_(base)
        assert all(torch.equal(p, weights(trainer)[name]) for name, p in base.named_parameters())


def test_what_a_task_free_child_has_trained_does_not_depend_on_later_flags(
    tiny_bert: Path, tmp_path: Path
) -> None:
    trainer = a_trainer(tiny_bert, tmp_path, "child-f")
    trainer.train()
    before = trainer.delta().num_trained
    trainer.model.requires_grad_(False)
    assert trainer.delta().num_trained == before > 0
    partly = a_trainer(tiny_bert, tmp_path, "child-f")
    partly.model.bert.embeddings.requires_grad_(False)
    partly.train()
    part = partly.delta().parts["bert.embeddings.word_embeddings.weight"]
    assert part.is_empty  # so that another base is noticed


class Interrupt(TrainerCallback):
    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_gradients_of_a_training_that_failed_do_not_enter_the_next(tiny_bert: Path, tmp_path: Path) -> None:
    child = ChildConfig(density=0.3, scores="random")
    found = []
    for fails in (False, True):
        trainer = a_trainer(tiny_bert, tmp_path, child, gradient_accumulation_steps=2)
        if fails:
            trainer.add_callback(Interrupt)
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            trainer.remove_callback(Interrupt)
        set_seed(3)
        trainer.train()
        found.append(trainer.state.log_history[0]["grad_norm"])
    assert found[0] == found[1]


def test_an_optimizer_class_is_used(tiny_bert: Path, tmp_path: Path) -> None:
    trainer = a_trainer(tiny_bert, tmp_path, "child-d")
    trainer.optimizer_cls_and_kwargs = torch.optim.SGD, {"lr": 0.5}
    assert isinstance(trainer.create_optimizer().inner, torch.optim.SGD)  # type: ignore[attr-defined]
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5


def test_whole_matrices_save_no_computation() -> None:
    rows = Granularity("row")
    assert not saves_computation(
        Child({"a": Part((4, 3), None, rows), "b": Part((4, 3), torch.tensor([]), rows)})
    )
    assert saves_computation(Child({"a": Part((4, 3), torch.tensor([1]), rows)}))


def test_resume_from_another_base_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    a_trainer(tiny_bert, tmp_path, ChildConfig(density=0.3), max_steps=7).train()
    other = a_trainer(tiny_bert, tmp_path, ChildConfig(density=0.3))
    with torch.no_grad():
        other.bare_model.bert.embeddings.word_embeddings.weight.add_(1.0)
    with pytest.raises(DeltaError, match="another base model"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


def test_eligible_patterns(tiny_bert: Path, tmp_path: Path) -> None:
    for variant in ("task-driven", "task-free"):
        config = ChildConfig(variant, density=0.5, eligible=("*.layer.1.*",))  # type: ignore[arg-type]
        trainer = a_trainer(tiny_bert, tmp_path, config, save_strategy="no", max_steps=3)
        before = weights(trainer)
        trainer.train()
        moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
        assert moved and all(".layer.1." in name or name.startswith("classifier") for name in moved)
    with pytest.raises(ParameterError, match="matched no parameter"):
        a_trainer(tiny_bert, tmp_path, ChildConfig(density=0.5, eligible=("decoder.*",))).train()


def test_wrong_use(tiny_bert: Path, tmp_path: Path) -> None:
    without = a_trainer(tiny_bert, tmp_path, "child-d")
    without.train_dataset = None
    with pytest.raises(ConfigError, match="Pass train_dataset"):
        without.select()
    trainer = a_trainer(tiny_bert, tmp_path, ChildConfig(density=0.3))
    optimizer = torch.optim.SGD(trainer.bare_model.parameters())
    with pytest.raises(ConfigError, match="builds the optimizer"):
        ChildTrainer(trainer.bare_model, trainer.args, child=TaskFree(0.3), optimizers=(optimizer, None))


def test_task_heads_and_unit_axes() -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, num_labels=3)
    assert task_head(GPT2ForSequenceClassification(config)) == ("score.weight",)
    assert task_head(GPT2LMHeadModel(config)) == ()
    assert task_head(torch.nn.Linear(2, 2)) == ()
    axes = unit_axes(GPT2LMHeadModel(config), "row")
    assert axes["transformer.h.0.attn.c_attn.weight"] == 1 and "transformer.wte.weight" not in axes
    inputs = unit_axes(GPT2LMHeadModel(config), "column")
    assert inputs["transformer.h.0.attn.c_attn.weight"] == 0
    assert inputs["transformer.wte.weight"] == 0  # which the head shares
    assert unit_axes(torch.nn.ConvTranspose1d(2, 3, 4), "column") == {"weight": 0}
    assert unit_axes(torch.nn.ConvTranspose1d(2, 3, 4), "row") == {"weight": 1}
    assert unit_axes(torch.nn.Conv1d(2, 3, 4), "column") == {}


def test_a_dataset_with_columns_that_the_model_does_not_take(tiny_bert: Path, tmp_path: Path) -> None:
    import datasets

    rows = [
        {key: value.tolist() for key, value in row.items()} | {"sentence": "a cat", "idx": i}
        for i, row in enumerate(examples())
    ]
    trainer = a_trainer(tiny_bert, tmp_path, ChildConfig(density=0.3), save_strategy="no", max_steps=2)
    trainer.train_dataset = datasets.Dataset.from_list(rows)
    trainer.train()
    assert isinstance(trainer.select(), Child)


def test_resume_without_random_states_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    a_trainer(tiny_bert, tmp_path, ChildConfig(density=0.3), max_steps=7).train()
    (tmp_path / "checkpoint-7" / "random-0.safetensors").unlink()
    with pytest.raises(CorruptFileError, match="random-0.safetensors cannot be read"):
        a_trainer(tiny_bert, tmp_path, ChildConfig(density=0.3)).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-7")
        )


def test_resume_with_another_child_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    a_trainer(tiny_bert, tmp_path, ChildConfig(density=0.3), max_steps=7).train()
    for other in (ChildConfig(density=0.1), ChildConfig("task-free", density=0.3), TaskFree(0.3)):
        with pytest.raises(ConfigError, match="a child other"):
            a_trainer(tiny_bert, tmp_path, other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


@pytest.mark.parametrize("kind", ["rows", "task-free rows"])
def test_layers_form_the_trained_rows_alone_while_training(
    tiny_bert: Path, tmp_path: Path, kind: str
) -> None:
    class Look(TrainerCallback):
        def __init__(self) -> None:
            self.layers: set[str] = set()

        def on_substep_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            self.layers |= {
                type(module).__name__ for name, module in model.named_modules() if "dense" in name
            }

    look = Look()
    options = {"save_strategy": "no", "gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "max_steps": 4}
    trainer = a_trainer(tiny_bert, tmp_path, CHILDREN[kind], callbacks=[look], **options)
    without_dropout(trainer.bare_model)
    trainer.train()
    assert look.layers != {"Linear"}
    assert {type(m).__name__ for n, m in trainer.bare_model.named_modules() if n.endswith("dense")} == {
        "Linear"
    }
    dense = a_trainer(
        tiny_bert, tmp_path, dataclasses.replace(CHILDREN[kind], release_gradients=False), **options
    )
    without_dropout(dense.bare_model)
    dense.train()
    for name, value in weights(dense).items():
        torch.testing.assert_close(weights(trainer)[name], value, rtol=1e-4, atol=1e-5)
    before = weights(trainer)
    trainer.train()  # attaches again
    assert any(not torch.equal(before[name], value) for name, value in weights(trainer).items())


def test_a_method_names_the_child(tiny_bert: Path, tmp_path: Path) -> None:
    trainer = a_trainer(tiny_bert, tmp_path, "child-d", child_density=0.1)
    assert trainer.child_config == ChildConfig("task-driven", density=0.1)
    assert a_trainer(tiny_bert, tmp_path, "child-f").child_config == ChildConfig("task-free")
    assert a_trainer(tiny_bert, tmp_path, "child-lowest").child_config == ChildConfig(lowest=True)
    assert a_trainer(tiny_bert, tmp_path, "child-random").child_config == ChildConfig(scores="random")


@pytest.mark.parametrize(
    ("child", "density", "words"),
    [
        ("chlid-d", None, "there is no child 'chlid-d'. Did you mean 'child-d'"),
        ("child-d", 30, "density must be in"),
        (ChildConfig(), 0.1, "density belongs to the name of a method, got one beside a ChildConfig"),
        (TaskFree(0.3, 0), 0.1, "beside a TaskFree"),
        (0.3, None, "child must be a method's name, a ChildConfig, a Child or a TaskFree, got 0.3"),
    ],
)
def test_other_children_are_refused(
    tiny_bert: Path, tmp_path: Path, child: Any, density: float | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        a_trainer(tiny_bert, tmp_path, child, child_density=density)
