"""The files of a run's folder: their names, how they are written, and checks before writing.

config.toml            the resolved options
data.json              sha256 of the files of examples
labels.json            kind of task, label names, metrics, columns, the base model's hash
delta.json, delta.safetensors   the trained values
child.safetensors      the positions of these entries (fixed children)
tokenizer/             the tokenizer; image_processor/ for image tasks
method/                a method's files for other libraries (an adapter in PEFT's own format)
start/                 the delta from the base model to the run it started from (--init-from)
log.jsonl              the training log
tensorboard/           the same for TensorBoard (--report-to tensorboard)
metrics.json           the result; written last, so that it marks a finished run
checkpoints/, folds/   exist only during training
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from filelock import FileLock, Timeout

from childtuning.child.files import file_hash, read_json, write_atomically
from childtuning.delta import Delta
from childtuning.errors import ConfigError, CorruptFileError
from childtuning.runs.config import RunConfig, json_ready, read_toml
from childtuning.tasks import KINDS, Kind, find_kind
from childtuning.tasks.metrics import is_share, lower_is_better

CONFIG, LABELS, METRICS, DATA = "config.toml", "labels.json", "metrics.json", "data.json"
METHOD_FILES, CHECKPOINTS, START, TENSORBOARD = "method", "checkpoints", "start", "tensorboard"
FOLDS, CHOSEN = "folds", "chosen.json"
_OURS = (
    "log.jsonl",
    CONFIG,
    LABELS,
    METRICS,
    DATA,
    *sorted({kind.processor_folder for kind in KINDS.values()}),
    METHOD_FILES,
    START,
    TENSORBOARD,
    CHECKPOINTS,
    FOLDS,
    "child.safetensors",
    "delta.json",
    "delta.safetensors",
)
_WIDE = 0.05  # half the width of an interval that is worth a remark
_NOT_IDENTITY = ("data_dir", "save_steps", "report_to")  # what lies in the folder is compared by its hashes


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file atomically; ``errors`` says what becomes of half a character (a lone surrogate), as for ``open``."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8", errors=errors))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(json_ready(content), indent=2, ensure_ascii=False) + "\n")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Refuse a folder that another process on this machine is training into.

    The lock lies in the system's folder for temporary files; the system releases it however a process ends.

    Raises:
        ConfigError: another process is, or there can be no lock.
    """
    place = f"{os.path.expanduser('~')}\n{folder.resolve()}"  # by user: a lock of another could not be opened
    lock = FileLock(Path(gettempdir()) / f"childtuning-{sha256(place.encode()).hexdigest()[:16]}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"another process is training into {str(folder)!r}. Wait until it ends, or pass another folder."
        ) from None
    except (OSError, NotImplementedError) as fault:
        raise ConfigError(
            f"{lock.lock_file} cannot be locked ({fault}). Set TMPDIR to a folder on a local disk."
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # first, so that nobody takes a lock that is about to go; not on Windows
            Path(lock.lock_file).unlink()
        lock.release()


def check_output(folder: Path, config: RunConfig, *, overwrite: bool, resume: bool) -> bool:
    """Check that a run may write to a folder; nothing is changed.

    Returns:
        whether it goes on with a run there; not with one that was stopped before it had chosen its child.
    Raises:
        ConfigError: when files would be lost, or when resuming a run with other options.
    """
    if resume and overwrite:
        raise ConfigError("--resume continues a run and --overwrite removes it. Pass one of them.")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output {str(folder)!r} is a file. Pass a folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        if resume:
            raise ConfigError(f"there is nothing to resume in {str(folder)!r}. Leave out --resume to start.")
        return False
    if _is_bare(folder):
        return False
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
            f"{str(folder)!r} contains files that are not a run's, so it is not overwritten. Pass another."
        )
    return resume


