"""Text generation with a causal language model: responses to prompts, and running text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from childtuning.errors import ConfigError, DataError, ModelError
from childtuning.tasks.batches import IGNORED, EncodedExamples, PaddingCollator
from childtuning.tasks.instructions import (
    Instructions,
    Messages,
    RunningText,
    prompt_joiner,
    read_instructions,
    read_prompts,
)
from childtuning.tasks.kind import Answers, Columns, Kind, Part, register
from childtuning.tasks.metrics import WeightedFn, ratio
from childtuning.tasks.rows import Source
from childtuning.tasks.sentences import looks_like_conll

_CONVERSATIONS = ("messages", "conversations")  # the second is ShareGPT's
# Prompt, what belongs to it, response: this library's, Alpaca's and Dolly's.
_PROMPTS = (
    ("prompt", "", "response"),
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
)


@register
class CausalLM(Kind):
    """Next-token prediction, trained with cross entropy over the tokens of responses or of running text.

    A row is the prompt, the response and the end-of-text token. Each is tokenised separately and the tokens
    are concatenated, so that a prompt has the same tokens in training and in generation. The prompt carries
    no loss. A row that is too long is truncated at the left of its prompt; a response that does not fit by
    itself is truncated at its end. Running text is cut into blocks that overlap by one token, so that every
    token but the first is predicted once.
    """

    name = "causal-lm"
    summary = "text to continue: prompts and responses, instructions, conversations, or text files"
    auto_model = "AutoModelForCausalLM"
    has_classes = False
    has_new_head = False
    takes_packaged = False
    metric_names = ("loss", "perplexity")
    adds = ("num_tokens", "ended")
    batch_size: ClassVar[int] = 8  # logits over a vocabulary are large

    def claims(self, source: Source, columns: Columns) -> bool:
        """Accept text files, and tables with prompts and responses, instructions or conversations."""
        if source.is_named(".txt"):
            return not looks_like_conll(source.text)
        if not source.is_table:
            return False
        texts = (columns.text,) if columns.text else _CONVERSATIONS
        if any(_is_conversation(cell) for text in texts for cell in source.cells(text)):
            return True
        return any(
            columns.text in (None, prompt)
            and columns.label in (None, response)
            and source.find(prompt) is not None
            and source.find(response) is not None
            for prompt, _, response in _PROMPTS
        )

    def settle(self, source: Source, columns: Columns) -> Columns:
        """Use the usual columns unless others are named; note those that are not this library's own."""
        default = _PROMPTS[0]
        if source.is_named(".txt"):
            source.note("a .txt file is read as running text; examples with labels need csv, tsv or jsonl")
        if columns.text is not None or not source.is_table:
            return Columns(columns.text or default[0], columns.text_pair, columns.label or default[2])
        for name in _CONVERSATIONS:
            if source.find(name) is not None:
                if name != _CONVERSATIONS[0]:
                    source.note(f"conversations are in column {name!r} (--text names another)")
                return Columns(name, None, columns.label or default[2])
        for prompt, more, response in _PROMPTS[1:]:
            if all(source.find(name) is not None for name in (prompt, columns.label or response)):
                pair = columns.text_pair or (more if source.find(more) is not None else None)
                prompts = f"{prompt!r} and {pair!r}" if pair else repr(prompt)
                source.note(f"prompts are in {prompts}, responses in {columns.label or response!r}")
                return Columns(prompt, pair, columns.label or response)
        return Columns(default[0], columns.text_pair, columns.label or default[2])

    def read(
        self, source: Source, columns: Columns, *, part: Part = "dev", labelled: bool = True
    ) -> Instructions | RunningText:
        """Read prompts and responses, or a text; an unlabelled text file holds one prompt per line."""
        if source.is_named(".txt"):
            return RunningText(source.text) if labelled else read_prompts(source)
        response = (columns.label or "response") if labelled else None
        return read_instructions(source, columns.text or "prompt", response, columns.text_pair)

    def of_texts(self, texts: list[str], pairs: list[str] | None, columns: Columns) -> Instructions:
        """Return prompts, joined of two texts as they are in a file."""
        if pairs is not None and columns.text and columns.text_pair is None:
            raise DataError(
                f"the run was trained on prompts of one text, got a second, {pairs[0]!r:.80}. Leave it out."
            )
        whole = prompt_joiner(columns.text or "", columns.text_pair if pairs is None else "")
        return Instructions([whole(*both) for both in zip(texts, pairs or [""] * len(texts), strict=True)])

    def metrics(self, label_names: Sequence[str]) -> tuple[str, ...]:
        """Return the loss in nats per token, and its exponential."""
        return ("loss", "perplexity")

    def num_outputs(self, label_names: Sequence[str]) -> int:
        """Return 0: there is no new head, and the model sets the vocabulary."""
        return 0

    def model_options(self, label_names: Sequence[str]) -> dict[str, Any]:
        """Return nothing: the pretrained head is kept."""
        return {}

    def encode(
        self,
        processor: Any,
        split: Instructions | RunningText,
        *,
        max_length: int,
        label_names: Sequence[str] = (),
    ) -> EncodedExamples:
        """Tokenise; labels are −100 in prompts and the token ids elsewhere."""
        start = _start(processor)
        if max_length < len(start) + 2:
            raise ConfigError(
                f"max_length must be at least {len(start) + 2}, got {max_length}. Pass max_length=128."
            )
        if isinstance(split, RunningText):
            return _blocks(_tokens(processor, [split.text])[0], start, max_length)
        shown = [self._shown(processor, prompt) for prompt in split.prompts]
        prompts = [
            [*start, *tokens] if isinstance(prompt, str) else tokens  # a template adds the start token itself
            for prompt, tokens in zip(split.prompts, _tokens(processor, shown), strict=True)
        ]
        if split.responses is None:
            kept = [_cut(tokens, start, max_length) for tokens in prompts]
            num_cut = sum(len(tokens) > max_length for tokens in prompts)
            # An empty prompt still needs one token for the model to continue from.
            return EncodedExamples(
                {"input_ids": [tokens or [_end(processor)] for tokens in kept]}, None, num_cut=num_cut
            )
        responses = [
            self._written(processor, prompt, text, response)
            for prompt, text, response in zip(split.prompts, shown, split.responses, strict=True)
        ]
        end = _end(processor)
        inputs, labels, num_cut = [], [], 0
        for tokens, answer in zip(prompts, _tokens(processor, responses), strict=True):
            answer = answer if _has_ended(processor, answer, end) else [*answer, end]
            num_cut += len(tokens) + len(answer) > max_length
            answer = answer[: max_length - (len(start) if tokens[: len(start)] == start else 0)]
            kept = _cut(tokens, start, max_length - len(answer))
            inputs.append([*kept, *answer])
            labels.append([*[IGNORED] * len(kept), *answer])
        return EncodedExamples({"input_ids": inputs}, labels, num_cut=num_cut)

    def _shown(self, processor: Any, prompt: str | Messages) -> str:
        """The prompt as text."""
        if isinstance(prompt, str):
            return prompt
        if not getattr(processor, "chat_template", None):
            raise ModelError(
                "the model's tokenizer has no chat template, which rows of messages need. "
                "Pass a model that has one, or rows with a prompt and a response."
            )
        return _with_template(processor, prompt, add_generation_prompt=True)

    def _written(self, processor: Any, prompt: str | Messages, shown: str, response: str) -> str:
        """The response as the text that follows the prompt's text."""
        if isinstance(prompt, str):
            return response
        messages = [*prompt, {"role": "assistant", "content": response}]
        whole = _with_template(processor, messages)
        if not whole.startswith(shown):
            raise ModelError(
                "the tokenizer's chat template does not continue a prompt with its response. "
                "Pass rows with a prompt and a response, or another model."
            )
        return whole[len(shown) :]

    def collator(self, processor: Any, *, exact: bool = False) -> PaddingCollator:
        """Pad on the right, whatever the tokenizer's side: positions are counted from the left."""
        return PaddingCollator(processor, None if exact else 8, side="right")

    def outputs(self, model: Any, batch: Mapping[str, Tensor]) -> list[tuple[float, int]]:
        """Return for each row the summed loss in nats and the number of tokens in the sum."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits = logits[:, -batch["input_ids"].shape[1] :]  # virtual tokens stand before
        found = []
        for row, labels in zip(logits[:, :-1], batch["labels"][:, 1:], strict=True):
            here = labels != IGNORED
            loss = cross_entropy(row[here].float(), labels[here], reduction="none").double().sum()
            found.append((float(loss), int(here.sum())))
        return found

    def weighted(
        self,
        metric: str,
        outputs: Sequence[tuple[float, int]],
        encoded: EncodedExamples,
        split: Any,
        label_names: Sequence[str],
    ) -> WeightedFn:
        """Return the mean loss over all tokens, or its exponential."""
        totals, counts = np.asarray(outputs, dtype=np.float64).T

        def loss(weights: np.ndarray) -> np.ndarray:
            count = weights @ counts
            return np.where(count > 0, ratio(weights @ totals, count), math.nan)

        def perplexity(weights: np.ndarray) -> np.ndarray:
            found = loss(weights)
            return np.where(found < 700, np.exp(np.minimum(found, 700)), found * math.inf)

        return {"loss": loss, "perplexity": perplexity}[metric]

    def answers(
        self, model: Any, batch: Mapping[str, Tensor], processor: Any, options: Answers
    ) -> list[dict[str, Any]]:
        """Generate greedily after each prompt, until the end-of-text token or `max_new_tokens`."""
        room, start = _num_positions(model) - options.max_new_tokens, _start(processor)
        if room <= len(start):
            raise ConfigError(
                f"max_new_tokens must leave room for a prompt among the model's {_num_positions(model)} positions, "
                f"got {options.max_new_tokens}. Pass fewer."
            )
        prompts = [
            tokens.new_tensor(_cut(tokens[mask.bool()].tolist(), start, room))
            for tokens, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        longest, end = max(map(len, prompts)), _end(processor)
        tokens = torch.stack(
            [torch.nn.functional.pad(row, (longest - len(row), 0), value=end) for row in prompts]
        )
        mask = torch.stack(
            [torch.nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in prompts]
        )
        written = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=end,
            pad_token_id=end,
        )[:, longest:]
        found = []
        for row in written.tolist():
            own = row[: row.index(end)] if end in row else row
            text = processor.decode(own, skip_special_tokens=True)
            found.append({"prediction": text, "num_tokens": len(own), "ended": end in row})
        return found

    def predictions(
        self,
        answers: Sequence[dict[str, Any]],
        encoded: EncodedExamples,
        split: Any,
        label_names: Sequence[str],
    ) -> list[dict[str, Any]]:
        """Return the text, its number of tokens, and whether the model ended it with an end-of-text token."""
        return list(answers)

    def line(self, prediction: Mapping[str, Any], shown: str) -> str:
        """Return the prompt and the response."""
        return f"{shown}\t{' '.join(prediction['prediction'].split())}"


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _tokens(processor: Any, texts: list[str]) -> list[list[int]]:
    """The tokens of each text, without special tokens."""
    return [list(processor(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts]


def _start(processor: Any) -> list[int]:
    """The token that begins every text, if the tokenizer adds one."""
    first = processor.bos_token_id
    return [first] if first is not None and list(processor("a")["input_ids"])[:1] == [first] else []


def _end(processor: Any) -> int:
    if not isinstance(processor.eos_token_id, int):
        raise ModelError(
            "the model's tokenizer has no end-of-text token. Set tokenizer.eos_token and save it again."
        )
    return processor.eos_token_id


def _cut(tokens: list[int], start: list[int], room: int) -> list[int]:
    """Cut a prompt at its left, but for the token that begins every text."""
    lead = start if tokens[: len(start)] == start else []
    return [*lead, *tokens[len(lead) + max(0, len(tokens) - room) :]]


def _has_ended(processor: Any, answer: list[int], end: int) -> bool:
    """Tell whether nothing but white space follows the last end-of-text token."""
    if end not in answer:
        return False
    rest = answer[len(answer) - answer[::-1].index(end) :]
    return not processor.decode(rest).strip()


def _with_template(processor: Any, messages: Messages, **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return processor.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as fault:
        roles = ", ".join(message["role"] for message in messages)
        raise ModelError(
            f"the tokenizer's chat template refuses messages of {roles} ({fault}). Change the rows, or the model."
        ) from None


def _num_positions(model: Any) -> int:
    """The number of positions for tokens: without those of PEFT's virtual ones."""
    limit = getattr(model.config, "max_position_embeddings", None)
    taken = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    return limit - taken if isinstance(limit, int) else 2**31


def _blocks(tokens: list[int], start: list[int], max_length: int) -> EncodedExamples:
    tokens = [*start, *tokens]
    if len(tokens) < 2:
        raise DataError("a text must have at least two tokens to learn from. Pass a longer file.")
    # One token of overlap: the last token of a block is the first context of the next.
    blocks = [tokens[at : at + max_length] for at in range(0, len(tokens) - 1, max_length - 1)]
    return EncodedExamples({"input_ids": blocks}, [list(block) for block in blocks])
