"""A run's folder: what a finished run leaves behind, and how it is opened again.

config.toml            the resolved options
labels.json            kind of task, label names, metrics, text columns, the base model's hash
delta.json, delta.safetensors   the trained values
child.safetensors      which entries they are (fixed children)
tokenizer/             the tokenizer
method/                what a method leaves for others (an adapter in PEFT's own format)
metrics.json           the result; written last, so that it marks a finished run
checkpoints/           while the run is going on
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from childtuning.delta import Delta
from childtuning.errors import BaseMismatchError, ConfigError, CorruptFileError, DataError
from childtuning.experiments.prediction import predict_logits, score_logits
from childtuning.experiments.run_config import RunConfig, read_toml
from childtuning.tasks import Examples, check_labels, read_examples
from childtuning.training import LoadedModel, Prepared, load_classifier

CONFIG, LABELS, METRICS = "config.toml", "labels.json", "metrics.json"
TOKENIZER, METHOD_FILES, CHECKPOINTS = "tokenizer", "method", "checkpoints"
_OURS = (
    "log.jsonl",
    CONFIG,
    LABELS,
    METRICS,
    TOKENIZER,
    METHOD_FILES,
    CHECKPOINTS,
    "child.safetensors",
    "delta.json",
    "delta.safetensors",
)
_NOT_IDENTITY = ("save_steps",)


def write_text(path: Path, text: str) -> None:
    """Write a file, complete or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, complete or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def check_output(folder: Path, config: RunConfig, *, overwrite: bool, resume: bool) -> None:
    """Make sure that a run may write to a folder; nothing is changed.

    Raises:
        ConfigError: it holds something that would be lost, or a run with other options is to be resumed.
    """
    if resume and overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite removes it. Pass one of them.")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output {str(folder)!r} is a file. Pass a folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        if resume:
            raise ConfigError(f"there is nothing to resume in {str(folder)!r}. Leave out --resume to start.")
        return
    if _is_bare(folder) and not resume:
        return
    is_run = _is_run(folder)
    if resume:
        if not is_run:
            raise ConfigError(f"{str(folder)!r} is not a run: it has no {CONFIG}. Pass the run's folder.")
        _check_same(folder, config)
    elif not overwrite:
        raise ConfigError(
            f"output folder {str(folder)!r} is not empty. Pass --resume, --overwrite, or another folder."
        )
    elif not is_run:
        raise ConfigError(
            f"{str(folder)!r} holds files that are not a run's, so it is not overwritten. Pass another."
        )


def _is_bare(folder: Path) -> bool:
    """Whether all there is in a folder is the empty one that a run makes first."""
    return all(
        path.name == CHECKPOINTS and path.is_dir() and not any(path.iterdir()) for path in folder.iterdir()
    )


def _is_run(folder: Path) -> bool:
    try:
        RunConfig.from_options(read_toml(folder / CONFIG))
    except ConfigError:
        return False
    return True


def _check_same(folder: Path, config: RunConfig) -> None:
    before = RunConfig.from_options(read_toml(folder / CONFIG))
    for name in RunConfig.__dataclass_fields__:
        then, now = getattr(before, name), getattr(config, name)
        if then != now and name not in _NOT_IDENTITY:
            raise ConfigError(
                f"the run in {str(folder)!r} was started with {name}={then!r}, got {now!r}. "
                "Resume with the same options, or pass another output folder."
            )


def clear_run(folder: Path) -> None:
    """Remove a run's own files from its folder, and nothing else."""
    for name in (*_OURS, *(name + ".partial" for name in _OURS)):
        path = folder / name
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


def remove_empty(folder: Path) -> None:
    """Remove a run's folder that the trainer made and nothing was written to."""
    for path in (folder / CHECKPOINTS, folder):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


@dataclass(frozen=True)
class Prediction:
    """What a run's model says about some examples.

    Attributes:
        logits: float32 [n, num_labels].
        labels: per example the label's name, or the number for regression.
        confidences: per example the softmax probability of that label; ``None`` for regression.
    """

    logits: NDArray[np.float32]
    labels: list[Any]
    confidences: list[float] | None


