"""Compare methods over seeds: plan the runs, do them once each, record them, and say what is significant."""

from childtuning.experiments.comparison.asking import asked_for
from childtuning.experiments.comparison.choice import Choice, Tried, choose
from childtuning.experiments.comparison.compare import EXECUTORS, compare, foreseen, set_up, stored
from childtuning.experiments.comparison.design import Comparison
from childtuning.experiments.comparison.plan import num_runs
from childtuning.experiments.comparison.protocols import PROTOCOLS
from childtuning.experiments.comparison.records import Group, Record, Recorded
from childtuning.experiments.comparison.store import Store
from childtuning.experiments.comparison.summary import Average, Row, across_tasks, summarize

__all__ = [
    "Average",
    "Choice",
    "Comparison",
    "EXECUTORS",
    "Group",
    "PROTOCOLS",
    "Record",
    "Recorded",
    "Row",
    "Store",
    "Tried",
    "across_tasks",
    "asked_for",
    "choose",
    "compare",
    "foreseen",
    "num_runs",
    "set_up",
    "stored",
    "summarize",
]
