"""What a run has understood before it starts: its examples, and the learning rate and epochs chosen for them."""

from __future__ import annotations

import math
import os
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import torch

from childtuning.errors import counted
from childtuning.ranks import num_processes
from childtuning.runs.config import RunConfig
from childtuning.runs.evaluate import RunTests
from childtuning.runs.log import duration
from childtuning.tasks import Columns, Split, Task
from childtuning.training import ChildTrainer, LoadedModel, layer_width, suggested_epochs, suggested_rate

_NAMED = 12  # classes that a line lists
_FEW = 5  # examples; with fewer, a class is rare
_BACKWARD = 3  # a training step takes about three forward passes


@dataclass(frozen=True)
class Understood:
    """What a run has understood of its options and examples.

    Attributes:
        task, kind, columns: the task's.
        train_examples, eval_examples, held_out_examples: counts.
        classes: class -> its examples in training and in evaluation; ``None`` without classes.
        values: least, mean and largest target in training; ``None`` unless targets are numbers.
        tokens: median and most tokens of the training examples; ``None`` for images.
        cut_by_length: training words or rows (by kind of task) that ``max_length`` truncates.
        duplicates: evaluation examples that are also training examples, whatever their labels.
        contradictions: training examples whose text is also there with another class.
        examples: the first training example of each of two classes: its text, or both, and its label.
        child: density or budget, and granularity; empty for methods that take none.
        method, learning_rate, epochs, steps: of the training.
        reasons: option -> why it has its value, for those chosen by the run.
        folds: of a cross-validation.
        seconds: an estimate of the time to choose the child, train and evaluate; ``None`` where it was not made.
        warnings: what looks wrong, one line each.
    """

    task: str
    kind: str
    columns: dict[str, Any]
    train_examples: int
    eval_examples: int
    held_out_examples: int
    classes: dict[str, list[int]] | None
    values: list[float] | None
    tokens: list[int] | None
    cut_by_length: int
    duplicates: int
    contradictions: int
    examples: list[list[str]]
    child: dict[str, Any]
    method: str
    learning_rate: float
    epochs: float
    steps: int
    reasons: dict[str, str]
    folds: int | None = None
    seconds: float | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """Yield what a user should check, a line each."""
        named = [f"{name} {column!r}" for name, column in self.columns.items() if column]
        yield f"task        {', '.join([self.kind, *named])}"
        yield f"training    {self._counts(self.train_examples, 0)}"
        yield f"evaluation  {self._counts(self.eval_examples, 1)}{self._folds()}"
        if self.held_out_examples:
            yield f"held out    {counted(self.held_out_examples, 'example')} of the training file"
        if self.tokens is not None:
            cut = f"{self.cut_by_length} are cut" if self.cut_by_length else "none is cut"
            yield f"length      median {self.tokens[0]} tokens, longest {self.tokens[1]}; {cut}"
        for *shown, label in self.examples:
            yield f"example     {' + '.join(map(repr, shown))} → {label}"
        child = [f"{name} {value}" for name, value in self.child.items()]
        chosen = [
            f"learning rate {self.learning_rate:g}{self._reason('learning_rate')}",
            f"{self.epochs:g} {'epoch' if self.epochs == 1 else 'epochs'}{self._reason('epochs')}",
            counted(self.steps, "step"),
        ]
        parts = [", ".join(child), chosen[0], ", ".join(chosen[1:])]
        yield f"method      {self.method}: {'; '.join(filter(None, parts))}"
        if self.seconds is not None:
            yield f"time        about {duration(max(1.0, self.seconds))}"
        for warning in self.warnings:
            yield f"warning: {warning}"

    def _folds(self) -> str:
        if self.folds is None:
            return ""
        return f"; in {self.folds} folds, each answered by a model trained on the others"

    def _counts(self, examples: int, column: int) -> str:
        if self.classes is None:
            found = "" if self.values is None or column else ", from {:g} to {:g}, mean {:.3g}"
            least, mean, largest = self.values or (0, 0, 0)
            return f"{counted(examples, 'example')}{found.format(least, largest, mean)}"
        counts = sorted(self.classes.items(), key=lambda item: -item[1][column])
        words = [f"{_short(name, 40)} {both[column]:,}" for name, both in counts[:_NAMED]]
        rest = f", and {len(counts) - _NAMED:,} more classes" if counts[_NAMED:] else ""
        return f"{counted(examples, 'example')}: {', '.join(words)}{rest}"

    def _reason(self, name: str) -> str:
        return f" ({self.reasons[name]})" if name in self.reasons else ""


