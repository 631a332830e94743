"""Per-example Fisher information over batches of RTE, on the packaged MiniLM, batch 16.

Every case gets the same batches, bucketed and padded as the library does it, and scores the same parameters unless its
library cannot. Each reference's sums are compared with ours, and the largest relative difference is recorded.

Extra memory is a difference of processes: the peak of a Fisher pass, less the peak of a forward and backward pass over
the same batches that lets go of every gradient as soon as it is formed. That pass holds what any pass must (weights,
activations, one dense gradient at a time) and no result; a pass that keeps its gradients would hold as many bytes as
the scores have, and the difference would hide them.
"""

from __future__ import annotations

import argparse
import copy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from environment import RETURNED
from record import Record
from references.per_example import PER_EXAMPLE, Squares, batch_of_one
from shapes import HEAD, classifier, random_batch
from timing import Case, alternating, tell
from torch import Tensor
from workers import call

import childtuning as ct

_OURS, _PLAIN, _LOOP = "fisher_information", "forward and backward", "batch of one"
_MEMORY_OURS, _MEMORY_PLAIN = (
    "peak memory: fisher_information",
    "peak memory: forward and backward, nothing kept",
)


def run(record: Record, options: argparse.Namespace) -> None:
    """Measure the passes."""
    model, batches, always = material(options.quick, options.data_dir, options.batches)
    names = list(ct.fisher_information(model, batches[:1], always=always))
    examples = sum(len(batch["labels"]) for batch in batches)
    record.facts |= {
        "batches": len(batches),
        "examples": examples,
        "tokens": sum(batch["input_ids"].numel() for batch in batches),
        "scored_parameters": sum(p.numel() for n, p in model.named_parameters() if n in set(names)),
    }
    results: dict[str, dict[str, Tensor]] = {}

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad(set_to_none=True)

    def ours() -> None:
        results[_OURS] = ct.fisher_information(model, batches, always=always)

    cases = {_PLAIN: Case(plain), _OURS: Case(ours, ours=True)}
    for name, build in {_LOOP: batch_of_one, **PER_EXAMPLE}.items():
        own = copy.deepcopy(model)
        squares = record.attempt(name, lambda build=build, own=own: build(own, names))
        if squares is not None:
            cases[name] = Case(_keeping(results, name, squares, batches))
    alternating(record, cases, options.repeats)
    record.facts["largest_relative_difference"] = {
        name: _difference(results[_OURS], sums, examples) for name, sums in results.items() if name != _OURS
    }
    record.facts["scored_by"] = {
        name: sum(score.numel() for score in sums.values()) for name, sums in results.items()
    }
    results.clear()
    record.ratio("per-example Fisher ÷ forward and backward", _OURS, _PLAIN, at_most=1.15)
    record.ratio("per-example Fisher ÷ batch-of-one loop", _OURS, _LOOP, at_most=0.35)
    fastest = record.fastest(list(PER_EXAMPLE))
    record.facts["fastest_reference"] = fastest
    record.ratio("per-example Fisher ÷ the fastest other library that runs", _OURS, fastest, at_most=0.8)
    for name in PER_EXAMPLE:
        record.ratio(f"per-example Fisher ÷ {name}", _OURS, name)
    _memory(record, options)


def material(
    quick: bool, data_dir: Path | str | None, num_batches: int
) -> tuple[Any, list[dict[str, Tensor]], tuple[str, ...]]:
    """Return a model in ``eval()`` mode, labelled batches, and the patterns of its new head."""
    if quick:
        model = classifier("tiny").eval()
        return model, [random_batch(model, 4, 8, seed) for seed in range(2)], HEAD
    from torch.utils.data import DataLoader

    from childtuning.tasks import LengthBucketBatches, PaddingCollator, encode, load_task
    from childtuning.training import load_classifier

    task = load_task("rte", data_dir=data_dir)
    loaded = load_classifier(None, num_labels=task.num_labels, label_names=task.label_names)
    encoded = encode(loaded.tokenizer, task.train, max_length=128, label_ids=task.label_ids)
    loader = DataLoader(
        encoded,
        batch_sampler=LengthBucketBatches(encoded.lengths, 16, seed=0),
        collate_fn=PaddingCollator(loaded.tokenizer),
    )
    return loaded.model.eval(), list(islice(loader, num_batches)), loaded.new_parameters


def _keeping(
    results: dict[str, dict[str, Tensor]], name: str, squares: Squares, batches: list[dict[str, Tensor]]
) -> Any:
    def run() -> None:
        results[name] = squares(batches)

    return run


def _difference(ours: dict[str, Tensor], sums: dict[str, Tensor], examples: int) -> float:
    """Return the largest difference in any parameter, relative to that parameter's largest score.

    Scores a millionth of the largest of all and below are rounding (a key's bias has no gradient) and not compared.
    """
    floor = 1e-6 * max(score.max().item() for score in sums.values())
    return max(
        (ours[name] * examples - score).abs().max().item() / score.max().item()
        for name, score in sums.items()
        if score.max().item() > floor
    )


def _memory(record: Record, options: argparse.Namespace) -> None:
    given = {
        "quick": options.quick,
        "data_dir": None if options.data_dir is None else str(options.data_dir),
        "num_batches": options.batches,
    }
    record.facts["allocator_for_memory"] = RETURNED
    for number in range(options.repeats):
        tell(f"  memory: round {number + 1} of {options.repeats}")
        for name, fisher in ((_MEMORY_PLAIN, False), (_MEMORY_OURS, True)):
            found = record.attempt(
                name,
                lambda fisher=fisher: call(
                    "fisher-memory", options.threads, malloc=RETURNED, fisher=fisher, **given
                ),
                ours=True,
            )
            if found is not None:
                record.add_samples(name, [found["peak_bytes"]], "bytes")
                record.facts["score_bytes"] = found["score_bytes"]
    name = "extra memory of the Fisher pass ÷ the scores it returns"
    if all(case in record.samples for case in (_MEMORY_OURS, _MEMORY_PLAIN)):
        low, high = (
            sorted(record.samples[case]["values"])[len(record.samples[case]["values"]) // 2]
            for case in (_MEMORY_PLAIN, _MEMORY_OURS)
        )
        record.value(name, (high - low) / record.facts["score_bytes"], at_most=1.3, statistic="median")
    else:
        record.value(name, None, at_most=1.3, statistic="median")


def measure_memory(fisher: bool, quick: bool, data_dir: str | None, num_batches: int) -> dict[str, Any]:
    """Run one pass in this process and say how much memory it took beside the loaded model."""
    import peak

    model, batches, always = material(quick, data_dir, num_batches)
    scored = [p for n, p in model.named_parameters() if n not in set(always)]
    small = {key: value[:2] for key, value in batches[0].items()}
    model(**small).loss.backward()  # starts the thread pools and the libraries' own buffers
    model.zero_grad(set_to_none=True)
    before = peak.resident_bytes()
    peak.start_peak()
    if fisher:
        scores = ct.fisher_information(model, batches, always=always)
        num_bytes = sum(score.nbytes for score in scores.values())
    else:
        num_bytes = 4 * sum(p.numel() for p in scored)
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(_let_go)
        for batch in batches:
            model(**batch).loss.backward()
    return {"peak_bytes": peak.peak_bytes() - before, "score_bytes": num_bytes}


def _let_go(parameter: torch.nn.Parameter) -> None:
    parameter.grad = None
