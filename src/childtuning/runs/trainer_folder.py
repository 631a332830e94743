"""`TrainerFolder`: a folder that ``ChildTrainer`` saved, opened like a finished run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from childtuning.child import Child
from childtuning.child.files import read_json
from childtuning.delta import Delta
from childtuning.errors import ConfigError, ModelError
from childtuning.runs.folder import saved_processor
from childtuning.runs.judgement import Judgement
from childtuning.runs.predict import FinishedRun
from childtuning.tasks import KINDS, Kind, Source, Split
from childtuning.tasks.kind import Columns
from childtuning.training import LoadedModel, model_folder, num_positions

_PROCESSORS = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
_METHODS = {"task-driven": "child-d", "task-free": "child-f"}


class TrainerFolder(FinishedRun):
    """A folder that ``ChildTrainer`` saved: a delta, the model's configuration, and perhaps a processor.

    Args:
        path: the folder: ``output_dir``, one of its checkpoints, or that of ``save_model``.
        model: the base model; ``None``: the one that the delta names. A model is not changed.
        progress: draw bars on standard error.
        tell: called with lines for the user.
    Raises:
        CorruptFileError: when the delta is damaged.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        model: str | Path | nn.Module | None = None,
        progress: bool = False,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.path, self.progress, self.tell = Path(path).expanduser(), progress, tell
        self._given = model
        delta, child = self.delta, self.path / "child.safetensors"
        density = Child.load(child).density if child.is_file() else (delta.recipe or {}).get("density", 1.0)
        size = sum((self.path / name).stat().st_size for name in ("delta.json", "delta.safetensors"))
        self.metrics = {"metrics": {}, "density": density, "delta_bytes": size}
        self.about = {"base_name": delta.base.get("name"), "columns": {}}

    @property
    def method(self) -> str:
        """The method of the child: ``child-d`` or ``child-f``; ``child`` if another was given."""
        choice = self.path / "child.json"
        found = read_json(choice) if choice.is_file() else {}
        return _METHODS.get(found.get("variant", ""), "child")

    @cached_property
    def _config(self) -> Any:
        """The model's configuration."""
        import transformers

        if not (self.path / "config.json").is_file():
            raise ConfigError(
                f"{str(self.path)!r} has no config.json: its model is not of transformers. Pass model=, the base model."
            )
        return transformers.AutoConfig.from_pretrained(self.path)

    @cached_property
    def kind(self) -> Kind:  # type: ignore[override]
        """The kind of task that the model's class is for, and its loss: ``config.problem_type``."""
        import transformers

        config = self._config
        name = (config.architectures or ["none"])[0]
        for kind in KINDS.values():
            mapping = getattr(transformers, kind.auto_model)._model_mapping
            if type(config) in mapping and mapping[type(config)].__name__ == name and _has_loss(kind, config):
                return kind
        raise ModelError(f"childtuning predicts nothing with a {name}. Call model(), and use it yourself.")

    @cached_property
    def label_names(self) -> list[str]:
        """Class names in the order of the logits, as the model's configuration has them."""
        names = [name for _, name in sorted(self._config.id2label.items())] if self.kind.has_classes else []
        if any(name == f"LABEL_{index}" for index, name in enumerate(names)):
            self.tell("the classes have no names. Set model.config.id2label before training to name them.")
        return names

    def processor(self) -> Any:
        """Return the tokenizer or image processor that was saved with the model.

        Raises:
            ConfigError: when there is none.
        """
        if not any((self.path / name).is_file() for name in _PROCESSORS):
            raise ConfigError(
                f"{str(self.path)!r} has no tokenizer or image processor. Save it there: "
                "ChildTrainer(…, processing_class=tokenizer), or tokenizer.save_pretrained(folder)."
            )
        return saved_processor(self.kind, self.path)

    def _of_training_files(self) -> tuple[bool, str | None, str | None]:
        return False, None, None

    def read_input(self, path: str | Path | Source, *, labelled: bool) -> Split:
        """Read examples from a file or folder whose columns have the usual names."""
        source = self.source(path, labelled=labelled)
        needs_none = not labelled and self.kind.has_new_head
        columns = Columns(label="label") if needs_none else Columns()  # a column that need not be there
        return self.kind.read(source, self.kind.settle(source, columns), part="dev", labelled=labelled)

    def judge(self, examples: str | Path | Split) -> Judgement:
        """Judge the model by the kind's metrics."""
        self.about["metrics"] = self.kind.metrics(self.label_names)
        return super().judge(examples)

    def _check_form(self, examples: Split) -> None:
        """Accept any form: the folder does not say what the model was trained on."""

    def _max_length(self) -> int:
        return num_positions(self.model()) or 512

    def base(self) -> LoadedModel:
        import transformers

        if isinstance(self._given, nn.Module):
            return LoadedModel("the given model", copy.deepcopy(self._given), None, (), "")
        name = self._given or self.about["base_name"]
        if name is None:
            raise ConfigError(
                f"the delta in {str(self.path)!r} names no base model. Pass model=, its base model."
            )
        architecture = getattr(transformers, (self._config.architectures or ["none"])[0], None)
        if architecture is None:
            raise ConfigError(
                f"{str(self.path)!r} does not name the model's class. Pass model=, the base model."
            )
        dtype = next((v.dtype for v in self.delta.values.values() if v.is_floating_point()), None)
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # the head is new, and comes from the delta
        try:
            model, info = architecture.from_pretrained(
                name, config=self._config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except (OSError, ValueError) as fault:
            reason = " ".join(str(fault).split())[:200]
            raise ModelError(
                f"the base model {str(name)!r} cannot be loaded ({reason}). Pass model=."
            ) from None
        finally:
            transformers.logging.set_verbosity(verbosity)
        new = {*info["missing_keys"], *(key for key, *_ in info.get("mismatched_keys", ()))}
        return LoadedModel(str(name), model, None, tuple(sorted(new)), "")

    def base_folder(self) -> Path:
        """Return the folder that the base model is loaded from."""
        if isinstance(self._given, nn.Module) or not (self._given or self.about["base_name"]):
            raise ModelError("the base model was given, and not its folder.")
        return model_folder(str(self._given or self.about["base_name"]))

    def bare_model(self) -> Any:
        """Return a model of the saved class without values, on the ``meta`` device."""
        import transformers

        architecture = getattr(transformers, (self._config.architectures or ["none"])[0], None)
        if architecture is None:
            raise ModelError("the folder does not name the model's class.")
        with torch.device("meta"):
            return architecture(self._config)

    def changes(self) -> Delta:
        """Return the delta from the base model."""
        return self.delta

    def untuned(self, base: LoadedModel) -> Any:
        """Return the base model: nothing is added."""
        return base.model

    def merged(self) -> Any:
        """Return a tuned model: it has the base model's architecture."""
        return self._tuned(self.base())


def _has_loss(kind: Kind, config: Any) -> bool:
    """Tell whether a kind of task has the loss of a configuration; where it names none, it is transformers' choice."""
    is_one = config.num_labels == 1
    if kind.problem_type is None:
        return kind.has_classes != is_one or not kind.has_new_head
    problem = config.problem_type or ("regression" if is_one else "single_label_classification")
    return kind.problem_type == problem and (kind.has_classes or is_one)
