"""The paper's experiments as named settings of a comparison. [Xu et al. 2021, sections 4 and 5]"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from childtuning.errors import ConfigError, did_you_mean

_GLUE_SMALL = ("cola", "rte", "mrpc", "stsb")
_MAIN = ("full", "child-f", "child-d")
# Where the networks of a domain-transfer run are scored, as far as the data is there: test splits, MNLI's two dev ones.
_NLI = (
    ("mnli", ("dev_matched", "dev")),
    ("mnli", ("dev_mismatched", "dev_mismatched_1000_tokenized")),
    ("snli", ("test", "dev")),
    ("sick", ("test", "dev")),
    ("scitail", ("test", "dev")),
    ("qqp", ("dev",)),
)


@dataclass(frozen=True)
class Protocol:
    """What a named protocol fills in where the user says nothing.

    Attributes:
        summary: one line for listings.
        settings: fields of ``Comparison``.
        options: of all runs.
        scores_elsewhere: score every network on the other language-inference tasks of the data folder.
        overlaps: compare the children that the tasks choose.
    """

    summary: str
    settings: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    scores_elsewhere: bool = False
    overlaps: bool = False


PROTOCOLS: Mapping[str, Protocol] = {
    "paper": Protocol(
        "hyperparameters by the reported examples, as the paper has it: mean and best of the dev set's scores",
        {"selection": "reported"},
    ),
    "glue-small": Protocol(
        "the four small GLUE tasks: CoLA, RTE, MRPC, STS-B",
        {"tasks": _GLUE_SMALL, "methods": _MAIN, "grid": {"learning_rate": [2e-5, 4e-5, 1e-4]}},
    ),
    "low-resource": Protocol(
        "few training examples: 100, 300, 1,000",
        {"tasks": ("rte", "mrpc"), "methods": _MAIN, "train_sizes": (100, 300, 1000)},
    ),
    "domain-transfer": Protocol(
        "train on 5,000 examples of SNLI or MNLI, score on the other language-inference tasks",
        {"tasks": ("snli", "mnli"), "methods": _MAIN, "train_sizes": (5000,)},
        scores_elsewhere=True,
    ),
    "task-transfer": Protocol(
        "freeze each tuned body and train a new linear head on it for the other tasks",
        {"tasks": ("mrpc", "rte"), "methods": _MAIN, "transfer_to": ("mrpc", "rte", "cola", "stsb")},
    ),
    "ablation": Protocol(
        "children that are random, of the lowest Fisher information, or all that is left of the network",
        {
            "tasks": ("rte", "mrpc"),
            "methods": ("full", "child-d", "child-random", "child-lowest", "child-pruned"),
        },
    ),
    "overlap": Protocol(
        "how far the children overlap that several tasks choose",
        {"tasks": _GLUE_SMALL, "methods": ("child-d",), "num_seeds": 1},
        overlaps=True,
    ),
}


def find_protocol(name: str) -> Protocol:
    """Return a protocol by its name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"there is no protocol {name!r}. {did_you_mean(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def inference_splits(data_dir: str | Path) -> tuple[str, ...]:
    """Return the language-inference examples of a data folder, as ``elsewhere`` takes them.

    Raises:
        ConfigError: there are none.
    """
    from childtuning.tasks.task_folders import file_of

    found = []
    for task, splits in _NLI:
        folder = Path(data_dir).expanduser() / task
        there = [split for split in splits if folder.is_dir() and file_of(folder, split)]
        found += [f"{task}/{there[0]}"] if there else []
    if not found:
        raise ConfigError(
            f"data_dir {str(data_dir)!r} has none of mnli, snli, sick, scitail, qqp. Pass another."
        )
    return tuple(dict.fromkeys(found))
