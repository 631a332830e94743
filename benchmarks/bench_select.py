"""Choosing a child from scores: BERT-base shapes, scores as skewed as Fisher information is."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from record import Record
from references.official import official_masks
from shapes import classifier
from timing import Case, alternating

import childtuning as ct

_DENSITY = 0.1
_OURS, _OURS_ROW = "select_child 0.1, element", "select_child 0.1, row"
_PERCENTILE, _KTHVALUE = "numpy percentile of the concatenation", "torch.kthvalue of the concatenation"
_TOPK, _OFFICIAL = "torch.topk of the concatenation", "official twin: percentile and masks"


def run(record: Record, options: argparse.Namespace) -> None:
    """Measure the selections."""
    generator = torch.Generator().manual_seed(0)
    model = classifier("tiny" if options.quick else "bert-base")
    scores = {
        name: torch.randn(p.shape, generator=generator).mul_(3).exp_()
        for name, p in model.named_parameters()
        if not name.startswith("classifier")
    }
    del model
    count = sum(score.numel() for score in scores.values())
    budget = round(_DENSITY * count)

    def flat() -> torch.Tensor:
        return torch.cat([score.view(-1) for score in scores.values()])

    def percentile() -> float:
        everything = np.concatenate([score.numpy().reshape(-1) for score in scores.values()])
        return float(np.percentile(everything, (1 - _DENSITY) * 100))

    cases = {
        _OURS: Case(lambda: ct.select_child(scores, _DENSITY), ours=True),
        _OURS_ROW: Case(lambda: ct.select_child(scores, _DENSITY, granularity="row"), ours=True),
        _PERCENTILE: Case(percentile),
        _KTHVALUE: Case(lambda: torch.kthvalue(flat(), count - budget + 1).values.item()),
        _TOPK: Case(lambda: torch.topk(flat(), budget, sorted=False)),
        _OFFICIAL: Case(lambda: official_masks({score: score for score in scores.values()}, _DENSITY)),
    }
    alternating(record, cases, options.repeats)
    chosen = record.attempt(_OURS, lambda: ct.select_child(scores, _DENSITY).num_trained, ours=True)
    record.facts |= {"scores": count, "budget": budget, "chosen": chosen}
    record.ratio("selecting 0.1 ÷ numpy percentile of the concatenation", _OURS, _PERCENTILE, at_most=0.15)
    record.ratio("selecting 0.1 ÷ torch.kthvalue of the concatenation", _OURS, _KTHVALUE, at_most=0.5)
    record.ratio("selecting 0.1 ÷ torch.topk of the concatenation", _OURS, _TOPK)
    record.ratio("selecting 0.1 ÷ official twin's selection with its masks", _OURS, _OFFICIAL)
    record.ratio("selecting rows, 0.1 ÷ torch.kthvalue of the concatenation", _OURS_ROW, _KTHVALUE)
