"""Tasks: their kinds; examples from files, GLUE or the embedded task; batches and metrics."""

from __future__ import annotations

from childtuning.tasks.batches import EncodedExamples, LengthBucketBatches, PaddingCollator, encode
from childtuning.tasks.causal_lm import CausalLM
from childtuning.tasks.classification import Classification
from childtuning.tasks.docstrings import load_docstring_task
from childtuning.tasks.examples import Examples
from childtuning.tasks.files import read_examples, task_from_files
from childtuning.tasks.glue import GLUE, GlueTask, load_task
from childtuning.tasks.image_classification import ImageClassification
from childtuning.tasks.kind import KINDS, Answers, Columns, Kind, Task, find_kind, infer_kind
from childtuning.tasks.labels import LabelKind, check_labels
from childtuning.tasks.metrics import METRICS, Metric, compute_metrics, default_metrics
from childtuning.tasks.multi_label import LabelSets, MultiLabel
from childtuning.tasks.regression import Regression
from childtuning.tasks.rows import Source, as_source
from childtuning.tasks.split import Split
from childtuning.tasks.token_classification import TokenClassification
from childtuning.tasks.transfer import TransferTask, load_transfer_task

__all__ = [
    "Answers",
    "CausalLM",
    "Classification",
    "Columns",
    "EncodedExamples",
    "Examples",
    "GLUE",
    "GlueTask",
    "ImageClassification",
    "KINDS",
    "Kind",
    "LabelKind",
    "LabelSets",
    "LengthBucketBatches",
    "METRICS",
    "Metric",
    "MultiLabel",
    "PaddingCollator",
    "Regression",
    "Source",
    "Split",
    "Task",
    "TokenClassification",
    "TransferTask",
    "as_source",
    "check_labels",
    "compute_metrics",
    "default_metrics",
    "encode",
    "find_kind",
    "infer_kind",
    "load_docstring_task",
    "load_task",
    "load_transfer_task",
    "read_examples",
    "task_from_files",
]