def choose_training(
    config: RunConfig, loaded: LoadedModel, num_examples: int
) -> tuple[RunConfig, dict[str, str]]:
    """Return a run with its learning rate and epochs as numbers, and why: option -> reason for those that were auto."""
    reasons: dict[str, str] = {}
    chosen: dict[str, float] = {}
    if config.learning_rate == "auto":
        chosen["learning_rate"] = suggested_rate(loaded.model, config.methods().rate)
        reasons["learning_rate"] = f"auto: layers of width {layer_width(loaded.model)}"
    if config.epochs == "auto":
        batch = config.batch_size * config.gradient_accumulation
        chosen["epochs"] = float(suggested_epochs(num_examples, batch))
        reasons["epochs"] = f"auto: {counted(num_examples, 'example')}"
    return replace(config, **chosen), reasons  # type: ignore[arg-type]


def understood(
    config: RunConfig,
    task: Task,
    held_out: Split | None,
    train: Any,
    tests: RunTests,
    reasons: dict[str, str],
) -> Understood:
    """Describe a run.

    Args:
        config: with its learning rate and epochs as numbers.
        task: its examples.
        held_out: the held-out training examples.
        train: the encoded training examples.
        tests: the encoded evaluation examples.
        reasons: as ``choose_training`` returns them.
    """
    assert isinstance(config.epochs, float) and isinstance(config.learning_rate, float)
    classes, values = _labels_of(task)
    is_text = "input_ids" in train[0]
    in_folds = config.folds is not None and config.fold is None
    warnings = list(data_warnings(task, in_folds=in_folds))
    if is_text and len(train) > 1 and all(row["input_ids"] == train[0]["input_ids"] for row in train):
        warnings.append(
            "the model sees the same tokens in every training example. Raise --max-length, or check the text."
        )
    batches = math.ceil(len(train) / config.batch_size)
    steps = math.ceil(math.ceil(batches / config.gradient_accumulation) * config.epochs)
    told = (method.warning(steps) for method in config.methods().methods)
    warnings += [warning for warning in told if warning is not None]
    if steps == 1 and config.warmup_ratio > 0:
        warnings.append(
            "the only step is one of warm-up, whose rate is 0: nothing will be trained. Raise --epochs, or pass "
            "--warmup-ratio 0."
        )
    return Understood(
        task=task.name,
        kind=task.kind,
        columns=_columns(task.columns),
        train_examples=len(train),
        eval_examples=len(tests.encoded[0]),
        held_out_examples=0 if held_out is None else len(held_out),
        classes=classes,
        values=values,
        tokens=[int(median(train.lengths)), max(train.lengths)] if is_text else None,
        cut_by_length=train.num_cut,
        duplicates=0 if in_folds else _duplicates(task),
        contradictions=_contradictions(task),
        examples=_examples(task.train),
        child=_child(config),
        method=config.method,
        learning_rate=config.learning_rate,
        epochs=config.epochs,
        steps=steps,
        reasons=reasons,
        folds=config.folds if config.fold is None else None,
        warnings=warnings,
    )


def data_warnings(task: Task, *, in_folds: bool = False) -> Iterator[str]:
    """Yield what looks wrong about a task's examples, one line each.

    Args:
        task: the examples.
        in_folds: whether each example is answered by a model that has not seen it.
    """
    num_train, num_dev = len(task.train), len(task.dev)
    if not in_folds and (duplicates := _duplicates(task)):
        all_of = "all" if duplicates == num_dev else f"{duplicates:,}"
        verb = "is" if duplicates == 1 < num_dev else "are"
        yield (
            f"{all_of} of the {num_dev:,} evaluation examples {verb} also in training, so the score says too little "
            "about new ones. Drop the repeated rows, or evaluate on others."
        )
    if contradictions := _contradictions(task):
        yield (
            f"{contradictions:,} of the {num_train:,} training examples are there more than once, with different "
            "labels: no model can learn both. Correct the labels, or drop the rows."
        )
    for name in ("text", "text_pair"):
        texts = getattr(task.train, name, None)
        if isinstance(texts, list) and len(texts) > 1 and len(set(texts)) == 1:
            column = getattr(task.columns, name) or name
            yield f"every training example has the same {column!r}: {texts[0][:60]!r}. Name another column."
    labels = getattr(task.train, "labels", None) or []
    if len(labels) > 1 and isinstance(labels[0], list) and all(label == labels[0] for label in labels):
        names = ", ".join(labels[0])
        yield f"every training example has the labels {names}. If lists are 0/1 indicators, write names instead."
    classes, values = _labels_of(task)
    if values is not None and values[0] == values[2]:
        yield f"every training target is {values[0]:g}, so there is nothing to learn. Name another column."
    if classes is None:
        return
    looks: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        looks["".join(unicodedata.normalize("NFKC", name).casefold().split())].append(name)
    for names in looks.values():
        if len(names) > 1:
            yield (
                f"the labels {' and '.join(map(repr, names))} look alike and are learnt as different classes. "
                "Write them the same way, if they are one."
            )
    if len(classes) > max(20, num_train / 2):
        yield (
            f"the label has {len(classes):,} classes in {num_train:,} examples: perhaps it is an id, or a number "
            "(--label-type number)."
        )
    elif rare := [name for name, (train, _) in classes.items() if train < _FEW]:
        more = f" and {len(rare) - 3} others" if rare[3:] else ""
        yield f"fewer than {_FEW} training examples have the label {', '.join(rare[:3])}{more}: it is hardly learnt."


def _labels_of(task: Task) -> tuple[dict[str, list[int]] | None, list[float] | None]:
    """Count the classes in training and evaluation; or return least, mean and largest of numbers."""
    labels, dev_labels = _labels(task.train), _labels(task.dev)
    if task.rules.has_classes:
        here, there = Counter(map(str, labels)), Counter(map(str, dev_labels))
        return {name: [here[name], there[name]] for name in task.label_names}, None
    if labels and isinstance(labels[0], float):
        return None, [min(labels), sum(labels) / len(labels), max(labels)]
    return None, None


def _duplicates(task: Task) -> int:
    known = set(task.train.contents() or ())
    return sum(content in known for content in task.dev.contents() or ())


def _contradictions(task: Task) -> int:
    labels, contents = getattr(task.train, "labels", None), task.train.contents()
    if not task.rules.has_classes or labels is None or contents is None:
        return 0
    found: dict[Any, set[str]] = defaultdict(set)
    for content, label in zip(contents, labels, strict=True):
        found[content].add(str(label))
    return sum(len(found[content]) > 1 for content in contents)


def _child(config: RunConfig) -> dict[str, Any]:
    if not config.methods().takes_density:
        return {}
    child = config.child()
    size = {"density": child.density} if child.budget is None else {"budget": child.budget}
    return {**size, "granularity": child.granularity}


def estimate_seconds(found: Understood, config: RunConfig, trainer: ChildTrainer, train: Any) -> float:
    """Estimate the time to choose the child, train and evaluate, from a forward pass; it leaves no trace."""
    model, rows = trainer.bare_model, sorted(range(len(train)), key=train.lengths.__getitem__)
    start = max(0, len(rows) // 2 - config.batch_size // 2)
    batch = trainer.data_collator([train[row] for row in rows[start : start + config.batch_size]])
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items()}
    was_training = model.training
    model.eval()
    spent = []
    try:
        with torch.no_grad():
            for _ in range(2):  # the first one also warms up
                begun = time.perf_counter()
                model(**inputs)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                spent.append(time.perf_counter() - begun)
    finally:
        model.train(was_training)
    child = config.child()
    scores = child.variant == "task-driven" and child.scores == "fisher" and child.density != 1.0
    train_passes = _BACKWARD * (found.epochs + scores) * found.train_examples / _processes()
    passes = train_passes + found.eval_examples
    if found.folds is not None:
        passes += (found.folds - 1) * train_passes
    return min(spent) * passes / len(inputs[next(iter(inputs))])


def _processes() -> int:
    """The number of processes that train together; before they have met, as torchrun tells it."""
    return max(num_processes(), int(os.environ.get("WORLD_SIZE", "1")))


def _labels(split: Split) -> list[Any]:
    """Return the labels of all examples, or of all their words."""
    labels = getattr(split, "labels", None) or getattr(split, "tags", None) or []
    return [label for one in labels for label in (one if isinstance(one, (list, tuple)) else [one])]


def _columns(columns: Columns) -> dict[str, Any]:
    return {"text": columns.text, "text_pair": columns.text_pair, "label": columns.label}


def _examples(split: Split) -> list[list[str]]:
    """The first example, and the first with another label."""
    labels = (
        getattr(split, "labels", None) or getattr(split, "tags", None) or getattr(split, "responses", None)
    )
    if not labels:
        return [[*_texts(split, 0), "…"]]
    other = next((row for row, label in enumerate(labels) if label != labels[0]), None)
    rows = [0] if other is None else [0, other]
    return [[*_texts(split, row), _short(labels[row])] for row in rows]


def _texts(split: Split, row: int) -> list[str]:
    seconds = getattr(split, "text_pair", None) or []
    return [split.shown(row), *(_short(text) for text in seconds[row : row + 1])]


def _short(label: Any, most: int = 80) -> str:
    text = " ".join(label) if isinstance(label, (list, tuple)) else str(label)
    return text if len(text) <= most else text[: most - 1] + "…"
