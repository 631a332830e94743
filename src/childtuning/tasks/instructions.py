"""Data for text generation: prompts with responses, conversations, and running text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from childtuning.errors import ConfigError, DataError
from childtuning.tasks.examples import rows_of
from childtuning.tasks.files import text_of, texts_of
from childtuning.tasks.rows import Source
from childtuning.tasks.split import Split

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Instructions(Split):
    """One split of prompts.

    Args:
        prompts: for each row, a text, or the messages of a conversation so far, each with "role" and "content".
        responses: the response to each prompt, or None if unknown.
    Raises:
        DataError: when the number of responses differs from the number of prompts.
    """

    prompts: list[str | Messages]
    responses: list[str] | None = None

    def __post_init__(self) -> None:
        if self.responses is not None and len(self.responses) != len(self.prompts):
            raise DataError(
                f"responses must have one entry per prompt, got {len(self.responses)} for {len(self.prompts)} prompts. "
                f"Pass lists of equal length."
            )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def is_labelled(self) -> bool:
        """Whether there are responses."""
        return self.responses is not None

    @property
    def num_empty(self) -> int:
        """The number of prompts that are empty or whitespace."""
        return sum(isinstance(prompt, str) and not prompt.strip() for prompt in self.prompts)

    def subset(self, indices: Iterable[int]) -> Instructions:
        """Return the rows at `indices`, in that order."""
        rows = [int(index) for index in indices]
        return Instructions([self.prompts[row] for row in rows], rows_of(self.responses, rows))

    def shown(self, index: int) -> str:
        """Return the end of the prompt on one line."""
        prompt = self.prompts[index]
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        return " ".join(text.split())[-100:]


@dataclass(frozen=True)
class RunningText(Split):
    """A single text, to be cut into blocks of tokens."""

    text: str

    def __len__(self) -> int:
        return 1

    @property
    def is_labelled(self) -> bool:
        """Always true: each token is the label of the tokens before it."""
        return True

    def subset(self, indices: Iterable[int]) -> RunningText:
        """Return the text, which is one example."""
        return self

    def shown(self, index: int) -> str:
        """Return the beginning on one line."""
        return " ".join(self.text[:400].split())[:100]

    def sample(self, limit: int | None, *, seed: int = 0) -> RunningText:
        """Return the text; it has no examples to sample.

        Raises:
            ConfigError: when a limit is given.
        """
        if limit is not None:
            raise ConfigError(
                f"a limit counts rows, and running text has none, got {limit}. Pass a shorter file."
            )
        return self


def read_instructions(source: Source, prompt: str, response: str | None) -> Instructions:
    """Read prompts and responses, or conversations, from a table file.

    Args:
        source: csv, tsv, jsonl or parquet, optionally .gz.
        prompt: a column of texts, or of conversations: lists of messages, the last of which is the response.
        response: the column of responses, if `prompt` holds texts; None reads no responses.
    Raises:
        DataError: for a missing column, or a row with an empty response or messages that cannot be read.
    """
    source.check_columns(prompt)
    if any(isinstance(row.get(prompt), list) for row in source.rows):
        return _conversations(source, prompt, labelled=response is not None)
    prompts = texts_of(source.rows, prompt, source.path)
    if response is None:
        return Instructions([*prompts])
    source.check_columns(response)
    responses = texts_of(source.rows, response, source.path)
    for number, text in enumerate(responses, start=1):
        if not text.strip():
            raise DataError(
                f"{source} row {number} has an empty response in column {response!r}. Fill it in or drop the row."
            )
    return Instructions([*prompts], responses)


def _conversations(source: Source, column: str, *, labelled: bool) -> Instructions:
    prompts: list[str | Messages] = []
    responses: list[str] = []
    for number, row in enumerate(source.rows, start=1):
        where = f"{source} row {number}"
        messages = _messages(row.get(column), source, column, number)
        answered = messages[-1]["role"] == "assistant"
        if labelled and not (answered and messages[-1]["content"].strip() and len(messages) > 1):
            raise DataError(
                f"{where} must end with a non-empty message of the assistant, after at least one other message, "
                f"got the role {messages[-1]['role']!r} last of {len(messages)}. Correct or drop the row."
            )
        prompts.append(messages[:-1] if answered and len(messages) > 1 else messages)
        responses.append(messages[-1]["content"])
    return Instructions(prompts, responses if labelled else None)


def _messages(value: Any, source: Source, column: str, number: int) -> Messages:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{source} row {number} must have a list of messages in column {column!r}. Drop the row."
        )
    for message in value:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or "content" not in message
        ):
            raise DataError(
                f"{source} row {number} must have messages in column {column!r}, got {type(message).__name__} "
                f'without role or content. Write {{"role": "user", "content": "…"}}.'
            )
    return [
        {"role": message["role"], "content": text_of(message["content"], source.path, column, number)}
        for message in value
    ]


def read_prompts(source: Source) -> Instructions:
    """Read a text file as one prompt per line; blank lines are skipped.

    Raises:
        DataError: when there is no prompt.
    """
    lines = [line for line in source.text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{source} has no prompts. Write one per line.")
    return Instructions([*lines])
