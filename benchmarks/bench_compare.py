"""``compare`` against plain ``train`` of the same runs, one after the other in the same process.

The runs share what a comparison lets them share (examples and tokens; the model and the Fisher scores of a seed), which
plain runs make anew each time; a second case, of two seeds, shares the examples alone.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from record import Record
from timing import Case, alternating

_COMPARE, _DISTINCT = "compare", "compare, different seeds"
_TRAIN, _TRAIN_DISTINCT = "train, run by run", "train, run by run, different seeds"


def run(record: Record, options: argparse.Namespace) -> None:
    """Measure in turn: four runs of one seed that share their inputs, and two of different seeds."""
    from childtuning.compare import Comparison, compare, read_comparison, set_up
    from childtuning.runs import RunConfig, train_run

    sizes = {
        "train_limit": 24 if options.quick else options.train_limit or 200,
        "epochs": 1.0,
        "task": "docstrings",
    }
    sizes |= {"max_length": 64, "learning_rate": 1e-4}
    common = {name: value for name, value in sizes.items() if name not in ("task", "train_limit")}
    words = {"tasks": ["docstrings"], "train_sizes": str(sizes["train_limit"])}
    settings = {"threads": options.threads, "selection": "reported"}
    shared = read_comparison(
        None,
        **words,
        methods=["child-d"],
        grid=["density=0.1,0.3", "granularity=element,row"],
        settings={**settings, "num_seeds": 1},
        options=common,
    )
    apart = read_comparison(
        None,
        **words,
        methods=["full"],
        settings={**settings, "num_seeds": 2, "tune_seeds": 2},
        options=common,
    )

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def empty() -> None:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

        def compared(comparison: Comparison) -> None:
            set_up(folder / "runs.db", comparison)
            recorded = compare(folder / "runs.db", comparison)
            assert all(run.state == "done" for run in recorded.records)

        def trained(comparison: Comparison) -> None:
            for one in comparison.first_runs:
                train_run(RunConfig.from_options(one.config), folder / one.id)

        cases = {
            _TRAIN: Case(lambda: trained(shared), empty),
            _COMPARE: Case(lambda: compared(shared), empty, ours=True),
            _TRAIN_DISTINCT: Case(lambda: trained(apart), empty),
            _DISTINCT: Case(lambda: compared(apart), empty, ours=True),
        }
        alternating(record, cases, options.repeats)
    record.ratio(
        "compare ÷ train of the same runs: one seed, two densities × two granularities",
        _COMPARE,
        _TRAIN,
        at_most=1.03,
    )
    record.ratio(
        "compare ÷ train of the same runs: two seeds, which share the examples alone",
        _DISTINCT,
        _TRAIN_DISTINCT,
        at_most=1.03,
    )
