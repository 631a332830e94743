"""The table of GLUE tasks, and `load_task`, which loads a task by name from a folder or the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from childtuning.errors import ConfigError, DataError, did_you_mean
from childtuning.tasks.examples import Examples
from childtuning.tasks.files import read_examples, task_from_files
from childtuning.tasks.kind import Task, find_kind
from childtuning.tasks.labels import LabelKind, check_labels
from childtuning.tasks.rows import Source
from childtuning.tasks.task_folders import is_task_folder, splits_of

_HUB_DATASET = "nyu-mll/glue"
_EMBEDDED = "docstrings"


@dataclass(frozen=True)
class GlueTask:
    """One row of the table: label names in the order of the official ids, metrics, and hub columns."""

    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    columns: tuple[str, str | None]
    dev_split: str = "validation"


GLUE: Mapping[str, GlueTask] = {
    "cola": GlueTask(("unacceptable", "acceptable"), ("matthews",), ("sentence", None)),
    "sst2": GlueTask(("negative", "positive"), ("accuracy",), ("sentence", None)),
    "mrpc": GlueTask(("not_equivalent", "equivalent"), ("f1", "accuracy"), ("sentence1", "sentence2")),
    "stsb": GlueTask((), ("pearson", "spearman"), ("sentence1", "sentence2")),
    "qqp": GlueTask(("not_duplicate", "duplicate"), ("f1", "accuracy"), ("question1", "question2")),
    "mnli": GlueTask(
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        ("premise", "hypothesis"),
        "validation_matched",
    ),
    "qnli": GlueTask(("entailment", "not_entailment"), ("accuracy",), ("question", "sentence")),
    "rte": GlueTask(("entailment", "not_entailment"), ("accuracy",), ("sentence1", "sentence2")),
    "wnli": GlueTask(("not_entailment", "entailment"), ("accuracy",), ("sentence1", "sentence2")),
}


def load_task(
    name: str,
    *,
    data_dir: str | Path | None = None,
    kind: str | None = None,
    train_limit: int | None = None,
    seed: int = 0,
    strict: bool = False,
) -> Task:
    """Load a task by name.

    `data_dir/name/{train,dev}.jsonl.gz` (or .jsonl; MNLI's dev may be dev_matched) takes precedence over
    the hub. Columns and labels are as for `read_examples`; GLUE labels may also be the official ids. A
    folder of data_dir that is not a GLUE task is loaded as by `task_from_files`, with the splits that
    `splits_of` finds. "docstrings" is available on every machine (`load_docstring_task`).

    Args:
        name: a GLUE name, a folder of data_dir, or "docstrings".
        data_dir: the folder of local copies; None uses the hub.
        kind: the kind of task; None infers it for a folder.
        train_limit: the maximum number of training rows, drawn with `seed`; None keeps all (400 for
            "docstrings").
        seed: the seed of that draw.
        strict: refuse the first bad row of a file instead of leaving it out.
    Raises:
        DataError: for an unknown name, a missing split, a label that is not the task's, or when neither
            a local copy nor the hub is available.
        ConfigError: when train_limit is below 1, or the named task is of another kind.
    """
    if kind is not None:
        find_kind(kind)
    task = _load(name, data_dir, kind, train_limit, seed, strict)
    if kind not in (None, task.kind):
        raise ConfigError(f"task {name!r} is {task.kind}, got the kind {kind!r}. Leave the kind out.")
    return task


def _load(
    name: str, data_dir: str | Path | None, kind: str | None, train_limit: int | None, seed: int, strict: bool
) -> Task:
    if name == _EMBEDDED:
        from childtuning.tasks.docstrings import DEFAULT_TRAIN_LIMIT, load_docstring_task

        limit = DEFAULT_TRAIN_LIMIT if train_limit is None else train_limit
        return load_docstring_task(seed=seed, train_limit=limit)
    folders = _task_folders(data_dir)
    if name not in GLUE and name not in folders:
        raise DataError(f"Unknown task {name!r}. {did_you_mean(name, sorted({*GLUE, *folders, _EMBEDDED}))}")
    if name not in GLUE:
        train, dev = splits_of(name, folders[name])
        return task_from_files(
            train, dev, kind=kind, name=name, train_limit=train_limit, seed=seed, strict=strict
        )
    glue = GLUE[name]
    sources: list[Source] = []
    if name in folders:
        label_kind: LabelKind = "class" if glue.label_names else "number"
        sources = [Source(path, strict=strict) for path in splits_of(name, folders[name])]
        splits = [read_examples(source, label_kind=label_kind) for source in sources]
    else:
        splits = _hub_splits(name, glue, data_dir)
    train_rows, dev_rows = (_with_official_names(rows, glue) for rows in splits)
    task = Task(
        name=name,
        kind="classification" if glue.label_names else "regression",
        label_names=glue.label_names,
        metrics=glue.metrics,
        train=train_rows,
        dev=dev_rows,
        notes=tuple(note for source in sources for note in source.notes),
    )
    if glue.label_names:
        check_labels(dev_rows, sorted(train_rows.classes()), where=f"the dev split of {name!r}")
    return task.draw(train_limit, seed=seed)


def _task_folders(data_dir: str | Path | None) -> dict[str, Path]:
    """Return the folders of data_dir that contain examples or have a GLUE name."""
    if data_dir is None:
        return {}
    root = Path(data_dir)
    if not root.is_dir():
        raise DataError(f"data_dir must be a folder, got {root}. Pass one that holds TASK/train.jsonl.gz.")
    folders = {path.name: path for path in sorted(root.iterdir()) if path.is_dir()}
    return {name: path for name, path in folders.items() if name in GLUE or is_task_folder(path)}


def _with_official_names(rows: Examples, glue: GlueTask) -> Examples:
    """Replace official ids ("0", "1", …) with class names."""
    if not glue.label_names or rows.labels is None:
        return rows
    by_id = {str(index): name for index, name in enumerate(glue.label_names)}
    return Examples(rows.text, rows.text_pair, [by_id.get(str(label), str(label)) for label in rows.labels])


def _hub_splits(name: str, glue: GlueTask, data_dir: str | Path | None) -> list[Examples]:
    looked = "no local copy" if data_dir is None else f"no folder {name} in {data_dir}"
    try:
        import datasets

        loaded = datasets.load_dataset(_HUB_DATASET, name)
        splits = [loaded["train"], loaded[glue.dev_split]]  # type: ignore[index]
    except Exception as error:  # the remedy is the same whatever the network or the hub's client raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise DataError(
            f"Task {name!r} cannot be loaded: no network (or no such data there) and {looked} ({reason}). "
            f"Pass --data-dir DIR (data_dir=) with {name}/train.jsonl.gz and {name}/dev.jsonl.gz."
        ) from error
    text, pair = glue.columns
    return [
        Examples(
            text=list(split[text]),
            text_pair=None if pair is None else list(split[pair]),
            labels=[str(label) if glue.label_names else float(label) for label in split["label"]],  # type: ignore[arg-type]
        )
        for split in splits
    ]
