"""Choosing a column child with ``fisher_examples="auto"``, beside one epoch of full fine-tuning on the same examples.

The packaged MiniLM, 2,048 examples of each task, batches of 16, density 0.1. The facts say how many examples the choice
took, what share of its entries the child has in common with the one that all examples choose, and what share of that
one's Fisher information (by all examples) it holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from record import Record
from timing import Case, alternating, tell
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import childtuning as ct
from childtuning.child import select_child
from childtuning.tasks import LengthBucketBatches, PaddingCollator, encode, load_task
from childtuning.training import fisher_sample, load_classifier
from childtuning.training.child_choice import StopWhenStable

_TASKS, _EXAMPLES, _BATCH = ("rte", "mrpc", "stsb", "cola"), 2048, 16


def run(record: Record, options: argparse.Namespace) -> None:
    """Measure task after task."""
    tasks, limit = (("rte",), 160) if options.quick else (_TASKS, _EXAMPLES)
    if options.data_dir is None:
        tasks, limit = ("docstrings",), 160
    for name in tasks:
        tell(name)
        work = _Work.of(name, options.data_dir, limit)
        chosen, epoch = f"{name}: the child by a stable choice", f"{name}: one epoch of full fine-tuning"
        found: dict[str, Any] = {}

        def choose(work: _Work = work, found: dict[str, Any] = found) -> None:
            found["scores"] = work.scores(StopWhenStable(work.child))
            found["child"] = work.child(found["scores"])

        cases = {chosen: Case(choose, ours=True), epoch: Case(work.epoch, ours=True)}
        alternating(record, cases, options.repeats)
        every = work.scores(None)
        record.facts[name] = {
            "examples": len(work.encoded),
            "examples_of_the_choice": found["scores"].num_examples,
            "entries_in_common": found["child"].overlap(work.child(every)),
            "fisher_share": work.held(found["child"], every) / work.held(work.child(every), every),
        }
        record.ratio(f"{name}: choosing a column child of 0.1, fisher_examples=auto ÷ one epoch",
                     chosen, epoch, at_most=0.25)  # fmt: skip


@dataclass
class _Work:
    model: Any
    encoded: Any
    collate: Any
    always: tuple[str, ...]
    child: Callable[[Any], ct.Child]

    @classmethod
    def of(cls, name: str, data_dir: Any, limit: int) -> _Work:
        task = load_task(name, data_dir=data_dir)
        loaded = load_classifier(
            None,
            num_labels=task.num_labels,
            label_names=task.label_names,
            regression=task.kind == "regression",
        )
        whole = encode(loaded.tokenizer, task.train, max_length=128, label_ids=task.label_ids)
        drawn = fisher_sample(len(whole), limit, 0)
        encoded = _Some(Subset(whole, drawn), [whole.lengths[i] for i in drawn])
        child = partial(
            select_child, density=0.1, granularity="column", row_axes=ct.unit_axes(loaded.model, "column")
        )
        return cls(loaded.model, encoded, PaddingCollator(loaded.tokenizer), loaded.new_parameters, child)

    def scores(self, stop_fn: StopWhenStable | None) -> Any:
        order = fisher_sample(len(self.encoded), None if stop_fn is None else "auto", 0, self.encoded.lengths)
        batches = DataLoader(Subset(self.encoded, order), batch_size=_BATCH, collate_fn=self.collate)
        return ct.fisher_information(self.model, batches, always=self.always, stop_fn=stop_fn)

    def epoch(self) -> None:
        self.model.train()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
        sampler = LengthBucketBatches(self.encoded.lengths, _BATCH, seed=0)
        for batch in DataLoader(self.encoded, batch_sampler=sampler, collate_fn=self.collate):
            self.model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @staticmethod
    def held(child: ct.Child, scores: dict[str, Tensor]) -> float:
        return sum(float(score[child.mask(name)].sum(dtype=torch.float64)) for name, score in scores.items())


class _Some(torch.utils.data.Dataset):
    def __init__(self, rows: Any, lengths: list[int]) -> None:
        self.rows, self.lengths = rows, lengths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]
