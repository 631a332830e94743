"""Examples of other tasks, for out-of-domain evaluation of a trained model. [Xu et al. 2021, section 4.5]"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from childtuning.errors import DataError, did_you_mean
from childtuning.tasks.examples import Examples
from childtuning.tasks.files import read_examples
from childtuning.tasks.task_folders import file_of

# Whether a label means that one text follows from the other, or that both have the same meaning.
_FOLLOWS: Mapping[str, bool] = {
    "entailment": True,
    "neutral": False,
    "contradiction": False,
    "not_entailment": False,
    "duplicate": True,
    "not_duplicate": False,
    "equivalent": True,
    "not_equivalent": False,
}


@dataclass(frozen=True)
class TransferTask:
    """Examples that a model was not trained for.

    Attributes:
        name: as passed to `load_transfer_task`.
        examples: labelled pairs of texts.
        classes: the classes that occur among their labels.
    """

    name: str
    examples: Examples
    classes: frozenset[str]

    @property
    def questions(self) -> Examples:
        """The examples without their labels, which may not be classes of the model."""
        return replace(self.examples, labels=None)

    def accuracy(self, predicted: Sequence[str], label_names: Sequence[str]) -> float:
        """Return a model's accuracy on the examples; the model may have other classes.

        If both have the same classes, these are compared. Otherwise only whether the second text follows from the
        first (or has the same meaning) is compared: for the two classes of SciTail and RTE, contradiction counts as
        their negative class.

        Args:
            predicted: for each example, one of ``label_names``.
            label_names: the model's classes.
        """
        truth = [str(label) for label in self.examples.labels or ()]
        same = self.classes == set(label_names)
        right = sum(
            given == true if same else _FOLLOWS[given] == _FOLLOWS[true]
            for given, true in zip(predicted, truth, strict=True)
        )
        return right / len(truth)


def load_transfer_task(
    name: str,
    label_names: Sequence[str],
    data_dir: str | Path | None,
    *,
    limit: int | None = None,
    seed: int = 0,
) -> TransferTask:
    """Load examples of another task: ``sick`` for its dev split, ``snli/test`` for a split by name.

    Args:
        name: a folder of ``data_dir``, optionally followed by a split: a file's name without its type.
        label_names: the classes of the model to be evaluated.
        data_dir: the folder that contains it.
        limit: the maximum number of examples; None keeps all.
        seed: the seed of the draw.
    Raises:
        DataError: when there is no such file, or its labels have no counterpart among the model's.
    """
    task, _, split = name.partition("/")
    folder = Path(data_dir or ".") / task
    if data_dir is None or not folder.is_dir():
        known = sorted(path.name for path in Path(data_dir).iterdir()) if data_dir else []
        raise DataError(
            f"elsewhere {name!r} needs a folder {task!r} in data_dir, got {data_dir}. "
            f"{did_you_mean(task, known) if known else 'Pass --data-dir DIR.'}"
        )
    path = file_of(folder, split or "dev")
    if path is None:
        raise DataError(
            f"elsewhere {name!r}: {folder} has no split {split or 'dev'!r}. Name an existing one."
        )
    examples = read_examples(path, label_kind="class")
    if not len(examples):
        raise DataError(f"elsewhere {name!r}: {path} has no examples. Leave it out.")
    if not label_names:
        raise DataError(f"elsewhere {name!r} needs a model with classes, got a task without. Leave it out.")
    classes = frozenset(examples.classes())
    unknown = sorted((classes | set(label_names)) - set(_FOLLOWS))
    if unknown and classes != set(label_names):
        raise DataError(
            f"elsewhere {name!r}: label {unknown[0]!r} has no counterpart on the other side. "
            f"Known are {', '.join(_FOLLOWS)}."
        )
    return TransferTask(name, examples.sample(limit, seed=seed), classes)
