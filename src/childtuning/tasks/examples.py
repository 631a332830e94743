"""The nouns of this layer: `Examples` (one split of texts) and `Task` (train and dev, labels, metrics)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from childtuning.errors import ConfigError, DataError
from childtuning.tasks.kind import Columns, Kind, find_kind
from childtuning.tasks.split import Split

_MAX_NAMED = 5  # labels a message lists before it only counts


@dataclass(frozen=True)
class Examples(Split):
    """One split of texts, or pairs of them, and labels where they are known.

    Args:
        text: one text a row; empty texts are kept and counted by `num_empty`.
        text_pair: the second text of each row, or None for single-text data.
        labels: class names (str) or targets (float), or None for unlabelled rows.
    Raises:
        DataError: when the columns differ in length.
    Example:
        >>> rows = Examples(["a", " "], None, ["x", "y"])
        >>> len(rows), rows.num_empty, rows.subset([1]).labels
        (2, 1, ['y'])
    """

    text: list[str]
    text_pair: list[str] | None = None
    labels: list[str] | list[float] | None = None

    def __post_init__(self) -> None:
        for name, column in (("text_pair", self.text_pair), ("labels", self.labels)):
            if column is not None and len(column) != len(self.text):
                raise DataError(
                    f"{name} must have one entry a row, got {len(column)} for {len(self.text)} texts. "
                    f"Pass lists of equal length."
                )

    def __len__(self) -> int:
        return len(self.text)

    @property
    def is_labelled(self) -> bool:
        """Whether there are labels."""
        return self.labels is not None

    @property
    def num_empty(self) -> int:
        """The number of rows whose text is empty or only whitespace."""
        return sum(not text.strip() for text in self.text)

    @property
    def form(self) -> str:
        """Whether each example is one text or two."""
        return "single texts" if self.text_pair is None else "pairs of texts"

    def classes(self) -> set[str]:
        """Return the labels that occur, as class names."""
        return {str(label) for label in self.labels or ()}

    def subset(self, indices: Iterable[int]) -> Examples:
        """Return the rows at `indices`, in that order."""
        rows = [int(index) for index in indices]
        return Examples(
            text=[self.text[i] for i in rows],
            text_pair=rows_of(self.text_pair, rows),
            labels=cast("list[str] | list[float] | None", rows_of(self.labels, rows)),
        )

    def shown(self, index: int) -> str:
        """Return the beginning of the text on one line."""
        return " ".join(self.text[index].split())[:100]


def rows_of(column: list[Any] | None, rows: Iterable[int]) -> list[Any] | None:
    """Return the entries of a column at some rows; None of a column that is not there."""
    return None if column is None else [column[row] for row in rows]


@dataclass(frozen=True)
class Task:
    """A labelled train and dev split, what their labels mean, and how runs on them are measured.

    Args:
        name: what reports call it.
        kind: the name of its kind: "classification", "regression", …; see `KINDS`.
        label_names: class names in the order of their ids; () without classes.
        metrics: metric names; the first is the metric of the run.
        train: labelled examples to train on.
        dev: labelled examples to measure on.
        columns: where its files keep what.
    Raises:
        DataError: when a split is empty or unlabelled, training has a single class, dev has a class that
            training never saw, or for what the kind itself refuses.
    """

    name: str
    kind: str
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    train: Split
    dev: Split
    columns: Columns = field(default_factory=Columns)

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
        """Refuse label columns from which nothing can be learnt or measured."""
        if len(set(self.label_names)) != len(self.label_names):
            raise DataError(f"label_names must be distinct, got {self.label_names}. Drop the repeated.")
        seen = check_labels(self.train, self.label_names, where=f"the train split of {self.name!r}")
        if len(seen) < 2:
            raise DataError(
                f"Training needs at least two classes, got only {min(seen)!r} "
                f"in the train split of {self.name!r}. Add examples of another class."
            )
        check_labels(self.dev, sorted(seen), where=f"the dev split of {self.name!r}")

    def limit_evaluation(self, limit: int | None, *, seed: int = 0) -> Task:
        """Return the task with at most ``limit`` evaluation examples, as ``Split.sample`` draws them."""
        return replace(self, dev=self.dev.sample(limit, seed=seed))

    def hold_out(self, share: float, limit: int | None, *, seed: int = 0) -> tuple[Task, Split | None]:
        """Set a share of the training examples aside, and draw at most ``limit`` from the others.

        Args:
            share: in [0, 1); 0 sets nothing aside.
            limit: the most training examples; None keeps all.
            seed: of both draws.
        Returns:
            the task without them, and what was set aside; None for nothing.
        Raises:
            ConfigError, DataError: too few examples are left.
        """
        train, aside = self.train.hold_out(share, seed=seed) if share else (self.train, None)
        return replace(self, train=train.sample(limit, seed=seed)), aside

    def in_order(self, label_names: tuple[str, ...]) -> Task:
        """Return the task with its classes in the order of a model's outputs.

        Raises:
            ConfigError: the metric counts one class, the second of two, and would count the other.
        """
        if label_names == self.label_names or not self.label_names:
            return self
        if "f1" in self.metrics and len(label_names) == 2:
            raise ConfigError(
                f"f1 of {self.name!r} counts {self.label_names[1]!r}, got a model whose labels are "
                f"{', '.join(label_names)}. Save it with its labels in the order {', '.join(self.label_names)}."
            )
        return replace(self, label_names=label_names)

    @property
    def rules(self) -> Kind:
        """What the task's kind does."""
        return find_kind(self.kind)

    @property
    def num_labels(self) -> int:
        """The width of the model's head: the number of classes, 1 for regression."""
        return self.rules.num_outputs(self.label_names)

    @property
    def num_empty(self) -> int:
        """The number of rows of both splits that are empty."""
        return self.train.num_empty + self.dev.num_empty

    @property
    def label_ids(self) -> dict[str, int] | None:
        """Class name -> id, what `encode` takes; None without classes."""
        if not self.rules.has_classes:
            return None
        return {name: index for index, name in enumerate(self.label_names)}

    def label_id(self, name: str) -> int:
        """Return the id of a class name.

        Raises:
            DataError: when there is no such class.
        """
        if name not in self.label_names:
            raise DataError(f"Task {self.name!r} has no label {name!r}. {name_labels(self.label_names)}")
        return self.label_names.index(name)


def check_labels(examples: Split, label_names: Iterable[str], *, where: str) -> set[str]:
    """Return the classes that occur in `examples`, after checking that each of them is known.

    Args:
        examples: labelled with class names.
        label_names: the classes that training saw.
        where: the noun for the message, such as a file's name.
    Raises:
        DataError: naming up to five unknown labels, and the known ones.
    """
    known = list(label_names)
    found = examples.classes()
    unknown = sorted(found.difference(known))
    if unknown:
        rest = len(unknown) - _MAX_NAMED
        listing = ", ".join(repr(name) for name in unknown[:_MAX_NAMED]) + (
            f" and {rest} more" if rest > 0 else ""
        )
        raise DataError(f"Labels that training never saw in {where}: {listing}. {name_labels(known)}")
    return found


def name_labels(known: Iterable[str]) -> str:
    """Return the remedy half of a message about labels: the known ones, cut short when there are many."""
    names = list(known)
    rest = len(names) - 4 * _MAX_NAMED
    listing = ", ".join(repr(name) for name in names[: 4 * _MAX_NAMED])
    return f"Known: {listing}{f' and {rest} more' if rest > 0 else ''}. Correct or drop those rows."
