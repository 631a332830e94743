"""From examples to padded batches: tokenise once, bucket by length, pad to the longest row in the batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.data import Dataset, Sampler

from childtuning.errors import ConfigError, DataError
from childtuning.tasks.examples import Examples
from childtuning.tasks.labels import check_labels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCHES_IN_BUCKET = 50
IGNORED = -100  # the label that losses ignore
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class EncodedExamples(Dataset[dict[str, Any]]):
    """Tokenised examples: row i is a dict of lists (input_ids, attention_mask, …) and, optionally, `labels`.

    Args:
        columns: input name -> one list of token ids per row, unpadded.
        labels: class ids (int), one per row or one per token; or targets (float), one or several per row; or None.
        num_cut: how many words or rows were truncated by the length limit, if counted.
    """

    def __init__(
        self,
        columns: Mapping[str, list[list[int]]],
        labels: list[int] | list[float] | list[list[int]] | list[list[float]] | None,
        *,
        num_cut: int = 0,
    ) -> None:
        self._columns = dict(columns)
        self._labels = labels
        self.num_cut = num_cut

    def __len__(self) -> int:
        return len(self._columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {name: column[index] for name, column in self._columns.items()}
        if self._labels is not None:
            row["labels"] = self._labels[index]
        return row

    def with_labels(self, labels: list[list[float]] | None) -> EncodedExamples:
        """Return the same examples with several targets per row."""
        return EncodedExamples(self._columns, labels, num_cut=self.num_cut)

    @property
    def largest_token(self) -> int:
        """The largest token id that occurs; −1 if there are no tokens."""
        return max((max(tokens, default=-1) for tokens in self._columns["input_ids"]), default=-1)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each row."""
        return [len(tokens) for tokens in self._columns["input_ids"]]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    *,
    max_length: int,
    label_ids: Mapping[str, int] | None = None,
) -> EncodedExamples:
    """Tokenise examples without padding.

    A pair that is too long loses tokens from the longer text first. Some tokenizers return no tokens
    for ""; such a text becomes one end-of-text token, since models accept no empty sequence.

    Args:
        tokenizer: a Hugging Face tokenizer.
        examples: one split, labelled or not.
        max_length: the maximum number of tokens per row, special tokens included.
        label_ids: class name -> id (`Task.label_ids`); None for regression and unlabelled examples.
    Raises:
        ConfigError: when max_length leaves no room for text.
        DataError: for a label missing from `label_ids`, or class labels without `label_ids`.
    """
    check_max_length(tokenizer, max_length, pair=examples.text_pair is not None)
    labels = _label_column(examples, label_ids)
    if not len(examples):
        return EncodedExamples({"input_ids": []}, labels)

    encoded = tokenizer(
        examples.text,
        examples.text_pair,
        truncation=True,
        max_length=max_length,
        padding=False,
        verbose=False,
    )
    columns: dict[str, list[list[int]]] = {name: list(encoded[name]) for name in _INPUTS if name in encoded}
    if not all(columns["input_ids"]):
        _fill_empty(columns, tokenizer)
    num_cut = sum(bool(row.overflowing) for row in encoded.encodings or ())
    return EncodedExamples(columns, labels, num_cut=num_cut)


def check_max_length(tokenizer: PreTrainedTokenizerBase, max_length: int, *, pair: bool = False) -> None:
    """Check that a row has room for text besides its special tokens.

    Raises:
        ConfigError: when there is no room.
    """
    num_special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length <= num_special:
        raise ConfigError(
            f"max_length must be above the {num_special} special tokens of a row, got {max_length}. "
            f"Pass max_length=128, for example."
        )


