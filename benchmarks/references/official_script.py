"""A run as the official script makes it: padded to 128, float32, its own Fisher pass, masks and optimizer."""

from __future__ import annotations

import math
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import DataLoader

from childtuning.tasks import Examples, compute_metrics, load_task
from childtuning.training import load_classifier
from references.official import OfficialChildTuning, official_fisher, official_masks

_LENGTH, _BATCH, _RATE = 128, 16, 2e-5


def official_run(
    task: str, data_dir: str | None, train_limit: int | None, epochs: float, density: float, seed: int = 0
) -> dict[str, Any]:
    """Load, estimate, choose, train and evaluate; say how long each took and how well it went."""
    loaded_task = load_task(task, data_dir=data_dir, train_limit=train_limit, seed=seed)
    loaded = load_classifier(
        None,
        num_labels=loaded_task.num_labels,
        label_names=loaded_task.label_names,
        regression=loaded_task.kind == "regression",
        seed=seed,
    )
    model = loaded.model

    def padded(examples: Examples) -> list[dict[str, Any]]:
        columns = loaded.tokenizer(
            examples.text,
            examples.text_pair,
            padding="max_length",
            truncation=True,
            max_length=_LENGTH,
            return_tensors="pt",
        )
        ids = loaded_task.label_ids
        labels = [ids[str(label)] if ids else float(label) for label in examples.labels]
        columns["labels"] = torch.tensor(labels)
        return [{key: column[row] for key, column in columns.items()} for row in range(len(labels))]

    train, dev = padded(loaded_task.train), padded(loaded_task.dev)
    torch.manual_seed(seed)
    batches = DataLoader(train, batch_size=_BATCH, shuffle=True)
    start = perf_counter()
    masks = official_masks(official_fisher(model, batches), density)
    fisher_seconds = perf_counter() - start

    optimizer = OfficialChildTuning(model.parameters(), "D", density, masks, lr=_RATE, weight_decay=0.0)
    num_steps = math.ceil(epochs * len(batches))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / num_steps))
    start = perf_counter()
    model.train()
    step = 0
    while step < num_steps:
        for batch in batches:
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            model.zero_grad()
            step += 1
            if step == num_steps:
                break
    train_seconds = perf_counter() - start

    model.eval()
    outputs = []
    with torch.no_grad():
        for batch in DataLoader(dev, batch_size=8):
            batch.pop("labels")
            outputs.append(model(**batch).logits)
    logits = torch.cat(outputs)
    found = logits.argmax(1) if loaded_task.label_ids else logits[:, 0]
    targets = torch.stack([row["labels"] for row in dev])
    return {
        "metrics": compute_metrics(loaded_task.metrics, found.numpy(), targets.numpy()),
        "fisher_seconds": fisher_seconds,
        "train_seconds": train_seconds,
        "train_examples": len(train),
    }
