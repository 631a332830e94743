"""Run a model over examples: predictions, metrics, and all evaluation sets of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from childtuning.errors import ConfigError, ModelError
from childtuning.runs.config import RunConfig
from childtuning.runs.inputs import Inputs
from childtuning.runs.judgement import Answered, Judgement, judge, measure
from childtuning.tasks import Answers, Kind, LengthBucketBatches, Split, Task
from childtuning.training import num_positions


@dataclass(frozen=True)
class Predictor:
    """Run models over the examples of one kind of task.

    Attributes:
        kind: the kind of task.
        processor: the tokenizer or image processor.
        label_names: class names in order of id.
        max_length: the maximum number of tokens per example.
        progress: draw a bar on standard error.
        tell: called with lines for the user.
    """

    kind: Kind
    processor: Any
    label_names: Sequence[str]
    max_length: int
    progress: bool = False
    tell: Callable[[str], None] = lambda line: None

    def encode(self, split: Split, where: str) -> Any:
        """Convert examples to model inputs; report how many were truncated."""
        encoded = self.kind.encode(
            self.processor, split, max_length=self.max_length, label_names=self.label_names
        )
        if encoded.num_cut:
            self.tell(
                f"{encoded.num_cut} {self.kind.cut_words} of {where} were cut at {self.max_length} tokens"
            )
        return encoded

    def answered(self, model: Any, split: Split, encoded: Any = None) -> Answered:
        """Run a model on labelled examples; pass ``encoded`` if they are already encoded."""
        encoded = self.encode(split, "the examples") if encoded is None else encoded
        return Answered(self._over(model, encoded, self.kind.outputs), encoded, split)

    def judge(self, metrics: Sequence[str], parts: Sequence[Answered]) -> Judgement:
        """Judge what models answered."""
        return judge(self.kind, metrics, parts, self.label_names)

    def measure(self, metrics: Sequence[str], parts: Sequence[Answered]) -> dict[str, float]:
        """Return the metrics of what models answered."""
        return measure(self.kind, metrics, parts, self.label_names)

    def predict(
        self, model: Any, split: Split, options: Answers, encoded: Any = None
    ) -> list[dict[str, Any]]:
        """Return the prediction for each example, as written for users; pass ``encoded`` if already encoded."""
        encoded = self.encode(split, "the input") if encoded is None else encoded
        answer = partial(self.kind.answers, processor=self.processor, options=options)
        return self.kind.predictions(self._over(model, encoded, answer), encoded, split, self.label_names)

    def _over(self, model: Any, encoded: Any, read_fn: Callable[[Any, Any], list[Any]]) -> list[Any]:
        """Apply ``read_fn`` to batches of consecutive examples, padded to the longest, and join the results."""
        batches = LengthBucketBatches(encoded.lengths, self.kind.batch_size, seed=0, shuffle=False)
        loader = DataLoader(
            encoded,
            batch_sampler=batches,
            collate_fn=self.kind.collator(self.processor, exact=True),
            generator=torch.Generator(),  # so that measuring while training draws no random number from it
        )
        check_tokens(model, encoded)
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        found: list[Any] = []
        try:
            with torch.inference_mode(), _as_served(model):
                for batch in tqdm(loader, desc="Prediction", unit=" batches", disable=not self.progress):
                    found += read_fn(model, {key: value.to(device) for key, value in batch.items()})
        finally:
            model.train(was_training)
        return found


@contextmanager
def _as_served(model: Any) -> Iterator[None]:
    """Let a model that is in training compute as it will when it is loaded: without Accelerate's autocast."""
    own = vars(model)
    before = {name: own[name] for name in ("forward", "_original_forward") if name in own}
    if len(before) == 2:
        own["forward"] = before["_original_forward"]
    try:
        yield
    finally:
        own.update(before)


def cut_at(config: RunConfig, kind: Kind, model: Any) -> int:
    """Return the maximum number of tokens per example: ``max_length``, or the positions that are left if fewer.

    Raises:
        ConfigError: when the method takes all the model's positions.
    """
    room = num_positions(model) if kind.auto_processor == "AutoTokenizer" else None
    if room is None:
        return config.max_length
    left = room - config.methods().num_positions
    if left < 1:
        raise ConfigError(
            f"method {config.method!r} leaves none of the model's {room} positions. Pass fewer tokens."
        )
    return min(config.max_length, left)


