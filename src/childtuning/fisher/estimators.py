"""The two ways to add up squared gradients: one term an example, or one term a batch.

Both are called with batches on the model's device, inside ``without_trace``, and return the number of terms added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from childtuning import fast
from childtuning.errors import ChildTuningError, DataError, ParameterError, warn
from childtuning.fast.arrivals import EmissionError
from childtuning.fast.per_example import Inputs, PerExampleEngine
from childtuning.fast.vectorised import HeldElsewhereError, vectorised_squares
from childtuning.fisher.batches import (
    example,
    example_tensors,
    examples,
    is_ragged,
    num_examples,
    with_example_tensors,
)
from childtuning.fisher.loop import add_batch_squares_, add_example_squares_, check_finite, differentiable
from childtuning.fisher.losses import HeadLoss, NotFormedError, UserLoss, checked
from childtuning.fisher.sums import ScoreSums

Loss = UserLoss | HeadLoss

_MIXES = "examples. Score per batch (estimator='per-batch'), or pass a loss_fn whose examples are apart."
_MISFITS = 2  # batches that the engine could not take, after which it is not tried


class PerBatch:
    """The square of each batch's mean gradient, clipped, as the official code has it."""

    def __init__(self, model: nn.Module, loss: Loss, sums: ScoreSums, trainable: list[Tensor]) -> None:
        self.model, self.loss, self.sums, self.trainable = model, loss, sums, trainable
        self.is_reached, self.paths = True, dict.fromkeys(sums.parameters, "batch")

    def __call__(self, batch: Any) -> int:
        """Add one term."""
        with differentiable(self.trainable):
            if not add_batch_squares_(self.sums, self.model, batch, self._mean, self.sums.parameters):
                raise not_reached()
        return 1

    def _mean(self, model: nn.Module, batch: Any) -> Tensor:
        if isinstance(self.loss, HeadLoss):
            return self.loss.alone(model, batch)
        loss = checked(self.loss.loss_fn(model, batch)).mean()
        return loss / num_examples(batch) if self.loss.reduction == "sum" else loss


