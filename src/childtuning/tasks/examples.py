"""`Examples`: one split of texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

from childtuning.errors import DataError
from childtuning.tasks.split import Split

_MAX_NAMED = 5  # the number of labels that a message lists by name


@dataclass(frozen=True)
class Examples(Split):
    """One split of texts or pairs of texts, with labels if known.

    Args:
        text: one text per row; empty texts are kept and counted by `num_empty`.
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
                    f"{name} must have one entry per row, got {len(column)} for {len(self.text)} texts. "
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
        """The number of rows whose text is empty or whitespace."""
        return sum(not text.strip() for text in self.text)

    @property
    def form(self) -> str:
        """Whether each example is one text or two."""
        return "single texts" if self.text_pair is None else "pairs of texts"

    def contents(self) -> list[tuple[str, ...]]:
        """Return the text, or both texts, of each row."""
        columns = [column for column in (self.text, self.text_pair) if column is not None]
        return list(zip(*columns, strict=True))

    def classes(self) -> set[str]:
        """Return the labels that occur, as class names."""
        return {str(label) for label in self.labels or ()}

    def strata(self) -> list[str] | None:
        """Return the class names; None for unlabelled texts and targets."""
        labels = [label for label in self.labels or () if isinstance(label, str)]
        return labels if labels and len(labels) == len(self) else None

    def subset(self, indices: Iterable[int]) -> Self:
        """Return the rows at `indices`, in that order."""
        rows = [int(index) for index in indices]
        return replace(
            self,
            text=[self.text[i] for i in rows],
            text_pair=rows_of(self.text_pair, rows),
            labels=rows_of(self.labels, rows),  # type: ignore[arg-type]
        )

    def shown(self, index: int) -> str:
        """Return the beginning of the text on one line."""
        text = " ".join(self.text[index].split())
        return text if len(text) <= 100 else text[:99] + "…"


def rows_of(column: list[Any] | None, rows: Iterable[int]) -> list[Any] | None:
    """Return the entries of a column at `rows`; None if the column is None."""
    return None if column is None else [column[row] for row in rows]
