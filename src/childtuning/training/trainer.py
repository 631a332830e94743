"""The Hugging Face Trainer, training a child."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, Subset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from childtuning.child import Child
from childtuning.config import ChildConfig
from childtuning.delta import Delta
from childtuning.errors import ConfigError, DeltaError
from childtuning.optim import ChildOptimizer
from childtuning.task_free import TaskFree
from childtuning.training.child_choice import (
    Progress,
    choose_child,
    fisher_sample,
    saves_computation,
    task_head,
)
from childtuning.training.progress_bar import fisher_bar
from childtuning.training.random_streams import random_state, set_random_state
from childtuning.training.state_files import load_state, save_state

CHILD_FILE, CHOICE_FILE = "child.safetensors", "child.json"
_COUNTS_ITEMS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")  # their losses do


class _ForgetGradients(TrainerCallback):
    """After a step that a GradScaler skipped, gradients that lie outside the model are still there."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["optimizer"].zero_grad()


class ChildTrainer(Trainer):
    """A ``transformers.Trainer`` that trains a child network; ``child=`` is the one argument more.

    The child is chosen when training starts, from the training set, before anything random is drawn; the pass
    leaves no trace. Checkpoints hold a delta, the child, and the compact optimizer state, as safetensors and JSON.
    Resuming from one is bitwise: child, masks, optimizer, schedule, data order, dropout.

    Clipping (``max_grad_norm``) sees the unmasked gradient for a task-free child, as in the paper, and the gradient of
    the child's entries for a fixed one.

    Args:
        child: a ``ChildConfig``, or a ready ``Child`` or ``TaskFree``.
        always: parameter names or patterns trained whole beside the child where the configuration names none;
            ``None``: the model's task head (``task_head``).
        scores: ready scores by parameter name, in place of a Fisher pass.
        train_batches: a batch sampler for the training set (with ``set_epoch`` if its order changes by epoch).
        base_name: the base model's name, written into deltas.
        progress: of the Fisher pass: ``None`` follows ``disable_tqdm``; else as for ``fisher_information``.
        trainer_options: everything that ``transformers.Trainer`` takes.
    Raises:
        ConfigError: the arguments ask for what a child cannot do (DeepSpeed, FSDP, an optimizer of one's own).
    """

    def __init__(
        self,
        *args: Any,
        child: ChildConfig | Child | TaskFree,
        always: Iterable[str] | None = None,
        scores: dict[str, Tensor] | None = None,
        train_batches: Sampler[list[int]] | None = None,
        base_name: str | None = None,
        progress: bool | Progress | None = None,
        **trainer_options: Any,
    ) -> None:
        super().__init__(*args, **trainer_options)
        if self.optimizer is not None:
            raise ConfigError(
                "ChildTrainer builds the optimizer, got one. Name it in TrainingArguments(optim=…)."
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ConfigError(
                "a child cannot be trained under DeepSpeed or FSDP yet. Use one process or DDP."
            )
        if not type(self.model).__name__.endswith(_COUNTS_ITEMS):
            # The loss is the batch's mean whatever num_items_in_batch says; without this, accumulated gradients would
            # be summed where they should be averaged.
            self.model_accepts_loss_kwargs = False
        self.add_callback(_ForgetGradients())
        self.child_config = child if isinstance(child, ChildConfig) else None
        self.child: Child | TaskFree | None = None if isinstance(child, ChildConfig) else child
        self.train_batches = train_batches
        self._always = tuple(always) if always is not None else None
        self._scores = scores
        self._base_name = base_name
        self._progress = progress

    # What is trained

    @property
    def bare_model(self) -> nn.Module:
        """The model before Accelerate wrapped it."""
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, nn.Module)
        return model

    def select(self) -> Child | TaskFree:
        """Return the child, choosing it now if that has not been done."""
        if self.child is None:
            assert self.child_config is not None
            always = self._always if self._always is not None else task_head(self.bare_model)
            progress = not self.args.disable_tqdm if self._progress is None else self._progress
            with fisher_bar() as bar:
                self.child = choose_child(
                    self.child_config,
                    self.bare_model,
                    self._fisher_batches,
                    always=always,
                    scores=self._scores,
                    progress=False
                    if not self.is_world_process_zero()
                    else bar
                    if progress is True
                    else progress,
                )
        return self.child

    def _fisher_batches(self) -> Iterable[Any]:
        """The training set once, batches of similar length, in an order that draws nothing at random."""
        dataset = self.train_dataset
        assert self.child_config is not None
        if isinstance(dataset, IterableDataset):
            raise ConfigError(
                "Fisher information needs a training set of known length, got an iterable one. Pass scores=."
            )
        columns, collate = self._model_inputs("Fisher information")
        lengths = getattr(dataset, "lengths", None)
        limit, seed = self.child_config.fisher_examples, self.child_config.seed
        order = fisher_sample(len(dataset), limit, seed)  # type: ignore[arg-type]
        if lengths is not None:
            order.sort(key=lambda index: lengths[index])
        return DataLoader(
            Subset(columns, order),
            batch_size=self.args.per_device_train_batch_size,
            shuffle=False,
            collate_fn=collate,
        )

    def _model_inputs(self, description: str) -> tuple[Any, Any]:
        """The training set and a collator that leave out columns which the model does not take."""
        dataset: Any = self.train_dataset
        if hasattr(dataset, "column_names"):
            return self._remove_unused_columns(dataset, description), self.data_collator
        return dataset, self._get_collator_with_removed_columns(self.data_collator, description)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the ``ChildOptimizer`` around the optimizer that ``TrainingArguments`` names."""
        if self.optimizer is None:
            module = self.bare_model if model is None else model
            child = self.select()
            decayed = set(self.get_decay_parameter_names(module))
            named = [(name, p) for name, p in module.named_parameters() if p.is_floating_point()]
            groups = [
                {
                    "params": [pair for pair in named if pair[0] in decayed],
                    "weight_decay": self.args.weight_decay,
                },
                {"params": [pair for pair in named if pair[0] not in decayed], "weight_decay": 0.0},
            ]
            inner, options = self.get_optimizer_cls_and_kwargs(self.args, module)  # type: ignore[arg-type]
            config = self.child_config
            preset = config.preset if config else None
            if preset == "official":
                inner = None
                options = {key: value for key, value in options.items() if key in ("lr", "betas", "eps")}
            one_process = self.args.world_size == 1 and self.args.n_gpu <= 1
            may_release = one_process and preset is None
            wanted = config.release_gradients if config else None
            release = may_release and isinstance(child, Child) if wanted is None else wanted
            structured = may_release and wanted is not False and saves_computation(child)
            if isinstance(child, TaskFree) and self.args.fp16:
                structured = False  # a GradScaler sees the parameters' own gradients alone
            self.optimizer = ChildOptimizer(
                [group for group in groups if group["params"]],
                child,
                inner,
                rescale=config.rescale if config else None,
                preset=preset,
                release_gradients=release,
                model=module if structured else None,
                **options,
            )
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as ``transformers.Trainer`` does; afterwards the model's layers are its own again."""
        if self.optimizer is not None:
            self.child_optimizer.attach()
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.optimizer is not None:
                self.child_optimizer.remove()

    @property
    def child_optimizer(self) -> ChildOptimizer:
        """The ``ChildOptimizer``, also when Accelerate has wrapped it."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        assert isinstance(optimizer, ChildOptimizer)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        self.accelerator.unscale_gradients(self.optimizer)
        return self.child_optimizer.clip_grad_norm_(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        if grad_norm is None:
            self.accelerator.unscale_gradients(self.optimizer)
            grad_norm = self.child_optimizer.clip_grad_norm_(float("inf"))
        return grad_norm

    def get_train_dataloader(self) -> DataLoader:
        """Return the training batches, by ``train_batches`` where one was given."""
        if self.train_batches is None:
            return super().get_train_dataloader()
        dataset, collate = self._model_inputs("training")
        return self.accelerator.prepare(
            DataLoader(
                dataset,
                batch_sampler=self.train_batches,
                collate_fn=collate,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            )
        )

    # What is saved

    def delta(self) -> Delta:
        """Return the trained values, as they are now."""
        child = self.select()
        if self.child_config is not None and self.child_config.preset == "official":
            child = TaskFree(1.0)  # decay moves every parameter there
        return Delta.capture(self.bare_model, child, base=self._base_name)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        if not self.args.should_save:
            return
        self.delta().save(folder)
        if isinstance(self.child, Child):
            self.child.save(folder / CHILD_FILE)
        (folder / CHOICE_FILE).write_text(json.dumps(self._choice()), encoding="utf-8")
        config = getattr(self.model, "config", None)
        if config is not None and hasattr(config, "save_pretrained"):
            config.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _choice(self) -> dict[str, Any]:
        """Say what was asked for, so that another child is not resumed by mistake."""
        if self.child_config is not None:
            return self.child_config.to_dict()
        return {"child": self.child.fingerprint() if isinstance(self.child, Child) else repr(self.child)}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            save_state(Path(output_dir) / "optimizer.safetensors", self.optimizer.state_dict())
            save_state(Path(output_dir) / "scheduler.safetensors", self.lr_scheduler.state_dict())  # type: ignore[union-attr]

    def _save_scaler(self, output_dir: str) -> None:
        if self.args.should_save and self.accelerator.scaler is not None:
            save_state(Path(output_dir) / "scaler.safetensors", self.accelerator.scaler.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        os.makedirs(output_dir, exist_ok=True)
        save_state(self._random_file(output_dir), random_state())

    def _random_file(self, folder: str) -> Path:
        return Path(folder) / f"random-{self.args.process_index}.safetensors"

    # What is loaded

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / "delta.json").is_file():
            raise DeltaError(
                f"{folder} is not a checkpoint of ChildTrainer: it has no delta. Resume from another."
            )
        choice = folder / CHOICE_FILE
        if choice.is_file() and json.loads(choice.read_text(encoding="utf-8")) != self._choice():
            raise ConfigError(
                f"{folder} was trained with another child than this trainer's. Resume with the same one."
            )
        Delta.load(folder).apply_(self.bare_model if model is None else model)
        if (folder / CHILD_FILE).is_file():
            self.child = Child.load(folder / CHILD_FILE)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        Delta.load(self.state.best_model_checkpoint).apply_(self.bare_model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.optimizer.load_state_dict(load_state(Path(checkpoint) / "optimizer.safetensors"))
            self.lr_scheduler.load_state_dict(load_state(Path(checkpoint) / "scheduler.safetensors"))  # type: ignore[union-attr]

    def _load_scaler(self, checkpoint: str | None) -> None:
        path = Path(checkpoint or "") / "scaler.safetensors"
        if checkpoint is not None and self.accelerator.scaler is not None and path.is_file():
            self.accelerator.scaler.load_state_dict(load_state(path))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._random_file(checkpoint).is_file():
            set_random_state(load_state(self._random_file(checkpoint)))
