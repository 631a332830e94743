"""A finished run, opened again: its model rebuilt, asked, measured and verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from childtuning.delta import Delta
from childtuning.errors import BaseMismatchError, ConfigError, CorruptFileError, DataError
from childtuning.experiments.prediction import Reader
from childtuning.experiments.run_config import RunConfig, read_toml
from childtuning.experiments.run_files import CONFIG, LABELS, METRICS
from childtuning.experiments.run_inputs import load_run_model, prepare_run_model
from childtuning.experiments.run_start import apply_start, bits
from childtuning.tasks import Answers, Columns, Kind, Source, Split, check_labels, find_kind
from childtuning.training import LoadedModel, Prepared


class RunFolder:
    """A finished run, opened.

    Args:
        path: the folder.
        progress: draw bars on standard error.
        tell: called with lines for the user.
    Raises:
        ConfigError: there is no such folder, it is no run, or the run is not finished.
        CorruptFileError: its files are damaged.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        progress: bool = False,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.path = Path(path).expanduser()
        self.progress, self.tell = progress, tell
        if not self.path.is_dir():
            raise ConfigError(
                f"there is no run folder {str(path)!r}. Pass the output folder of `childtuning train`."
            )
        if not (self.path / CONFIG).is_file():
            raise ConfigError(
                f"{str(path)!r} is not a run: it has no {CONFIG}. Pass the output of `childtuning train`."
            )
        if not (self.path / METRICS).is_file():
            raise ConfigError(
                f"the run in {str(path)!r} is not finished. Go on with `childtuning train … --resume`."
            )
        self.config = RunConfig.from_options(read_toml(self.path / CONFIG))
        self.about = self._json(
            LABELS, "kind", "label_names", "metrics", "columns", "form", "base_name", "base_hash"
        )
        self.metrics = self._json(METRICS, "metrics", "density", "delta_bytes")
        if not (self.path / self.kind.processor_folder).is_dir():
            raise CorruptFileError(
                f"{self.path} has no folder {self.kind.processor_folder!r}. Copy the run's folder anew."
            )

    def _json(self, name: str, *keys: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
            for key in keys:
                content[key]
            return content
        except (OSError, ValueError, KeyError, TypeError) as fault:
            raise CorruptFileError(
                f"{self.path / name} cannot be read ({fault}). Copy the run's folder anew."
            ) from None

    @property
    def kind(self) -> Kind:
        """The kind of task that the run was trained on."""
        return find_kind(self.about["kind"])

    @property
    def label_names(self) -> list[str]:
        """Class names in the order of the logits."""
        return self.about["label_names"]

    @cached_property
    def delta(self) -> Delta:
        """The trained values, verified against their hashes."""
        return Delta.load(self.path)

    @cached_property
    def base(self) -> LoadedModel:
        """The model that the run started from with a random head, its base verified."""
        loaded = load_run_model(self.config, self.kind, self.label_names)
        if loaded.base_hash != self.about["base_hash"]:
            raise BaseMismatchError(
                f"the delta was made for another base model: {loaded.name!r} has other weights than when the run was "
                "trained. Put the original model back there."
            )
        apply_start(self.config, loaded, self.path)
        return loaded

    def model(self) -> Any:
        """Return the tuned model: the base with what the methods add and the delta applied."""
        model = self.prepared().model
        self.delta.apply_(model)
        return model.eval()

    def prepared(self) -> Prepared:
        """Return the base model as the methods prepare it, before training."""
        prepared = prepare_run_model(self.config, self.config.methods(), self.base)
        del self.__dict__["base"]  # its model is not the base any more
        return prepared

    def merged(self) -> Any:
        """Return the tuned model in the base model's own architecture.

        Raises:
            ModelError: a method added what cannot be folded into it.
        """
        return self.config.methods().merge(self.model()).eval()

    def processor(self) -> Any:
        """Return the tokenizer or image processor that the run used."""
        import transformers

        folder = str(self.path / self.kind.processor_folder)
        return getattr(transformers, self.kind.auto_processor).from_pretrained(folder)

    def read_input(self, path: str | Path, *, labelled: bool) -> Split:
        """Read examples from a file or folder with the run's own columns."""
        columns = Columns(**self.about["columns"])
        return self.kind.read(Source(Path(path).expanduser()), columns, part="dev", labelled=labelled)

    def predict(self, examples: Split, options: Answers | None = None) -> list[dict[str, Any]]:
        """Answer examples.

        Returns:
            by example a dict: "prediction" (the label, the number, …) and what else the kind of task gives.
        Raises:
            DataError: the examples are of another form than the run's.
        """
        reader = self._reader(examples)
        return reader.predict(self.model(), examples, options or Answers())

    def evaluate(self, examples: Split) -> dict[str, float]:
        """Return the run's metrics on labelled examples.

        Raises:
            DataError: labels that training never saw, or examples of another form.
        """
        if self.kind.has_classes:
            check_labels(examples, tuple(self.label_names), where="the evaluation file")
        reader = self._reader(examples)
        return reader.measure(self.model(), examples, self.about["metrics"])

    def _reader(self, examples: Split) -> Reader:
        wanted = self.about["form"]
        if examples.form != wanted:
            raise DataError(
                f"the run was trained on {wanted}, got {examples.form}. Pass input of the same columns."
            )
        return Reader(
            self.kind,
            self.processor(),
            self.label_names,
            self.config.max_length,
            progress=self.progress,
            tell=self.tell,
        )

    def verify(self) -> dict[str, int]:
        """Prove against the base model what the delta changes.

        Returns:
            counts: parameters and entries in the model; entries in the delta, how many of those differ from the
            base, and how many entries outside the delta differ from the base (0 if all is well). What the base
            does not have, the new head and added modules, is counted on its own.
        """
        loaded = self.base
        new = set(loaded.new_parameters)
        pretrained = {id(p): p.detach().clone() for n, p in loaded.model.named_parameters() if n not in new}
        model = self.prepared().model
        named = dict(zip(self.delta.parts, model.parameters(), strict=True))
        self.delta.apply_(model)
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
