"""`ChildTrainer`, a Hugging Face Trainer that trains a child network."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput
from transformers.training_args import ParallelMode

from childtuning.child import Child, ChildConfig, TaskFree
from childtuning.child.budget import Costs
from childtuning.child.eligible import canonical_name, matches, named
from childtuning.child.pieces import reshard
from childtuning.errors import ConfigError
from childtuning.fisher import training_costs
from childtuning.fisher.batches import to_device
from childtuning.fisher.loop import differentiable, take_gradients
from childtuning.fisher.losses import model_loss
from childtuning.fisher.without_trace import used_in_training, without_trace
from childtuning.optim import ChildOptimizer
from childtuning.ranks import of_main_process
from childtuning.training.checkpoint_files import CheckpointFiles
from childtuning.training.child_choice import (
    Progress,
    ScoreFn,
    Scores,
    as_child,
    choose_child,
    fisher_bar,
    new_parameters,
    saves_computation,
    task_head,
)
from childtuning.training.method import LossStep, Method
from childtuning.training.scored_examples import ScoredExamples
from childtuning.training.sharing import (
    SHARE,
    averages_copies,
    check_processes,
    check_sharded_run,
    divides_by_items,
    hide_uncounted,
    make_alike,
    resumable,
    share_of_mean,
    shared_loader,
    show_uncounted,
    weigh,
)


class _TellGradients(TrainerCallback):
    """Notify methods right before the step, when gradients are not clipped."""

    def __init__(self, trainer: ChildTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.args.max_grad_norm <= 0:
            self.trainer.accelerator.unscale_gradients(self.trainer.optimizer)
            self.trainer._tell_gradients()


class _Upkeep(TrainerCallback):
    """Find the best checkpoint after a resume; clear gradients stored outside the model, which survive a failure."""

    def __init__(self, trainer: ChildTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.find_best_checkpoint()
        self.trainer.child_optimizer.zero_grad()  # Accelerate's does nothing after half an update

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["optimizer"].zero_grad()


def _check_methods(config: ChildConfig | None, methods: Sequence[Method], args: Any) -> None:
    """Refuse options with which a method would have no effect or a wrong one."""
    for method in methods:
        if method.reselects and args.load_best_model_at_end:
            raise ConfigError(
                f"method {method.name!r} changes which entries are trained, so that it cannot go back to the best "
                "checkpoint. Keep the last one (load_best_model_at_end=False)."
            )
        if config is not None and config.release_gradients and method.whole_gradients:
            raise ConfigError(
                f"method {method.name!r} needs all gradients in full, got release_gradients=True. Leave it out."
            )
        if config is not None and config.preset and type(method).inner is not Method.inner:
            raise ConfigError(
                f"preset={config.preset!r} has an optimizer of its own, which method {method.name!r} would change. "
                "Leave one of them out."
            )


class ChildTrainer(CheckpointFiles, ScoredExamples, Trainer):
    """A ``transformers.Trainer`` that trains a child network; the only required extra argument is ``child=``.

    The child is chosen from the training set when training starts, before any random numbers are drawn; the Fisher
    pass leaves no trace. Checkpoints contain a delta, the child, and the compact optimizer state, as safetensors and
    JSON. Resuming is bitwise exact: child, masks, optimizer, schedule, data order, dropout.

    Clipping (``max_grad_norm``) uses the unmasked gradient for a task-free child, as in the paper, and the gradient of
    the child's entries for a fixed child.

    Learning rate and epochs are those of the ``TrainingArguments``, whose defaults suit BERT-base and much data:
    ``suggested_rate(model)`` and ``suggested_epochs(num_examples, batch_size)`` are what ``childtuning train`` chooses.

    Args:
        child: the name of a method, ``child-d`` or ``child-f``; a ``ChildConfig``, for more options; or an existing
            ``Child`` or ``TaskFree``.
        density: of a child that is named; ``None``: 0.3.
        always: names or patterns of parameters trained in full besides the child; used if the configuration has none. A
            ``Child`` or ``TaskFree`` has its own: of a ``TaskFree`` without them, a new head is masked as the rest.
            ``None``: the model's task head (``task_head``), and parameters missing from its checkpoint.
        scores: precomputed scores by parameter name, in place of a Fisher pass; or a function that takes the pass and
            returns its scores, or cached scores of an equal pass.
        methods: further methods: terms of the loss, changes of the update. Their ``prepare`` must already have been
            applied to the model.
        train_batches: a batch sampler for the training set (with ``set_epoch`` if its order changes by epoch). Several
            processes cut each of its batches across them.
        base_name: the base model's name, written into deltas.
        progress: progress of the Fisher pass: ``None`` follows ``disable_tqdm``; else as for ``fisher_information``.
        trainer_options: everything that ``transformers.Trainer`` accepts.
    Raises:
        ConfigError: when the arguments are not supported for a child (DeepSpeed, FSDP, a custom optimizer).
    """

    def __init__(
        self,
        *args: Any,
        child: str | ChildConfig | Child | TaskFree,
        density: float | Literal["auto"] | None = None,
        always: Iterable[str] | None = None,
        scores: Scores | ScoreFn | None = None,
        methods: Sequence[Method] = (),
        train_batches: Sampler[list[int]] | None = None,
        base_name: str | None = None,
        progress: bool | Progress | None = None,
        **trainer_options: Any,
    ) -> None:
        self._is_built = False
        child = as_child(child, density)
        with resumable(trainer_options.get("args") or (args[1] if len(args) > 1 else None)):
            super().__init__(*args, **trainer_options)
        if self.optimizer is not None:
            raise ConfigError(
                "ChildTrainer builds the optimizer, got one. Name it in TrainingArguments(optim=…)."
            )
        self.is_sharded = check_processes(self)
        self._divides_by_items: bool | None = None
        self._share = 1.0  # of this process's loss in the batch's
        self._averages_copies = False
        self._alike: Callable[[], nn.Module | None] = lambda: None  # the model that all processes have
        self.add_callback(_Upkeep(self))
        self._resumed_from = self._trained = None
        self.child_config = child if isinstance(child, ChildConfig) else None
        self.child: Child | TaskFree | None = None if isinstance(child, ChildConfig) else child
        self.methods = tuple(methods)
        if self.child is not None and always is not None:
            raise ConfigError(
                "a Child or TaskFree says itself what is trained in full, got always=. Pass it to select_child, or to "
                "TaskFree."
            )
        _check_methods(self.child_config, self.methods, self.args)
        if self.is_sharded:
            check_sharded_run(self.child_config, self.methods)
        self._method_callbacks = [
            callback for m in self.methods if (callback := m.callback(self)) is not None
        ]
        self._gradients_told = -1
        self.touched: Child | None = None
        for callback in [
            *self._method_callbacks,
            *([_TellGradients(self)] if self._method_callbacks else []),
        ]:
            self.add_callback(callback)
        self.train_batches = train_batches
        self._always = self._given_always = tuple(always) if always is not None else None
        self._begun: list[tuple[Method, nn.Module]] = []
        self._scores = scores
        self.num_scored: int | None = None
        self.costs: Costs | None = None
        self._base_name = base_name
        self._progress = progress
        self._is_built = True

    # What is trained

    @property
    def bare_model(self) -> nn.Module:
        """The model without Accelerate's wrapper."""
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, nn.Module)
        return model

    @property
    def always(self) -> tuple[str, ...]:
        """Names or patterns of the parameters trained in full besides the child."""
        if self.child_config is not None and self.child_config.always is not None:
            return self.child_config.always
        if self._always is None:
            new = {*task_head(self.bare_model), *new_parameters(self.bare_model)}
            parameters = named(self.bare_model, sharded=True)
            self._always = tuple(n for n, p in parameters.items() if n in new and p.requires_grad)
        return self._always

    def select(self) -> Child | TaskFree:
        """Return the child, choosing it first if necessary."""
        if self.child is None:
            assert self.child_config is not None
            self._make_alike()
            progress = not self.args.disable_tqdm if self._progress is None else self._progress
            with fisher_bar() as bar:
                self.child = choose_child(
                    self.child_config,
                    self.bare_model,
                    self._fisher_batches,
                    always=self.always,
                    scores=self._scores if isinstance(self._scores, dict) else self._score,
                    progress=False
                    if not self.is_world_process_zero()
                    else bar
                    if progress is True
                    else progress,
                    loss_fn=self._fisher_loss(),
                    costs_fn=self.count_costs,
                    share=True,
                )
            # Scores may differ in the last bit between ranks, and with them the children.
            self.child = of_main_process(self.child)
        return self.child

    def _make_alike(self) -> None:
        """Let every process begin with the main process's model: what is chosen and watched is the same everywhere."""
        model = self.bare_model
        if self._in_copies and self._alike() is not model:
            make_alike(chain(model.parameters(), model.buffers()))
            self._alike = weakref.ref(model)

    @property
    def _in_copies(self) -> bool:
        """Whether each process has a model of its own."""
        return self.args.parallel_mode is ParallelMode.DISTRIBUTED and not self.is_sharded

    def count_costs(self) -> Costs:
        """Count what a training step costs, on the largest batch of a Fisher pass."""
        if self.costs is None:
            self.costs = training_costs(self.bare_model, self._largest_batch(), self._fisher_loss())
        return self.costs

    def measure_passes(self, repeats: int = 2) -> float:
        """Return the time of a forward and backward pass of the child, as a share of one that trains everything.

        The fastest of a few of each, on the batch that the costs are counted on; the optimizer's update is not in it.
        """
        model, loss_fn = self.bare_model, self._fisher_loss() or model_loss
        batch = to_device(self._largest_batch(), next(model.parameters()).device)
        parameters = {name: p for name, p in named(model).items() if p.is_floating_point()}
        optimizer = self.create_optimizer()
        spent: dict[str, list[float]] = {"full": [], "child": []}
        for _ in range(repeats):
            with without_trace(model, training=True), differentiable(parameters.values()):
                start = time.perf_counter()
                take_gradients(loss_fn(model, batch).mean(), parameters, lambda name, gradient: None)
                spent["full"].append(time.perf_counter() - start)
            with used_in_training(model):
                start = time.perf_counter()
                loss_fn(model, batch).mean().backward()
                spent["child"].append(time.perf_counter() - start)
            optimizer.zero_grad()
        return min(spent["child"]) / min(spent["full"])

    def _score(self, make_fn: Callable[[], Scores]) -> Scores:
        """Make the scores, or take what the given function returns, and note how many examples they are of."""
        scores = self._scores(make_fn) if callable(self._scores) else make_fn()
        self.num_scored = getattr(scores, "num_examples", None)
        return scores

    @property
    def _has_other_loss(self) -> bool:
        """Whether a subclass, or another trainer beside this one (TRL's), computes the loss."""
        owners = [cls for cls in type(self).__mro__ if "compute_loss" in vars(cls)]
        return any(cls not in (ChildTrainer, Trainer) for cls in owners)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the ``ChildOptimizer`` around the optimizer that ``TrainingArguments`` names."""
        if self.optimizer is None:
            module = self.bare_model if model is None else model
            self._make_alike()  # a child that was given has not asked for it
            child = self.select()
            reshard(module)
            given = self.optimizer_cls_and_kwargs
            inner, options = given or self.get_optimizer_cls_and_kwargs(self.args, module)  # type: ignore[arg-type]
            groups = self._groups(module, options)
            for method in self.methods:
                inner, options = method.inner(inner, options)
            config = self.child_config
            preset = config.preset if config else None
            if preset == "official":
                inner = None
                options = {key: value for key, value in options.items() if key in ("lr", "betas", "eps")}
            whole_gradients = any(method.whole_gradients for method in self.methods)
            one_process = self.args.world_size == 1 and self.args.n_gpu <= 1
            of_copies = not (one_process or self.is_sharded) and averages_copies(module, child, self.args)
            may_release = (one_process or of_copies) and preset is None and not whole_gradients
            may_form = may_release or (self.is_sharded and isinstance(child, Child) and not whole_gradients)
            wanted = config.release_gradients if config else None
            release = may_release and isinstance(child, Child) if wanted is None else wanted
            structured = may_form and wanted is not False and saves_computation(child)
            self._averages_copies = of_copies and (release or structured)
            if isinstance(child, TaskFree) and self.args.fp16:
                structured = False  # a GradScaler sees only the parameters' own gradients
            self.optimizer = ChildOptimizer(
                groups,
                child,
                inner,
                rescale=config.rescale if config else None,
                preset=preset,
                release_gradients=release,
                model=module if structured else None,
                **options,
            )
            parameters = named(module, sharded=True)
            self._trained = {name for name, p in parameters.items() if p.requires_grad}
        return self.optimizer

    def _wrap_model(self, model: nn.Module, training: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        """Wrap the model for training; copies whose optimizer averages their gradients go without DDP."""
        wrapped: nn.Module = super()._wrap_model(model, training, *args, **kwargs)
        if training and self._averages_copies and wrapped is self.model:
            return self.accelerator.prepare_model(wrapped, evaluation_mode=True)
        return wrapped

    def _groups(self, model: nn.Module, options: dict[str, Any]) -> list[dict[str, Any]]:
        """The optimizer's parameter groups: by weight decay and by the options of methods."""
        decayed = set(self.get_decay_parameter_names(model))
        named = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        own: dict[str, dict[str, Any]] = {
            name: {"weight_decay": self.args.weight_decay if name in decayed else 0.0} for name in named
        }
        plain = {canonical_name(name): name for name in named}
        always = tuple(name for name in plain if matches(name, self.always))
        for method in self.methods:
            asked = method.group_options(model, always, options)
            for name, extra in asked.items():
                if plain.get(name) is not None:
                    own[plain[name]] |= extra
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for name, parameter in named.items():
            group = groups.setdefault(tuple(sorted(own[name].items())), {**own[name], "params": []})
            group["params"].append((name, parameter))
        return list(groups.values())

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as ``transformers.Trainer`` does; afterwards the model's layers are restored."""
        if self._in_copies:  # an evaluation marks it as prepared, and it would not be wrapped
            vars(self.bare_model).pop("_is_accelerate_prepared", None)
        if self.model_init is None:
            if self.methods and not resume_from_checkpoint:
                self.select()
            if self.optimizer is not None:
                self.child_optimizer.attach()
            self._begin()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._end()
            if self.optimizer is not None:
                self.child_optimizer.remove()
            if self._averages_copies:  # whoever trains this model next is to wrap it
                vars(self.bare_model).pop("_is_accelerate_prepared", None)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a new model from ``model_init``, and reset the state that belonged to the previous model."""
        model = super().call_model_init(trial)
        if self._is_built:
            self._end()
            self.model, self._always = model, self._given_always
            self.child = None if self.child_config is not None else self.child
            self.costs = self.touched = None
            self._begin()
        return model

    def _begin(self) -> None:
        self._make_alike()
        for method in self.methods:
            self._begun.append((method, self.bare_model))
            method.begin(self)

    def _end(self) -> None:
        while self._begun:
            method, model = self._begun.pop()
            method.end(model)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run the forward and backward pass of one batch, as often as the methods require."""

        self._share = inputs.pop(SHARE, 1.0) if isinstance(inputs, dict) else 1.0
        train: Any = super().training_step

        def step() -> Tensor:  # GRPO's inputs are a list
            given = dict(inputs) if isinstance(inputs, Mapping) else inputs
            return train(model, given, num_items_in_batch)

        for method in self.methods:
            step = partial(method.training_step, self, step)
        return step()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        """Return the batches of an update and, if the loss divides by it, their number of items."""
        iterator, *rest = args
        samples, num_items = super().get_batch_samples(map(hide_uncounted, iterator), *rest, **kwargs)
        samples = [show_uncounted(sample) for sample in samples]
        if self._divides_by_items is None and samples:
            self._divides_by_items = divides_by_items(self, samples[0])
            # Otherwise the loss is the batch's mean whatever num_items_in_batch is, and accumulated gradients would
            # be summed, not averaged.
            self.model_accepts_loss_kwargs = self._divides_by_items
            if not self._divides_by_items and self.loss_is_scaled_for_ga is None:
                self.loss_is_scaled_for_ga = False
        is_models = self.compute_loss_func is None and type(self).compute_loss is ChildTrainer.compute_loss
        divides = bool(self._divides_by_items)
        weigh(samples, self.bare_model, divides_by_items=divides, is_models=is_models)
        return samples, num_items if self._divides_by_items else None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss; in training, with the terms of the methods."""
        task: Any = super().compute_loss
        if not (model.training and self.methods):  # some trainers give no outputs
            found = task(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
            if not model.training or self._share == 1:
                return found
            return (found[0] * self._share, found[1]) if return_outputs else found * self._share
        given = dict(inputs)
        task_fn: Any = partial(task, return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss, outputs = task_fn(model, inputs)
        weight = share_of_mean(self, model, given, num_items_in_batch)
        step = LossStep(model, given, outputs, loss, task_fn, weight)
        for method in self.methods:
            loss = method.loss(loss, step)
        loss = loss * self._share if self._share != 1 else loss
        return (loss, outputs) if return_outputs else loss

    @property
    def child_optimizer(self) -> ChildOptimizer:
        """The ``ChildOptimizer``, without Accelerate's wrapper."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        assert isinstance(optimizer, ChildOptimizer)
        return optimizer

    def _tell_gradients(self) -> None:
        """Notify the methods, once per step, that the gradient is complete."""
        if self._gradients_told != self.state.global_step:
            self._gradients_told = self.state.global_step
            for callback in self._method_callbacks:
                callback.gradients_ready()

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        self.accelerator.unscale_gradients(self.optimizer)
        self._tell_gradients()
        return self.child_optimizer.clip_grad_norm_(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        if grad_norm is None:
            self.accelerator.unscale_gradients(self.optimizer)
            grad_norm = self.child_optimizer.clip_grad_norm_(float("inf"))
        return grad_norm

    def get_train_dataloader(self) -> DataLoader:
        """Return the training data loader, which uses ``train_batches`` if given."""
        if self.train_batches is None:
            return super().get_train_dataloader()
        dataset, collate = self._model_inputs("training")
        return shared_loader(
            dataset,
            self.train_batches,
            collate,
            self.accelerator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )
