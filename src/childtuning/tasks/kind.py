"""`Kind`, the interface of a kind of task; the registry of kinds; and `Task`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
from torch import Tensor

from childtuning.errors import ConfigError, DataError, did_you_mean
from childtuning.tasks.labels import check_labels, some_names, sort_labels
from childtuning.tasks.metrics import OF_ONE_CLASS, OF_RANKING, WeightedFn
from childtuning.tasks.rows import Source
from childtuning.tasks.split import Split

Part = Literal["train", "dev"]
Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


@dataclass(frozen=True)
class Columns:
    """The columns of a file; None leaves the choice to the kind of task.

    Args:
        text: the text, the words, or the prompt.
        text_pair: the second text, for pairs.
        label: the label, the tags, or the response.
        label_type: whether labels are classes or numbers; "auto" infers it.
        decimal_commas: whether numbers are written as "3,5".
        pixel_range: the lowest and highest value that the training images' pixels can have; None: each file's own.
    """

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    label_type: Literal["auto", "class", "number"] = "auto"
    decimal_commas: bool = False
    pixel_range: tuple[int, int] | None = None


class Encoded(Protocol):
    """Examples as model inputs: a dataset of rows, made by a kind's `encode`."""

    num_cut: int
    """How many words or rows were truncated by the length limit."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @property
    def lengths(self) -> list[int]:
        """The length of each row, used to form batches."""
        ...


@dataclass(frozen=True)
class Answers:
    """Options for generating answers.

    Args:
        max_new_tokens: the maximum number of tokens in a generated response.
    """

    max_new_tokens: int = 64


class Kind(ABC):
    """One kind of task: how to read, check and encode examples, run a model on them, and measure its outputs.

    Class attributes:
        name: the name a user types.
        summary: one line for listings.
        auto_model: the transformers class that loads a model for it.
        auto_processor: the transformers class that loads the tokenizer or image processor.
        processor_folder: the processor's folder within a run.
        processor_options: the options that the processor is loaded with.
        has_classes: whether labels are classes.
        has_new_head: whether the model gets a new head for the task.
        takes_packaged: whether the packaged encoder is the default model.
        problem_type: transformers' name for the loss, where one class of model has several.
        metric_names: all available metrics.
        adds: what predictions have besides "prediction" and confidences.
        batch_size: examples per batch in prediction and evaluation.
        cut_words: what `Encoded.num_cut` counts, as the subject of "… were cut".
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    auto_model: ClassVar[str]
    auto_processor: ClassVar[str] = "AutoTokenizer"
    processor_folder: ClassVar[str] = "tokenizer"
    processor_options: ClassVar[Mapping[str, Any]] = {}
    has_classes: ClassVar[bool] = True
    has_new_head: ClassVar[bool] = True
    takes_packaged: ClassVar[bool] = True
    problem_type: ClassVar[str | None] = None
    metric_names: ClassVar[tuple[str, ...]]
    adds: ClassVar[tuple[str, ...]] = ()
    batch_size: ClassVar[int] = 32
    cut_words: ClassVar[str] = "rows"

    # Files

    @abstractmethod
    def claims(self, source: Source, columns: Columns) -> bool:
        """Return whether a training file is of this kind, by name, content and columns; no file suits two kinds."""

    def settle(self, source: Source, columns: Columns) -> Columns:
        """Return the columns, with those left open filled in from the training file."""
        return columns

    @abstractmethod
    def read(self, source: Source, columns: Columns, *, part: Part = "dev", labelled: bool = True) -> Split:
        """Read one split.

        Args:
            source: a file or folder.
            columns: as `settle` returned them.
            part: which split to read if the file holds both.
            labelled: whether to read labels.
        Raises:
            DataError: when the file cannot be used; one line that names the file.
        """

    def holds_both(self, source: Source) -> bool:
        """Return whether a file holds both splits."""
        return False

    def of_texts(self, texts: list[str], pairs: list[str] | None, columns: Columns) -> Split:
        """Return unlabelled examples that a user typed: one of each text, or of each pair.

        Args:
            texts, pairs: the texts, and the second of each if there are pairs.
            columns: of the file that the run was trained on: typed examples are as its rows.
        Raises:
            ConfigError: when examples of this kind cannot be typed.
            DataError: when they have no second text.
        """
        raise ConfigError(f"examples of {self.name} cannot be typed. Pass them as --input FILE.")

    # The task

    def label_names(self, train: Split) -> tuple[str, ...]:
        """Return the class names that occur in training, in order of id; () without classes."""
        return sort_labels(train.classes()) if self.has_classes else ()

    @abstractmethod
    def metrics(self, label_names: Sequence[str]) -> tuple[str, ...]:
        """Return the default metrics of a task; the first is the metric of the run."""

    def check(self, task: Task) -> None:  # noqa: B027  # most kinds have nothing more to check
        """Make the checks that are specific to this kind.

        Raises:
            DataError: when the task cannot be trained or measured.
        """

    def num_outputs(self, label_names: Sequence[str]) -> int:
        """Return the width of the new head."""
        return len(label_names)

    def model_options(self, label_names: Sequence[str]) -> dict[str, Any]:
        """Return the options of the model's configuration."""
        return {
            "num_labels": self.num_outputs(label_names),
            "id2label": dict(enumerate(label_names)),
            "label2id": {label: index for index, label in enumerate(label_names)},
            **({} if self.problem_type is None else {"problem_type": self.problem_type}),
        }

    def default_processor(self, config: Any) -> Any:
        """Return the processor for a model folder that has none; None if there is no default."""
        return None

    # Batches

    @abstractmethod
    def encode(
        self, processor: Any, split: Split, *, max_length: int, label_names: Sequence[str] = ()
    ) -> Encoded:
        """Convert examples to model inputs, with labels if the split has them.

        Raises:
            ConfigError, DataError: when the processor or the length does not fit these examples.
        """

    @abstractmethod
    def collator(self, processor: Any, *, exact: bool = False) -> Collate:
        """Return a function that collates rows into a batch; `exact` pads to the longest row and no further."""

    # What a model returns

    @abstractmethod
    def outputs(self, model: Any, batch: Mapping[str, Tensor]) -> list[Any]:
        """Run a model on a batch and return what `weighted` needs, one entry per example."""

    def constant_output(self, train: Split, label_names: Sequence[str]) -> Any:
        """Return the output of a constant baseline, which gives every example the same answer.

        The answer is the most frequent one among the training examples; None if there is no such baseline.
        """
        return None

    def truth(self, split: Any, label_names: Sequence[str]) -> list[int] | None:
        """Return the class id of each example, if it has one class and its output is logits; else None."""
        return None

    @abstractmethod
    def weighted(
        self, metric: str, outputs: Sequence[Any], encoded: Any, split: Any, label_names: Sequence[str]
    ) -> WeightedFn:
        """Return a metric of a labelled split as a function of the examples' weights."""

    def answers(self, model: Any, batch: Mapping[str, Tensor], processor: Any, options: Answers) -> list[Any]:
        """Run a model on a batch and return what `predictions` needs, one entry per example."""
        return self.outputs(model, batch)

    @abstractmethod
    def predictions(
        self, answers: Sequence[Any], encoded: Any, split: Any, label_names: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return for each example what is written for a user: a dict with "prediction" and possibly other keys."""

    def chances(self, logits: np.ndarray) -> np.ndarray | None:
        """Return the probability of each class [N, K], float64, for logits [N, K]; None without classes."""
        return None

    def line(self, prediction: Mapping[str, Any], shown: str) -> str:
        """Return a prediction and a short form of its example as one line of text."""
        return f"{prediction['prediction']}\t{shown}"


KINDS: dict[str, Kind] = {}
_K = TypeVar("_K", bound=Kind)


def register(kind: type[_K]) -> type[_K]:
    """Register a kind of task under its name; a decorator."""
    KINDS[kind.name] = kind()
    return kind


def find_kind(name: str) -> Kind:
    """Return a kind of task by name.

    Raises:
        DataError: when there is no kind of that name.
    """
    if name not in KINDS:
        raise DataError(f"Unknown kind of task, got {name!r}. {did_you_mean(name, KINDS)}")
    return KINDS[name]


def infer_kind(source: Source, columns: Columns, *, unless: str = "classification") -> Kind:
    """Return the kind that claims a training file, or the kind named `unless` if none does.

    Raises:
        ConfigError: when more than one kind claims it.
    """
    claiming = [kind for kind in KINDS.values() if kind.claims(source, columns)]
    if len(claiming) > 1:
        names = " or ".join(kind.name for kind in claiming)
        raise ConfigError(f"{source} may be {names}. Choose one with --task-kind NAME (kind=).")
    return claiming[0] if claiming else find_kind(unless)


def check_metrics(kind: Kind, names: Iterable[str]) -> None:
    """Check that a kind of task has these metrics.

    Raises:
        ConfigError: naming the first metric that it lacks.
    """
    everything = {name: None for other in KINDS.values() for name in other.metric_names}
    for name in names:
        if name not in everything:
            raise ConfigError(f"Unknown metric {name!r}. {did_you_mean(name, everything)}")
        if name not in kind.metric_names:
            fitting = ", ".join(kind.metric_names)
            raise ConfigError(f"Metric {name!r} does not fit {kind.name}. Pass one of {fitting}.")


@dataclass(frozen=True)
class Task:
    """A labelled train and dev split, their label names, and the metrics of runs on them.

    Args:
        name: the task's name in reports.
        kind: the name of its kind: "classification", "regression", …; see `KINDS`.
        label_names: class names in order of id; () without classes.
        metrics: metric names; the first is the metric of the run.
        train: labelled examples to train on.
        dev: labelled examples to measure on.
        columns: the columns of its files.
        notes: what was guessed about its files or left out, one line each, for the user.
    Raises:
        DataError: when a split is empty or unlabelled, training has a single class, a split has a class that
            is not in `label_names`, or the kind's own check fails.
    """

    name: str
    kind: str
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    train: Split
    dev: Split
    columns: Columns = field(default_factory=Columns)
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        kind = find_kind(self.kind)
        if not self.metrics:
            raise DataError(f"Task {self.name!r} must name at least one metric, got none. Pass one.")
        for split, rows in (("train", self.train), ("dev", self.dev)):
            if not len(rows):
                raise DataError(f"The {split} split of {self.name!r} has no rows. Pass at least one example.")
            if not rows.is_labelled:
                raise DataError(f"The {split} split of {self.name!r} has no labels. Name its label column.")
        kind.check(self)
        if kind.has_classes:
            self._check_classes()
        elif self.label_names:
            raise DataError(
                f"A task of kind {self.kind} has no label names, got {self.label_names}. Pass label_names=()."
            )

    def _check_classes(self) -> None:
        """Refuse labels that cannot be learnt or measured."""
        if len(set(self.label_names)) != len(self.label_names):
            raise DataError(f"label_names must be distinct, got {self.label_names}. Drop the duplicates.")
        seen = check_labels(self.train, self.label_names, where=f"the train split of {self.name!r}")
        # A single label that a text has or has not can be learnt.
        is_single = find_kind(self.kind).problem_type == "multi_label_classification"
        if len(seen) < (1 if is_single else 2):
            needed = "one label" if is_single else "two classes"
            remedy = (
                "Pass a larger --train-limit, or more examples"
                if len(self.label_names) > 1
                else "Add examples of another class"
                if seen
                else "Label the examples"
            )
            raise DataError(
                f"Training needs at least {needed}, got {f'only {min(seen)!r}' if seen else 'none'} "
                f"in the train split of {self.name!r}. {remedy}."
            )
        check_labels(self.dev, self.label_names, where=f"the dev split of {self.name!r}")

    def draw(self, limit: int | None, *, seed: int = 0) -> Task:
        """Return the task with at most ``limit`` training examples, as ``Split.sample`` draws them.

        The class names stay; classes that are not drawn are noted.
        """
        train = self.train.sample(limit, seed=seed)
        lost = [name for name in self.label_names if name in self.train.classes() - train.classes()]
        note = f"the {len(train)} training examples drawn have none of {some_names(lost)}"
        return replace(self, train=train, notes=(*self.notes, note) if lost else self.notes)

    def limit_evaluation(self, limit: int | None, *, seed: int = 0) -> Task:
        """Return the task with at most ``limit`` evaluation examples, as ``Split.sample`` draws them."""
        return replace(self, dev=self.dev.sample(limit, seed=seed))

    def hold_out(self, share: float, limit: int | None, *, seed: int = 0) -> tuple[Task, Split | None]:
        """Hold out a share of the training examples, and draw at most ``limit`` of the others.

        Args:
            share: in [0, 1); 0 holds nothing out.
            limit: the maximum number of training examples; None keeps all.
            seed: the seed of both draws.
        Returns:
            the task without the held-out examples, and these; None if nothing is held out.
        Raises:
            ConfigError, DataError: when too few examples are left.
        """
        train, aside = self.train.hold_out(share, seed=seed) if share else (self.train, None)
        if aside is not None and self.metrics[0] in OF_RANKING and len(aside.classes()) < 2:
            raise DataError(
                f"{self.metrics[0]} needs held-out examples of two classes, got only {min(aside.classes())!r}. "
                "Hold out a larger share, pass more examples of the rare class, or another --metric."
            )
        return replace(self, train=train).draw(limit, seed=seed), aside

    def measured_by(self, metric: str) -> Task:
        """Return the task with another main metric; its others follow.

        Raises:
            ConfigError: for a metric that does not fit the kind, or its tags.
            DataError: when it needs two classes, and the evaluation examples are of one.
        """
        check_metrics(self.rules, [metric])
        if metric.startswith("span_") and "span_f1" not in self.rules.metrics(self.label_names):
            raise ConfigError(
                f"{metric} reads the tags O, B-… and I-…, got {some_names(self.label_names)}. Pass --metric accuracy, "
                "or write the tags so."
            )
        if metric in OF_RANKING and len(self.dev.classes()) < 2:
            raise DataError(
                f"{metric} needs evaluation examples of two classes, got only {min(self.dev.classes())!r}. "
                "Pass examples of another class, or another --metric."
            )
        return replace(self, metrics=(metric, *(name for name in self.metrics if name != metric)))

    def in_order(self, label_names: tuple[str, ...]) -> Task:
        """Return the task with its classes in the order of a model's outputs.

        Raises:
            ConfigError: when a metric is of the second of two classes, and the order would change that class.
        """
        if label_names == self.label_names or not self.label_names:
            return self
        of_one = [name for name in self.metrics if name in OF_ONE_CLASS]
        if of_one and len(label_names) == 2:
            raise ConfigError(
                f"{of_one[0]} of {self.name!r} measures the class {self.label_names[1]!r}, got a model with the labels "
                f"{', '.join(label_names)}. Save it with its labels in the order {', '.join(self.label_names)}."
            )
        return replace(self, label_names=label_names)

    @property
    def rules(self) -> Kind:
        """The task's kind."""
        return find_kind(self.kind)

    @property
    def num_labels(self) -> int:
        """The width of the model's head: the number of classes, 1 for regression."""
        return self.rules.num_outputs(self.label_names)

    @property
    def num_empty(self) -> int:
        """The number of empty rows in both splits."""
        return self.train.num_empty + self.dev.num_empty

    @property
    def label_ids(self) -> dict[str, int] | None:
        """Class name -> id, as passed to `encode`; None without classes."""
        if not self.rules.has_classes:
            return None
        return {name: index for index, name in enumerate(self.label_names)}
