"""What a way to fine-tune may change about a training; the ways themselves are registered one layer up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from childtuning.child import Child, ChildConfig, TaskFree
from childtuning.optim import ChildOptimizer
from childtuning.training.further_pass import statistics_kept, unwrapped

Part = Literal["start", "modules", "child", "loss", "update"]
PARTS: tuple[Part, ...] = ("start", "modules", "child", "loss", "update")


class ChildTraining(Protocol):
    """What a method may ask a ``ChildTrainer`` for.

    Attributes:
        child: which entries are trained, once it is chosen.
        child_config: what it is chosen by.
        touched: every entry that was ever trained, where that is more than the child.
    """

    child: Child | TaskFree | None
    child_config: ChildConfig | None
    touched: Child | None

    @property
    def bare_model(self) -> nn.Module: ...

    @property
    def always(self) -> tuple[str, ...]: ...

    @property
    def child_optimizer(self) -> ChildOptimizer: ...

    def select(self) -> Child | TaskFree: ...


@dataclass(frozen=True)
class Prepared:
    """A model as a method will train it.

    Attributes:
        model: the pretrained model with its head, and whatever methods added.
        always: names of the parameters that are trained whole beside the child: the new head, and what methods made
            anew.
        eligible: names of the parameters that a child is chosen from; ``None``: all others that require a gradient.
    """

    model: nn.Module
    always: tuple[str, ...]
    eligible: tuple[str, ...] | None = None


@dataclass(frozen=True)
class LossStep:
    """One forward pass of the training, for methods that add to its loss.

    Attributes:
        model: as the trainer calls it.
        inputs: what it was called with, labels among them where the batch has them.
        outputs: what it returned.
        task_loss: the task's loss of this pass, without any method's term.
        task_fn: computes the task's loss of another pass as the trainer does; called with a model and a copy of the
            inputs, it returns the loss and the outputs.
        weight: the share of the batch in an accumulated gradient's mean where the trainer does not divide by the
            number of batches itself; else 1. A term that is a mean over the batch is multiplied by it.
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    outputs: Any
    task_loss: Tensor
    task_fn: Callable[[nn.Module, dict[str, Any]], tuple[Tensor, Any]]
    weight: float = 1.0

    @property
    def logits(self) -> Tensor:
        """The model's logits."""
        return logits_of(self.outputs)

    @property
    def bare_model(self) -> nn.Module:
        """The model inside the wrappers of the trainer: further passes go through it, and hooks are put on it."""
        return unwrapped(self.model)

    def forward(self, **changed: Any) -> Tensor:
        """Return the logits of another pass over the same inputs, or some of them changed, with fresh dropout.

        Running statistics stay those of the first pass.
        """
        model = self.bare_model
        inputs = {**self.inputs, **changed}
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            inputs.pop("labels", None)  # others make the decoder's inputs of them
        with statistics_kept(model):
            return logits_of(model(**inputs))

    def task_again(self) -> tuple[Tensor, Tensor]:
        """Return the task's loss and the logits of another pass over the same inputs, with fresh dropout.

        Running statistics stay those of the first pass.
        """
        model = self.bare_model
        with statistics_kept(model):
            loss, outputs = self.task_fn(model, dict(self.inputs))
        return loss, logits_of(outputs)


def logits_of(outputs: Any) -> Tensor:
    """Return the logits of what a model returned: a field, a key, or the first of a tuple behind the loss."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        return outputs["logits"]
    if hasattr(outputs, "logits"):
        return outputs.logits
    return next(entry for entry in outputs if isinstance(entry, Tensor) and entry.ndim > 0)


class Method:
    """One way to fine-tune, or one ingredient of a combination.

    A subclass is a frozen dataclass: its fields are the method's hyperparameters, the first of them is what stands
    behind the colon in ``name:value``. Every hook below does nothing unless it is overridden, so that methods compose.

    Class attributes:
        name: the word a user types.
        summary: one line for listings.
        source: the paper it comes from.
        trains: what is trained, in a few words.
        memory: what it holds beside the model, in a few words; n is the number of trained entries.
        part: what it decides: the ``child`` (which parameters are trained), added ``modules`` (the pretrained network
            is frozen), the ``start`` (weights or layers before training), a term of the ``loss``, or the ``update``.
        density: p where the user names none.
        chooses: it says itself what a child is chosen from, so that ``eligible`` patterns have no place.
        acts_on_pretrained: it chooses among the pretrained weights or changes what they do, so that it has no place
            beside added modules, which freeze them.
        excludes: methods that have no place beside it, and why, by their names; one of two says it.
        whole_gradients: it reads every trained parameter's gradient after the backward pass, so that gradients are
            neither released nor formed for rows alone.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    trains: ClassVar[str]
    memory: ClassVar[str]
    part: ClassVar[Part]
    density: ClassVar[float] = 1.0
    chooses: ClassVar[bool] = False
    acts_on_pretrained: ClassVar[bool] = False
    whole_gradients: ClassVar[bool] = False
    excludes: ClassVar[Mapping[str, str]] = {}

    def child(self, config: ChildConfig) -> ChildConfig:
        """Return what is trained, given the user's options.

        Raises:
            ConfigError: an option that this method does not take.
        """
        return config

    def prepare(self, prepared: Prepared) -> Prepared:
        """Change the model before anything is chosen or trained; also when a finished run is opened again.

        It may use torch's random numbers, and must add the same parameters in the same order every time.

        Raises:
            ModelError: the method does not apply to this model; the message says why.
        """
        return prepared

    def begin(self, model: nn.Module, always: tuple[str, ...]) -> None:
        """Change the model for the time of training; it still holds the values that training starts from."""

    def end(self, model: nn.Module) -> None:
        """Undo ``begin``."""

    def loss(self, loss: Tensor, step: LossStep) -> Tensor:
        """Return the loss with this method's term."""
        return loss

    def inner(
        self, inner: type[Optimizer], options: dict[str, Any]
    ) -> tuple[type[Optimizer], dict[str, Any]]:
        """Return the inner optimizer's class and options."""
        return inner, options

    def group_options(
        self, model: nn.Module, always: tuple[str, ...], options: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """Return optimizer options by parameter name, where they differ from the inner optimizer's ``options``.

        ``always`` are the names of the parameters that are trained whole beside the child.
        """
        return {}

    def training_step(self, trainer: ChildTraining, step: Callable[[], Tensor]) -> Tensor:
        """Run forward and backward pass of one batch, by calling ``step`` once or more; return the loss."""
        return step()

    def callback(self, trainer: ChildTraining) -> MethodCallback | None:
        """Return what is told of the training's events, and has a state that checkpoints keep."""
        return None

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what others need to use the result in a format of their own, beside the delta."""

    def merge(self, model: nn.Module) -> nn.Module:
        """Return the tuned model in the base model's own architecture.

        Raises:
            ModelError: what was added cannot be folded into it.
        """
        return model


class MethodCallback(TrainerCallback):
    """A ``TrainerCallback`` with a state, for what a method has to remember between steps."""

    def gradients_ready(self) -> None:
        """Called once a step when its gradient is complete, unscaled, and not yet clipped."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a bitwise resume needs: tensors and JSON-ready values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict``."""