def check_tokens(model: Any, encoded: Any) -> None:
    """Check that the model has an embedding for every token of the examples.

    Raises:
        ModelError: when the tokenizer does not match the model.
    """
    largest = getattr(encoded, "largest_token", None)
    try:
        size = None if largest is None else getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # a model of characters has no table of tokens
        return
    if largest is not None and size is not None and largest >= size:
        raise ModelError(
            f"the tokenizer returned the token id {largest}, but the model has only {size} embeddings. "
            "Pass the model with its own tokenizer, or enlarge it first: model.resize_token_embeddings(len(tokenizer))."
        )


class Fold(NamedTuple):
    """A part of a cross-validation.

    Attributes:
        train: the examples trained on.
        answered: what the model answered for the others.
    """

    train: Split
    answered: Answered


class RunTests:
    """All evaluation sets of a run: dev, held-out training examples, other tasks; read before training starts.

    Args:
        config: the run.
        task: its examples.
        held_out: the held-out training examples; ``None`` if there are none.
        predictor: runs a model over them.
        inputs: loads and caches them.
    Raises:
        DataError: when the label of an example cannot be evaluated.
    """

    def __init__(
        self, config: RunConfig, task: Task, held_out: Split | None, predictor: Predictor, inputs: Inputs
    ) -> None:
        self.task, self.held_out, self.predictor = task, held_out, predictor
        self._dev = inputs.encoded(config, predictor, task.dev, "the evaluation examples")
        self._aside = (
            None
            if held_out is None
            else inputs.encoded(config, predictor, held_out, "the held-out training examples")
        )
        if config.elsewhere and task.rules.truth(task.dev, task.label_names) is None:
            raise ConfigError(f"elsewhere needs one class per example, got {task.kind}. Leave it out.")
        self._elsewhere = [inputs.elsewhere(name, config, task) for name in config.elsewhere or ()]
        self._elsewhere_encoded = [
            inputs.encoded(config, predictor, other.questions, f"the examples of {other.name}")
            for other in self._elsewhere
        ]

    @property
    def encoded(self) -> list[Any]:
        """All evaluation sets, encoded; first the dev examples."""
        aside = [] if self._aside is None else [self._aside]
        return [self._dev, *aside, *self._elsewhere_encoded]

    @property
    def num_cut(self) -> int:
        """How many words or rows of the dev examples were truncated by the length limit."""
        return self._dev.num_cut

    def measure(self, model: Any, folds: Sequence[Fold] | None = None) -> dict[str, Any]:
        """Return the fields of ``RunResult`` with a model's scores.

        Args:
            model: the trained model.
            folds: of a cross-validation; their scores are those of the dev examples then.
        """
        names, predictor, label_names = self.task.metrics, self.predictor, self.task.label_names
        if folds is None:
            folds = [Fold(self.task.train, predictor.answered(model, self.task.dev, self._dev))]
        constants = [
            None if output is None else fold.answered._replace(outputs=[output] * len(fold.answered.outputs))
            for fold in folds
            for output in [self.task.rules.constant_output(fold.train, label_names)]
        ]
        known = [constant for constant in constants if constant is not None]
        return {
            **vars(predictor.judge(names, [fold.answered for fold in folds])),
            "held_out": None if self.held_out is None else self.held_out_scores(model),
            "constant": predictor.measure(names, known) if len(known) == len(folds) else None,
            "folds": [predictor.measure(names, [fold.answered]) for fold in folds] if len(folds) > 1 else [],
            "elsewhere": {
                other.name: {
                    "accuracy": other.accuracy(self._classes(model, other, encoded), self.task.label_names)
                }
                for other, encoded in zip(self._elsewhere, self._elsewhere_encoded, strict=True)
            },
            "eval_examples": sum(len(fold.answered.outputs) for fold in folds),
        }

    def held_out_answers(self, model: Any) -> Answered:
        """Run a model on the held-out training examples."""
        assert self.held_out is not None
        return self.predictor.answered(model, self.held_out, self._aside)

    def held_out_scores(self, model: Any) -> dict[str, float]:
        """Measure a model on the held-out training examples."""
        return self.predictor.measure(self.task.metrics, [self.held_out_answers(model)])

    def nothing(self) -> dict[str, Any]:
        """Return the fields of ``measure`` for a model without scores."""
        metrics = dict.fromkeys(self.task.metrics, float("nan"))
        return {"metrics": metrics, "eval_examples": len(self._dev)}

    def _classes(self, model: Any, other: Any, encoded: Any) -> list[str]:
        answers = self.predictor.predict(model, other.questions, Answers(), encoded)
        return [answer["prediction"] for answer in answers]
