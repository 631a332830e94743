"""The serialisable whole of a child: everything that decides which entries are trained, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from childtuning.child.eligible import as_patterns
from childtuning.child.ranking import SCOPES
from childtuning.child.task_free import density_fault, mass_fault
from childtuning.child.units import KINDS
from childtuning.errors import ConfigError, did_you_mean

_CHOICES = {
    "variant": ("task-driven", "task-free"),
    "granularity": KINDS,
    "scope": SCOPES,
    "scores": ("fisher", "magnitude", "random"),
    "estimator": ("per-example", "per-batch"),
    "labels": ("data", "sampled"),
    "fisher_device": ("model", "cpu"),
    "fisher_dtype": ("float32", "bfloat16"),
    "preset": (None, "official"),
}
_FIXED_BY_OFFICIAL = {
    "granularity": "element",
    "scope": "global",
    "scores": "fisher",
    "lowest": False,
    "labels": "data",
    "fisher_dtype": "float32",
    "always": None,
}


@dataclass(frozen=True)
class ChildConfig:
    """What child to train. [Xu et al. 2021]

    Args:
        variant: ``task-driven`` (fixed, chosen by scores: D) or ``task-free`` (a fresh random mask a step: F).
        density: p, the share of the eligible entries, in (0, 1]; ``auto``: the smallest that holds the share ``mass``
            of the scores' total.
        mass: for ``density="auto"``, in (0, 1].
        granularity: what is chosen as one unit: ``element``, ``row``, ``block``, ``parameter``.
        scope: rank all parameters together (``global``) or give each its share (``parameter``).
        scores: what ranks the entries: ``fisher``, or for ablation ``magnitude`` or ``random``.
        lowest: take the lowest scores instead, for ablation.
        estimator: Fisher ``per-example`` (the formula) or ``per-batch`` (the official code's).
        labels: the data's own (``data``) or drawn from the model (``sampled``).
        fisher_examples: estimate from this many examples at most; ``None``: all.
        fisher_device: keep the Fisher scores beside the ``model``'s parameters or on the ``cpu``; it changes memory,
            and results by rounding alone.
        fisher_dtype: keep them in ``float32`` (float64 for float64 parameters) or in ``bfloat16``, whose error
            ``fisher_information`` states.
        eligible: patterns over parameter names; ``None``: every pretrained floating-point parameter.
        always: patterns over names that are trained whole beside the child; ``None``: the model's new head.
        rescale: divide the gradient by the density; ``None``: as the document does, in both variants.
        seed: names the masks, random scores and sampled labels.
        release_gradients: free each dense gradient as soon as the child's entries of it are taken; ``None``: yes for a
            fixed child in one process. It changes memory, not results.
        preset: ``official`` reproduces the official code's child, masks and update, for parity only.
    Raises:
        ConfigError: all the faults there are, in one line.
    """

    variant: Literal["task-driven", "task-free"] = "task-driven"
    density: float | Literal["auto"] = 0.3
    mass: float = 0.9
    granularity: Literal["element", "row", "block", "parameter"] = "element"
    scope: Literal["global", "parameter"] = "global"
    scores: Literal["fisher", "magnitude", "random"] = "fisher"
    lowest: bool = False
    estimator: Literal["per-example", "per-batch"] = "per-example"
    labels: Literal["data", "sampled"] = "data"
    fisher_examples: int | None = None
    fisher_device: Literal["model", "cpu"] = "model"
    fisher_dtype: Literal["float32", "bfloat16"] = "float32"
    eligible: tuple[str, ...] | None = None
    always: tuple[str, ...] | None = None
    rescale: bool | None = None
    seed: int = 0
    release_gradients: bool | None = None
    preset: Literal["official"] | None = None

    def __post_init__(self) -> None:
        faults = []
        for name in ("eligible", "always"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or (
                isinstance(patterns, (list, tuple, set, frozenset))
                and all(isinstance(p, str) for p in patterns)
            ):
                object.__setattr__(self, name, as_patterns(patterns))
            elif patterns is not None:
                faults.append(
                    f"{name} must be patterns over parameter names, got {patterns!r}. Pass for example "
                    f"{name}=['classifier.*']."
                )
        is_auto = isinstance(self.density, str) and self.density == "auto"
        fault = None if is_auto else density_fault(self.density)
        if not is_auto and fault is None:
            object.__setattr__(self, "density", float(self.density))  # numpy's numbers are not JSON
        faults += [fault] if fault else []
        if (fault := mass_fault(self.mass)) is not None:
            faults.append(fault)
        for name, known in _CHOICES.items():
            got = getattr(self, name)
            if got not in known:
                words = [str(word) for word in known if word is not None]
                faults.append(
                    f"{name} must be one of {', '.join(words)}, got {got!r}. {did_you_mean(str(got), words)}"
                )
        for name, may_be_none in {"lowest": False, "rescale": True, "release_gradients": True}.items():
            got = getattr(self, name)
            if not isinstance(got, bool) and not (may_be_none and got is None):
                faults.append(f"{name} must be True or False, got {got!r}. Leave it out for the default.")
        if not _is_whole(self.seed):
            faults.append(f"seed must be a whole number, got {self.seed!r}. Pass seed=0.")
        limit = self.fisher_examples
        if limit is not None and not (_is_whole(limit) and limit >= 1):
            faults.append(
                f"fisher_examples must be a whole number from 1 up, got {limit!r}. Leave it out for all."
            )
        if is_auto:
            needs = {
                "variant='task-driven'": self.variant == "task-driven",
                "scope='global'": self.scope == "global",
                "scores other than random ones": self.scores != "random",
                "no preset": self.preset is None,
                "the highest scores": not self.lowest,
            }
            faults += [
                f"density='auto' needs {need}. Pass a number." for need, holds in needs.items() if not holds
            ]
        if self.variant == "task-free" and self.scope == "parameter":
            faults.append("scope='parameter' has no meaning for a task-free child. Leave it out.")
        if self.release_gradients and (self.variant == "task-free" or self.preset):
            faults.append(
                "release_gradients needs a fixed child, which is none of the official preset's. Leave it out."
            )
        if self.granularity == "parameter" and self.scope == "parameter":
            faults.append(
                "granularity='parameter' cannot be shared out within each parameter. Use scope='global'."
            )
        if self.preset == "official":
            faults += [
                f"preset='official' has its own {name}, got {getattr(self, name)!r}. Leave it out."
                for name, default in _FIXED_BY_OFFICIAL.items()
                if getattr(self, name) != default
            ]
        if faults:
            raise ConfigError(" ".join(faults))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields; ``from_dict`` makes an equal configuration of them."""
        listed = {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }
        return listed

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what ``to_dict`` wrote.

        Raises:
            ConfigError: an unknown field, or a value outside its range.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"a child has no option {name!r}. {did_you_mean(name, known)}")
        options: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**options)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
