"""The base class of methods that use PEFT: wrap a model, train its head, save PEFT's files."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from childtuning.errors import ModelError
from childtuning.methods.checks import not_for
from childtuning.methods.whole import with_head
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
    """A method that freezes the network, adds modules of PEFT, and trains these and the head.

    As usual in PEFT, a copy of the head is trained; the original is kept but not used.
    """

    part: ClassVar[Part] = "modules"
    chooses: ClassVar[bool] = True
    package: ClassVar[str | None] = "peft"

    @abstractmethod
    def peft_config(self, model: nn.Module, task_type: str | None, head: list[str]) -> Any:
        """Return PEFT's configuration.

        Args:
            model: the model before it is wrapped.
            task_type: PEFT's name for the model's task; ``None`` if it has none.
            head: paths of the modules that are trained in full.
        """

    def prepare(self, prepared: Prepared) -> Prepared:
        """Wrap the model.

        Raises:
            ModelError: when PEFT cannot wrap it, or a module has parameters that are trained in full and others.
            ConfigError: when PEFT is not installed.
        """
        return self._wrapped(prepared, task_type(prepared.model))

    def _wrapped(self, prepared: Prepared, task: str | None) -> Prepared:
        self.check_installed()
        from peft import PeftModel, get_peft_model

        if isinstance(prepared.model, PeftModel):
            raise ModelError(
                f"method {self.name!r} got a model that PEFT has already wrapped. Merge it first."
            )
        head = _head_modules(self.name, prepared.model, with_head(prepared))
        set_aside = [p for name, p in prepared.model.named_parameters() if name in set(prepared.always)]
        try:
            with warnings.catch_warnings():  # it uses the old name of a property of transformers
                warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
                model = get_peft_model(prepared.model, self.peft_config(prepared.model, task, head))  # type: ignore[arg-type]
        except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError) as fault:
            raise not_for(self.name, prepared.model, fault) from None
        # PEFT keeps the original new head but never uses it. Set to zero, it is the same on every machine, even if
        # machines draw different random numbers from the same seed.
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
    """Return PEFT's name for the task of a transformers model."""
    if not hasattr(model, "config"):
        return None
    return next((task for ending, task in _TASKS.items() if type(model).__name__.endswith(ending)), None)


def to_save(task: str | None, head: list[str]) -> list[str] | None:
    """Return PEFT's ``modules_to_save``: the head, except modules that PEFT trains by default.

    For tasks other than SEQ_CLS, PEFT adds the default names after it has chosen its targets; it would then wrap the
    head twice.
    """
    own = ("classifier", "score") if task == "SEQ_CLS" else ()
    return [path for path in head if path not in own] or None


def _head_modules(method: str, model: nn.Module, always: Iterable[str]) -> list[str]:
    """The outermost modules whose parameters are all trained in full."""
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
        raise not_for(method, model, f"{min(wanted - covered)!r} is trained in full, but its module is not")
    return found
