"""Predict with, evaluate and verify a finished run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from childtuning.errors import DataError, ModelError
from childtuning.runs.evaluate import Predictor, cut_at
from childtuning.runs.folder import RunFolder
from childtuning.runs.inputs import base_model, bits, merged_model, tuned_model
from childtuning.tasks import Answers, Columns, Source, Split, check_labels


class FinishedRun(RunFolder):
    """A finished run, for prediction, evaluation and verification.

    Args:
        path: its folder.
        progress: draw bars on standard error.
        tell: called with lines for the user.
    Raises:
        ConfigError: when there is no such folder, it is not a run, or the run is not finished.
        CorruptFileError: when its files are damaged.
    """

    def __init__(
        self, path: str | Path, *, progress: bool = False, tell: Callable[[str], None] = lambda line: None
    ) -> None:
        super().__init__(path)
        self.progress, self.tell = progress, tell

    def _check_finite(self) -> None:
        if self.metrics.get("diverged_at") is not None:
            raise ModelError(
                f"training of the run in {str(self.path)!r} diverged at step {self.metrics['diverged_at']}: its model "
                "predicts nothing. Train again with a lower --lr."
            )

    def model(self) -> Any:
        """Return the tuned model."""
        self._check_finite()
        return tuned_model(self)

    def merged(self) -> Any:
        """Return the tuned model in the base model's own architecture.

        Raises:
            ModelError: when the modules added by a method cannot be merged into it.
        """
        self._check_finite()
        return merged_model(self)

    def read_input(self, path: str | Path, *, labelled: bool) -> Split:
        """Read examples from a file or folder, with the run's columns.

        Bad rows are left out and told if they are to be measured; predictions need every row.
        """
        columns = Columns(**self.about["columns"])
        source = Source(Path(path).expanduser(), strict=self.config.strict or not labelled)
        examples = self.kind.read(source, columns, part="dev", labelled=labelled)
        for note in source.notes:
            self.tell(note)
        return examples

    def predict(self, examples: Split, options: Answers | None = None) -> list[dict[str, Any]]:
        """Return predictions for examples.

        Returns:
            for each example a dict with "prediction" (the label, the number, …) and other keys that depend on the kind
            of task.
        Raises:
            DataError: when the form of the examples differs from the run's.
        """
        self._check_form(examples)
        model = self.model()
        return self._predictor(model).predict(model, examples, options or Answers())

    def evaluate(self, examples: Split) -> dict[str, float]:
        """Return the run's metrics on labelled examples.

        Raises:
            DataError: for labels that did not occur in training, or examples of another form.
        """
        if self.kind.has_classes:
            check_labels(examples, tuple(self.label_names), where="the evaluation file")
        self._check_form(examples)
        model = self.model()
        return self._predictor(model).measure(model, examples, self.about["metrics"])

    def _check_form(self, examples: Split) -> None:
        wanted = self.about["form"]
        if examples.form != wanted:
            raise DataError(
                f"the run was trained on {wanted}, got {examples.form}. Pass input with the same columns."
            )

    def _predictor(self, model: Any) -> Predictor:
        most = cut_at(self.config, self.kind, model)
        names, processor = self.label_names, self.processor()
        return Predictor(self.kind, processor, names, most, progress=self.progress, tell=self.tell)

    def verify(self) -> dict[str, int]:
        """Compare the tuned model with the base model, bitwise.

        Returns:
            counts: parameters and entries in the model; entries in the delta, how many of them differ from the
            base, and how many entries outside the delta differ from the base (0 if all is well). Entries that the
            base does not have (the new head and added modules) are counted separately.
        """
        loaded = base_model(self)
        new = set(loaded.new_parameters)
        pretrained = {id(p): p.detach().clone() for n, p in loaded.model.named_parameters() if n not in new}
        model = tuned_model(self, loaded)
        named = dict(zip(self.delta.parts, model.parameters(), strict=True))
        counts: dict[str, int] = dict.fromkeys(
            (
                "parameters",
                "entries",
                "entries_in_delta",
                "changed_inside",
                "changed_outside",
                "new_entries",
            ),
            0,
        )
        for name, parameter in named.items():
            part, old = self.delta.parts[name], pretrained.get(id(parameter))
            if old is None:
                counts["new_entries"] += parameter.numel()
                continue
            counts["parameters"] += 1
            counts["entries"] += old.numel()
            counts["entries_in_delta"] += part.num_trained
            differs = (bits(old) != bits(parameter.detach())).any(1)
            inside = differs[part.indices()].sum() if not part.is_empty else 0
            counts["changed_inside"] += int(inside)
            counts["changed_outside"] += int(differs.sum()) - int(inside)
        return counts
