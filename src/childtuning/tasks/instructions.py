"""Data for text generation: prompts with responses, conversations, and running text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from childtuning.errors import ConfigError, DataError
from childtuning.tasks.columns import text_of
from childtuning.tasks.delimited import BadRow
from childtuning.tasks.examples import rows_of
from childtuning.tasks.rows import Source
from childtuning.tasks.split import Split

Messages = list[dict[str, str]]

_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names of roles


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

    def contents(self) -> list[str | tuple[tuple[str, str], ...]]:
        """Return the prompts; of a conversation, the role and content of each message."""
        return [
            prompt if isinstance(prompt, str) else tuple((one["role"], one["content"]) for one in prompt)
            for prompt in self.prompts
        ]

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

    def hold_out(self, share: float, *, seed: int = 0) -> tuple[RunningText, RunningText]:
        """Split off the end of the text, at a space or line break.

        Raises:
            DataError: when it is a single word.
        """
        cuts = [index for index, mark in enumerate(self.text) if mark.isspace() and self.text[index:].strip()]
        size = (1 - share) * len(self.text)
        cut = min(cuts, key=lambda index: abs(index - size), default=0)
        if not self.text[:cut].strip():
            raise DataError("a text of one word cannot be split. Pass a longer file, or --eval FILE.")
        return RunningText(self.text[:cut]), RunningText(self.text[cut:])

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


def read_instructions(
    source: Source, prompt: str, response: str | None, more: str | None = None
) -> Instructions:
    """Read prompts and responses, or conversations, from a table file.

    Args:
        source: a table file.
        prompt: a column of texts, or of conversations: lists of messages, the last of which is the response.
        response: the column of responses, if `prompt` holds texts; None reads no responses.
        more: a column of texts that belong to the prompts, such as the inputs of instructions. A blank line
            separates the two, and a line break ends the prompt, as it does if `prompt` is called instruction.
    Raises:
        DataError: for a missing column, or rows with an empty response or messages that cannot be read.
    """
    if any(isinstance(cell, list) for cell in source.cells(prompt)):
        left_out: set[str] = set()
        labelled = response is not None
        rows = source.each(lambda cell: _conversation(cell, prompt, left_out, labelled=labelled), prompt)
        if left_out:
            source.note(f"messages have {', '.join(sorted(left_out))}, which the model does not see")
    else:
        join = prompt_joiner(prompt, more)

        def read(cell: Any, beside: Any, answer: Any) -> tuple[str | Messages, str]:
            whole = join(text_of(cell, prompt), text_of(beside, more))
            if response is not None and not text_of(answer, response).strip():
                fault = f"has an empty response in column {response!r}"
                raise BadRow(fault, "Fill it in or drop the row.")
            return whole, text_of(answer, response)

        rows = source.each(read, prompt, more, response)
    return Instructions(
        [asked for asked, _ in rows], None if response is None else [answer for _, answer in rows]
    )


def prompt_joiner(prompt: str, more: str | None) -> Callable[[str, str], str]:
    """Return what makes a prompt of two texts, for these columns; see ``read_instructions``."""
    ends = more is not None or prompt.lower() == "instruction"
    return lambda text, beside: "\n\n".join(filter(None, (text, beside))) + "\n" * ends


def _conversation(
    cell: Any, column: str, left_out: set[str], *, labelled: bool
) -> tuple[str | Messages, str]:
    messages = _messages(cell, column, left_out)
    answered = messages[-1]["role"] == "assistant"
    if labelled and not (answered and messages[-1]["content"].strip() and len(messages) > 1):
        raise BadRow(
            f"must end with a non-empty message of the assistant, after at least one other message, "
            f"got the role {messages[-1]['role']!r} last of {len(messages)}",
            "Correct or drop the row.",
        )
    return messages[:-1] if answered and len(messages) > 1 else messages, messages[-1]["content"]


def _messages(value: Any, column: str, left_out: set[str]) -> Messages:
    """Return messages with roles and contents; ShareGPT's have `from` and `value`, and roles of its own.

    The names of what else they have that is not empty are added to ``left_out``.
    """
    if not isinstance(value, list) or not value:
        raise BadRow(f"must have a list of messages in column {column!r}", "Drop the row.")
    messages: Messages = []
    for message in value:
        said = message if isinstance(message, dict) else {}
        role, content = (
            said.get(one, said.get(other)) for one, other in (("role", "from"), ("content", "value"))
        )
        if not isinstance(role, str) or not ("content" in said or "value" in said):
            raise BadRow(
                f"must have messages in column {column!r}, got {type(message).__name__} without role or content",
                'Write {"role": "user", "content": "…"}.',
            )
        left_out |= {key for key in said.keys() - {"role", "content", "from", "value"} if said[key]}
        messages.append({"role": _ROLES.get(role, role), "content": text_of(content, column)})
    return messages


def read_prompts(source: Source) -> Instructions:
    """Read a text file as one prompt per line; blank lines are skipped.

    Raises:
        DataError: when there is no prompt.
    """
    lines = [line for line in source.text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{source} has no prompts. Write one per line.")
    return Instructions([*lines])
