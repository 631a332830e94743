"""The loss of each example: the user's, or that of a Hugging Face head, formed from its logits and labels.

The loss of an example is that of the batch which holds it alone. From one pass over a batch it is known in three cases:
the user's function returns one loss an example; it returns a scalar and the user states whether that is their mean or
their sum; or the model has a head whose loss is a known formula, which is compared with the model's own loss on every
batch. Anything else is ``NotFormedError``, and examples are run alone.

Shapes: B examples, P terms of an example's loss (positions, pixels, outputs), K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from childtuning.errors import ConfigError, DataError, counted, warn
from childtuning.fisher.batches import IGNORED_LABEL, examples, is_token_level, num_examples

LossFn = Callable[[nn.Module, Any], Tensor]
Reduction = Literal["mean", "sum"]

_LOSS_TYPES = ("ForCausalLM", "ForMaskedLM", "ForTokenClassification")


class NotFormedError(Exception):
    """The examples' losses do not follow from the batch's pass; the message is the reason and the remedy."""


class BatchLoss(NamedTuple):
    """The sum of the examples' own losses, and each of them where they are known."""

    total: Tensor
    losses: Tensor | None


def checked(loss: Any, size: int | None = None) -> Tensor:
    """Return what a user's function returned, if it is a loss.

    Args:
        loss: a scalar, or one loss an example.
        size: the number of examples; ``None``: unknown.
    Raises:
        DataError: no tensor, another shape, or no real numbers.
    """
    if not isinstance(loss, Tensor):
        got = type(loss).__name__
    elif loss.dim() > 1 or not loss.numel() or (loss.dim() and size not in (None, len(loss))):
        got = f"shape {tuple(loss.shape)}"
    elif not loss.is_floating_point():
        got = f"dtype {loss.dtype}"
    else:
        return loss
    examples = "" if size is None else f" for {counted(size, 'example')}"
    raise DataError(
        f"the loss must be a real number, or one an example, got {got}{examples}. Return losses of shape [B]."
    )


class UserLoss:
    """What the user's function returns: one loss an example, or a scalar.

    Args:
        loss_fn: ``loss_fn(model, batch)``.
        reduction: what a scalar is over examples; ``None``: unknown.
    """

    def __init__(self, loss_fn: LossFn, reduction: Reduction | None) -> None:
        self.loss_fn, self.reduction = loss_fn, reduction

    def alone(self, model: nn.Module, example: Any) -> Tensor:
        """Return the loss of a batch of one, a scalar."""
        return self.of_batch(model, example, 1, may_be_scalar=True).total

    def of_batch(self, model: nn.Module, batch: Any, size: int, *, may_be_scalar: bool = False) -> BatchLoss:
        """Return the examples' losses.

        Raises:
            NotFormedError: a scalar, and no stated reduction.
            ConfigError: one loss an example, and a stated reduction.
            DataError: another shape, or no real numbers.
        """
        loss = checked(self.loss_fn(model, batch), size)
        if loss.dim():
            if self.reduction is not None:
                raise ConfigError(
                    f"reduction={self.reduction!r} is for a loss_fn that returns a scalar, got one loss an example. "
                    "Leave it out."
                )
            return BatchLoss(loss.sum(), loss)
        if self.reduction is None and not may_be_scalar:
            raise NotFormedError(
                "How loss_fn weighs the examples of a batch is not known. Return one loss an example, or state "
                "reduction='mean' or 'sum' where it is that of the examples' own losses; a mean over tokens, or with "
                "class weights, is neither."
            )
        return BatchLoss(loss * size if self.reduction == "mean" else loss, None)


