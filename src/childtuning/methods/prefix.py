"""prefix: train keys and values that are prepended in every layer, with PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from childtuning.methods.checks import not_for
from childtuning.methods.peft_modules import to_save
from childtuning.methods.registry import register
from childtuning.methods.virtual_tokens import VirtualTokens
from childtuning.training import ChildTraining


@register
@dataclass(frozen=True)
class Prefix(VirtualTokens):
    """Prepend trained keys and values of ``tokens`` virtual tokens in every layer's attention.

    The new head is trained in full. The paper reparametrises them by a wider network, for stability; here, as in
    PEFT's default, they are trained directly.

    Args:
        tokens: the number of virtual tokens.
    """

    name = "prefix"
    summary = "train virtual keys and values in every layer, and the head (PEFT)"
    source = "Li & Liang 2021, arXiv 2101.00190"
    trains = "keys and values of virtual tokens, in every layer"
    rate = 200.0
    memory = "2n state, n values"

    def peft_config(self, model: Any, task_type: str | None, head: list[str]) -> Any:
        """Return PEFT's ``PrefixTuningConfig``."""
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            task_type=task_type,  # type: ignore[arg-type]
            num_virtual_tokens=self.tokens,
            # PEFT does not know all the names that configurations use for these.
            num_layers=model.config.num_hidden_layers,
            token_dim=model.config.hidden_size,
            num_attention_heads=model.config.num_attention_heads,
            modules_to_save=to_save(task_type, head),
        )

    def training_step(self, trainer: ChildTraining, step: Callable[[], Tensor]) -> Tensor:
        """Run the step; refuse gradient checkpointing, with which layers silently ignore the prefix.

        Raises:
            ModelError: when gradient checkpointing is on.
        """
        if any(getattr(module, "gradient_checkpointing", False) for module in trainer.bare_model.modules()):
            raise not_for(
                self.name, trainer.bare_model, "with gradient checkpointing its layers ignore the prefix"
            )
        return step()
