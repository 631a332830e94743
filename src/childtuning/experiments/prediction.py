"""Run a model over examples, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from childtuning.tasks import Examples, LengthBucketBatches, PaddingCollator, Task, compute_metrics, encode


def predict_logits(
    model: Any,
    tokenizer: Any,
    examples: Examples,
    *,
    max_length: int,
    batch_size: int = 32,
    progress: bool = False,
) -> NDArray[np.float32]:
    """Return the logits [n, num_labels], float32, in the order of the examples.

    Batches are consecutive examples, padded to their longest. ``progress`` draws a bar on standard error.
    """
    unlabelled = Examples(examples.text, examples.text_pair, None)
    encoded = encode(tokenizer, unlabelled, max_length=max_length)
    batches = LengthBucketBatches(encoded.lengths, batch_size, seed=0, shuffle=False)
    collator = PaddingCollator(tokenizer, pad_to_multiple_of=None)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    rows: list[NDArray[np.float32]] = []
    try:
        with torch.inference_mode():
            loader = DataLoader(encoded, batch_sampler=batches, collate_fn=collator)
            for batch in tqdm(loader, desc="Prediction", unit=" batches", disable=not progress):
                logits = model(**{key: value.to(device) for key, value in batch.items()}).logits
                rows.append(logits.float().cpu().numpy())
    finally:
        model.train(was_training)
    return np.concatenate(rows) if rows else np.zeros((0, 1), np.float32)


def score_logits(
    task_kind: str, metrics: Sequence[str], logits: NDArray[np.float32], labels: Sequence[Any]
) -> dict[str, float]:
    """Return the metrics of logits against labels (class ids, or numbers for regression)."""
    predictions = logits[:, 0] if task_kind == "regression" else logits.argmax(1)
    if task_kind != "regression" and not np.isfinite(logits).all():
        predictions = np.full(len(logits), np.nan)
    return compute_metrics(metrics, predictions, np.asarray(labels))


def label_ids(task: Task, examples: Examples) -> list[Any]:
    """Return the examples' labels as the model's targets."""
    ids = task.label_ids
    return [label if ids is None else ids[label] for label in examples.labels or []]  # type: ignore[index]
