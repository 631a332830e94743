"""Token classification: named entities, parts of speech."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from childtuning.errors import DataError, ModelError
from childtuning.tasks.batches import IGNORED, EncodedExamples, PaddingCollator, check_max_length
from childtuning.tasks.kind import Columns, Kind, Part, register
from childtuning.tasks.metrics import WeightedFn, ratio
from childtuning.tasks.rows import Source
from childtuning.tasks.sentences import Sentences, is_bio, looks_like_conll, read_conll, read_sentences
from childtuning.tasks.spans import span_counts, span_ratio

_NO_WORD = -1  # the word index of a special token


class EncodedSentences(EncodedExamples):
    """Tokenised sentences; the first token of a word carries its label, the others −100.

    Attributes:
        places: for each sentence, the indices of the words that have a token, in order.
    """

    places: list[list[int]]


@register
class TokenClassification(Kind):
    """One class per word, trained with cross entropy at its first token."""

    name = "token-classification"
    summary = "one class per word: rows with lists `tokens` and `tags`, or CoNLL files"
    auto_model = "AutoModelForTokenClassification"
    # Byte-level tokenizers require it for input split into words.
    processor_options: ClassVar[Mapping[str, Any]] = {"add_prefix_space": True}
    metric_names = ("span_f1", "span_precision", "span_recall", "accuracy")
    cut_words = "words"

    def claims(self, source: Source, columns: Columns) -> bool:
        """Accept CoNLL files, and tables whose tokens are lists."""
        if source.is_named(".conll"):
            return True
        if source.is_named(".txt"):
            return looks_like_conll(source.text)
        return source.is_table and any(map(_is_words, source.cells(columns.text or "tokens")))

    def settle(self, source: Source, columns: Columns) -> Columns:
        """Use the default columns unless others are named."""
        return Columns(columns.text or "tokens", None, columns.label or "tags")

    def read(
        self, source: Source, columns: Columns, *, part: Part = "dev", labelled: bool = True
    ) -> Sentences:
        """Read sentences from a table or a CoNLL file."""
        if not source.is_table:
            return read_conll(source, labelled=labelled)
        return read_sentences(
            source, columns.text or "tokens", (columns.label or "tags") if labelled else None
        )

    def of_texts(self, texts: list[str], pairs: list[str] | None, columns: Columns) -> Sentences:
        """Split each text at white space and return it as one sentence."""
        if pairs is not None:
            raise DataError(
                f"words are tagged in single texts, got a second one, {pairs[0]!r:.80}. Leave it out."
            )
        return Sentences([text.split() for text in texts])

    def metrics(self, label_names: Sequence[str]) -> tuple[str, ...]:
        """Return F1 over spans if the tags mark spans, and accuracy over words."""
        return ("span_f1", "accuracy") if is_bio(label_names) else ("accuracy",)

    def encode(
        self, processor: Any, split: Sentences, *, max_length: int, label_names: Sequence[str] = ()
    ) -> EncodedSentences:
        """Tokenise words; labels mark the first token of each word, even if the tags are unknown."""
        if not getattr(processor, "is_fast", False):
            raise ModelError(
                "the model's tokenizer does not map tokens to words. Pass a model with a fast tokenizer."
            )
        check_max_length(processor, max_length)

        encoded = processor(
            split.words, is_split_into_words=True, truncation=True, max_length=max_length, verbose=False
        )
        columns = {name: list(encoded[name]) for name in encoded if name in PaddingCollator.inputs}
        ids = {name: index for index, name in enumerate(label_names)}
        labels: list[list[int]] = []
        places: list[list[int]] = []
        num_cut = 0
        for row, words in enumerate(split.words):
            of_token = [_NO_WORD if word is None else word for word in encoded.word_ids(row)]
            previous = (_NO_WORD, *of_token[:-1])
            first = [
                word != _NO_WORD and word != before for word, before in zip(of_token, previous, strict=True)
            ]
            tags = split.tags[row] if split.tags is not None else None
            labels.append(
                [
                    IGNORED if not begins else 0 if tags is None else ids[tags[word]]
                    for word, begins in zip(of_token, first, strict=True)
                ]
            )
            places.append([word for word, begins in zip(of_token, first, strict=True) if begins])
            num_cut += len(words) - 1 - max(places[-1], default=-1)
        result = EncodedSentences(columns, labels, num_cut=num_cut)
        result.places = places
        return result

    def collator(self, processor: Any, *, exact: bool = False) -> PaddingCollator:
        """Pad token ids and labels."""
        return PaddingCollator(processor, None if exact else 8)

    def outputs(self, model: Any, batch: Mapping[str, Tensor]) -> list[np.ndarray]:
        """Return for each sentence the most likely class of each word with a token, and its probability: [words, 2].

        The class is NaN if a logit is not finite.
        """
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits.float()
        best = logits.softmax(-1).max(-1)
        classes = best.indices.double().masked_fill(~logits.isfinite().all(-1), math.nan)
        rows = zip(classes, best.values.double(), batch["labels"] != IGNORED, strict=True)
        return [
            np.stack([classes[here].cpu().numpy(), values[here].cpu().numpy()], axis=1)
            for classes, values, here in rows
        ]

    def weighted(
        self,
        metric: str,
        outputs: Sequence[np.ndarray],
        encoded: EncodedSentences,
        split: Sentences,
        label_names: Sequence[str],
    ) -> WeightedFn:
        """Compare tags; a truncated word counts as wrongly tagged and as outside all spans."""
        assert split.tags is not None
        if not all(np.isfinite(row).all() for row in outputs):
            return lambda weights: np.full(len(weights), math.nan)
        said = [row["prediction"] for row in self.predictions(outputs, encoded, split, label_names)]
        if metric != "accuracy":
            counts = span_counts([[guess or "O" for guess in guesses] for guesses in said], split.tags)
            return lambda weights: span_ratio(metric, weights @ counts)
        pairs = [list(zip(*both, strict=True)) for both in zip(said, split.tags, strict=True)]
        right = np.asarray([sum(guess == true for guess, true in row) for row in pairs])
        words = np.asarray([len(row) for row in pairs])
        return lambda weights: ratio(weights @ right, weights @ words)

    def predictions(
        self,
        answers: Sequence[np.ndarray],
        encoded: EncodedSentences,
        split: Sentences,
        label_names: Sequence[str],
    ) -> list[dict[str, Any]]:
        """Return a tag and its probability for each word; None for truncated words and words without a token."""
        rows = []
        for words, places, answer in zip(split.words, encoded.places, answers, strict=True):
            tags: list[str | None] = [None] * len(words)
            confidence: list[float | None] = [None] * len(words)
            for word, (best, probability) in zip(places, answer, strict=True):
                tags[word] = label_names[int(best)] if math.isfinite(best) else None
                confidence[word] = float(probability)
            rows.append({"prediction": tags, "confidence": confidence, "tokens": words})
        return rows

    def line(self, prediction: Mapping[str, Any], shown: str) -> str:
        """Return the words with their tags."""
        pairs = zip(prediction["tokens"], prediction["prediction"], strict=True)
        return " ".join(f"{word}/{tag or '?'}" for word, tag in pairs)


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(entry, dict) for entry in value)