class PaddingCollator:
    """Turn rows of `EncodedExamples` into tensors, padded to the longest row.

    Args:
        tokenizer: gives the padding token and the side.
        pad_to_multiple_of: round the length up (8 suits tensor cores); None pads to the longest row exactly.
        max_length: the limit for rounding up, so that no batch exceeds the model's positions; by
            default the tokenizer's `model_max_length`.
        side: where to pad; by default the tokenizer's side.
    Returns:
        When called, input_ids, attention_mask (and token_type_ids): int64, shape (B, T); labels: shape (B,),
        int64 for class ids and float32 for targets, or (B, K) for K targets per row; or, for one label per
        token, shape (B, T), int64, padded with −100, which losses ignore.
    Raises:
        ConfigError: when the tokenizer has no padding token.
    """

    inputs = _INPUTS

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pad_to_multiple_of: int | None = 8,
        *,
        max_length: int | None = None,
        side: Literal["left", "right"] | None = None,
    ) -> None:
        pad_id = tokenizer.pad_token_id
        if not isinstance(pad_id, int):
            raise ConfigError(
                "The tokenizer has no padding token. Set tokenizer.pad_token = tokenizer.eos_token, "
                "and model.config.pad_token_id to match."
            )
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ConfigError(
                f"pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}. Pass 8 or None."
            )
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_length = tokenizer.model_max_length if max_length is None else max_length
        self._pad_left = (side or tokenizer.padding_side) == "left"
        self._fill = {
            "input_ids": pad_id,
            "attention_mask": 0,
            "token_type_ids": tokenizer.pad_token_type_id,
        }

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        length = longest
        if self.pad_to_multiple_of:
            rounded = math.ceil(longest / self.pad_to_multiple_of) * self.pad_to_multiple_of
            length = max(longest, min(rounded, self.max_length))
        batch: dict[str, torch.Tensor] = {}
        for name, fill in self._fill.items():
            if name in rows[0]:
                padded = [self._pad(list(row[name]), length, fill) for row in rows]
                batch[name] = torch.tensor(padded, dtype=torch.int64, device="cpu")
        if "attention_mask" not in batch:
            padded = [self._pad([1] * len(row["input_ids"]), length, 0) for row in rows]
            batch["attention_mask"] = torch.tensor(padded, dtype=torch.int64, device="cpu")
        if "labels" in rows[0]:
            labels = [row["labels"] for row in rows]
            several = isinstance(labels[0], list)
            if several and not isinstance(labels[0][0], float):
                labels = [self._pad(ids, length, IGNORED) for ids in labels]
                batch["labels"] = torch.tensor(labels, dtype=torch.int64, device="cpu")
                return batch
            dtype = torch.float32 if several or isinstance(labels[0], float) else torch.int64
            batch["labels"] = torch.tensor(labels, dtype=dtype, device="cpu")
        return batch

    def _pad(self, tokens: list[int], length: int, fill: int) -> list[int]:
        padding = [fill] * (length - len(tokens))
        return padding + tokens if self._pad_left else tokens + padding


class LengthBucketBatches(Sampler[list[int]]):
    """Batches of indices of rows of similar length; each epoch yields every row exactly once.

    Rows are shuffled and cut into buckets of 50 batches; a bucket is sorted by length and cut into
    batches; the batches are shuffled. The order is a pure function of (lengths, batch_size, seed, epoch)
    and uses no global random state, so that a resumed run sees the same data.

    Args:
        lengths: the number of tokens of each row.
        batch_size: rows per batch; the last batch may be smaller.
        seed: any integer.
        shuffle: False keeps the rows in their original order, for predictions.
        drop_last: drop the last batch if it is smaller.
    Raises:
        ConfigError: when batch_size is below 1.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(
                f"batch_size must be at least 1, got {batch_size}. Pass batch_size=16, for example."
            )
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.epoch = 0
        self._lengths = list(lengths)
        self._seed = seed
        self._shuffle = shuffle

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, that determines the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self._lengths), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        num_rows = len(self._lengths)
        if not self._shuffle:
            yield from self._kept(self._cut(list(range(num_rows))))
            return
        generator = torch.Generator().manual_seed(_mix(self._seed, self.epoch))
        order = torch.randperm(num_rows, generator=generator, device="cpu").tolist()
        size = self.batch_size * _BATCHES_IN_BUCKET
        batches: list[list[int]] = []
        for start in range(0, num_rows, size):
            bucket = sorted(order[start : start + size], key=self._lengths.__getitem__, reverse=True)
            batches += self._cut(bucket)
        batches = self._kept(batches)
        for position in torch.randperm(len(batches), generator=generator, device="cpu").tolist():
            yield batches[position]

    def _cut(self, rows: list[int]) -> list[list[int]]:
        return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]

    def _kept(self, batches: list[list[int]]) -> list[list[int]]:
        return [batch for batch in batches if len(batch) == self.batch_size or not self.drop_last]


def _mix(seed: int, epoch: int) -> int:
    """Return a seed that gives neighbouring (seed, epoch) pairs unrelated random streams."""
    digest = hashlib.blake2b(f"{seed},{epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _label_column(examples: Examples, label_ids: Mapping[str, int] | None) -> list[int] | list[float] | None:
    if examples.labels is None:
        return None
    if label_ids is not None:
        check_labels(examples, label_ids, where="the examples")
        return [label_ids[str(label)] for label in examples.labels]
    for row, label in enumerate(examples.labels, start=1):
        if isinstance(label, str):
            raise DataError(
                f"Row {row} has the class label {label!r}, but no label ids were given. Pass label_ids."
            )
    return [float(label) for label in examples.labels]


def _fill_empty(columns: dict[str, list[list[int]]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Add one token to every empty row, in place."""
    choices = (tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    filler = {
        "input_ids": next((token for token in choices if isinstance(token, int)), 0),
        "attention_mask": 1,
        "token_type_ids": 0,
    }
    for name, column in columns.items():
        columns[name] = [tokens or [filler[name]] for tokens in column]
