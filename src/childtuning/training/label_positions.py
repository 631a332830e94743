"""Which label a language model or a tagger predicts where. Shapes: B examples, T labels, P positions of the logits."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100
_PREDICT_THE_NEXT = ("ForCausalLM", "LMHeadModel")


def predicted_labels(model: nn.Module, labels: Tensor, num_positions: int) -> Tensor:
    """Return the label that is predicted at each position: [B, T] -> [B, P], −100 where there is none.

    A causal language model predicts at each position the label of the next, as its loss has it. Positions that have no
    label, such as those of a soft prompt, stand in front.

    Args:
        model: unwrapped; the name of its class tells causal language models from others, as in transformers.
        labels: one a token.
        num_positions: P, at least T.
    """
    labels = F.pad(labels, (num_positions - labels.shape[-1], 0), value=IGNORED)
    return F.pad(labels[..., 1:], (0, 1), value=IGNORED) if _predicts_the_next(model) else labels


def _predicts_the_next(model: nn.Module) -> bool:
    name = type(model).__name__
    if name.endswith("ForConditionalGeneration"):
        return not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return name.endswith(_PREDICT_THE_NEXT)
