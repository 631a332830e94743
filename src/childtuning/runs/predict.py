"""Predict with, evaluate, merge and verify a finished run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from childtuning.child import Child
from childtuning.delta import Delta
from childtuning.delta.files import bits
from childtuning.errors import ConfigError, DataError, ModelError
from childtuning.runs.config import json_ready
from childtuning.runs.evaluate import Predictor, cut_at
from childtuning.runs.export import Form, export_run
from childtuning.runs.folder import START, RunFolder, write_text
from childtuning.runs.inputs import base_model, is_model_folder, prepare_run_model, read_run_task
from childtuning.runs.judgement import Answered, Judgement
from childtuning.tasks import Answers, Columns, Source, Split, as_source, check_labels
from childtuning.training import LoadedModel, bare_architecture, model_folder
from childtuning.training.checkpoint_files import CHILD_FILE

Texts = Sequence[str] | Sequence[tuple[str, str]]
_MOST_CLASSES = 50  # a file of predictions holds the probabilities of no more


class PredictionsFile:
    """A new csv or jsonl file: the columns of the input, then the predictions.

    A class gets the columns prediction and confidence, and the probability of each class if there are at most 50: in
    csv a column p_CLASS each, in jsonl one object ``probabilities``. So do several labels, whose probabilities are
    independent of each other. Other kinds of task get what ``predict`` returns.

    Args:
        path: the file; its ending decides.
    Raises:
        ConfigError: when it exists, has another ending, or its folder does not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if self.path.suffix not in (".csv", ".jsonl"):
            raise ConfigError(f"the output must end in .csv or .jsonl, got {str(path)!r}. Name it so.")
        if not self.path.parent.is_dir():
            raise ConfigError(
                f"there is no folder {str(self.path.parent)!r} for the output. Create it, or pass another."
            )
        if self.path.exists():
            raise ConfigError(f"output file {str(path)!r} already exists. Pass another.")

    def check(self, columns: Sequence[str], run: FinishedRun, prefix: str = "") -> None:
        """Check that no column of the input would be replaced.

        Args:
            columns: of the input.
            run: that predicts.
            prefix: of the columns that are added.
        Raises:
            ConfigError: naming the first one.
        """
        names = (f"p_{name}" for name in run.label_names)
        added = {"prediction", "confidence", "probabilities", *run.kind.adds, *names}
        for name in columns:
            if name in {prefix + one for one in added}:
                raise ConfigError(
                    f"the input has a column {name!r}, which the output adds. Rename it in the input."
                )

    def joined(
        self,
        inputs: Sequence[Mapping[str, Any]],
        rows: Sequence[dict[str, Any]],
        run: FinishedRun,
        prefix: str = "",
    ) -> list[dict[str, Any]]:
        """Return the input's rows with a run's predictions, as they are written."""
        return [
            {**given, **{prefix + name: value for name, value in self._added(row, run).items()}}
            for given, row in zip(inputs, rows, strict=True)
        ]

    def write(self, joined: Sequence[Mapping[str, Any]]) -> None:
        """Write rows."""
        if self.path.suffix == ".jsonl":
            lines = (json.dumps(json_ready(row), ensure_ascii=False, default=str) for row in joined)
            # Half a character is written as JSON escapes it, which is how it came.
            write_text(self.path, "".join(line + "\n" for line in lines), errors="backslashreplace")
            return
        file = io.StringIO()
        columns = list(dict.fromkeys(name for row in joined for name in row))
        # A lone carriage return ends a line for readers, and is quoted only where everything is.
        has_returns = any("\r" in str(value) for row in joined for value in row.values())
        quoting = csv.QUOTE_ALL if has_returns else csv.QUOTE_MINIMAL
        writer = csv.DictWriter(file, columns, lineterminator="\n", quoting=quoting)
        writer.writeheader()
        for row in joined:
            writer.writerow(
                {
                    name: json.dumps(json_ready(value), ensure_ascii=False, default=str)
                    if isinstance(value, (list, dict))
                    else value
                    for name, value in row.items()
                }
            )
        write_text(self.path, file.getvalue(), errors="replace")

    def _added(self, row: dict[str, Any], run: FinishedRun) -> dict[str, Any]:
        added = {name: value for name, value in row.items() if name != "logits"}
        names = run.label_names
        chances = run.kind.chances(np.array([row["logits"]])) if "logits" in row else None
        if chances is None or len(names) > _MOST_CLASSES:
            return added
        of_class = dict(zip(names, chances[0].tolist(), strict=True))
        if self.path.suffix == ".jsonl":
            return {**added, "probabilities": of_class}
        return added | {f"p_{name}": value for name, value in of_class.items()}


