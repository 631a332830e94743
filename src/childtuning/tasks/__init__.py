"""Tasks: examples from files, GLUE or the embedded task; their batches and metrics."""

from __future__ import annotations

from childtuning.tasks.batches import EncodedExamples, LengthBucketBatches, PaddingCollator, encode
from childtuning.tasks.docstrings import load_docstring_task
from childtuning.tasks.examples import Examples, Task, TaskKind, check_labels
from childtuning.tasks.files import guess_columns, read_examples, task_from_files
from childtuning.tasks.glue import GLUE, GlueTask, load_task
from childtuning.tasks.labels import LabelKind
from childtuning.tasks.metrics import METRICS, Metric, compute_metrics, default_metrics
from childtuning.tasks.rows import read_rows

__all__ = [
    "EncodedExamples",
    "Examples",
    "GLUE",
    "GlueTask",
    "LabelKind",
    "LengthBucketBatches",
    "METRICS",
    "Metric",
    "PaddingCollator",
    "Task",
    "TaskKind",
    "check_labels",
    "compute_metrics",
    "default_metrics",
    "encode",
    "guess_columns",
    "load_docstring_task",
    "load_task",
    "read_examples",
    "read_rows",
    "task_from_files",
]
