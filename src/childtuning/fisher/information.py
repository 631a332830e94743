"""The diagonal of the empirical Fisher information."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from childtuning.child.budget import Costs
from childtuning.child.eligible import bare_model
from childtuning.child.eligible import eligible as eligible_parameters
from childtuning.errors import ConfigError, DataError, did_you_mean
from childtuning.fast.products import wide_products
from childtuning.fisher.batches import num_entries, num_examples, to_device, unpacked
from childtuning.fisher.costs import training_costs
from childtuning.fisher.estimators import PerBatch, PerExample, not_reached
from childtuning.fisher.losses import HeadLoss, LossFn, Reduction, SampledLabels, UserLoss, shifts_labels
from childtuning.fisher.shared_pass import SharedPass
from childtuning.fisher.sums import ScoreSums
from childtuning.fisher.without_trace import without_trace

Progress = Callable[[int, int | None], None]
StopFn = Callable[[Mapping[str, Tensor], int], bool]
ESTIMATORS = ("per-example", "per-batch")
LABELS = ("data", "sampled")
REDUCTIONS = (None, "mean", "sum")


class Scores(dict[str, Tensor]):
    """Scores by parameter name.

    ``paths`` says, by name too, which way they went: ``engine``, ``vectorised``, ``loop``, or ``batch``;
    ``num_examples`` how many examples they are of. ``costs()`` counts a training step on the pass's largest batch, as
    long as the model lives.
    """

    paths: dict[str, str]
    num_examples: int
    costs: Callable[[], Costs | None]

    def __reduce__(self) -> tuple[type[dict], tuple[dict[str, Tensor]]]:
        """Pickle as a plain dict, which ``torch.load`` reads."""
        return dict, (dict(self),)


def fisher_information(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    reduction: Reduction | None = None,
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
    stop_fn: StopFn | None = None,
    share: bool = False,
) -> Scores:
    """Estimate the diagonal empirical Fisher information of each parameter entry.

    F_i = (1/n) Σ_j (∂ log p(y_j | x_j; θ) / ∂θ_i)², one term an example. [Xu et al. 2021, eq. 7]

    ``per-batch`` is what the official code computes instead: the square of each batch's mean gradient, each
    parameter's gradient first clipped to norm 1 on its own, averaged over batches.

    ℓ_j = −log p(y_j | x_j; θ) is the loss of the batch that holds example j alone, as it was given: with its padding.
    All examples of a batch are differentiated in one pass where their losses are known: ``loss_fn`` returns one an
    example, or ``reduction`` says what its scalar is, or a transformers head computes the loss from its logits and the
    labels by a formula, which is checked on every batch. Elsewhere, and for parameters that no faster way serves,
    examples are run one at a time, which is exact and slow, and a UserWarning says why.

    The processes of a model that ``fully_shard`` (FSDP2) or DistributedDataParallel has wrapped share the pass: each is
    given the same batches, takes every n-th, and has the scores of all, laid out as its parameters are (DTensors of a
    sharded model, whose weights are gathered for the pass). A bare model is scored by each process on its own, unless
    they ``share``.

    The pass leaves no trace: modes, gradients, flags, buffers, weights and random streams are as before. Squares are
    taken in float32, so that half-precision gradients do not underflow.

    Scores can be kept on another device than the model's, or in bf16, which halves them. Squares are formed in float32
    beside the model all the same, and added one parameter at a time. Sums in bf16 are rounded at random, by bits that
    are a function of seed, name and number of the term; to the nearest they would stand still from 256 times a term on.
    They are unbiased. After n terms (batches; examples where they are taken one at a time) the standard deviation of an
    entry is at most 2^-8·√n of its value, and at most 2^-4 (6 %) for any n. The mean is rounded once more, by 2^-9.

    Args:
        model: the pretrained network with its head, as it is or wrapped by torch.compile, DDP or ``fully_shard``.
        batches: dicts for the model's own loss, with ``labels`` (Hugging Face), or whatever ``loss_fn`` takes. The
            first axis of every tensor counts examples, but for tensors of length 1. Of a causal language model's packed
            row without ``attention_mask`` each sequence is an example: ``position_ids`` or ``cu_seq_lens_q`` tell them
            apart. Moved to the model's device.
        loss_fn: ``loss_fn(model, batch)``, the negative log-likelihood: one an example [B], or a scalar.
        reduction: what a scalar of ``loss_fn`` is over the examples of a batch, ``mean`` or ``sum``; ``None``: unknown,
            so that examples are run one at a time. A mean over tokens is neither.
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
        stop_fn: called after each batch as ``stop_fn(sums, done)``, with the sums so far by parameter name and the
            number of examples in them; the pass ends when it returns True.
        share: let all processes share the pass of a model that nothing wraps; all of them call this.
    Returns:
        by parameter name, in the model's order, a tensor of its shape, on the device and in the dtype asked for;
        zero where no gradient reaches.
    Raises:
        ConfigError: an unknown estimator, kind of labels, reduction, device or dtype.
        ParameterError: a pattern fits no parameter, nothing is eligible, or the forward pass changes a weight.
        DataError: no batches; batches without a loss, or whose axes disagree; a loss that is not finite, or that mixes
            examples.

    Example:
        >>> import torch
        >>> line = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(line.weight)
        >>> loss = lambda model, batch: 0.5 * (model(batch[0]) - batch[1]).square().mean()
        >>> data = [(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [1.0]]))]
        >>> fisher_information(line, data, loss, "mean")["weight"].item()  # (1·1)² and (2·1)², averaged
        2.5
    """
    choices = (
        ("estimator", estimator, ESTIMATORS),
        ("labels", labels, LABELS),
        ("reduction", reduction, REDUCTIONS),
    )
    for what, got, known in choices:
        if got not in known:
            words = list(map(str, known))
            raise ConfigError(
                f"{what} must be one of {', '.join(words)}, got {got!r}. {did_you_mean(str(got), words)}"
            )
    if labels == "sampled" and loss_fn is not None:
        raise ConfigError(
            "labels='sampled' draws from the model's own output, got a loss_fn. Leave loss_fn out."
        )
    if reduction is not None and loss_fn is None:
        raise ConfigError(f"reduction is for a loss_fn, got {reduction!r} without one. Leave it out.")
    given, model = model, bare_model(model)
    prepare = SampledLabels(model, seed) if labels == "sampled" else None
    unpacks = estimator == "per-example" and shifts_labels(model)
    loss = HeadLoss() if loss_fn is None else UserLoss(loss_fn, reduction)
    done = num_terms = 0
    largest: Any = None
    with SharedPass.of(given, share=share) as shared:
        with shared.ranks.agreed():
            if stop_fn is not None and shared.ranks.size > 1:
                raise ConfigError(
                    "stop_fn would see the sums of one process, and several share this pass. Leave it out."
                )
            parameters = eligible_parameters(model, eligible, always)
            sums = ScoreSums(parameters, device=scores_device, dtype=scores_dtype, seed=seed)
            report = _reporter(progress, batches)
            device = next(iter(parameters.values())).device
            scored = {id(parameter) for parameter in parameters.values()}
            trainable: list[Tensor] = [p for p in model.parameters() if p.requires_grad or id(p) in scored]
            with without_trace(model, training=training), wide_products(trainable):
                add_: PerExample | PerBatch = (
                    PerExample(model, loss, sums, trainable, training=training)
                    if estimator == "per-example"
                    else PerBatch(model, loss, sums, trainable)
                )
                torch.manual_seed(seed)
                for number, (given_batch, batch) in enumerate(_apart(batches, device, unpacks)):
                    done += num_examples(batch)
                    largest = (
                        max(largest, given_batch, key=num_entries) if largest is not None else given_batch
                    )
                    if prepare is not None:  # of every batch: the draws are one stream
                        batch = prepare(batch)
                    if shared.is_mine(number):
                        num_terms += add_(batch)
                    report(done)
                    if stop_fn is not None and stop_fn(sums.tensors, done):
                        break
            if progress is True:
                print(file=sys.stderr)
            if done == 0:
                raise DataError(
                    "there are no batches to estimate Fisher information from. Pass training examples."
                )
            if num_terms and not add_.is_reached:
                raise not_reached()
        shared.add_up_(sums.tensors)
        means = sums.means_(shared.total(num_terms))
        if not any(bool(mean.any()) for mean in means.values()):
            raise DataError(
                "every score is exactly 0: no example alone has a gradient. The loss mixes examples, or does not "
                "depend on eligible parameters. Pass a loss_fn that has a gradient for each example."
            )
        scores = Scores(shared.as_laid_out(means))
    scores.paths, scores.num_examples = add_.paths, done
    scores.costs = partial(_costs_of, weakref.ref(model), largest, loss_fn)
    return scores


def _apart(batches: Iterable[Any], device: torch.device, unpacks: bool) -> Iterator[tuple[Any, Any]]:
    """Yield the batches as given and as they are scored, with an example a row, on the device."""
    for batch in batches:
        batch = to_device(batch, device)
        for apart in unpacked(batch) if unpacks else [batch]:
            yield batch, apart


def _costs_of(model: Callable[[], nn.Module | None], batch: Any, loss_fn: LossFn | None) -> Costs | None:
    alive = model()
    return None if alive is None else training_costs(alive, batch, loss_fn)


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