class PerExample:
    """The square of each example's gradient: by the engine, by a vectorised pass, or by the loop.

    ``paths`` records the path of each parameter: ``engine``, ``vectorised`` or ``loop``. A parameter that one path
    cannot handle moves to the next and stays there. A warning names what goes through the loop, once.

    Args:
        trainable: the parameters that require a gradient in the loop, scored or not.
        training: whether dropout and batch statistics are active; examples then run alone.
    Raises:
        DataError: a layer mixes the examples of a batch.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, sums: ScoreSums, trainable: list[Tensor], *, training: bool
    ) -> None:
        self.model, self.loss, self.sums, self.trainable = model, loss, sums, trainable
        self.training = training
        self.parameters = sums.parameters
        self.engine = PerExampleEngine(model, self.parameters)
        self._path = dict.fromkeys(self.parameters, "engine")
        self.is_reached = False
        self._num_fast = self._num_misfits = 0
        self._is_told = training or not fast.enabled()
        self._is_checked = training
        _check_layers(model, training)

    def supports(self, size: int) -> bool:
        """Return whether a batch may go through the engine; whether the loss allows it shows when it is formed."""
        return fast.enabled() and not self.training and size > 1 and self._num_misfits < _MISFITS

    def __call__(self, batch: Any) -> int:
        """Add one term for each example."""
        size = num_examples(batch)
        if self.loss.reduction is not None and not self.training:
            self._check_mixing(batch, size)
            self._check_reduction(batch, size, self.loss.reduction)
        reason = self._fast(batch, size) if self.supports(size) else ""
        self._num_fast += reason is None
        if reason is not None:
            self._check_mixing(batch, size)
            self._loop(batch, size, self.parameters)
            if reason:  # said after the first batch: where the loop raises, nothing is slow
                self._tell(list(self.parameters), reason)
        return size

    @property
    def paths(self) -> dict[str, str]:
        """The way of each parameter; of all ``loop`` where no batch went another."""
        return self._path if self._num_fast else dict.fromkeys(self.parameters, "loop")

    # The paths, fastest first

    def _fast(self, batch: Any, size: int) -> str | None:
        """Add the batch's terms; or return the reason, with nothing added, why that takes the loop."""
        failed: dict[str, str] = {}
        wanted = self._on("engine")
        if wanted:
            alone: list[tuple[int, Tensor]] = []

            def single(index: int) -> Inputs:
                one = example(batch, size, index)
                return self._inputs(one, 1, lambda losses: alone.append((index, losses)))

            whole = self._inputs(batch, size, lambda losses: self._compare(losses, alone))
            try:
                outcome = self.engine.run(size, whole, single, wanted, self.sums.add)
            except ChildTuningError:
                raise
            except EmissionError as error:
                raise error.__cause__ or error from None
            except NotFormedError as error:
                self._num_misfits += _MISFITS if isinstance(self.loss, UserLoss) else 1
                return str(error)
            except Exception as error:  # the loop raises it again if it is the model's own
                self._num_misfits += 1
                return f"A batch of {size} raised {type(error).__name__}: {error}."
            failed = outcome.failed
            self.is_reached = self.is_reached or outcome.is_reached
            if outcome.is_mixed and isinstance(self.loss, UserLoss):
                raise DataError(
                    f"the gradient at one example depends on the losses of others: the loss mixes {_MIXES}"
                )
            if outcome.left_out is not None:
                self._loop(example(batch, size, outcome.left_out), 1, [n for n in wanted if n not in failed])
        self._path |= dict.fromkeys(failed, "vectorised")
        rest = self._on("vectorised")
        if rest and (reason := self._vectorised(batch, size, rest)):
            self._path |= dict.fromkeys(rest, "loop")
            failed = {name: failed.get(name, reason) for name in rest}
        looped = self._on("loop")
        if looped:
            self._loop(batch, size, looped)
            self._tell(looped, self._owners(looped, failed))
        return None

    def _inputs(self, batch: Any, size: int, compare_fn: Any) -> Inputs:
        def total(left_out: int | None) -> Tensor:
            found = self.loss.of_batch(self.model, batch, size)
            with torch._C.DisableTorchFunction():
                check_finite(found.total.detach() if found.losses is None else found.losses.detach())
                if found.losses is not None:
                    compare_fn(found.losses.detach())
            if found.losses is None or left_out is None:
                return found.total
            with torch._C.DisableTorchFunction():
                weights = torch.ones_like(found.losses)
                weights[left_out] = 0.0
            return (found.losses * weights).sum()

        return Inputs(example_tensors(batch, size), total, has_losses=self.loss.reduction is None)

    def _compare(self, losses: Tensor, alone: list[tuple[int, Tensor]]) -> None:
        """Refuse losses of examples that depend on the rest of the batch."""
        largest = float(losses.abs().max())
        for index, one in alone:
            found, wanted = float(losses[index]), float(one[0])
            if abs(found - wanted) > self._slack(max(abs(wanted), 0.1 * largest)):
                if isinstance(self.loss, HeadLoss):
                    raise NotFormedError(
                        f"The loss of an example is {wanted:.6g} alone and {found:.6g} in its batch. Use float32."
                    )
                raise DataError(
                    f"the loss of an example is {wanted:.6g} alone and {found:.6g} in its batch: the loss mixes "
                    + _MIXES
                )

    def _vectorised(self, batch: Any, size: int, names: list[str]) -> str | None:
        """Add the terms of some parameters by one vectorised pass; return the reason where that cannot be."""
        if is_ragged(batch, size):
            return "its examples are not rows of tensors"
        chosen = {name: self.parameters[name] for name in names}
        alone = _Alone(self.model, self.loss)
        names_by_id = {id(parameter): name for name, parameter in chosen.items()}
        # Each place once: of a module with two paths torch would keep what it put there for a call.
        places = {
            f"{path}.{own}": names_by_id[id(parameter)]
            for path, module in alone.named_modules()
            for own, parameter in module._parameters.items()
            if id(parameter) in names_by_id
        }

        def loss_fn(parameters: Mapping[str, Tensor], tensors: list[Tensor]) -> Tensor:
            replaced = {place: parameters[name] for place, name in places.items()}
            one = with_example_tensors(batch, size, tensors)
            return functional_call(alone, replaced, (one,), tie_weights=False)

        try:
            with differentiable(chosen.values()):
                squares = vectorised_squares(chosen, loss_fn, example_tensors(batch, size))
        except HeldElsewhereError as error:
            return str(error)
        except ChildTuningError:
            raise
        except Exception as error:
            return f"a vectorised pass raised {type(error).__name__}"
        finally:
            for module in self.model.modules():
                if isinstance(module, nn.RNNBase):  # it keeps a list of the weights of its last call
                    module._update_flat_weights()
        self.is_reached = True
        for name, square in squares.items():
            self.sums.add(name, lambda total, square=square: total.add_(square))
        return None

    def _loop(self, batch: Any, size: int, names: Iterable[str]) -> None:
        chosen = {name: self.parameters[name] for name in names}
        with differentiable(self.trainable):
            reached = add_example_squares_(self.sums, self.model, batch, size, self.loss.alone, chosen)
        self.is_reached = self.is_reached or reached

    def _on(self, path: str) -> list[str]:
        return [name for name in self.parameters if self._path[name] == path]

    # Checks and warnings

    def _check_mixing(self, batch: Any, size: int) -> None:
        """Refuse, on the first batch, a loss that duplicating an example changes by more than that example's share."""
        if self._is_checked:
            return
        self._is_checked = True
        with differentiable(self.trainable):
            one = self.loss.alone(self.model, example(batch, size, 0)).detach()
            try:
                two = self._whole(examples(batch, size, [0, 0])).detach()
                whole = self._whole(batch).detach() if two.dim() and size > 1 else None
            except ChildTuningError:
                raise
            except Exception:  # a model that takes no batch
                return
        if whole is not None:
            return self._compare(whole, [(0, one.reshape(1))])
        if two.dim() or not bool(one.isfinite()) or not bool(two.isfinite()):
            return
        low, high = sorted((float(one), 2 * float(one)))
        slack = self._slack(max(abs(low), abs(high)))
        if not low - slack <= float(two) <= high + slack:
            raise DataError(
                f"the loss of an example is {float(one):.6g}, and that of a batch which holds it twice is "
                f"{float(two):.6g}: the loss mixes {_MIXES}"
            )

    def _check_reduction(self, batch: Any, size: int, reduction: str) -> None:
        """Compare a batch's loss with what is stated of the losses of its examples alone.

        Every batch is compared: a mean over tokens is one over examples as long as these are of one length.
        """
        with differentiable(self.trainable):
            try:
                whole = float(self._whole(batch).detach())
            except ChildTuningError:
                raise
            except Exception:  # the loop takes it, an example at a time
                return
            alone = [
                float(self.loss.alone(self.model, example(batch, size, i)).detach()) for i in range(size)
            ]
        divisor = size if reduction == "mean" else 1
        wanted = sum(alone) / divisor
        if abs(whole - wanted) > self._slack(max(map(abs, alone)) * size / divisor):
            raise DataError(
                f"the loss of a batch is {whole:.6g}, and the {reduction} of its examples' own losses {wanted:.6g}. "
                "Return one loss an example, or leave out reduction: a mean over tokens, or with weights, is neither."
            )

    def _slack(self, loss: float) -> float:
        """Return how far rounding may move a loss of this size."""
        eps = max(self.engine.eps, *(torch.finfo(p.dtype).eps for p in self.parameters.values()))
        return max(1e-3, 32 * eps) * loss + 8 * eps

    def _whole(self, batch: Any) -> Tensor:
        """The loss of a batch as it comes."""
        if isinstance(self.loss, HeadLoss):
            return self.loss.alone(self.model, batch)
        return self.loss.loss_fn(self.model, batch)

    def _owners(self, names: list[str], reasons: Mapping[str, str]) -> str:
        """Name up to five modules that hold these parameters, with the reasons."""
        ids = {id(self.parameters[name]): name for name in names}
        owners: dict[str, str] = {}
        for path, module in self.model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) in ids:
                    reason = reasons.get(ids[id(parameter)], "it has no rule")
                    owners.setdefault(f"{path or 'the model'} ({type(module).__name__})", reason)
        shown = [f"{owner}: {reason}" for owner, reason in list(owners.items())[:5]]
        more = f"; and {len(owners) - 5} more modules" if len(owners) > 5 else ""
        return f"{'; '.join(shown)}{more}. Leave them out of eligible=, or wait."

    def _tell(self, names: list[str], reason: str) -> None:
        if self._is_told:
            return
        self._is_told = True
        warn(
            f"Fisher information of {len(names)} of {len(self.parameters)} parameters is taken one example at a time, "
            f"which is exact and slow. {reason}"
        )


class _Alone(nn.Module):
    """The loss of an example as a module, so that parameters anywhere in the model can be replaced for a call."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, example: Any) -> Tensor:
        return self.loss.alone(self.model, example)


def not_reached() -> ParameterError:
    """Return the error for a loss without a gradient."""
    return ParameterError(
        "the loss does not depend on any eligible parameter. Check the eligible patterns, and that it is not detached."
    )


def _check_layers(model: nn.Module, training: bool) -> None:
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (training or module.running_mean is None):
            raise DataError(
                f"{path or 'the model'} ({type(module).__name__}) normalises by the statistics of the batch, which "
                "mixes examples. Use training=False and running statistics, or estimator='per-batch'."
            )
