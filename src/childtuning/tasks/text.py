"""The base class of text classification and regression: reading, tokenising, one vector of logits per text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from childtuning.errors import ConfigError, DataError
from childtuning.tasks.batches import EncodedExamples, PaddingCollator, encode
from childtuning.tasks.columns import label_column, text_columns
from childtuning.tasks.examples import Examples
from childtuning.tasks.files import read_examples
from childtuning.tasks.kind import Columns, Kind, Part
from childtuning.tasks.labels import has_decimal_commas
from childtuning.tasks.rows import Source

if TYPE_CHECKING:
    from childtuning.tasks.kind import Task


class TextKind(Kind):
    """A kind of task with one label per text or pair of texts."""

    auto_model = "AutoModelForSequenceClassification"
    label_kind: Literal["class", "number"]

    def settle(self, source: Source, columns: Columns) -> Columns:
        """Guess the columns from the training file, where they are not named."""
        if columns.label_type not in ("auto", self.label_kind):
            raise ConfigError(
                f"{self.name} has labels of type {self.label_kind!r}, got label_type {columns.label_type!r}. "
                f"Leave one of them out."
            )
        text, pair = columns.text, columns.text_pair
        if text is None:
            text, guessed = text_columns(source, columns.label)
            pair = pair or guessed
        taken = [source.column(name) for name in (text, pair) if name is not None]
        label = columns.label or label_column(source, *taken)
        commas = self.label_kind == "number" and has_decimal_commas(source.cells(label))
        if commas:
            source.note(f"column {label!r} is read with decimal commas")
        return Columns(text, pair, label, self.label_kind, commas)

    def read(
        self, source: Source, columns: Columns, *, part: Part = "dev", labelled: bool = True
    ) -> Examples:
        """Read texts and labels from a table file."""
        return read_examples(
            source,
            text=columns.text,
            text_pair=columns.text_pair,
            label=(columns.label or "label") if labelled else None,
            label_kind=self.label_kind if labelled else None,
            decimal_commas=columns.decimal_commas,
        )

    def of_texts(self, texts: list[str], pairs: list[str] | None, columns: Columns) -> Examples:
        """Return texts or pairs."""
        return Examples(texts, pairs, None)

    def check(self, task: Task) -> None:
        """Refuse a task that has pairs in one split and single texts in the other."""
        if task.train.form != task.dev.form:
            single = "train" if task.train.form == "single texts" else "dev"
            raise DataError(
                f"The splits of {task.name!r} must be both pairs or both single texts, "
                f"got single texts in {single}. Name the same columns for both."
            )

    def encode(
        self, processor: Any, split: Any, *, max_length: int, label_names: Sequence[str] = ()
    ) -> EncodedExamples:
        """Tokenise texts."""
        ids = {name: index for index, name in enumerate(label_names)} if label_names else None
        return encode(processor, split, max_length=max_length, label_ids=ids)

    def collator(self, processor: Any, *, exact: bool = False) -> PaddingCollator:
        """Pad token ids."""
        return PaddingCollator(processor, None if exact else 8)

    def outputs(self, model: Any, batch: Mapping[str, Tensor]) -> list[Any]:
        """Return the logits of each text, float32."""
        return logits_by_example(model, batch)


def logits_by_example(model: Any, batch: Mapping[str, Tensor]) -> list[Any]:
    """Return the logits [num_labels] of each example, as float32 arrays."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return list(model(**inputs).logits.float().cpu().numpy())
