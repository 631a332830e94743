"""The loss whose gradient is squared: the model's own, on the data's labels or on labels drawn from the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from childtuning.errors import ConfigError, DataError
from childtuning.fisher.batches import IGNORED_LABEL, is_token_level

LossFn = Callable[[nn.Module, Any], Tensor]


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that a Hugging Face model computes itself when labels are in the batch."""
    if not isinstance(batch, Mapping):
        raise DataError(
            f"without loss_fn a batch must be a dict, got {type(batch).__name__}. Pass loss_fn=f(model, batch)."
        )
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if loss is None and isinstance(output, Mapping):
        loss = output.get("loss")
    if loss is None and isinstance(output, tuple) and output:
        loss = output[0]
    if not isinstance(loss, Tensor):
        raise DataError(
            "the model returned no loss. Put 'labels' into the batches, or pass loss_fn=f(model, batch)."
        )
    return loss


def shifts_labels(model: nn.Module) -> bool:
    """Tell whether the model's loss compares each position's output with the next position's label."""
    loss_type = getattr(model, "loss_type", None)
    return loss_type == "ForCausalLM" or (loss_type is None and "LMHead" in type(model).__name__)


class SampledLabels:
    """Labels drawn from the model's own prediction: the mean square of their gradient is the true Fisher.

    Classes are drawn from the softmax, sequence positions each on its own (shifted by one for causal language
    models); positions labelled −100 stay ignored. Several independent yes/no labels are drawn from the sigmoid. Real
    outputs are N(f(x), K/2) for K of them, whose −log density is the mean squared error such models train on. Draws
    are made example after example from one stream, so that they do not depend on how the data are cut into batches.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model = model
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: Any) -> Any:
        """Return the batch with its labels replaced."""
        if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
            raise ConfigError(
                "labels='sampled' needs dict batches with 'labels' and the model's own loss. Use labels='data'."
            )
        labels = batch["labels"]
        with torch.no_grad():
            outputs = self.model(**{key: value for key, value in batch.items() if key != "labels"})
        logits = outputs.logits.detach()
        if labels.is_floating_point():
            draw = self._bernoulli if self._is_multi_label(logits) else self._normal
            logits = logits.double().cpu().reshape(labels.shape)
            drawn = torch.stack([draw(row) for row in logits])
        elif is_token_level(labels):
            drawn = self._positions(logits, labels)
        else:
            logits = logits.reshape(*labels.shape, -1)
            drawn = torch.stack([self._classes(row) for row in logits])
        return {**batch, "labels": drawn.to(labels)}

    def _is_multi_label(self, logits: Tensor) -> bool:
        problem = getattr(getattr(self.model, "config", None), "problem_type", None)
        return problem == "multi_label_classification" or (problem is None and logits.shape[-1] > 1)

    def _normal(self, mean: Tensor) -> Tensor:
        return (
            mean
            + torch.randn(mean.shape, generator=self.generator, dtype=mean.dtype) * (mean.numel() / 2) ** 0.5
        )

    def _bernoulli(self, logits: Tensor) -> Tensor:
        return torch.rand(logits.shape, generator=self.generator, dtype=logits.dtype) < logits.sigmoid()

    def _positions(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Draw a class for each labelled position; only these use the stream, however long the padding."""
        offset = int(shifts_labels(self.model))
        drawn = labels.cpu().clone()
        for row, old, row_logits in zip(drawn, labels, logits, strict=True):
            where = (old[offset:] != IGNORED_LABEL).nonzero().squeeze(1)
            row[where.cpu() + offset] = self._classes(row_logits[where]).to(row)
        return drawn

    def _classes(self, logits: Tensor) -> Tensor:
        """Invert the distribution function of each row [..., K] at a uniform draw: [...]."""
        upto = logits.float().softmax(-1).cpu().double().cumsum(-1)
        draws = torch.rand((*upto.shape[:-1], 1), generator=self.generator, dtype=upto.dtype)
        return (
            torch.searchsorted(upto, draws * upto[..., -1:], right=True)
            .squeeze(-1)
            .clamp_(max=upto.shape[-1] - 1)
        )
