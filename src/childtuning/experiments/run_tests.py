"""`RunTests`: everything that a run's model is measured on."""

from __future__ import annotations

from typing import Any

from childtuning.experiments.prediction import Reader
from childtuning.experiments.run_config import RunConfig
from childtuning.experiments.shared_inputs import Inputs
from childtuning.tasks import Answers, Split, Task


class RunTests:
    """The reported examples, those that training set aside, and those of other tasks; read before training starts.

    Args:
        config: the run.
        task: its examples.
        held_out: what training set aside; ``None`` for nothing.
        reader: puts them to a model.
        inputs: where they come from.
    Raises:
        DataError: an example's label cannot be measured.
    """

    def __init__(
        self, config: RunConfig, task: Task, held_out: Split | None, reader: Reader, inputs: Inputs
    ) -> None:
        self.task, self.held_out, self.reader = task, held_out, reader
        self._dev = inputs.encoded(config, reader, task.dev, "the evaluation examples")
        self._aside = (
            None
            if held_out is None
            else inputs.encoded(config, reader, held_out, "the held-out training examples")
        )
        self._elsewhere = [inputs.elsewhere(name, config, task) for name in config.elsewhere or ()]
        self._elsewhere_encoded = [
            inputs.encoded(config, reader, other.questions, f"the examples of {other.name}")
            for other in self._elsewhere
        ]

    @property
    def num_cut(self) -> int:
        """How much of the reported examples the length limit has cut."""
        return self._dev.num_cut

    def measure(self, model: Any) -> dict[str, Any]:
        """Return the fields of ``RunResult`` that say how good a model is."""
        names, reader, dev = self.task.metrics, self.reader, self.task.dev
        constant = self.task.how.constant_output(self.task.train, self.task.label_names)
        return {
            "metrics": reader.measure(model, dev, names, self._dev),
            "held_out": None
            if self.held_out is None
            else reader.measure(model, self.held_out, names, self._aside),
            "constant": None
            if constant is None
            else self.task.how.measure(names, [constant] * len(dev), self._dev, dev, self.task.label_names),
            "elsewhere": {
                other.name: {
                    "accuracy": other.accuracy(self._classes(model, other, encoded), self.task.label_names)
                }
                for other, encoded in zip(self._elsewhere, self._elsewhere_encoded, strict=True)
            },
            "eval_examples": len(self._dev),
        }

    def _classes(self, model: Any, other: Any, encoded: Any) -> list[str]:
        answers = self.reader.predict(model, other.questions, Answers(), encoded)
        return [answer["prediction"] for answer in answers]
