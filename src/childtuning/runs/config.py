"""All options of a run, in four sections; a flat TOML file can hold them.

An option is declared once, as a field of a section: the command line, the checks of values and the table in the
documentation are derived from it.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from childtuning.config import ChildConfig, ChildOptions, density_fault
from childtuning.errors import ConfigError, did_you_mean
from childtuning.options import option, options_of, settle

if TYPE_CHECKING:
    from childtuning.methods import Combination

HELD_OUT = 0.1  # share of the training examples, where something has to be chosen by them


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training and evaluation data."""

    task: str | None = option(None, "A task by name: a GLUE name, a folder of --data-dir, or docstrings.")
    task_kind: str | None = option(
        None,
        "classification, multi-label, regression, token-classification, causal-lm or image-classification.",
        unset="inferred from the training file",
    )
    train: str | None = option(
        None,
        "Training examples: csv, tsv, json, jsonl, parquet, xlsx, conll or txt, each also .gz; "
        "or images: a folder, npz or idx.",
    )
    eval: str | None = option(
        None, "Evaluation examples, in the same form.", unset="a share of the training examples"
    )
    eval_share: float = option(
        0.2, "Share of the training examples to evaluate on, without --eval.", within="(0, 1)"
    )
    text: str | None = option(None, "Column of the text, tokens or prompt; guessed when left out.")
    text_pair: str | None = option(None, "Column of the second text, for pairs.")
    label: str | None = option(
        None, "Column of the label, tags or response; guessed when left out.", unset="label, tags, response"
    )
    label_type: Literal["auto", "class", "number"] = option("auto", "class, number, or auto.")
    metric: str | None = option(
        None,
        "Main metric: f1, macro-f1, balanced-accuracy, auroc, rmse, …; docs/tasks.md lists those of each kind.",
        unset="the task's first",
    )
    data_dir: str | None = option(
        None, "Folder that contains TASK/ with both splits; searched before the hub."
    )
    train_limit: int | None = option(None, "Maximum number of training examples.", within="(0, 2147483648)")
    eval_limit: int | None = option(
        None,
        "Maximum number of evaluation examples; also for the held-out ones and each --elsewhere.",
        within="(0, 2147483648)",
    )
    data_seed: int = option(
        0,
        "Seed of the draws of --eval-share, --train-limit, --eval-limit and --held-out.",
        within="[0, 4294967296)",
    )
    held_out: float = option(
        0.0,
        "Share of the training examples to hold out and score separately; 0.1 if they choose a checkpoint or a "
        "temperature.",
        within="[0, 1)",
    )
    folds: int | None = option(
        None,
        "Cross-validation: measure on each of this many parts of --train with a model trained on the others, then "
        "train on all.",
        within="[2, inf)",
        unset="none",
    )
    fold: int | None = option(
        None,
        "Train for this fold alone, 1 to --folds, and evaluate on its part.",
        within="(0, 2147483648)",
        unset="all",
    )
    encoding: str | None = option(
        None,
        "Encoding of text files that are not UTF-8: cp1251, gb18030, …",
        unset="Windows-1252 if it may be",
    )
    sheet: str | None = option(None, "Sheet of a workbook with several.", unset="the first")
    strict: bool = option(
        False,
        "Refuse the first bad row of a file, instead of leaving out up to one in twenty.",
        flags=("--strict/--no-strict",),
    )
    elsewhere: tuple[str, ...] | None = option(
        None, "Also score on another task of --data-dir, with mapped labels: sick, snli/test; repeatable."
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model to tune."""

    model: str | None = option(None, "Model folder or hub name.", unset="packaged all-MiniLM-L6-v2")
    init_from: str | None = option(
        None, "Start from this run's tuned network with a new head, or from a model folder."
    )


@dataclass(frozen=True, kw_only=True)
class Child(ChildOptions):
    """The fine-tuning method."""

    method: str = option("child-d", "See `childtuning methods`.")
    density: float | Literal["auto"] | None = option(
        None,
        "Share of the entries in the child, in (0, 1]; auto: the smallest that reaches --mass.",
        check=density_fault,
        unset="the method's default",
    )
    fisher_labels: Literal["data", "sampled"] = option("data", "Labels for Fisher: data or sampled.")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Training hyperparameters. Most defaults are those of the paper's protocol; it uses rate 2e-5 and 3 epochs."""

    learning_rate: float | Literal["auto"] = option(
        "auto",
        "Peak learning rate, after the warm-up and before a linear decay to 0; auto: by the width of the model and "
        "by method.",
        flags=("--learning-rate", "--lr"),
        within="(0, inf)",
        argument="learning_rate",
    )
    epochs: float | Literal["auto"] = option(
        "auto",
        "Passes over the training set; auto: by its size, 3 to 20.",
        within="(0, inf)",
        argument="num_train_epochs",
    )
    batch_size: int = option(
        16,
        "Examples per batch, of all processes together.",
        within="(0, 2147483648)",
        argument="per_device_train_batch_size",
    )
    gradient_accumulation: int = option(
        1, "Batches per optimizer step.", within="(0, 2147483648)", argument="gradient_accumulation_steps"
    )
    warmup_ratio: float = option(
        0.1, "Share of the steps used for warm-up.", within="[0, 1)", argument="warmup_steps"
    )
    weight_decay: float = option(
        0.01, "Weight decay of the trained weights.", within="[0, inf)", argument="weight_decay"
    )
    max_grad_norm: float = option(
        1.0, "Clip gradients to this norm; 0: never.", within="[0, inf)", argument="max_grad_norm"
    )
    class_weights: Literal["balanced"] | None = option(
        None,
        "balanced: weigh an example of class c by n/(k·n_c) in the loss, also for Fisher.",
        unset="all 1",
    )
    max_length: int = option(128, "Maximum number of tokens per example.", within="(0, 2147483648)")
    precision: Literal["fp32", "bf16", "auto"] = option(
        "fp32", "fp32, bf16 autocast, or auto: bf16 where native."
    )
    compile: bool = option(
        False,
        "Run the model through torch.compile while training.",
        flags=("--compile/--no-compile",),
        argument="torch_compile",
    )
    shard: bool = option(
        False,
        "Shard the model over the processes of torchrun (FSDP2).",
        flags=("--shard/--no-shard",),
    )
    seed: int = option(
        0, "Seed of the head, the data order, dropout and masks.", within="[0, 4294967296)", argument="seed"
    )
    best_checkpoint: bool = option(
        False,
        "Keep the checkpoint with the best score on the held-out training examples.",
        flags=("--best-checkpoint/--last-checkpoint",),
    )
    early_stopping: int | None = option(
        None,
        "Stop after this many checkpoints without a better score; implies --best-checkpoint.",
        within="(0, 2147483648)",
        unset="never",
    )
    temperature_scaling: bool = option(
        False,
        "Divide the logits by a number fitted on the held-out training examples, so that confidences can be trusted.",
        flags=("--temperature-scaling/--no-temperature-scaling",),
    )
    save_steps: int | None = option(
        None, "Steps between checkpoints.", within="(0, 2147483648)", unset="every epoch"
    )
    report_to: tuple[str, ...] | None = option(None, "Also log to tensorboard, wandb, mlflow, …; repeatable.")

    def arguments(self) -> dict[str, Any]:
        """Return the options that ``TrainingArguments`` takes, under its own names."""
        declared = options_of(Train).values()
        return {one.argument: getattr(self, one.name) for one in declared if one.argument}


_OF_FILES = ("text", "text_pair", "label", "encoding", "sheet")
SECTIONS = {"Data": Data, "Model": Model, "Child": Child, "Training": Train}


@dataclass(frozen=True, kw_only=True)
class RunConfig(Train, Child, Model, Data):
    """One run: data, model, child, training.

    Raises:
        ConfigError: listing all faults in one line.
    """

    def __post_init__(self) -> None:
        faults = settle(self)
        if self.task is None and self.train is None:
            faults.append("there is nothing to train on. Pass --task NAME, or --train FILE.")
        if self.task is not None and (self.train is not None or self.eval is not None):
            faults.append("--task and --train/--eval exclude each other. Pass one of them.")
        if self.task is not None:
            given = [name for name in _OF_FILES if getattr(self, name) is not None]
            given += ["label_type"] if self.label_type != "auto" else []
            if given:
                faults.append(
                    f"a named task has its own columns, got {', '.join(given)}. Leave them out, or pass files."
                )
        if self.budget is not None and self.density is not None:
            faults.append("--budget takes the place of --density. Pass one of them.")
        if self.class_weights is not None and self.fisher_labels == "sampled":
            faults.append(
                "class_weights weighs the data's labels, got fisher_labels='sampled'. Pass one of them."
            )
        faults += self._faults_of_shards() if self.shard else []
        if self.encoding is not None:
            from childtuning.tasks.encodings import is_encoding

            if not is_encoding(self.encoding):
                faults.append(f"there is no encoding {self.encoding!r}. Pass cp1251, gb18030, shift_jis, …")
        if self.sheet is not None and not any(
            str(path).lower().endswith(".xlsx") for path in (self.train, self.eval)
        ):
            faults.append("--sheet names a sheet of a workbook, got no .xlsx file. Leave it out.")
        if self.folds is not None and (self.train is None or self.eval is not None):
            faults.append(
                "--folds evaluates on parts of the file --train, got --task or --eval beside it. Leave that out."
            )
        if self.folds is not None and self.eval_share != options_of(Data)["eval_share"].default:
            faults.append("--folds evaluates on every part, got --eval-share. Leave one of them out.")
        if self.fold is not None and not self.fold <= (self.folds or 0):
            faults.append(f"fold must be between 1 and --folds, got {self.fold} of {self.folds or 'none'}.")
        if not faults:
            self.child()
        if faults:
            raise ConfigError(" ".join(faults))

    def _faults_of_shards(self) -> list[str]:
        """Say what does not go with a sharded model."""
        options = {
            "--temperature-scaling": self.temperature_scaling,
            "--budget": self.budget is not None,
            "--fisher-examples auto": self.fisher_examples == "auto",
            "--preset": self.preset is not None,
        }
        names = [name for name, is_given in options.items() if is_given]
        names += [f"method {one.name}" for one in self.methods().methods if not one.shards]
        return [f"--shard does not go with {', '.join(names)}. Leave one of them out."] if names else []

    def child(self) -> ChildConfig:
        """Return the configuration of the child that the method trains with these options.

        Raises:
            ConfigError: for an unknown method, or options outside their range.
        """
        methods = self.methods()
        density = methods.density if self.density is None else self.density
        options: dict[str, Any] = {name: getattr(self, name) for name in options_of(ChildOptions)}
        options |= {"density": density, "labels": self.fisher_labels, "seed": self.seed}
        return methods.child(ChildConfig(**options))

    def methods(self) -> Combination:
        """Return the methods of the run.

        Raises:
            ConfigError: for an unknown method, or methods that cannot be combined.
        """
        from childtuning.methods import Combination

        return Combination.parse(self.method)

    @property
    def chooses_checkpoint(self) -> bool:
        """Whether the held-out examples choose the checkpoint that is kept."""
        return self.best_checkpoint or self.early_stopping is not None

    def resolved(self) -> RunConfig:
        """Return the same run with what depends on other options or this machine filled in.

        That is the density, the precision, the held-out share, and full paths.
        """
        paths = {
            name: str(Path(value).expanduser().resolve())
            for name in ("train", "eval", "data_dir", "init_from")
            if (value := getattr(self, name)) is not None
        }
        if self.model is not None and Path(self.model).expanduser().is_dir():
            paths["model"] = str(Path(self.model).expanduser().resolve())
        precision = self.precision
        if precision == "auto":
            from childtuning.training import has_fast_bf16

            precision = "bf16" if has_fast_bf16() else "fp32"
        held_out = self.held_out
        if self.chooses_checkpoint or self.temperature_scaling:
            held_out = held_out or HELD_OUT
        density = None if self.budget else self.child().density
        return replace(self, density=density, precision=precision, held_out=held_out, **paths)

    def to_toml(self) -> str:
        """Return the options that are not None, as TOML."""
        values = {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }
        import tomli_w

        return tomli_w.dumps({key: value for key, value in values.items() if value is not None})

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Make a run from option names and values; a number may be text, as typed.

        Raises:
            ConfigError: for an unknown option, or a value of the wrong type or outside its range.
        """
        known = options_of(cls)
        values: dict[str, Any] = {}
        for name, value in by_field(options).items():
            if name not in known:
                raise ConfigError(f"a run has no option {name!r}. {did_you_mean(name, known)}")
            is_typed = isinstance(value, str) and known[name].kind in ("int", "float") and known[name].words
            values[name] = known[name].parse(value) if is_typed else value
        return cls(**values)


_SPLITS = ("train", "training", "data")


def name_of_data(train: str) -> str:
    """Return a short name for the user's own training data: its file's or folder's, or that of the folder around it.

    Example:
        >>> name_of_data("data/reviews/train.csv.gz"), name_of_data("reviews.csv")
        ('reviews', 'reviews')
    """
    path = Path(train).expanduser().resolve()
    name = path.name.split(".")[0]
    return path.parent.name or name if name.lower() in _SPLITS else name


def by_field(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options under the names of their fields: ``max-length`` is ``max_length``, ``lr`` ``learning_rate``.

    Raises:
        ConfigError: one is given under two names.
    """
    spelled = {
        flag.strip("-").replace("-", "_"): one.name
        for one in options_of(RunConfig).values()
        for flag in one.flags
    }
    found: dict[str, Any] = {}
    for given, value in options.items():
        name = given.replace("-", "_")
        name = spelled.get(name, name)
        if name in found:
            raise ConfigError(f"option {name!r} is given twice, also as {given!r}. Keep one of the two.")
        found[name] = value
    return found


def json_ready(value: Any) -> Any:
    """Return a value with ``None`` in place of non-finite numbers, which JSON cannot represent."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: json_ready(item) for key, item in value.items()}
    return [json_ready(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read the options of a TOML file.

    Raises:
        ConfigError: when it is missing or not TOML.
    """
    try:
        return tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as fault:
        raise ConfigError(
            f"config file {str(path)!r} cannot be read ({fault.strerror}). Check the path."
        ) from None
    except ValueError as fault:  # not TOML, not UTF-8, or a number of thousands of digits
        raise ConfigError(f"config file {str(path)!r} is not TOML ({fault}). Correct that line.") from None


def option_of_text(name: str, text: str) -> Any:
    """Parse an option's value as typed by a user: ``2e-5``, ``row``, ``true``.

    Raises:
        ConfigError: when a run has no such option, or the text is not a value of its type.
    """
    known = options_of(RunConfig)
    if name not in known:
        raise ConfigError(f"a run has no option {name!r}. {did_you_mean(name, known)}")
    return known[name].parse(text)
