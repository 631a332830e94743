"""Run a model over examples, in order: what it says of them, and how right it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from childtuning.tasks import Answers, Kind, LengthBucketBatches, Split


@dataclass(frozen=True)
class Reader:
    """A kind of task and what it needs to put examples to a model.

    Attributes:
        kind: the kind of task.
        processor: the tokenizer or image processor.
        label_names: class names in the order of their ids.
        max_length: the most tokens of an example.
        progress: draw a bar on standard error.
        tell: called with lines for the user.
    """

    kind: Kind
    processor: Any
    label_names: Sequence[str]
    max_length: int
    progress: bool = False
    tell: Callable[[str], None] = lambda line: None

    def encode(self, split: Split, where: str) -> Any:
        """Turn examples into rows of numbers; the user is told what the length limit cuts."""
        encoded = self.kind.encode(
            self.processor, split, max_length=self.max_length, label_names=self.label_names
        )
        if encoded.num_cut:
            self.tell(
                f"{encoded.num_cut} {self.kind.cut_words} of {where} were cut at {self.max_length} tokens"
            )
        return encoded

    def measure(
        self, model: Any, split: Split, metrics: Sequence[str], encoded: Any = None
    ) -> dict[str, float]:
        """Return the metrics of a model on labelled examples, which may be encoded already."""
        encoded = self.encode(split, "the examples") if encoded is None else encoded
        outputs = self._over(model, encoded, self.kind.outputs)
        return self.kind.measure(metrics, outputs, encoded, split, self.label_names)

    def predict(
        self, model: Any, split: Split, options: Answers, encoded: Any = None
    ) -> list[dict[str, Any]]:
        """Return by example what a model answers, as it is written for users; they may be encoded already."""
        encoded = self.encode(split, "the input") if encoded is None else encoded
        answer = partial(self.kind.answers, processor=self.processor, options=options)
        return self.kind.predictions(self._over(model, encoded, answer), encoded, split, self.label_names)

    def _over(self, model: Any, encoded: Any, read_fn: Callable[[Any, Any], list[Any]]) -> list[Any]:
        """Put consecutive examples to a model, padded to their longest, and return what is read of each."""
        batches = LengthBucketBatches(encoded.lengths, self.kind.batch_size, seed=0, shuffle=False)
        loader = DataLoader(
            encoded, batch_sampler=batches, collate_fn=self.kind.collator(self.processor, exact=True)
        )
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        found: list[Any] = []
        try:
            with torch.inference_mode():
                for batch in tqdm(loader, desc="Prediction", unit=" batches", disable=not self.progress):
                    found += read_fn(model, {key: value.to(device) for key, value in batch.items()})
        finally:
            model.train(was_training)
        return found