def _is_bare(folder: Path) -> bool:
    """Whether a folder contains only what a run creates first: an empty checkpoints folder, half of its options."""
    return all(
        path.match(f"{CONFIG}.*partial")
        or (path.name == CHECKPOINTS and path.is_dir() and not any(path.iterdir()))
        for path in folder.iterdir()
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
        chooses = name == "save_steps" and before.chooses_checkpoint  # it says at which steps
        if then != now != "auto" and (chooses or name not in _NOT_IDENTITY):
            raise ConfigError(
                f"the run in {str(folder)!r} was started with {name}={then!r}, got {now!r}. "
                "Resume with the same options, or pass another output folder."
            )


def as_begun(folder: Path, config: RunConfig) -> RunConfig:
    """Return a run that is continued with what its beginning chose in place of ``auto``.

    Raises:
        ConfigError: when a file of examples has changed since.
    """
    before = RunConfig.from_options(read_toml(folder / CONFIG))
    if (folder / DATA).is_file():
        known = read_json(folder / DATA, "Start again with --overwrite.")
        check_data(known, asdict(config), "start again with --overwrite")
    autos = [name for name in RunConfig.__dataclass_fields__ if getattr(config, name) == "auto"]
    return replace(config, **{name: getattr(before, name) for name in autos})


def data_hashes(options: Mapping[str, Any]) -> dict[str, str]:
    """Return name -> sha256 of what a run's examples are read from: by path, or TASK/FILE for a task's.

    A folder of images has one hash of all its files.
    """
    given = [Path(options[name]).expanduser() for name in ("train", "eval") if options.get(name)]
    paths = {str(path): path for path in given}
    if options.get("data_dir"):
        others = [name.partition("/")[0] for name in options.get("elsewhere") or ()]
        for task in dict.fromkeys(filter(None, [options.get("task"), *others])):
            folder = Path(options["data_dir"]).expanduser() / task
            inside = sorted(folder.iterdir()) if folder.is_dir() else []
            paths |= {f"{task}/{p.name}": p for p in inside if not p.name.startswith((".", "README"))}
    return {name: _content_hash(path) for name, path in paths.items() if path.exists()}


def _content_hash(path: Path) -> str:
    if path.is_file():
        return file_hash(path)
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    shown = sorted(name for name in files if "/." not in f"/{name}")  # .DS_Store and the like are no examples
    listed = [f"{name} {file_hash(files[name])}" for name in shown]
    return sha256("\n".join(listed).encode()).hexdigest()


def check_data(known: Mapping[str, str], options: Mapping[str, Any], remedy: str) -> dict[str, str]:
    """Return ``data_hashes``, after checking that no file has changed.

    Raises:
        ConfigError: naming the first one that has.
    """
    found = data_hashes(options)
    for path, value in found.items():
        if known.get(path, value) != value:
            raise ConfigError(f"{path} has changed since it was trained on. Restore it, or {remedy}.")
    return found


def clear_run(folder: Path) -> None:
    """Remove a run's own files from its folder, and nothing else."""
    partial = (path for name in _OURS for path in folder.glob(f"{name}.*partial"))
    for path in (*(folder / name for name in _OURS), *partial):
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


def saved_processor(kind: Kind, folder: Path) -> Any:
    """Return the tokenizer or image processor in a folder.

    Raises:
        CorruptFileError: a file of it is damaged.
    """
    import transformers

    try:
        return getattr(transformers, kind.auto_processor).from_pretrained(str(folder))
    except ImportError:  # a package is missing, and no file is damaged
        raise
    except Exception as fault:  # the tokenizers library raises bare Exceptions
        reason = " ".join(str(fault).split())[:200]
        raise CorruptFileError(f"{folder} cannot be read ({reason}). Copy the whole folder anew.") from None


def remove_empty(folder: Path) -> None:
    """Remove a run's folder if the trainer created it and nothing was written to it."""
    for path in (folder / CHECKPOINTS, folder):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint; incomplete ones are kept."""
    found = sorted(
        (folder / CHECKPOINTS).glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1])
    )
    whole = [path for path in found if _is_complete(path / "trainer_state.json")]
    return whole[-1] if whole else None


def chosen_before(folder: Path) -> dict[str, Any]:
    """Return what a run that is resumed noted when it chose its child; empty if it noted nothing."""
    try:
        return read_json(folder / CHECKPOINTS / CHOSEN)
    except CorruptFileError:
        return {}


def _is_complete(trainer_state: Path) -> bool:
    try:
        return "global_step" in read_json(trainer_state)
    except CorruptFileError:
        return False


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        task, method, seed: as configured.
        metric: name and value of the task's main metric on the dev split.
        metrics: all of the task's metrics.
        held_out: the same on the held-out training examples; ``None`` if there are none.
        constant: the same for the constant baseline, the most frequent answer of the training examples; ``None`` if
            the kind of task has no such baseline.
        elsewhere: for each other task, its metrics with mapped labels.
        folds: the metrics on each part of a cross-validation; ``metrics`` and what else is said of the dev split are
            those of all parts together then.
        checkpoint: the step that was kept, the last step, and the held-out score that decided; ``None``: the last.
        temperature: what the logits were divided by, in the head's weights; ``None``: nothing.
        interval, per_class, confusion, errors, answers: on the dev split, as in ``Judgement``; ``None`` and [] in
            results of earlier versions.
        density: the share of the eligible entries in the child.
        trained_parameters: the number of trained entries, including the new head.
        child_parameters: how many of them are eligible.
        eligible_parameters: the number of entries that the child is chosen from.
        state_bytes: the optimizer's memory, without the model and its gradients.
        delta_bytes: size of the delta's two files.
        fisher_seconds, train_seconds: wall time of the Fisher pass, and of training since it last went on.
        peak_memory_bytes: of the GPU if there is one, else of the process, during choice and training.
        train_examples, eval_examples, empty_texts: counts.
        cut_by_length: the number of words or rows (by kind of task) that ``max_length`` truncated in both splits.
        output: the run's folder.
        learning_rate, epochs: of the training; ``None`` in results of earlier versions.
        budget: its ``limit``, and the predicted shares of full fine-tuning's costs by kind; for a step also
            ``measured_passes``, that of a forward and backward pass. ``None`` without a budget.
        understood: what ``Understood`` describes.
        notes: what was guessed about the files or left out, one line each.
        diverged_at: the first logged step with a non-finite loss, at which training stopped; ``None``: none.
        base_hash: sha256 of the base model's pretrained weights; ``None`` in results of earlier versions.
    """

    task: str
    method: str
    seed: int
    metric: dict[str, Any]
    metrics: dict[str, float]
    density: float
    trained_parameters: int
    child_parameters: int
    eligible_parameters: int
    state_bytes: int
    delta_bytes: int
    fisher_seconds: float
    train_seconds: float
    peak_memory_bytes: int
    train_examples: int
    eval_examples: int
    empty_texts: int
    cut_by_length: int
    output: str
    held_out: dict[str, float] | None = None
    constant: dict[str, float] | None = None
    elsewhere: dict[str, dict[str, float]] = field(default_factory=dict)
    learning_rate: float | None = None
    epochs: float | None = None
    understood: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    diverged_at: int | None = None
    interval: list[float] | None = None
    per_class: dict[str, dict[str, float]] | None = None
    confusion: list[list[int]] | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)
    answers: list[str] | None = None
    folds: list[dict[str, float]] = field(default_factory=list)
    checkpoint: dict[str, float] | None = None
    temperature: float | None = None
    base_hash: str | None = None
    budget: dict[str, str | float] | None = None

    def __repr__(self) -> str:
        value = self.metric["value"]
        score = f"{self.metric['name']} {math.nan if value is None else value:.4f}"
        return (
            f"RunResult({self.task}, {self.method}, seed {self.seed}: {score}, "
            f"{self.trained_parameters:,} trained entries, density {self.density:.4g}, {self.output!r})"
        )

    @property
    def fault(self) -> str | None:
        """What went wrong in training, in one line; ``None`` if nothing did."""
        if self.diverged_at is None:
            return None
        return (
            f"training diverged and was stopped: the loss is not finite at step {self.diverged_at}. "
            f"Lower the learning rate (--lr), or train in fp32; the log is {self.output}/log.jsonl."
        )

    @property
    def remarks(self) -> list[str]:
        """What a user should know about the score, one line each."""
        name, value = self.metric["name"], self.metric["value"]
        constant = (self.constant or {}).get(name)
        sign = -1 if lower_is_better(name) else 1
        if self.diverged_at is not None:
            return []
        found = []
        more = "" if self.folds else " With --folds 5, every example counts."
        if self.interval is None and value == 1 and sign > 0:
            found.append(
                f"{name} 1.000: no sample of these {self.eval_examples} examples scores less, so they cannot tell how "
                f"far it may be off.{more}"
            )
        if self.interval is not None and is_share(name):
            low, high = self.interval
            if (high - low) / 2 > _WIDE:
                found.append(
                    f"{name} {value:.3f} lies between {low:.2f} and {high:.2f} with these {self.eval_examples} "
                    f"examples: differences below {(high - low) / 2:.2f} are noise.{more}"
                )
        if constant is None or sign * value > sign * constant:
            return found
        return [
            *found,
            f"{name} {value:.3f} is not better than {constant:.3f}, the score of one answer for every example: "
            "the model has learnt nothing. Give it more examples or --epochs, try another --lr, and check the labels.",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return asdict(self)


class RunFolder:
    """The folder of a finished run, with its files read and checked.

    Args:
        path: the folder.
    Raises:
        ConfigError: when there is no such folder, it is not a run, or the run is not finished.
        CorruptFileError: when its files are damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
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
                f"the run in {str(path)!r} is not finished. Continue with `childtuning train … --resume`."
            )
        self.config = RunConfig.from_options(read_toml(self.path / CONFIG))
        self.about = self._json(
            LABELS, "kind", "label_names", "metrics", "columns", "form", "base_name", "base_hash"
        )
        self.metrics = self._json(METRICS, "metrics", "density", "delta_bytes")
        if not (self.path / self.kind.processor_folder).is_dir():
            raise CorruptFileError(
                f"{self.path} has no folder {self.kind.processor_folder!r}. Copy the run's folder again."
            )

    def _json(self, name: str, *keys: str) -> dict[str, Any]:
        content = read_json(self.path / name)
        if missing := [key for key in keys if key not in content]:
            raise CorruptFileError(f"{self.path / name} has no {missing[0]!r}. Copy the whole folder anew.")
        return content

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
        """The trained values, checked against their hashes."""
        return Delta.load(self.path)

    def processor(self) -> Any:
        """Return the tokenizer or image processor that the run used."""
        return saved_processor(self.kind, self.path / self.kind.processor_folder)
