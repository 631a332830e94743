"""Temperature scaling: logits divided by a number, so that the confidence of answers is about how often they are right.

softmax(z / T), with the T that minimises the log loss of held-out examples [Guo et al. 2017, section 4.2]. T is written
into the weights of the model's last layer, so that the delta, and every model made of it, gives these probabilities.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from childtuning.child.eligible import canonical_name, matches
from childtuning.errors import ConfigError
from childtuning.runs.evaluate import RunTests
from childtuning.tasks.metrics import probabilities

_MOST = 20.0  # and 1/20 at least


def fitted_temperature(logits: np.ndarray, truth: np.ndarray) -> float:
    """Return the temperature that minimises the log loss.

    Args:
        logits: [N, K].
        truth: class ids [N].
    Returns:
        a number in [1/20, 20].
    """

    def log_loss(log_temperature: float) -> float:
        chances = probabilities(logits / np.exp(log_temperature))[np.arange(len(truth)), truth]
        return float(-np.log(np.maximum(chances, np.finfo(np.float64).tiny)).mean())

    found = minimize_scalar(log_loss, bounds=(-np.log(_MOST), np.log(_MOST)), method="bounded")
    return float(np.exp(found.x))  # type: ignore[attr-defined]


def output_layer(model: nn.Module, always: Iterable[str], tests: RunTests) -> list[nn.Parameter]:
    """Return the weight and bias of the layer that makes the logits.

    It is a linear layer that is trained in full; halving it halves the logits of a held-out example.

    Args:
        model: the model.
        always: names or patterns of the parameters trained in full.
        tests: the run's evaluation sets, with held-out examples.
    Raises:
        ConfigError: when there is no such layer.
    """
    patterns = tuple(always)
    before = np.stack(tests.held_out_answers(model).outputs)
    for name, layer in reversed([*model.named_modules()]):
        names = [canonical_name(f"{name}.{own}") for own, _ in layer.named_parameters(recurse=False)]
        if not isinstance(layer, nn.Linear) or not all(matches(one, patterns) for one in names):
            continue
        parameters = list(layer.parameters())
        divide(parameters, 2.0)
        after = np.stack(tests.held_out_answers(model).outputs)
        divide(parameters, 0.5)
        if np.allclose(2 * after, before, rtol=1e-3, atol=1e-4):
            return parameters
    raise ConfigError(
        "temperature_scaling needs a linear layer that makes the logits and is trained in full, got none. Leave it out."
    )


@torch.no_grad()
def divide(parameters: Iterable[Tensor], temperature: float) -> None:
    """Divide parameters in place."""
    for parameter in parameters:
        parameter.div_(temperature)