class HeadLoss:
    """The loss that a Hugging Face model computes itself, formed an example at a time from its outputs.

    An example without any label adds nothing, as in training; a warning says so once.
    """

    reduction = None

    def __init__(self) -> None:
        self._is_told = False

    def _tell(self) -> None:
        if not self._is_told:
            self._is_told = True
            warn("examples without any label, as where the prompt fills an input, add nothing to the scores.")

    def alone(self, model: nn.Module, example: Any) -> Tensor:
        """Return the loss of a batch of one, a scalar; without any label 0, where the mean would be 0/0."""
        outputs = run_model(model, example)
        loss = loss_of(outputs)
        has_no_value = isinstance(loss, FakeTensor) or torch._C._are_functorch_transforms_active()
        if has_no_value or bool(loss.detach().isfinite()):
            return loss
        terms = head_terms(model, outputs, example)
        if not terms or any(bool(part.counts.any()) for part in terms):
            return loss
        self._tell()
        return torch.stack([part.terms.sum() for part in terms]).sum()

    def of_batch(self, model: nn.Module, batch: Any, size: int) -> BatchLoss:
        """Return the examples' losses, after the formula has been found to give the model's own loss.

        Raises:
            NotFormedError: there is no formula for this head, or it does not give the model's own loss.
        """
        outputs = run_model(model, batch)
        own = loss_of(outputs)
        terms = head_terms(model, outputs, batch)
        if terms is None or any(len(part.terms) != size for part in terms):
            raise NotFormedError(
                f"The loss of {type(model).__name__} has no known formula. Pass loss_fn=f(model, batch) that returns "
                "one loss an example."
            )
        losses = sum(part.weight * part.terms.sum(1) / part.counts.clamp(min=1) for part in terms)
        with torch.no_grad(), torch._C.DisableTorchFunction():  # the engine follows what values decide
            if any(not bool(part.counts.all()) for part in terms):
                self._tell()
            whole = sum(part.weight * part.terms.sum() / part.counts.sum() for part in terms)
            assert isinstance(losses, Tensor) and isinstance(whole, Tensor)
            is_half = torch.finfo(own.dtype).bits < 32
            rtol = 0.03 if is_half else 1e-4
            if not torch.allclose(whole.double(), own.double(), rtol=rtol, atol=0.01 * rtol, equal_nan=True):
                raise NotFormedError(
                    f"The loss of {type(model).__name__} is {float(own):.6g}, and {float(whole):.6g} by the formula of "
                    "its head. Pass loss_fn=f(model, batch) that returns one loss an example."
                )
        return BatchLoss(losses.sum(), losses)


class Terms(NamedTuple):
    """A mean of terms, Σ terms / Σ counts over a batch: terms [B, P], 0 where ignored; counts [B]."""

    terms: Tensor
    counts: Tensor
    weight: float = 1.0


def head_terms(model: nn.Module, outputs: Any, batch: Mapping[str, Any]) -> list[Terms] | None:
    """Return the means that a head's loss is the sum of, as transformers has them; ``None`` for an unknown head."""
    bare = getattr(model, "get_base_model", lambda: model)()
    if {"start_positions", "end_positions"} <= batch.keys() and _get(outputs, "start_logits") is not None:
        ends = [(_get(outputs, f"{end}_logits"), batch[f"{end}_positions"]) for end in ("start", "end")]
        return [_span_terms(logits, positions) for logits, positions in ends]
    logits, labels = _get(outputs, "logits"), batch.get("labels")
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        return None
    logits = logits.float() if torch.finfo(logits.dtype).bits < 32 else logits
    labels = labels.to(logits.device)
    match _kind_of(bare, logits, labels):
        case "pixels":
            return [_class_terms(_of_pixels(logits, labels).flatten(1, 2), labels.flatten(1), _ignored(bare))]
        case "positions":
            if shifts_labels(model):
                logits, labels = logits[:, :-1], labels[:, 1:]
            return [_class_terms(logits, labels, IGNORED_LABEL)]
        case "class":
            return [_class_terms(logits.unsqueeze(1), labels.reshape(-1, 1), IGNORED_LABEL)]
        case "numbers":
            terms = (logits - labels.to(logits.dtype).reshape(logits.shape)).square()
        case "flags":
            terms = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
        case _:
            return None
    return [Terms(terms, terms.new_full((len(terms),), terms.shape[1]))]


def _kind_of(model: nn.Module, logits: Tensor, labels: Tensor) -> str | None:
    """Return what the labels of a head are, as transformers tells; ``None``: unknown."""
    if type(model).__name__.endswith("ForSemanticSegmentation"):
        return "pixels" if labels.dim() == 3 and logits.dim() == 4 and logits.shape[1] > 1 else None
    if is_token_level(labels) and logits.dim() == 3 and logits.shape[:2] == labels.shape:
        return "positions"
    if logits.dim() != 2 or len(labels) != len(logits):
        return None
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem == "regression" or (problem is None and logits.shape[1] == 1):
        return "numbers" if labels.numel() == logits.numel() else None
    if not labels.is_floating_point():
        return "class" if labels.numel() == len(logits) else None
    return "flags" if labels.shape == logits.shape else None


