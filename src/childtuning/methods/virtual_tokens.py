"""The base class of prefix and prompt tuning: trained virtual tokens, and a check that they affect the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from childtuning.errors import ConfigError, ModelError
from childtuning.methods.checks import not_for
from childtuning.methods.peft_modules import PeftMethod, task_type
from childtuning.training import Prepared


@dataclass(frozen=True)
class VirtualTokens(PeftMethod):
    """A method that trains virtual tokens before the input.

    They use positions: if positions are learned, the maximum input length is reduced by their number.
    """

    tokens: int = 20

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"tokens of {self.name!r} must be at least 1, got {self.tokens}.")

    @property
    def num_positions(self) -> int:
        """The number of virtual tokens."""
        return self.tokens

    def prepare(self, prepared: Prepared) -> Prepared:
        """Wrap the model, and test it on an input of two tokens.

        Raises:
            ModelError: when the model does not support virtual tokens, or its output would depend on padding.
        """
        base = prepared.model
        if not hasattr(base, "config") or getattr(base, "main_input_name", "input_ids") != "input_ids":
            raise not_for(self.name, base, "it has no token embeddings to add virtual tokens to")
        wrapped = self._wrapped(prepared, task_type(base) or "FEATURE_EXTRACTION")
        was_training = base.training
        try:
            with torch.random.fork_rng(devices=[]):
                self._try(wrapped, base)
        except ModelError:
            raise
        except Exception as fault:  # a forward pass may raise anything
            raise not_for(self.name, base, fault) from None
        finally:
            wrapped.model.train(was_training)
        return wrapped

    def _try(self, wrapped: Prepared, base: nn.Module) -> None:
        model = wrapped.model.eval()
        short, padded = _inputs(base)
        with torch.enable_grad():
            ours, theirs = _output(model, short), _output(base, short)
            named = dict(model.named_parameters())
            tokens = [named[name] for name in wrapped.eligible or ()]
            gradients = (
                torch.autograd.grad(ours[..., 0].sum(), tokens, allow_unused=True)
                if ours.requires_grad
                else ()
            )
        if not any(gradient is not None and bool(gradient.any()) for gradient in gradients):
            raise not_for(self.name, base, "the virtual tokens do not affect its output")
        if ours.shape != theirs.shape and task_type(base) in ("TOKEN_CLS", "QUESTION_ANS"):
            raise not_for(self.name, base, "its output would include positions for the virtual tokens")
        if padded is None:
            return
        with torch.no_grad():
            if _same(theirs, _output(base, padded)) and not _same(ours, _output(model, padded)):
                raise not_for(
                    self.name,
                    base,
                    "after virtual tokens it treats padding as text, since it finds padding by token id",
                )

    def merge(self, model: nn.Module) -> nn.Module:
        """Refuse: virtual tokens are not a change of weights."""
        raise ModelError(
            f"the virtual tokens of {self.name!r} cannot be merged into the base model's weights. "
            "Use the run's folder."
        )


def _inputs(base: Any) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """An input of two tokens, and the same with a padding token if the model has one."""
    config, embeddings = base.config, base.get_input_embeddings().weight
    device, known = embeddings.device, range(len(embeddings))
    pad, end = (
        token if isinstance(token, int) and token in known else None
        for token in (getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None))
    )
    plain = [token for token in range(4) if token not in (pad, end)]
    last = plain[1] if end in (None, pad) else end
    extra = {}
    if task_type(base) == "SEQ_2_SEQ_LM":
        extra = {"decoder_input_ids": torch.tensor([[plain[0], last]], device=device)}

    def batch(ids: list[int], mask: list[int]) -> dict[str, Tensor]:
        of = {
            "input_ids": torch.tensor([ids], device=device),
            "attention_mask": torch.tensor([mask], device=device),
        }
        return of | extra

    short = batch([plain[0], last], [1, 1])
    return short, None if pad is None else batch([plain[0], last, pad], [1, 1, 0])


def _output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs)[0].float()


def _same(short: Tensor, padded: Tensor) -> bool:
    """Whether outputs at real tokens, or for the whole text, are equal up to rounding."""
    if padded.ndim > 2:
        padded = padded[:, : short.shape[1]]
    return bool((short - padded).abs().max() <= 1e-2 * short.abs().max())
