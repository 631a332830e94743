"""What child to train: the options, each declared once, and ``ChildConfig``, the serialisable whole of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any, Literal, Self

from childtuning.errors import ConfigError, did_you_mean
from childtuning.options import option, settle

KINDS = ("element", "row", "block", "parameter")
SCOPES = ("global", "parameter")
_FIXED_BY_OFFICIAL = {
    "granularity": "element",
    "scope": "global",
    "scores": "fisher",
    "lowest": False,
    "labels": "data",
    "fisher_dtype": "float32",
    "always": None,
}


def mass_fault(mass: object) -> str | None:
    """Return what is wrong with a share of the scores' total in one line, or None."""
    is_number = isinstance(mass, Real) and not isinstance(mass, bool)
    if is_number and 0.0 < float(mass) <= 1.0:  # type: ignore[arg-type]
        return None
    return f"mass must be a share in (0, 1], got {mass!r}. Pass for example mass=0.9."


def density_fault(density: object) -> str | None:
    """Return what is wrong with a density in one line, or None."""
    if isinstance(density, bool) or not isinstance(density, Real):
        return f"density must be a number in (0, 1], got {density!r}. Pass a share: density=0.3."
    value = float(density)
    if math.isfinite(value) and 0.0 < value <= 1.0:
        return None
    share = value / 100 if 1.0 < value <= 100.0 else 0.3
    return f"density must be in (0, 1], got {density:g}. Pass a share: density={share:g}."


def check_density(density: float) -> float:
    """Return the density as a float.

    Raises:
        ConfigError: it is not in (0, 1].
    """
    fault = density_fault(density)
    if fault:
        raise ConfigError(fault)
    return float(density)


@dataclass(frozen=True, kw_only=True)
class ChildOptions:
    """What may be said of a child whatever the method: fields of ``ChildConfig`` and of a run."""

    mass: float = option(
        0.9, "With --density auto: share of the scores to hold, in (0, 1].", check=mass_fault
    )
    granularity: Literal["element", "row", "block", "parameter"] = option(
        "element", "What is chosen as one: element, row, block or parameter."
    )
    scope: Literal["global", "parameter"] = option(
        "global", "Rank all parameters together (global), or give each its share (parameter)."
    )
    estimator: Literal["per-example", "per-batch"] = option(
        "per-example", "Fisher per-example (the formula) or per-batch (the official code's)."
    )
    fisher_examples: int | None = option(
        None, "Estimate Fisher from this many examples at most.", within="[1, inf)", unset="all"
    )
    fisher_device: Literal["model", "cpu"] = option(
        "model", "Keep Fisher scores on model or cpu; results differ by rounding alone."
    )
    fisher_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "Keep Fisher scores in float32 or bfloat16."
    )
    eligible: tuple[str, ...] | None = option(
        None, "Pattern of parameters to choose from; repeatable.", unset="every pretrained one"
    )
    always: tuple[str, ...] | None = option(
        None, "Pattern of parameters trained whole; repeatable.", unset="the new head"
    )
    rescale: bool | None = option(
        None, "Divide gradients by the density.", flags=("--rescale/--no-rescale",), unset="yes"
    )
    release_gradients: bool | None = option(
        None,
        "Free each dense gradient once the child's entries are taken.",
        flags=("--release-gradients/--keep-gradients",),
        unset="on for a fixed child",
    )
    preset: Literal["official"] | None = option(
        None, "official: child, masks and update of the paper's code, for parity only."
    )


@dataclass(frozen=True)
class ChildConfig(ChildOptions):
    """What child to train. [Xu et al. 2021]

    Args:
        variant: ``task-driven`` (fixed, chosen by scores: D) or ``task-free`` (a fresh random mask a step: F).
        density: p, the share of the eligible entries, in (0, 1]; ``auto``: the smallest that holds the share ``mass``
            of the scores' total.
        scores: what ranks the entries: ``fisher``, or for ablation ``magnitude`` or ``random``.
        lowest: take the lowest scores instead, for ablation.
        labels: of the Fisher information: the data's own (``data``) or drawn from the model (``sampled``).
        seed: names the masks, random scores and sampled labels.
        mass: for ``density="auto"``, in (0, 1].
        granularity: what is chosen as one unit: ``element``, ``row``, ``block``, ``parameter``.
        scope: rank all parameters together (``global``) or give each its share (``parameter``).
        estimator: Fisher ``per-example`` (the formula) or ``per-batch`` (the official code's).
        fisher_examples: estimate from this many examples at most; ``None``: all.
        fisher_device: keep the Fisher scores beside the ``model``'s parameters or on the ``cpu``; it changes memory,
            and results by rounding alone.
        fisher_dtype: keep them in ``float32`` (float64 for float64 parameters) or in ``bfloat16``, whose error
            ``fisher_information`` states.
        eligible: patterns over parameter names; ``None``: every pretrained floating-point parameter.
        always: patterns over names that are trained whole beside the child; ``None``: the model's new head.
        rescale: divide the gradient by the density; ``None``: as the document does, in both variants.
        release_gradients: free each dense gradient as soon as the child's entries of it are taken; ``None``: yes for a
            fixed child in one process. It changes memory, not results.
        preset: ``official`` reproduces the official code's child, masks and update, for parity only.
    Raises:
        ConfigError: all the faults there are, in one line.
    """

    variant: Literal["task-driven", "task-free"] = option("task-driven", "Fixed, or fresh each step.")
    density: float | Literal["auto"] = option(0.3, "Share of the eligible entries.", check=density_fault)
    scores: Literal["fisher", "magnitude", "random"] = option("fisher", "What ranks the entries.")
    lowest: bool = option(False, "Take the lowest scores instead.")
    labels: Literal["data", "sampled"] = option("data", "Labels of the Fisher information.")
    seed: int = option(0, "Names masks, random scores and sampled labels.")

    def __post_init__(self) -> None:
        faults = settle(self)
        if self.density == "auto":
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
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

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
        return cls(**values)