def _of_pixels(logits: Tensor, labels: Tensor) -> Tensor:
    """Bring logits [B, K, h, w] to the pixels of the labels: [B, H, W, K]."""
    return F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False).movedim(1, -1)


def _ignored(model: nn.Module) -> int:
    return getattr(getattr(model, "config", None), "semantic_loss_ignore_index", 255)


def _class_terms(logits: Tensor, labels: Tensor, ignored: int) -> Terms:
    """Cross entropy of [B, P, K] at [B, P], without the ignored ones."""
    terms = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ignored, reduction="none")
    return Terms(terms.view(labels.shape), (labels != ignored).sum(1))


def _span_terms(logits: Tensor, positions: Tensor) -> Terms:
    """Half of the cross entropy of where an answer starts or ends; positions outside the text are ignored."""
    logits = logits.float() if torch.finfo(logits.dtype).bits < 32 else logits
    length = logits.shape[1]
    positions = positions.reshape(-1, 1).to(logits.device).clamp(0, length)
    return _class_terms(logits.unsqueeze(1), positions, length)._replace(weight=0.5)


def _get(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def run_model(model: nn.Module, batch: Any) -> Any:
    """Call a Hugging Face model on a dict."""
    if not isinstance(batch, Mapping):
        raise DataError(
            f"without loss_fn a batch must be a dict, got {type(batch).__name__}. Pass loss_fn=f(model, batch)."
        )
    return model(**batch)


def loss_of(outputs: Any) -> Tensor:
    """Return the loss that a Hugging Face model computed itself when labels are in the batch."""
    loss = _get(outputs, "loss")
    if loss is None and isinstance(outputs, tuple) and outputs:
        loss = outputs[0]
    if not isinstance(loss, Tensor):
        raise DataError(
            "the model returned no loss. Put 'labels' into the batches, or pass loss_fn=f(model, batch)."
        )
    if loss.numel() != 1:
        raise DataError(f"the model's loss must be a scalar, got shape {tuple(loss.shape)}. Pass loss_fn.")
    return loss.reshape(())


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that a Hugging Face model computes itself."""
    return loss_of(run_model(model, batch))


def shifts_labels(model: nn.Module) -> bool:
    """Tell whether the model's loss compares each position's output with the next position's label."""
    bare = getattr(model, "get_base_model", lambda: model)()
    name = type(bare).__name__
    if name.endswith("ForConditionalGeneration"):
        return not getattr(getattr(bare, "config", None), "is_encoder_decoder", False)
    loss_type = getattr(bare, "loss_type", None)
    return loss_type == "ForCausalLM" or (loss_type not in _LOSS_TYPES and "LMHead" in name)


def _with_decoder_inputs(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add what an encoder-decoder would make of the labels, so that it stays when they are replaced."""
    is_given = {"decoder_input_ids", "decoder_inputs_embeds"} & batch.keys()
    if is_given or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return batch
    if not is_token_level(batch["labels"]):
        return batch
    shift_fn = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift_fn is None:
        raise ConfigError(
            f"labels='sampled' needs what the decoder of {type(model).__name__} reads, and the batch does not say. "
            "Put decoder_input_ids into the batches."
        )
    return {**batch, "decoder_input_ids": shift_fn(labels=batch["labels"])}


def losses_by_slices(outputs_loss_fn: Callable[[Any, Any], Tensor], label_key: str = "labels") -> LossFn:
    """Make a ``loss_fn`` that returns one loss an example of a function of (outputs, labels).

    ℓ_b = fn(outputs of b, labels of b): the model runs once on the batch, and its outputs are taken apart. The
    Trainer's ``compute_loss_func`` and label smoother are such functions.

    Args:
        outputs_loss_fn: ``fn(outputs, labels) -> scalar``.
        label_key: what the batch calls the labels.
    """

    def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        size = num_examples(batch)
        if label_key not in batch:
            raise DataError(f"the batch has no {label_key!r}. Put them into the batches.")
        outputs = model(**{key: value for key, value in batch.items() if key != label_key})
        labels = batch[label_key]
        return torch.stack(
            [
                outputs_loss_fn(_outputs_of(outputs, size, index), examples(labels, size, [index])).reshape(
                    ()
                )
                for index in range(size)
            ]
        )

    return loss_fn


def _outputs_of(outputs: Any, size: int, index: int) -> Any:
    """Return what a model returned of one example, in a container of the same kind."""
    if isinstance(outputs, Tensor):
        return outputs.narrow(0, index, 1) if outputs.dim() and len(outputs) == size else outputs
    if isinstance(outputs, Mapping):
        return type(outputs)(**{key: _outputs_of(value, size, index) for key, value in outputs.items()})
    if type(outputs) in (tuple, list):
        return type(outputs)(_outputs_of(value, size, index) for value in outputs)
    return outputs


class SampledLabels:
    """Labels drawn from the model's own prediction: the mean square of their gradient is the true Fisher.

    Classes are drawn from the softmax, positions and pixels each on its own (shifted by one for causal language
    models); ignored ones stay so. A decoder reads the data's labels, not those drawn. Several independent yes/no labels
    are drawn from the sigmoid. Real outputs are N(f(x), K/2) for K of them, whose −log density is the mean squared
    error such models train on. Draws are made example after example from one stream, so that they do not depend on how
    the data are cut into batches.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model = model
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: Any) -> Any:
        """Return the batch with its labels replaced.

        Raises:
            ConfigError: no labels, a head whose loss has no known formula, or a decoder whose inputs are not known.
        """
        if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
            raise ConfigError(
                "labels='sampled' needs dict batches with 'labels' and the model's own loss. Use labels='data'."
            )
        bare = getattr(self.model, "get_base_model", lambda: self.model)()
        labels = batch["labels"]
        batch = _with_decoder_inputs(bare, batch)
        with torch.no_grad():
            outputs = self.model(**{key: value for key, value in batch.items() if key != "labels"})
        logits = outputs.logits.detach()
        match _kind_of(bare, logits, labels):
            case "pixels":
                drawn = self._positions(_of_pixels(logits, labels), labels, _ignored(bare))
            case "positions":
                drawn = self._positions(logits, labels, IGNORED_LABEL, int(shifts_labels(self.model)))
            case "class":
                drawn = torch.stack([self._classes(row) for row in logits]).reshape(labels.shape)
            case "numbers" | "flags" as kind:
                draw = self._normal if kind == "numbers" else self._bernoulli
                drawn = torch.stack([draw(row) for row in logits.double().cpu()]).reshape(labels.shape)
            case _:
                raise ConfigError(
                    f"labels='sampled' has no formula for {type(bare).__name__} with logits {list(logits.shape)} and "
                    f"labels {list(labels.shape)} of {labels.dtype}. Use labels='data'."
                )
        # Whole numbers may have been given as the labels of a regression.
        is_real = drawn.is_floating_point() and not labels.is_floating_point()
        return {**batch, "labels": drawn.to(labels.device, logits.dtype if is_real else labels.dtype)}

    def _normal(self, mean: Tensor) -> Tensor:
        return (
            mean
            + torch.randn(mean.shape, generator=self.generator, dtype=mean.dtype, device="cpu")
            * (mean.numel() / 2) ** 0.5
        )

    def _bernoulli(self, logits: Tensor) -> Tensor:
        return (
            torch.rand(logits.shape, generator=self.generator, dtype=logits.dtype, device="cpu")
            < logits.sigmoid()
        )

    def _positions(self, logits: Tensor, labels: Tensor, ignored: int, offset: int = 0) -> Tensor:
        """Draw a class for each labelled position; only these use the stream, however long the padding."""
        drawn = labels.cpu().clone()
        for row, old, row_logits in zip(drawn, labels, logits, strict=True):
            where = old[offset:] != ignored
            row[offset:][where.cpu()] = self._classes(row_logits[: len(where)][where]).to(row)
        return drawn

    def _classes(self, logits: Tensor) -> Tensor:
        """Invert the distribution function of each row [..., K] at a uniform draw: [...]."""
        upto = logits.float().softmax(-1).cpu().double().cumsum(-1)
        draws = torch.rand((*upto.shape[:-1], 1), generator=self.generator, dtype=upto.dtype, device="cpu")
        return (
            torch.searchsorted(upto, draws * upto[..., -1:], right=True)
            .squeeze(-1)
            .clamp_(max=upto.shape[-1] - 1)
        )
