"""What the Fisher pass of a trainer scores: the batches of its training set, and its loss."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from childtuning.child import ChildConfig
from childtuning.errors import ConfigError
from childtuning.fisher import losses_by_slices
from childtuning.fisher.batches import num_entries, packed_sequence, packed_sequences
from childtuning.fisher.losses import shifts_labels
from childtuning.training.child_choice import fisher_sample

_EXAMPLES = "examples"  # of a trainer with a loss of its own: row, start and stop in the row [B, 3]
_ALL = -1  # where it stops: the whole row


class ScoredExamples:
    """The training set as a Fisher pass reads it."""

    child_config: ChildConfig | None

    if TYPE_CHECKING:  # of ChildTrainer and Trainer
        args: Any
        train_dataset: Any
        data_collator: Any
        compute_loss_func: Any
        label_smoother: Any
        compute_loss: Any
        _prepare_inputs: Any
        _remove_unused_columns: Any
        _get_collator_with_removed_columns: Any

        @property
        def bare_model(self) -> nn.Module: ...

        @property
        def _has_other_loss(self) -> bool: ...

    def _largest_batch(self) -> Any:
        return max(self._fisher_batches(), key=num_entries)

    def _fisher_loss(self) -> Any:
        """The training loss if it is not the model's own: per example if it is a function of the outputs."""
        assert self.child_config is not None
        if self.child_config.labels == "sampled":
            return None
        if self._has_other_loss:
            return self._loss_of_rows
        if self.compute_loss_func is not None:
            return losses_by_slices(partial(self.compute_loss_func, num_items_in_batch=None))
        if self.label_smoother is not None:
            shift = shifts_labels(self.bare_model)
            return losses_by_slices(partial(self.label_smoother, shift_labels=shift))
        return None

    def _fisher_batches(self) -> Iterable[Any]:
        """One pass over the training set in batches of similar length, in a deterministic order."""
        dataset = self.train_dataset
        assert self.child_config is not None
        if isinstance(dataset, IterableDataset):
            raise ConfigError(
                "Fisher information needs a training set of known length, got an iterable one. Pass scores=."
            )
        columns, collate = self._model_inputs("Fisher information")
        lengths = getattr(dataset, "lengths", None)
        limit, seed = self.child_config.fisher_examples, self.child_config.seed
        size = self.args.per_device_train_batch_size
        order = fisher_sample(len(dataset), limit, seed, lengths, size)  # type: ignore[arg-type]
        if self._has_other_loss:  # which may make several rows of an example
            examples = torch.tensor(
                [
                    (row, where.start, where.stop)
                    for row in order
                    for where in self._sequences(collate([columns[row]])) or [slice(0, _ALL)]
                ],
                device="cpu",
            )
            return [{_EXAMPLES: some} for some in examples.split(size) if len(some)]
        return DataLoader(
            Subset(columns, order),
            batch_size=size,
            shuffle=False,
            collate_fn=collate,
        )

    def _sequences(self, batch: Any) -> list[slice]:
        return packed_sequences(batch) if shifts_labels(self.bare_model) else []

    def _loss_of_rows(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean of the trainer's own losses: of rows of the training set, or of sequences packed in them."""
        columns, collate = self._model_inputs("Fisher information")
        examples = batch[_EXAMPLES].tolist()
        if all(stop == _ALL for _, _, stop in examples):
            return self.compute_loss(
                model, self._prepare_inputs(collate([columns[row] for row, *_ in examples]))
            )
        losses = []
        for row, start, stop in examples:
            inputs = collate([columns[row]])
            inputs = inputs if stop == _ALL else packed_sequence(inputs, slice(start, stop))
            losses.append(self.compute_loss(model, self._prepare_inputs(inputs)))
        return torch.stack(losses).mean()

    def _model_inputs(self, description: str) -> tuple[Any, Any]:
        """The training set and a collator, without columns that the model does not accept."""
        dataset: Any = self.train_dataset
        if dataset is None:
            raise ConfigError(
                "a child is chosen and trained on the training set, got none. Pass train_dataset=."
            )
        if hasattr(dataset, "column_names"):
            return self._remove_unused_columns(dataset, description), self.data_collator
        return dataset, self._get_collator_with_removed_columns(self.data_collator, description)
