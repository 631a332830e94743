"""The two ways to add up squared gradients: one term an example, or one term a batch.

Both are called with batches on the model's device, inside ``untouched``, and return the number of terms added.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from childtuning.errors import ParameterError
from childtuning.fisher.batches import contrasting_pair, example, examples, num_examples
from childtuning.fisher.engine import Engine
from childtuning.fisher.loop import add_batch_squares_, add_example_squares_
from childtuning.fisher.losses import LossFn, model_loss, shifts_labels
from childtuning.fisher.sums import Sums
from childtuning.fisher.weights import ExampleWeights

_DISAGREE = "the layer-wise pass does not agree with the batch-of-one loop"
_NO_WEIGHTS = "the loss of a batch is no weighted mean of its examples' losses"
_NOT_REACHED = "the loss does not depend on any eligible parameter. Check the eligible patterns."


class PerBatch:
    """The square of each batch's mean gradient, clipped, as the official code has it."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn | None,
        sums: Sums,
    ) -> None:
        self.model, self.loss_fn = model, loss_fn or model_loss
        self.parameters, self.sums = sums.parameters, sums

    def __call__(self, batch: Any) -> int:
        """Add one term."""
        if not add_batch_squares_(self.sums, self.model, batch, self.loss_fn, self.parameters):
            raise ParameterError(_NOT_REACHED)
        return 1