class FinishedRun(RunFolder):
    """A finished run, for prediction, evaluation, merging and verification.

    The tuned model is loaded once, when it is first needed.

    Args:
        path: its folder.
        model: the base model's folder or hub name, if it is no longer where the run found it.
        progress: draw bars on standard error.
        tell: called with lines for the user.
    Raises:
        ConfigError: when there is no such folder, it is not a run, or the run is not finished.
        CorruptFileError: when its files are damaged.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        model: str | Path | None = None,
        progress: bool = False,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__(path)
        self.progress, self.tell = progress, tell
        if model is not None:
            if not isinstance(model, (str, Path)):
                raise ConfigError(
                    f"model must be a folder or a hub name, got {type(model).__name__}. Pass one."
                )
            starts = self.config.init_from is not None and not (self.path / START).is_dir()
            start = None if starts else self.config.init_from
            self.config = replace(self.config, model=str(model), init_from=start)

    def __repr__(self) -> str:
        found = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics["metrics"].items())
        return f"{type(self).__name__}({str(self.path)!r}, {self.method}{found and f': {found}'})"

    @property
    def method(self) -> str:
        """The method that it was trained with."""
        return self.config.method

    def model(self) -> Any:
        """Return the tuned model, the same at every call.

        Raises:
            ModelError: when training diverged.
        """
        return self._model

    @cached_property
    def _model(self) -> Any:
        return self._tuned(self.base())

    def adopt(self, model: Any) -> None:
        """Predict with this model, whose values somebody else puts in."""
        self.__dict__["_model"] = model

    def base(self) -> LoadedModel:
        """Load the base model."""
        return base_model(self)

    def untuned(self, base: LoadedModel) -> Any:
        """Return a base model, in place, with the modules that the method adds: what the delta is for."""
        self.check_sound()
        return prepare_run_model(self.config, self.config.methods(), base).model

    def base_folder(self) -> Path:
        """Return the folder that the base model is loaded from."""
        config = self.config
        has_start = (self.path / START).is_dir()
        is_base = config.init_from is not None and not has_start and is_model_folder(config.init_from)
        return model_folder(config.init_from if is_base else config.model)

    def bare_model(self) -> Any:
        """Return a model of the run's architecture without values, on the ``meta`` device."""
        options = self.kind.model_options(self.label_names)
        return bare_architecture(
            str(self.base_folder()), self.processor(), auto_model=self.kind.auto_model, options=options
        )

    def base_parameters(self) -> Iterable[tuple[str, Any]]:
        """Return the parameters that a loaded base model has from its files, by name."""
        loaded, start = self.base(), self.path / START
        other = set(loaded.new_parameters)
        if start.is_dir():
            other |= {name for name, part in Delta.load(start).parts.items() if not part.is_empty}
        return [(n, p) for n, p in loaded.model.named_parameters() if n not in other]

    def changes(self) -> Delta:
        """Return the delta from the base model on disk: of a run that started from another one, both."""
        start = self.path / START
        if not start.is_dir():
            return self.delta
        both = Delta.load(start).then(self.delta)
        # The model that the run started from has the base model's frozen entries, and is checked as it is loaded.
        return both.hashed(self.untuned(self.base()))

    def check_sound(self) -> None:
        """Raise a ModelError if training diverged."""
        if self.metrics.get("diverged_at") is not None:
            raise ModelError(
                f"training of the run in {str(self.path)!r} diverged at step {self.metrics['diverged_at']}: its model "
                "predicts nothing. Train again with a lower --lr."
            )

    def _tuned(self, base: LoadedModel) -> Any:
        """Turn the base model into the tuned one, in place."""
        model = self.untuned(base)
        self.delta.apply_(model)
        return model.eval()

    def merged(self) -> Any:
        """Return a tuned model in the base model's own architecture.

        Raises:
            ModelError: when the modules added by a method cannot be merged into it.
        """
        return self.config.methods().merge(self._tuned(self.base())).eval()

    def merge(self, folder: str | Path) -> Path:
        """Save the merged model: ``export(folder, "model")``."""
        return self.export(folder)

    def export(self, folder: str | Path, to: Form = "model", *, base: str | None = None) -> Path:
        """Write the run's model in a form that others read; arguments and errors as for ``export_run``.

        ``hub`` is what ``push_to_hub`` uploads, and ``load`` opens: ``base`` is the base model's name there.
        """
        if to == "hub":
            from childtuning.runs.hub import publish

            return publish(self, folder, base=base)
        return export_run(self, folder, to)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Upload the run to the Hugging Face hub: delta, tokenizer, model card and certificate.

        No example and no base model is uploaded.
        ``childtuning.load("hf://OWNER/NAME")`` opens it elsewhere.

        Args:
            repo_id: OWNER/NAME; it is created if it does not exist.
            base: the base model's name on the hub; needed if the run was trained from a folder.
            private: whether a new repository is; ``None``: as the owner's settings say.
            token: ``None``: the one that ``hf auth login`` saved.
            revision: the branch; ``None``: main.
        Returns:
            the address of the commit.
        Raises:
            ConfigError: the base model has no name, or the hub refuses.
        """
        from childtuning.runs.hub import push

        return push(self, repo_id, base=base, private=private, token=token, revision=revision)

    def source(
        self,
        path: str | Path | Source,
        *,
        labelled: bool,
        encoding: str | None = None,
        sheet: str | None = None,
    ) -> Source:
        """Return a file or folder as a source.

        Bad rows are left out and told if they are to be measured; predictions need every row.

        Args:
            path: of the file or folder.
            labelled: whether examples are to be measured.
            encoding, sheet: where they are not those of the training file.
        Raises:
            ConfigError: a sheet of what is no workbook.
        """
        if sheet is not None and not str(path).lower().endswith(".xlsx"):
            raise ConfigError(f"--sheet names a sheet of a workbook, got {path}. Leave it out.")
        is_strict, known, known_sheet = self._of_training_files()
        strict, encoding, sheet = is_strict or not labelled, encoding or known, sheet or known_sheet
        return as_source(path, strict=strict, encoding=encoding, sheet=sheet)

    def _of_training_files(self) -> tuple[bool, str | None, str | None]:
        """Return whether bad rows were refused, and the encoding and the sheet."""
        return self.config.strict, self.config.encoding, self.config.sheet

    def read_input(self, path: str | Path | Source, *, labelled: bool) -> Split:
        """Read examples from a file or folder, with the run's columns."""
        columns = Columns(**self.about["columns"])
        source = self.source(path, labelled=labelled)
        examples = self.kind.read(source, columns, part="dev", labelled=labelled)
        for note in source.notes:
            self.tell(note)
        known = self._num_trained_on(examples) if labelled else 0
        if known:
            self.tell(
                f"warning: {known:,} of the {len(examples):,} examples were trained on, so the score says too little "
                "about new ones"
            )
        return examples

    def _num_trained_on(self, examples: Split) -> int:
        """Count the examples that are also training examples, whatever their labels; 0 if the training file is gone."""
        config = self.config
        there = config.train or (config.data_dir and Path(config.data_dir, config.task or ""))
        if not there or not Path(there).expanduser().exists():  # else a task would be looked for on the hub
            return 0
        try:
            task, _ = read_run_task(self.config)
        except (ConfigError, DataError):
            return 0
        known = set(task.train.contents() or ())
        return sum(content in known for content in examples.contents() or ())

    def predict(
        self, examples: Texts | str | Path | Split, options: Answers | None = None
    ) -> list[dict[str, Any]]:
        """Return predictions for examples.

        Args:
            examples: a list of texts, or of pairs of texts; or a file or folder that ``childtuning train`` reads.
            options: how a language model answers.
        Returns:
            for each example a dict with "prediction" (the label, the number, …) and other keys that depend on the kind
            of task.
        Raises:
            DataError: when the form of the examples differs from the run's.
        """
        split = self._split(examples)
        if not len(split):
            return []
        self._check_form(split)
        return self._predictor.predict(self.model(), split, options or Answers())

    def predict_proba(self, examples: Texts | str | Path | Split) -> np.ndarray:
        """Return the probability of each class, [num_examples, num_classes], float64, in the order of ``label_names``.

        Of several labels per example, each has a probability of its own.

        Args:
            examples: as for ``predict``.
        Raises:
            ConfigError: when an example of the run has no classes.
        """
        none = np.empty((0, len(self.label_names)))
        if self.kind.chances(none) is None:
            raise ConfigError(f"{self.kind.name} has no probability of each class. Call predict.")
        rows = self.predict(examples)
        chances = self.kind.chances(np.array([row["logits"] for row in rows]) if rows else none)
        assert chances is not None
        return chances

    def evaluate(self, examples: str | Path | Split) -> dict[str, float]:
        """Return the run's metrics on labelled examples; arguments and errors as for ``judge``."""
        return self.judge(examples).metrics

    def judge(self, examples: str | Path | Split) -> Judgement:
        """Return the run's metrics on labelled examples with an interval, each class, and the most confident errors.

        Args:
            examples: a file or folder, or examples that were read.
        Raises:
            DataError: for labels that did not occur in training, or examples of another form.
        """
        return self._predictor.judge(self.about["metrics"], [self.answered(examples)])

    def answered(self, examples: str | Path | Split) -> Answered:
        """Run the tuned model on labelled examples; arguments and errors as for ``judge``."""
        if not isinstance(examples, Split):
            examples = self.read_input(examples, labelled=True)
        if self.kind.has_classes:
            check_labels(examples, tuple(self.label_names), where="the evaluation file")
        self._check_form(examples)
        return self._predictor.answered(self.model(), examples)

    def typed(self, texts: list[str], pairs: list[str] | None) -> Split:
        """Return texts, or pairs of texts, as unlabelled examples, formed as those in a file would be."""
        return self.kind.of_texts(texts, pairs, Columns(**self.about.get("columns", {})))

    def _split(self, examples: Texts | str | Path | Split) -> Split:
        """Return what the user passed as examples."""
        if isinstance(examples, Split):
            return examples
        if isinstance(examples, str) and not Path(examples).expanduser().exists():
            raise DataError(f"there is no file {examples[:80]!r}. Pass a list for texts: [text].")
        if isinstance(examples, (str, Path)):
            return self.read_input(examples, labelled=False)
        if isinstance(examples, Mapping) or hasattr(examples, "columns"):
            raise DataError(
                "examples must be a list of texts, got a table. Pass one column: list(table['text'])."
            )
        rows: list[Any] = list(examples)
        if all(isinstance(row, str) for row in rows):
            return self.typed(rows, None)
        if all(isinstance(row, (tuple, list)) and [*map(type, row)] == [str, str] for row in rows):
            return self.typed([one for one, _ in rows], [other for _, other in rows])
        other = next(row for row in rows if not isinstance(row, str))
        raise DataError(f"examples must be all texts or all pairs of texts, got {other!r:.80}. Pass strings.")

    def _check_form(self, examples: Split) -> None:
        wanted = self.about["form"]
        if examples.form != wanted:
            raise DataError(
                f"the run was trained on {wanted}, got {examples.form}. Pass input with the same columns."
            )

    @cached_property
    def _predictor(self) -> Predictor:
        names, processor, most = self.label_names, self.processor(), self._max_length()
        return Predictor(self.kind, processor, names, most, progress=self.progress, tell=self.tell)

    def _max_length(self) -> int:
        return cut_at(self.config, self.kind, self.model())

    def verify(self) -> dict[str, int]:
        """Compare the tuned model with the base model, bitwise.

        Returns:
            counts: parameters and entries in the model; entries in the delta, how many of them differ from the
            base, and how many entries outside the delta differ from the base (0 if all is well). Entries that the
            base does not have (the new head and added modules) are counted separately.
        Raises:
            CorruptFileError: the file of the child is damaged.
        """
        if (self.path / CHILD_FILE).is_file():
            Child.load(self.path / CHILD_FILE)
        loaded = self.base()
        new = set(loaded.new_parameters)
        pretrained = {id(p): p.detach().clone() for n, p in loaded.model.named_parameters() if n not in new}
        model = self._tuned(loaded)
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
