"""What the methods that come from PEFT share: wrapping a model, its head, what is saved."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from childtuning.errors import ConfigError, ModelError
from childtuning.methods.checks import not_for
from childtuning.training import Method, Prepared
from childtuning.training.method import Part

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
_COPY = ".modules_to_save."


@dataclass(frozen=True)
class PeftMethod(Method, ABC):
    """A method whose modules are PEFT's: it freezes the network, adds them, and trains them and the head.

    The head is trained in a copy, beside the untouched one, as PEFT has it.
    """

    part: ClassVar[Part] = "modules"
    chooses: ClassVar[bool] = True

    @abstractmethod
    def peft_config(self, model: nn.Module, task_type: str | None, head: list[str]) -> Any:
        """Return PEFT's configuration.

        Args:
            model: the model before it is wrapped.
            task_type: PEFT's word for the model's task; ``None`` if it has none for it.
            head: paths of the modules that are trained whole.
        """

    def prepare(self, prepared: Prepared) -> Prepared:
        """Wrap the model.

        Raises:
            ModelError: PEFT cannot, or a parameter that is trained whole is only a part of its module.
            ConfigError: PEFT is not installed.
        """
        return self._wrapped(prepared, task_type(prepared.model))

    def _wrapped(self, prepared: Prepared, task: str | None) -> Prepared:
        try:
            from peft import PeftModel, get_peft_model
        except ImportError:
            raise ConfigError(
                f"method {self.name!r} needs PEFT. Install it: pip install 'childtuning[peft]'."
            ) from None
        if isinstance(prepared.model, PeftModel):
            raise ModelError(
                f"method {self.name!r} got a model that PEFT has wrapped already. Merge it first."
            )
        head = _head_modules(self.name, prepared.model, prepared.always)
        set_aside = [p for name, p in prepared.model.named_parameters() if name in set(prepared.always)]
        try:
            with warnings.catch_warnings():  # it asks transformers for a property by an old name
                warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
                model = get_peft_model(prepared.model, self.peft_config(prepared.model, task, head))  # type: ignore[arg-type]
        except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError) as fault:
            raise not_for(self.name, prepared.model, fault) from None
        # PEFT keeps the new head beside the copy that it trains, and never uses it. As zeros it is the same on every
        # machine, also on those that draw other random numbers from a seed.
        with torch.no_grad():
            for parameter in set_aside:
                parameter.zero_()
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        copies = tuple(name for name in trained if _COPY in name)
        return Prepared(model, copies, tuple(name for name in trained if _COPY not in name))

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write PEFT's own files, which ``peft.PeftModel.from_pretrained`` reads."""
        model.save_pretrained(str(folder))  # type: ignore[operator]


def task_type(model: nn.Module) -> str | None:
    """Return PEFT's word for what a transformers model is for."""
    if not hasattr(model, "config"):
        return None
    return next((task for ending, task in _TASKS.items() if type(model).__name__.endswith(ending)), None)


def to_save(task: str | None, head: list[str]) -> list[str] | None:
    """Return the modules that PEFT has to be told to train whole: the head, but for what it trains unasked.

    For other tasks than this it adds its names after it has chosen its targets, and would wrap the head twice.
    """
    own = ("classifier", "score") if task == "SEQ_CLS" else ()
    return [path for path in head if path not in own] or None


def _head_modules(method: str, model: nn.Module, always: Iterable[str]) -> list[str]:
    """The outermost modules that hold nothing but parameters which are trained whole."""
    wanted = set(always)
    found: list[str] = []
    covered: set[str] = set()
    for path, module in model.named_modules():
        names = {f"{path}.{name}" for name, _ in module.named_parameters()}
        container = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        if path and names and names <= wanted and not names <= covered and not container:
            found.append(path)
            covered |= names
    if wanted - covered:
        raise not_for(method, model, f"{min(wanted - covered)!r} is trained whole, but its module is not")
    return found
