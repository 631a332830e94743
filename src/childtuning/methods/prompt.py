"""prompt: train embeddings that are prepended to the input, with PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from childtuning.errors import ConfigError
from childtuning.methods.peft_modules import to_save
from childtuning.methods.registry import register
from childtuning.methods.virtual_tokens import VirtualTokens

_STARTS = {"vocabulary": "SAMPLE_VOCAB", "random": "RANDOM"}


@register
@dataclass(frozen=True)
class Prompt(VirtualTokens):
    """Prepend embeddings of ``tokens`` virtual tokens to the input; train only these and the new head.

    Args:
        tokens: the number of virtual tokens.
        start: ``vocabulary``: embeddings of randomly drawn words, which the paper finds better; ``random``:
            normal with variance 1, PEFT's default, unlike typical embeddings.
    """

    name = "prompt"
    summary = "train virtual tokens in front of the input, and the head (PEFT)"
    source = "Lester et al. 2021, arXiv 2104.08691"
    trains = "embeddings of virtual tokens"
    rate = 200.0
    memory = "2n state, n values"

    start: str = "vocabulary"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in _STARTS:
            raise ConfigError(f"start of 'prompt' must be {' or '.join(_STARTS)}, got {self.start!r}.")

    def peft_config(self, model: Any, task_type: str | None, head: list[str]) -> Any:
        """Return PEFT's ``PromptTuningConfig``."""
        from peft import PromptTuningConfig

        return PromptTuningConfig(
            task_type=task_type,  # type: ignore[arg-type]
            num_virtual_tokens=self.tokens,
            num_layers=model.config.num_hidden_layers,
            token_dim=model.get_input_embeddings().weight.shape[
                1
            ],  # less than the hidden size in some networks
            num_attention_heads=model.config.num_attention_heads,
            prompt_tuning_init=_STARTS[self.start],
            modules_to_save=to_save(task_type, head),
        )