class RunFolder:
    """A finished run, opened.

    Args:
        path: the folder.
        progress: draw bars on standard error.
    Raises:
        ConfigError: there is no such folder, it is no run, or the run is not finished.
        CorruptFileError: its files are damaged.
    """

    def __init__(self, path: str | Path, *, progress: bool = False) -> None:
        self.path = Path(path).expanduser()
        self.progress = progress
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
            LABELS, "kind", "label_names", "metrics", "columns", "pairs", "base_name", "base_hash"
        )
        self.metrics = self._json(METRICS, "metrics", "density", "delta_bytes")
        if not (self.path / TOKENIZER).is_dir():
            raise CorruptFileError(f"{self.path} has no folder {TOKENIZER!r}. Copy the run's folder anew.")

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
    def is_regression(self) -> bool:
        """Whether the model predicts a number."""
        return self.about["kind"] == "regression"

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
        """The base model with a random head, verified to be the one the run started from."""
        loaded = load_classifier(
            self.config.model,
            num_labels=max(len(self.label_names), 1),
            label_names=self.label_names,
            regression=self.is_regression,
            seed=self.config.seed,
        )
        if loaded.base_hash != self.about["base_hash"]:
            raise BaseMismatchError(
                f"the delta was made for another base model: {loaded.name!r} has other weights than when the run was "
                "trained. Put the original model back there."
            )
        return loaded

    def model(self) -> Any:
        """Return the tuned model: the base with what the methods add and the delta applied."""
        model = self.prepared().model
        self.delta.apply_(model)
        return model.eval()

    def prepared(self) -> Prepared:
        """Return the base model as the methods prepare it, before training."""
        import transformers

        loaded = self.base
        transformers.set_seed(self.config.seed)
        prepared = self.config.methods().prepare(loaded.model, loaded.new_parameters)
        del self.__dict__["base"]  # its model is not the base any more
        return prepared

    def merged(self) -> Any:
        """Return the tuned model in the base model's own architecture.

        Raises:
            ModelError: a method added what cannot be folded into it.
        """
        return self.config.methods().merge(self.model()).eval()

    def tokenizer(self) -> Any:
        """Return the tokenizer that the run used."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(self.path / TOKENIZER))

    def read_input(self, path: str | Path, *, labelled: bool) -> Examples:
        """Read examples from a file with the run's own columns."""
        columns = self.about["columns"]
        label_kind = "number" if self.is_regression else "class"
        return read_examples(
            path,
            text=columns["text"],
            text_pair=columns["text_pair"],
            label=columns["label"] if labelled else None,
            label_kind=label_kind if labelled else None,
        )

    def logits(self, model: Any, examples: Examples) -> NDArray[np.float32]:
        """Return the model's logits for examples of the run's form.

        Raises:
            DataError: pairs where the run has single texts, or the reverse.
        """
        if (examples.text_pair is not None) != self.about["pairs"]:
            wanted = "pairs of texts" if self.about["pairs"] else "single texts"
            raise DataError(
                f"the run was trained on {wanted}, the input is not. Pass input of the same columns."
            )
        return predict_logits(
            model, self.tokenizer(), examples, max_length=self.config.max_length, progress=self.progress
        )

    def predict(self, examples: Examples) -> Prediction:
        """Label examples."""
        logits = self.logits(self.model(), examples)
        if self.is_regression:
            return Prediction(logits, [float(value) for value in logits[:, 0]], None)
        probabilities = torch.from_numpy(logits).softmax(1)
        best = logits.argmax(1)
        names = [self.label_names[index] for index in best]
        return Prediction(logits, names, [float(row[i]) for row, i in zip(probabilities, best, strict=True)])

    def evaluate(self, examples: Examples) -> dict[str, float]:
        """Return the run's metrics on labelled examples.

        Raises:
            DataError: labels that training never saw.
        """
        targets: list[Any] = list(examples.labels or [])
        if not self.is_regression:
            check_labels(examples, tuple(self.label_names), where="the evaluation file")
            targets = [self.label_names.index(label) for label in targets]
        logits = self.logits(self.model(), examples)
        return score_logits(self.about["kind"], self.about["metrics"], logits, targets)

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
            differs = (_bits(old) != _bits(parameter.detach())).any(1)
            inside = differs[part.indices()].sum() if not part.is_empty else 0
            counts["changed_inside"] += int(inside)
            counts["changed_outside"] += int(differs.sum()) - int(inside)
        return counts


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1, 1).view(torch.uint8)
