"""Everything that decides a run, as one flat set of options that a TOML file can hold."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import tomli_w

from childtuning.child import ChildConfig
from childtuning.errors import ConfigError, did_you_mean
from childtuning.methods import Combination
from childtuning.training.precision import has_fast_bf16

_CHILD_OPTIONS = (
    "mass",
    "granularity",
    "scope",
    "estimator",
    "fisher_examples",
    "fisher_device",
    "fisher_dtype",
    "eligible",
    "always",
    "rescale",
    "release_gradients",
    "preset",
)


@dataclass(frozen=True)
class RunConfig:
    """One run: data, model, method, training. The defaults are the paper's protocol where it names a value.

    Args:
        task: a task by name, from ``data_dir`` or the hub; or leave it out and name files:
        task_kind: a name in ``tasks.KINDS``; ``None``: what the training file looks like.
        train, eval: files or folders of examples, of what types the kind of task reads.
        text, text_pair, label: their columns; ``None`` takes the usual names.
        label_type: ``auto``, ``class`` or ``number``.
        data_dir: a folder with ``<task>/`` and in it the two splits.
        train_limit: use this many training examples at most, drawn by ``data_seed``.
        eval_limit: measure on this many evaluation examples at most, on as many of what is ``held_out`` and of every
            other task of ``elsewhere``; drawn by ``data_seed``.
        held_out: a share of the training examples that is set aside before anything is drawn from them: scored at the
            end, apart from what is reported, so that hyperparameters can be chosen by it.
        elsewhere: other tasks of ``data_dir`` on whose examples the model is scored as well, by a mapping of labels:
            ``sick`` (its dev split) or ``snli/test``.
        model: a model folder or hub name; ``None``: the packaged all-MiniLM-L6-v2.
        init_from: a finished run's folder: start from its tuned network instead of the base model's, with a new head;
            or a model folder, which is then the model.
        method: one of ``childtuning methods``, with options behind a colon, or several joined by ``+``.
        density: p, or ``auto``; ``None``: the method's own default.
        mass: for ``density="auto"``: the share of the Fisher information that the child holds.
        granularity, scope, estimator, fisher_labels, fisher_examples, fisher_device, fisher_dtype, eligible, always,
            rescale, release_gradients, preset: the rest of ``ChildConfig``.
        learning_rate: peak, after the warm-up and before a linear decay to 0.
        epochs, batch_size, gradient_accumulation, warmup_ratio, weight_decay, max_grad_norm, max_length: as named;
            ``max_length`` in tokens.
        precision: ``fp32``, ``bf16`` autocast, or ``auto``: bf16 where the machine computes in it natively.
        compile: run the model through ``torch.compile`` while training.
        seed: of the head's start, data order, dropout, and masks.
        data_seed: of what ``held_out``, ``train_limit`` and ``eval_limit`` draw.
        save_steps: a checkpoint every so many optimizer steps; ``None``: every epoch.
        report_to: where else to log while training: ``tensorboard``, or whatever transformers' Trainer reports to.
    Raises:
        ConfigError: all the faults there are, in one line.
    """

    task: str | None = None
    task_kind: str | None = None
    train: str | None = None
    eval: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    label_type: str = "auto"
    data_dir: str | None = None
    train_limit: int | None = None
    eval_limit: int | None = None
    held_out: float = 0.0
    elsewhere: tuple[str, ...] | None = None
    model: str | None = None
    init_from: str | None = None
    method: str = "child-d"
    density: float | str | None = None
    mass: float = 0.9
    granularity: str = "element"
    scope: str = "global"
    estimator: str = "per-example"
    fisher_labels: str = "data"
    fisher_examples: int | None = None
    fisher_device: str = "model"
    fisher_dtype: str = "float32"
    eligible: tuple[str, ...] | None = None
    always: tuple[str, ...] | None = None
    rescale: bool | None = None
    release_gradients: bool | None = None
    preset: str | None = None
    learning_rate: float = 2e-5
    epochs: float = 3.0
    batch_size: int = 16
    gradient_accumulation: int = 1
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_length: int = 128
    precision: str = "fp32"
    compile: bool = False
    seed: int = 0
    data_seed: int = 0
    save_steps: int | None = None
    report_to: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        faults = list(self._range_faults())
        try:
            self.child()
        except ConfigError as fault:
            faults.append(str(fault))
        if faults:
            raise ConfigError(" ".join(faults))

    def _range_faults(self) -> list[str]:
        faults = []
        if self.task is None and (self.train is None or self.eval is None):
            faults.append("there is nothing to train on. Pass --task NAME, or --train FILE and --eval FILE.")
        if self.task is not None and (self.train is not None or self.eval is not None):
            faults.append("--task and --train/--eval exclude each other. Pass one of them.")
        if self.task is not None:
            given = [name for name in ("text", "text_pair", "label") if getattr(self, name) is not None]
            given += ["label_type"] if self.label_type != "auto" else []
            if given:
                faults.append(
                    f"a named task has its own columns, got {', '.join(given)}. Leave out, or pass files."
                )
        positive = ("learning_rate", "epochs", "batch_size", "gradient_accumulation", "max_length")
        for name in (*positive, "train_limit", "eval_limit", "save_steps"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                faults.append(f"{name} must be above 0, got {value}.")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                faults.append(f"{name} must not be negative, got {value}. Pass 0 for none.")
        for name in ("warmup_ratio", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"{name} must be in [0, 1), got {getattr(self, name)}. Pass a share: 0.1.")
        for name in ("seed", "data_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                faults.append(f"{name} must be in [0, 2^32), got {getattr(self, name)}.")
        if self.precision not in ("fp32", "bf16", "auto"):
            faults.append(f"precision must be fp32, bf16 or auto, got {self.precision!r}.")
        if self.label_type not in ("auto", "class", "number"):
            faults.append(f"label_type must be auto, class or number, got {self.label_type!r}.")
        return faults

    def child(self) -> ChildConfig:
        """Return what the method trains under these options.

        Raises:
            ConfigError: an unknown method, or options outside their range.
        """
        methods = self.methods()
        density = methods.density if self.density is None else self.density
        options: dict[str, Any] = {name: getattr(self, name) for name in _CHILD_OPTIONS}
        options |= {"density": density, "labels": self.fisher_labels, "seed": self.seed}
        return methods.child(ChildConfig(**options))

    def methods(self) -> Combination:
        """Return the methods that are used.

        Raises:
            ConfigError: an unknown method, or methods that do not go together.
        """
        return Combination.parse(self.method)

    def resolved(self) -> RunConfig:
        """Return the same run with what depends on method and machine filled in: density, precision, full paths."""
        paths = {
            name: str(Path(value).expanduser().resolve())
            for name in ("train", "eval", "data_dir", "init_from")
            if (value := getattr(self, name)) is not None
        }
        if self.model is not None and Path(self.model).expanduser().is_dir():
            paths["model"] = str(Path(self.model).expanduser().resolve())
        precision = self.precision
        if precision == "auto":
            precision = "bf16" if has_fast_bf16() else "fp32"
        return replace(self, density=self.child().density, precision=precision, **paths)

    def to_toml(self) -> str:
        """Return the options that are set, as TOML."""
        values = {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }
        return tomli_w.dumps({key: value for key, value in values.items() if value is not None})

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Make a run from option names and values.

        Raises:
            ConfigError: an unknown option, a value of the wrong type, or outside its range.
        """
        known = {field.name: str(field.type) for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in options.items():
            name = name.replace("-", "_")
            if name not in known:
                raise ConfigError(f"a run has no option {name!r}. {did_you_mean(name, known)}")
            values[name] = _typed(name, value, known[name])
        return cls(**values)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read the options of a TOML file.

    Raises:
        ConfigError: it is missing or not TOML.
    """
    try:
        return tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as fault:
        raise ConfigError(
            f"config file {str(path)!r} cannot be read ({fault.strerror}). Check the path."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise ConfigError(f"config file {str(path)!r} is not TOML ({fault}). Correct that line.") from None


def option_of_text(name: str, text: str) -> Any:
    """Return an option's value as a user types it: ``2e-5``, ``row``, ``true``.

    Raises:
        ConfigError: a run has no such option, or the text is no value of its type.
    """
    known = {field.name: str(field.type) for field in fields(RunConfig)}
    if name not in known:
        raise ConfigError(f"a run has no option {name!r}. {did_you_mean(name, known)}")
    declared = known[name]
    if name == "density":
        return _density(text)
    try:
        if "bool" in declared:
            return {"true": True, "false": False}[text.lower()]
        if "int" in declared:
            return int(text)
        return float(text) if "float" in declared else text
    except (ValueError, KeyError):
        kinds = {"bool": "true or false", "int": "a whole number", "float": "a number"}
        wanted = next(words for kind, words in kinds.items() if kind in declared)
        raise ConfigError(f"{name} must be {wanted}, got {text!r}.") from None


def _density(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise ConfigError(f"density must be a number in (0, 1], or auto, got {text!r}.") from None


def _typed(name: str, value: Any, declared: str) -> Any:
    if value is None:
        return None
    if "tuple" in declared:
        return (value,) if isinstance(value, str) else tuple(str(item) for item in value)
    if name == "density" and isinstance(value, str):
        return _density(value)
    wanted = next(kind for kind in ("bool", "int", "float", "str") if kind in declared)
    kinds = {"bool": bool, "int": int, "float": (int, float), "str": str}[wanted]
    if not isinstance(value, kinds) or (isinstance(value, bool) and wanted != "bool"):
        raise ConfigError(f"{name} must be of type {wanted}, got {value!r}.")
    return float(value) if wanted == "float" else value
