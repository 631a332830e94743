"""The nouns of this layer: `Examples` (one split) and `Task` (train and dev, labels, metrics)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from childtuning.errors import ConfigError, DataError

TaskKind = Literal["classification", "regression"]

_MAX_NAMED = 5  # labels a message lists before it only counts


@dataclass(frozen=True)
class Examples:
    """One split: texts, optional second texts, and labels where they are known.

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
    def num_empty(self) -> int:
        """The number of rows whose text is empty or only whitespace."""
        return sum(not text.strip() for text in self.text)

    def subset(self, indices: Iterable[int]) -> Examples:
        """Return the rows at `indices`, in that order."""
        rows = [int(index) for index in indices]
        labels = self.labels
        return Examples(
            text=[self.text[i] for i in rows],
            text_pair=None if self.text_pair is None else [self.text_pair[i] for i in rows],
            labels=None if labels is None else [labels[i] for i in rows],  # type: ignore[arg-type]
        )

    def sample(self, limit: int | None, *, seed: int = 0) -> Examples:
        """Return at most `limit` rows, drawn without replacement, in their original order.

        A pure function of (number of rows, limit, seed). For one seed the sample of a smaller limit
        lies inside that of a larger one, so that low-resource curves add examples and never swap them.

        Args:
            limit: the most rows to keep, at least 1; None keeps all.
            seed: any integer.
        Raises:
            ConfigError: when limit is below 1.
        """
        if limit is None:
            return self
        if limit < 1:
            raise ConfigError(f"train_limit must be at least 1, got {limit}. Leave it out to use every row.")
        if limit >= len(self):
            return self
        # RandomState because its stream is frozen: numpy's newer generators may change between releases.
        order = np.random.RandomState(seed % 2**32).permutation(len(self))
        return self.subset(sorted(order[:limit].tolist()))


@dataclass(frozen=True)
class Task:
    """A labelled train and dev split, what their labels mean, and how runs on them are measured.

    Args:
        name: what reports call it.
        kind: "classification" or "regression".
        label_names: class names in the order of their ids; () for regression.
        metrics: metric names; the first is the metric of the run.
        train: labelled examples to train on.
        dev: labelled examples to measure on.
    Raises:
        DataError: when a split is empty or unlabelled, training has a single class, dev has a class that
            training never saw, a regression label is not finite, or only one split has second texts.
    """

    name: str
    kind: TaskKind
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    train: Examples
    dev: Examples

    def __post_init__(self) -> None:
        if self.kind not in ("classification", "regression"):
            raise DataError(f"kind must be 'classification' or 'regression', got {self.kind!r}.")
        if not self.metrics:
            raise DataError(f"Task {self.name!r} must name at least one metric, got none. Pass one.")
        for split, rows in (("train", self.train), ("dev", self.dev)):
            if not len(rows):
                raise DataError(f"The {split} split of {self.name!r} has no rows. Pass at least one example.")
            if rows.labels is None:
                raise DataError(f"The {split} split of {self.name!r} has no labels. Name its label column.")
        if (self.train.text_pair is None) != (self.dev.text_pair is None):
            single = "train" if self.train.text_pair is None else "dev"
            raise DataError(
                f"Both splits of {self.name!r} must be pairs or both single texts, "
                f"got single ones in {single}. Name the same columns for both."
            )
        if self.kind == "classification":
            self._check_classes()
        else:
            self._check_targets()

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

    def _check_targets(self) -> None:
        """Refuse targets that are not finite numbers."""
        if self.label_names:
            raise DataError(f"Regression has no label names, got {self.label_names}. Pass label_names=().")
        for split, rows in (("train", self.train), ("dev", self.dev)):
            for row, target in enumerate(rows.labels or (), start=1):
                if isinstance(target, str) or not math.isfinite(target):
                    raise DataError(
                        f"Regression labels must be finite numbers, got {target!r} in row {row} "
                        f"of the {split} split of {self.name!r}. Correct or drop that row."
                    )

    @property
    def num_labels(self) -> int:
        """The width of the model's head: the number of classes, 1 for regression."""
        return len(self.label_names) if self.kind == "classification" else 1

    @property
    def num_empty(self) -> int:
        """The number of rows of both splits whose text is empty or only whitespace."""
        return self.train.num_empty + self.dev.num_empty

    @property
    def label_ids(self) -> dict[str, int] | None:
        """Class name -> id, what `encode` takes; None for regression."""
        if self.kind == "regression":
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


def check_labels(examples: Examples, label_names: Iterable[str], *, where: str) -> set[str]:
    """Return the classes that occur in `examples`, after checking that each of them is known.

    Args:
        examples: labelled with class names.
        label_names: the classes that training saw.
        where: the noun for the message, such as a file's name.
    Raises:
        DataError: naming up to five unknown labels, and the known ones.
    """
    known = list(label_names)
    found = {str(label) for label in examples.labels or ()}
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
