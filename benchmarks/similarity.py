"""What a sentence encoder gains on a task against what it forgets of sentence similarity, by method and rate.

The runs are those of `childtuning compare --keep`. Gained is the task's score over that of the constant answer. Lost is
what the rank correlation falls by between the cosine of two sentences' means over their tokens and the label of STS-B,
on every third pair of its dev set; nothing is trained for it. Kept folders of measured runs are no longer needed.

    python benchmarks/similarity.py --data-dir DATA STORE STORE …
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, restart_with_settings
from recorded_runs import RecordedRuns, Way
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer

from childtuning import load
from childtuning.compare.store import Store
from childtuning.runs import RunConfig
from childtuning.runs.inputs import read_run_task

EVERY, BATCH_SIZE = 3, 16


class Similarity:
    """The measure: STS-B's pairs, and their labels.

    Args:
        tokenizer: of the encoder.
        data_dir: the folder with ``stsb/``.
    """

    def __init__(self, tokenizer: Any, data_dir: Path) -> None:
        dev: Any = read_run_task(RunConfig(task="stsb", data_dir=str(data_dir)))[0].dev
        self.tokenizer = tokenizer
        self.first, self.second, self.labels = dev.text[::EVERY], dev.text_pair[::EVERY], dev.labels[::EVERY]

    @torch.inference_mode()
    def __call__(self, body: Any) -> float:
        """Return Spearman's rank correlation of cosines and labels."""
        one, other = (self._vectors(body.eval(), texts) for texts in (self.first, self.second))
        found: Any = spearmanr(torch.cosine_similarity(one, other), self.labels)
        return float(found.statistic)

    def _vectors(self, body: Any, texts: list[str]) -> torch.Tensor:
        by_length = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        found: dict[int, torch.Tensor] = {}
        for start in range(0, len(texts), BATCH_SIZE):
            rows = by_length[start : start + BATCH_SIZE]
            batch = self.tokenizer([texts[row] for row in rows], padding=True, return_tensors="pt")
            kept = batch["attention_mask"].unsqueeze(-1)
            hidden = body(**batch).last_hidden_state
            found |= zip(rows, (hidden * kept).sum(1) / kept.sum(1), strict=True)
        return torch.stack([found[row] for row in range(len(texts))])


def way_of(run: Any) -> Way:
    """Return a recorded run's method, and its child's density and granularity where it takes them."""
    config: Mapping[str, Any] = run.config
    return Way(config["method"], config.get("density"), config.get("granularity", "element"))


def main() -> None:
    """Measure the kept runs that are not recorded yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stores", type=Path, nargs="+", help="stores of `childtuning compare --keep`")
    parser.add_argument("--data-dir", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "similarity.json")
    given = parser.parse_args()
    restart_with_settings(threads=1)
    torch.set_num_threads(1)
    recorded = RecordedRuns(given.output, threads=1)
    measure: Similarity | None = None
    missing: list[str] = []
    for path in given.stores:
        with Store.open(path) as store:
            finished = [(run, store.folder_of(run.id)) for run in store.records() if run.state == "done"]
        for run, folder in finished:
            if not folder.is_dir():
                missing.append(f"{path} {run.id}")
                continue
            base = str(run.config["model"])
            if measure is None:
                measure = Similarity(AutoTokenizer.from_pretrained(base), given.data_dir)
            key = {"task": run.group.task, "train_size": run.group.train_size, "model": Path(base).name}
            untuned = key | {"method": "none", "lr": 0.0, "seed": 0}
            recorded.run(untuned, lambda m=measure, b=base: {"similarity": m(AutoModel.from_pretrained(b))})
            tuned = key | {"method": str(way_of(run)), "lr": run.config["learning_rate"], "seed": run.seed}
            recorded.run(tuned, lambda m=measure, r=run, f=folder: _measured(m, r, f))
    if missing:
        print(f"not measured, their folders are gone (compare --keep): {', '.join(missing)}", file=sys.stderr)


def _measured(measure: Similarity, run: Any, folder: Path) -> dict[str, Any]:
    result, model = run.result, load(folder).model()
    return {
        "score": result["metric"]["value"],
        "constant": result["constant"][result["metric"]["name"]],
        "similarity": measure(getattr(model, model.base_model_prefix)),
        "trained_parameters": result["trained_parameters"],
    }


if __name__ == "__main__":
    main()
