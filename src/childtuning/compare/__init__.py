"""Compare methods over seeds: plan the runs, execute each once, record the results, and test for significance."""

from childtuning.compare.compare import EXECUTORS, check_installed, compare, foreseen, set_up, stored
from childtuning.compare.design import Comparison, read_methods
from childtuning.compare.plan import Choice, Tried, choose, num_runs
from childtuning.compare.protocols import PROTOCOLS, read_comparison
from childtuning.compare.records import Group, Record, Recorded
from childtuning.compare.store import Store
from childtuning.compare.summary import Average, Row, Standing, across_tasks, standing, summarize
from childtuning.compare.work import check_size

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
    "Standing",
    "Store",
    "Tried",
    "across_tasks",
    "check_installed",
    "check_size",
    "choose",
    "compare",
    "foreseen",
    "num_runs",
    "read_comparison",
    "read_methods",
    "set_up",
    "standing",
    "stored",
    "summarize",
]
