"""Temperature scaling: logits divided by a number, so that the confidence of answers is about how often they are right.

softmax(z / T), with the T that minimises the log loss of held-out examples [Guo et al. 2017, section 4.2]. T is written
into the weights of the model's last layer, so that the delta, and every model made of it, gives these probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from childtuning.child.eligible import canonical_name, matches
from childtuning.errors import ConfigError
from childtuning.runs.evaluate import RunTests
from childtuning.tasks.metrics import metric_fn, score

_MOST = 20.0  # and 1/20 at least
_FEW = 50  # examples


def fitted_temperature(logits: np.ndarray, truth: np.ndarray) -> float:
    """Return the temperature that minimises the log loss.

    Args:
        logits: [N, K].
        truth: class ids [N].
    Returns:
        a number in [1/20, 20].
    """

    bounds = (-np.log(_MOST), np.log(_MOST))
    found = minimize_scalar(
        lambda log: log_loss(logits / np.exp(log), truth), bounds=bounds, method="bounded"
    )
    return float(np.exp(found.x))  # type: ignore[attr-defined]


def log_loss(logits: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean negative log probability of the truth."""
    return score(metric_fn("log-loss", logits.argmax(1), truth, logits=logits), len(truth))


def output_layer(model: nn.Module, always: Iterable[str], tests: RunTests) -> list[nn.Parameter]:
    """Return the weight and bias of the layer that makes the logits.

    It is a linear layer that is trained in full; halving it halves the logits of every held-out example, whatever the
    biases of the model.

    Args:
        model: the model.
        always: names or patterns of the parameters trained in full.
        tests: the run's evaluation sets, with held-out examples.
    Raises:
        ConfigError: when there is no such layer.
    """
    patterns = tuple(always)
    found = []
    for name, layer in model.named_modules():
        names = [canonical_name(f"{name}.{own}") for own, _ in layer.named_parameters(recurse=False)]
        if isinstance(layer, nn.Linear) and all(matches(one, patterns) for one in names):
            found.append(list(layer.parameters()))
    biases = {id(p): p for p in model.parameters() if p.dim() == 1 and p.is_floating_point()}
    kept = [(bias, bias.detach().clone()) for bias in biases.values()]
    try:
        for bias in biases.values():  # a new head's are 0: every layer below it would pass then
            bias.data.add_(1.0)
        before = np.stack(tests.held_out_answers(model).outputs)
        for parameters in reversed(found):
            divide(parameters, 2.0)
            after = np.stack(tests.held_out_answers(model).outputs)
            divide(parameters, 0.5)
            if np.allclose(2 * after, before, rtol=1e-3, atol=1e-4 * np.abs(before).max()):
                return parameters
    finally:
        with torch.no_grad():
            for bias, values in kept:
                bias.copy_(values)
    raise ConfigError(
        "temperature_scaling needs a linear layer that makes the logits and is trained in full, got none. Leave it out."
    )


@torch.no_grad()
def divide(parameters: Iterable[Tensor], temperature: float) -> None:
    """Divide parameters in place."""
    for parameter in parameters:
        parameter.div_(temperature)


def scale(
    model: nn.Module, parameters: Sequence[Tensor], tests: RunTests, tell: Callable[[str], None]
) -> float | None:
    """Fit the temperature to the held-out examples and divide the parameters by it.

    Args:
        model: the trained model.
        parameters: those of its ``output_layer``.
        tests: the run's evaluation sets.
        tell: called with lines for the user.
    Returns:
        the temperature; ``None`` where no held-out example is answered wrong, which has no best temperature.
    """
    answered = tests.held_out_answers(model)
    logits = np.stack(answered.outputs)
    truth = np.asarray(tests.task.rules.truth(answered.split, tests.task.label_names))
    if (logits.argmax(1) == truth).all():
        tell(
            f"temperature: none of the {len(truth)} held-out examples is answered wrong, so that none can be fitted; "
            "the logits stay. Hold out more (--held-out)."
        )
        return None
    temperature = fitted_temperature(logits, truth)
    before, after = log_loss(logits, truth), log_loss(logits / temperature, truth)
    tell(
        f"temperature {temperature:.3f}: log loss of the {len(truth)} held-out examples that it is fitted to "
        f"{before:.4f} → {after:.4f}"
    )
    if len(truth) < _FEW:
        tell(f"warning: {len(truth)} examples say little about a temperature. Hold out more (--held-out).")
    if not 1.01 / _MOST < temperature < _MOST / 1.01:
        tell("warning: the temperature is at the end of its range: the confidences say nothing.")
    divide(parameters, temperature)
    return temperature