class PerExample:
    """The square of each example's gradient, by the engine where it is right and by the batch-of-one loop elsewhere.

    The engine is right where it agrees with the loop on two unlike examples of the first batch; a parameter whose
    module took no part in those two is compared on the first batch where it does. The rest is announced, once.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn | None,
        sums: Sums,
        *,
        training: bool,
    ) -> None:
        self.model, self.loss_fn = model, loss_fn or model_loss
        self.parameters, self.sums = sums.parameters, sums
        self.engine = Engine(model, self.parameters)
        self.weights = ExampleWeights(own_loss=loss_fn is None, shifted=shifts_labels(model))
        # In train mode dropout and batch statistics differ in a batch.
        self.looped = set(self.parameters) if training else set()
        self.proven: set[str] = set()
        self.checked = training

    def __call__(self, batch: Any) -> int:
        """Add one term for each example."""
        size = num_examples(batch)
        if size > 1 and not self.checked:
            self._check(batch, size)
        if self.looped == set(self.parameters) or not self.checked:
            self._loop(batch, size, self.parameters, self.sums, demand=True)
            return size
        if not self._settle_weights(batch, size):
            return self(batch)
        found = self._run(batch, size)
        if self.looped:
            self._loop(batch, size, self.looped, self.sums)
        if found:
            self._prove(batch, size, found)
        return size

    def _run(self, batch: Any, size: int) -> dict[str, Tensor | None]:
        """Add what the engine finds of proven parameters; return what it finds of others, or None where it failed."""
        unproven: dict[str, Tensor | None] = {}

        def sink(name: str, add: Callable[[Tensor], None]) -> None:
            if name in self.proven:
                return self.sums.add(name, add)
            score = self.sums.zero(name)
            add(score)
            if bool(score.any()):
                unproven[name] = score
            return None

        wanted = set(self.parameters) - self.looped
        failed = self.engine.run(
            batch, size, self.loss_fn, wanted, lambda loss: self.weights(batch, size), sink
        )
        return unproven | dict.fromkeys(failed)

    def _prove(self, batch: Any, size: int, unproven: Mapping[str, Tensor | None]) -> None:
        """Do the batch by the loop for these parameters; those that the engine had wrong stay with the loop."""
        reference = self.sums.exact(unproven)
        self._loop(batch, size, unproven, reference)
        scale = self.sums.largest()
        wrong = set()
        for name, found in unproven.items():
            wanted = reference[name].to(self.parameters[name].device)
            if found is None or not self._agree(name, found, wanted, scale):
                wrong.add(name)
            self.sums.add(name, lambda total, wanted=wanted: total.add_(wanted))
        self.proven |= unproven.keys() - wrong
        self._hand_over(dict.fromkeys(wrong, _DISAGREE))

    def _check(self, batch: Any, size: int) -> None:
        """Compare the engine with the loop on two examples, and find how the loss weighs examples."""
        self.checked = True
        pair = contrasting_pair(batch, size)
        reference = self.sums.exact(self.parameters)
        losses = self._loop(batch, size, self.parameters, reference, indices=pair, demand=True)
        scale = reference.largest()
        two = examples(batch, pair, size)
        reasons: dict[str, str] = {}
        met: set[str] = set()

        def weigh(loss: Tensor) -> Tensor:
            if not self.weights.fit(two, loss, losses):
                raise _NoWeightsError
            return self.weights(two, 2)

        def sink(name: str, add: Callable[[Tensor], None]) -> None:
            score = self.sums.zero(name)
            add(score)
            met.add(name)
            wanted = reference[name].to(score.device)
            if not self._agree(name, score, wanted, scale):
                reasons[name] = _DISAGREE
            elif bool(wanted.any()):
                self.proven.add(name)

        try:
            try:
                reasons |= self.engine.run(two, 2, self.loss_fn, self.parameters, weigh, sink)
            except (
                RuntimeError,
                ValueError,
                TypeError,
                IndexError,
            ):  # shapes, where a lent parameter did not fit
                if not self.engine.lend_nothing():
                    raise
                reasons |= self.engine.run(two, 2, self.loss_fn, self.parameters, weigh, sink)
        except _NoWeightsError:
            reasons = dict.fromkeys(self.parameters, _NO_WEIGHTS)
        except Exception as error:  # alone, the examples went well: the loop is right
            reasons = dict.fromkeys(self.parameters, f"a batch of two raised {type(error).__name__}: {error}")
        else:
            for name in self.parameters:
                if name not in met and bool(reference[name].any()):
                    why = (
                        "its module has no rule"
                        if name in self.engine.without_rule
                        else "it is used outside its module"
                    )
                    reasons.setdefault(name, why)
        self._hand_over(reasons)

    def _settle_weights(self, batch: Any, size: int) -> bool:
        """Where weightings that fitted so far differ on this batch, or it has classes that were not weighed together
        yet, ask some of its examples; tell whether a weighting fits.
        """
        if size == 1:
            return True
        asked = set(self.weights.strangers(batch, size))
        if self.weights.differ(batch, size):
            asked |= set(contrasting_pair(batch, size))
        if not asked:
            return True
        indices = sorted(asked)
        with torch.no_grad():
            losses = [float(self.loss_fn(self.model, example(batch, index, size))) for index in indices]
            few = examples(batch, indices, size)
            fits = self.weights.fit(few, self.loss_fn(self.model, few), losses)
        if not fits:
            self._hand_over(dict.fromkeys(self.parameters, _NO_WEIGHTS))
        return fits

    def _loop(
        self,
        batch: Any,
        size: int,
        names: Iterable[str],
        into: Sums,
        *,
        indices: list[int] | None = None,
        demand: bool = False,
    ) -> list[float]:
        wanted = {name: self.parameters[name] for name in self.parameters if name in set(names)}
        indices = list(range(size)) if indices is None else indices
        losses, reached = add_example_squares_(into, self.model, batch, self.loss_fn, wanted, indices, size)
        if demand and not reached:
            raise ParameterError(_NOT_REACHED)
        return losses

    def _agree(self, name: str, found: Tensor, wanted: Tensor, scale: float) -> bool:
        """Compare squares to rounding, of the parameter's largest and of what cancels to zero beside ``scale``."""
        eps = torch.finfo(self.parameters[name].dtype).eps
        difference = float((found - wanted).abs().max()) if found.numel() else 0.0
        return difference <= max(1e-3, 30 * eps) * float(wanted.max()) + (2 * eps) ** 2 * scale

    def _hand_over(self, reasons: Mapping[str, str]) -> None:
        """Leave these parameters to the loop from now on, and say so."""
        if not reasons:
            return
        self.looped |= reasons.keys()
        modules: dict[str, str] = {}
        for name in self.parameters:
            if name in reasons:
                path, module = self.engine.owners[name][0]
                modules.setdefault(f"{path or 'the model'} ({type(module).__name__})", reasons[name])
        shown = [f"{module}: {why}" for module, why in list(modules.items())[:5]]
        more = f"; and {len(modules) - 5} more modules" if len(modules) > 5 else ""
        warnings.warn(
            f"Fisher information of {len(reasons)} of {len(self.parameters)} parameters is taken one example "
            f"at a time, which is exact and slow. {'; '.join(shown)}{more}. A rule can be added with register_rule.",
            UserWarning,
            stacklevel=5,
        )


class _NoWeightsError(Exception):
    """No weighting explains the loss of the pair."""
