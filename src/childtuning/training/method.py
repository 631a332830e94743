"""The interface of fine-tuning methods; the methods themselves are registered one layer up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from childtuning.child import Child, ChildConfig, TaskFree
from childtuning.errors import ConfigError
from childtuning.optim import ChildOptimizer
from childtuning.training.further_pass import statistics_kept, unwrapped

Part = Literal["start", "modules", "child", "loss", "update"]
PARTS: tuple[Part, ...] = ("start", "modules", "child", "loss", "update")


class ChildTraining(Protocol):
    """The part of ``ChildTrainer`` that methods may use.

    Attributes:
        child: the entries that are trained; ``None`` before it is chosen.
        child_config: the configuration of the choice.
        touched: all entries trained so far, if more than the child.
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
    """A model prepared for training by methods.

    Attributes:
        model: the pretrained model with its head, and the modules that methods added.
        always: names of the parameters trained in full besides the child: the new head, and those that methods added
            or re-initialised.
        eligible: names of the parameters that a child is chosen from; ``None``: all others that require a gradient.
        redrawn: those of ``always`` that methods re-initialised.
    """

    model: nn.Module
    always: tuple[str, ...]
    eligible: tuple[str, ...] | None = None
    redrawn: tuple[str, ...] = ()

    @property
    def head(self) -> tuple[str, ...]:
        """The new head, or what the user trains in full in its place; () where the pretrained head is kept."""
        return tuple(name for name in self.always if name not in self.redrawn)


@dataclass(frozen=True)
class LossStep:
    """One forward pass of the training, for methods that add to its loss.

    Attributes:
        model: as the trainer calls it.
        inputs: the inputs of the pass, including labels if the batch has them.
        outputs: the outputs of the pass.
        task_loss: the task loss of this pass, without the terms of methods.
        task_fn: computes the task loss of another pass as the trainer does; takes a model and a copy of the inputs,
            and returns the loss and the outputs.
        weight: the batch's share in the mean of the accumulated gradient if the trainer does not divide by the number
            of batches itself; else 1. A term that is a mean over the batch is multiplied by it.
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
        """The model without the trainer's wrappers; use it for extra passes and for hooks."""
        return unwrapped(self.model)

    def forward(self, **changed: Any) -> Tensor:
        """Return the logits of another pass over the same inputs, with fresh dropout; ``changed`` replaces inputs.

        Running statistics are not updated.
        """
        model = self.bare_model
        inputs = {**self.inputs, **changed}
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            inputs.pop("labels", None)  # encoder-decoders make the decoder's inputs from them
        with statistics_kept(model):
            return logits_of(model(**inputs))

    def task_again(self) -> tuple[Tensor, Tensor]:
        """Return the task loss and the logits of another pass over the same inputs, with fresh dropout.

        Running statistics are not updated.
        """
        model = self.bare_model
        with statistics_kept(model):
            loss, outputs = self.task_fn(model, dict(self.inputs))
        return loss, logits_of(outputs)


def logits_of(outputs: Any) -> Tensor:
    """Return the logits in a model's outputs: a field, a key, or the first entry of a tuple after the loss."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        return outputs["logits"]
    if hasattr(outputs, "logits"):
        return outputs.logits
    return next(entry for entry in outputs if isinstance(entry, Tensor) and entry.ndim > 0)


class Method:
    """A fine-tuning method, used alone or in a combination.

    A subclass is a frozen dataclass: its fields are the method's hyperparameters, and the first field is the value
    after the colon in ``name:value``. Every hook below does nothing unless it is overridden, so that methods compose.

    Class attributes:
        name: the name a user types.
        summary: one line for listings.
        source: the paper it comes from.
        trains: what is trained, in a few words.
        memory: the memory it needs besides the model, in a few words; n is the number of trained entries.
        part: what it changes: the ``child`` (which parameters are trained), added ``modules`` (the pretrained network
            is frozen), the ``start`` (weights or layers before training), a term of the ``loss``, or the ``update``.
        density: the default of p.
        rate: the learning rate that suits it, as a multiple of full tuning's.
        redraws: it trains layers of the network in full from new values, whatever the others train.
        chooses: it sets the parameters that a child is chosen from, so that ``eligible`` patterns are refused.
        acts_on_pretrained: it selects pretrained weights or changes their effect, so that it cannot be combined with
            added modules, which freeze them.
        excludes: methods that it cannot be combined with: name -> reason. Only one of the two needs an entry.
        whole_gradients: it reads every trained parameter's gradient after the backward pass, so that gradients are
            neither released early nor computed for rows only.
        shards: it trains a model that several processes hold in pieces (FSDP2) as it trains a whole one; tested.
        package: what it needs besides this library's own requirements; ``None``: nothing.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    trains: ClassVar[str]
    memory: ClassVar[str]
    part: ClassVar[Part]
    density: ClassVar[float] = 1.0
    rate: ClassVar[float] = 1.0
    redraws: ClassVar[bool] = False
    chooses: ClassVar[bool] = False
    acts_on_pretrained: ClassVar[bool] = False
    whole_gradients: ClassVar[bool] = False
    reselects: ClassVar[bool] = False
    shards: ClassVar[bool] = False
    package: ClassVar[str | None] = None
    excludes: ClassVar[Mapping[str, str]] = {}

    def check_installed(self) -> None:
        """Raise a ConfigError if the package that it needs is missing."""
        if self.package is not None and find_spec(self.package) is None:
            raise ConfigError(
                f"method {self.name!r} needs {self.package}. Install it: pip install {self.package}."
            )

    @property
    def num_positions(self) -> int:
        """How many of a model's positions it takes from the input."""
        return 0

    def child(self, config: ChildConfig) -> ChildConfig:
        """Return the configuration of the child, given the user's options.

        Raises:
            ConfigError: for an option that this method does not accept.
        """
        return config

    def prepare(self, prepared: Prepared) -> Prepared:
        """Change the model before the child is chosen; also called when a finished run is opened again.

        It may use torch's random numbers, and must add the same parameters in the same order every time.

        Raises:
            ModelError: when the method does not apply to this model; the message gives the reason.
        """
        return prepared

    def begin(self, trainer: ChildTraining) -> None:
        """Change the trainer's model for the duration of training; its parameters still have their initial values."""

    def end(self, model: nn.Module) -> None:
        """Undo ``begin`` on a model."""

    def loss(self, loss: Tensor, step: LossStep) -> Tensor:
        """Return the loss plus this method's term."""
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

        ``always`` are the names of the parameters trained in full besides the child.
        """
        return {}

    def training_step(self, trainer: ChildTraining, step: Callable[[], Tensor]) -> Tensor:
        """Run the forward and backward pass of one batch by calling ``step`` at least once; return the loss."""
        return step()

    def callback(self, trainer: ChildTraining) -> MethodCallback | None:
        """Return a callback for training events, whose state is saved in checkpoints; ``None`` if not needed."""
        return None

    def warning(self, num_steps: int) -> str | None:
        """Return one line if a run of so many steps is too short for the options; else ``None``."""
        return None

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the result in another library's format, in addition to the delta."""

    def merge(self, model: nn.Module) -> nn.Module:
        """Return the tuned model in the base model's own architecture.

        Raises:
            ModelError: when the added modules cannot be merged into it.
        """
        return model


class MethodCallback(TrainerCallback):
    """A ``TrainerCallback`` with a state that a method keeps between steps."""

    def gradients_ready(self) -> None:
        """Called once per step, when its gradient is complete and unscaled, but not yet clipped."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a bitwise resume needs: tensors and JSON-ready values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state returned by ``state_dict``."""
