"""The diagonal of the empirical Fisher information."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sized
from typing import Any, Literal

import torch
from torch import Tensor, nn

from childtuning.child.eligible import eligible as eligible_parameters
from childtuning.errors import ConfigError, DataError, did_you_mean
from childtuning.fisher.batches import num_examples, own_labels, to_device, without_trailing_padding
from childtuning.fisher.estimators import PerBatch, PerExample
from childtuning.fisher.losses import LossFn, SampledLabels
from childtuning.fisher.sums import Sums
from childtuning.fisher.untouched import untouched

Progress = Callable[[int, int | None], None]
ESTIMATORS = ("per-example", "per-batch")
LABELS = ("data", "sampled")


def fisher_information(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    estimator: Literal["per-example", "per-batch"] = "per-example",
    labels: Literal["data", "sampled"] = "data",
    eligible: Iterable[str] | None = None,
    always: Iterable[str] | None = None,
    progress: bool | Progress = False,
    *,
    training: bool = False,
    seed: int = 0,
    scores_device: torch.device | str | None = None,
    scores_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Estimate the diagonal empirical Fisher information of each parameter entry.

    F_i = (1/n) Σ_j (∂ log p(y_j | x_j; θ) / ∂θ_i)², one term an example. [Xu et al. 2021, eq. 7]

    ``per-batch`` is what the official code computes instead: the square of each batch's mean gradient, each
    parameter's gradient first clipped to norm 1 on its own, averaged over batches.

    Per-example gradients come from one backward pass a batch, layer by layer. They are compared with a batch of one
    on two examples of the first batch; parameters for which they are not right (custom layers, weights used outside
    their module, losses that mix examples) are differentiated one example at a time, and a UserWarning names their
    modules. With ``training=True`` all are, since dropout and batch statistics would differ.

    The pass leaves no trace: modes, gradients, flags, buffers and random streams are as before. Squares are taken in
    float32, so that half-precision gradients do not underflow.

    Scores can be kept on another device than the model's, or in bf16, which halves them. Squares are formed in float32
    beside the model all the same, and added one parameter at a time. Only the comparison at the first batch needs
    float32 scores of all, on the CPU and for a moment. Sums in bf16 are rounded at random, by bits that are a function
    of seed, name and number of the term; to the nearest they would stand still from 256 times a term on. They are
    unbiased. After n terms (batches; examples where they are taken one at a time) the standard deviation of an entry is
    at most 2^-8·√n of its value, and at most 2^-4 (6 %) for any n. The mean is rounded once more, by at most 2^-9.

    Args:
        model: the pretrained network with its head.
        batches: dicts for the model's own loss, with ``labels`` (Hugging Face), or whatever ``loss_fn`` takes. The
            first axis of every tensor counts examples. Moved to the model's device.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the batch's mean negative log-likelihood.
        estimator: ``per-example`` or ``per-batch``.
        labels: ``data`` for the data's own, ``sampled`` for labels drawn from the model (the true Fisher).
        eligible: patterns over parameter names to score; ``None``: every floating-point parameter that requires a
            gradient.
        always: patterns over names to leave out, such as a new head.
        progress: ``True`` counts examples on standard error; a function is called with (done, total or None).
        training: run in ``train()`` mode, as the official code does, instead of ``eval()``.
        seed: for sampled labels, for dropout when ``training``, and for rounding to bf16.
        scores_device: where the scores are kept; ``None``: each on its parameter's device.
        scores_dtype: ``torch.float32`` or ``torch.bfloat16``; ``None``: float32 (float64 for float64 parameters).
    Returns:
        by parameter name, in the model's order, a tensor of its shape, on the device and in the dtype asked for;
        zero where no gradient reaches.
    Raises:
        ConfigError: an unknown estimator, kind of labels, device or dtype.
        ParameterError: a pattern fits no parameter, or nothing is eligible.
        DataError: no batches, or batches without a loss, or a loss that is not finite.

    Example:
        >>> import torch
        >>> line = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(line.weight)
        >>> loss = lambda model, batch: 0.5 * (model(batch[0]) - batch[1]).square().mean()
        >>> data = [(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [1.0]]))]
        >>> fisher_information(line, data, loss)["weight"].item()  # (1·1)² and (2·1)², averaged
        2.5
    """
    for what, got, known in (("estimator", estimator, ESTIMATORS), ("labels", labels, LABELS)):
        if got not in known:
            raise ConfigError(
                f"{what} must be one of {', '.join(known)}, got {got!r}. {did_you_mean(got, known)}"
            )
    if labels == "sampled" and loss_fn is not None:
        raise ConfigError(
            "labels='sampled' draws from the model's own output, got a loss_fn. Leave loss_fn out."
        )
    parameters = eligible_parameters(model, eligible, always)
    sums = Sums(parameters, device=scores_device, dtype=scores_dtype, seed=seed)
    report = _reporter(progress, batches)
    device = next(iter(parameters.values())).device
    prepare = SampledLabels(model, seed) if labels == "sampled" else lambda batch: batch
    done = num_terms = 0
    with untouched(model, training=training):
        if estimator == "per-example":
            add_ = PerExample(model, loss_fn, sums, training=training)
        else:
            add_ = PerBatch(model, loss_fn, sums)
        torch.manual_seed(seed)
        for batch in batches:
            batch = to_device(batch, device)
            if estimator == "per-example":
                batch = own_labels(without_trailing_padding(batch))
            num_terms += add_(prepare(batch))
            done += num_examples(batch)
            report(done)
    if progress is True:
        print(file=sys.stderr)
    if num_terms == 0:
        raise DataError("there are no batches to estimate Fisher information from. Pass training examples.")
    return sums.means_(num_terms)


def _reporter(progress: bool | Progress, batches: Iterable[Any]) -> Callable[[int], None]:
    if not progress:
        return lambda done: None
    dataset = getattr(batches, "dataset", None)
    total = len(dataset) if isinstance(dataset, Sized) else None
    if callable(progress):
        return lambda done: progress(done, total)
    of_total = f"/{total}" if total is not None else ""
    return lambda done: print(
        f"\rFisher information: {done}{of_total} examples", end="", file=sys.stderr, flush=True
    )
