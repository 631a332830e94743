"""The options of a child, each declared once, and ``ChildConfig``, the serialisable set of all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any, ClassVar, Literal, Self

from childtuning.errors import ConfigError, did_you_mean
from childtuning.options import option, settle

# The methods that are a child alone, by name: the fields that each one sets.
CHILD_METHODS: dict[str, dict[str, Any]] = {
    "child-d": {"variant": "task-driven", "scores": "fisher", "lowest": False},
    "child-f": {"variant": "task-free"},
    "child-lowest": {"variant": "task-driven", "scores": "fisher", "lowest": True},
    "child-random": {"variant": "task-driven", "scores": "random", "lowest": False},
}
KINDS = ("element", "row", "column", "block", "parameter")
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
    """Return one line that describes what is wrong with a mass (a share of the sum of scores), or None."""
    is_number = isinstance(mass, Real) and not isinstance(mass, bool)
    if is_number and 0.0 < float(mass) <= 1.0:  # type: ignore[arg-type]
        return None
    return f"mass must be a share in (0, 1], got {mass!r}. Pass mass=0.9, for example."


def density_fault(density: object) -> str | None:
    """Return one line that describes what is wrong with a density, or None."""
    if isinstance(density, bool) or not isinstance(density, Real):
        return f"density must be a number in (0, 1], got {density!r}. Pass a share: density=0.3."
    value = float(density)
    if math.isfinite(value) and 0.0 < value <= 1.0:
        return None
    share = value / 100 if 1.0 < value <= 100.0 else 0.3
    return f"density must be in (0, 1], got {density:g}. Pass a share: density={share:g}."


def check_density(density: float | None) -> float:
    """Return the density as a float.

    Raises:
        ConfigError: when it is not in (0, 1].
    """
    fault = density_fault(density)
    if fault:
        raise ConfigError(fault)
    return float(density)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What training may cost, as a share of what full fine-tuning costs. Give one.

    Args:
        step: the time of a training step.
        memory: its peak memory, with AdamW and released gradients.
        state: the bytes of the optimizer's state.
        delta: the bytes of the delta's file, of the model's.
    Raises:
        ConfigError: not exactly one is given, or it is not in (0, 1].

    Example:
        >>> str(Budget(step=0.5)), Budget.parse("memory=0.6")
        ('step=0.5', Budget(step=None, memory=0.6, state=None, delta=None))
    """

    KINDS: ClassVar[tuple[str, ...]] = ("step", "memory", "state", "delta")
    step: float | None = None
    memory: float | None = None
    state: float | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        given = {kind: value for kind in self.KINDS if (value := getattr(self, kind)) is not None}
        if len(given) != 1:
            raise ConfigError(
                f"a budget limits one of {', '.join(self.KINDS)}, got {len(given)}. Pass step=0.5."
            )
        ((kind, value),) = given.items()
        if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 < float(value) <= 1.0:
            raise ConfigError(f"a budget is a share in (0, 1], got {kind}={value!r}. Pass {kind}=0.5.")
        object.__setattr__(self, kind, float(value))

    @property
    def kind(self) -> str:
        """What is limited."""
        return next(kind for kind in self.KINDS if getattr(self, kind) is not None)

    @property
    def share(self) -> float:
        """The limit."""
        return getattr(self, self.kind)

    def __str__(self) -> str:
        return f"{self.kind}={self.share:.15g}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the budget that a text spells: ``step=0.5``.

        Raises:
            ConfigError: it spells none.
        """
        kind, equals, number = text.partition("=")
        kind = kind.strip()
        try:
            share = float(number)
        except ValueError:
            equals = ""
        if not equals or kind not in cls.KINDS:
            words = " or ".join(f"{kind}=0.5" for kind in cls.KINDS)
            raise ConfigError(f"budget must be {words}, got {text!r}.")
        return cls(**{kind: share})


def budget_fault(budget: object) -> str | None:
    """Return one line that describes what is wrong with a budget's text, or None."""
    try:
        Budget.parse(str(budget))
    except ConfigError as fault:
        return str(fault)
    return None


@dataclass(frozen=True, kw_only=True)
class ChildOptions:
    """The options of a child that apply to every method: fields of ``ChildConfig`` and of a run."""

    mass: float = option(
        0.9, "With --density auto: share of the sum of scores to keep, in (0, 1].", check=mass_fault
    )
    granularity: Literal["element", "row", "column", "block", "parameter"] = option(
        "element",
        "Unit of selection: element, row (an output unit), column (an input unit), block or parameter.",
    )
    budget: str | None = option(
        None,
        "What training may cost, of full fine-tuning, in place of a density: step=0.5, memory=0.6, state=0.1 or "
        "delta=0.1.",
        check=budget_fault,
        unset="the density",
    )
    scope: Literal["global", "parameter"] = option(
        "global", "Rank all parameters together (global), or each separately (parameter)."
    )
    estimator: Literal["per-example", "per-batch"] = option(
        "per-example", "Fisher per-example (the formula) or per-batch (the official code's)."
    )
    fisher_examples: int | Literal["auto"] | None = option(
        None,
        "Estimate Fisher from this many examples at most; auto: until more of them hardly change the child.",
        within="[1, inf)",
        unset="all",
    )
    fisher_device: Literal["model", "cpu"] = option(
        "model", "Keep Fisher scores on model or cpu; results differ only by rounding."
    )
    fisher_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "Keep Fisher scores in float32 or bfloat16."
    )
    eligible: tuple[str, ...] | None = option(
        None, "Pattern of parameters to choose from; repeatable.", unset="every pretrained one"
    )
    always: tuple[str, ...] | None = option(
        None, "Pattern of parameters trained in full; repeatable.", unset="the new head"
    )
    rescale: bool | None = option(
        None, "Divide gradients by the density.", flags=("--rescale/--no-rescale",), unset="yes"
    )
    release_gradients: bool | None = option(
        None,
        "Free each dense gradient once the child's entries are copied.",
        flags=("--release-gradients/--keep-gradients",),
        unset="on for a fixed child",
    )
    preset: Literal["official"] | None = option(
        None, "official: child, masks and update of the paper's code; only for comparison with it."
    )


@dataclass(frozen=True)
class ChildConfig(ChildOptions):
    """Configuration of the child to train. [Xu et al. 2021]

    Args:
        variant: ``task-driven`` (fixed, chosen by scores: D) or ``task-free`` (a fresh random mask per step: F).
        density: p, the share of the eligible entries, in (0, 1]; ``auto``: the smallest whose entries have the share
            ``mass`` of the sum of scores.
        scores: the scores that rank the entries: ``fisher``, or for ablation ``magnitude`` or ``random``.
        lowest: choose the lowest scores instead, for ablation.
        labels: the labels for Fisher information: the data's own (``data``) or drawn from the model (``sampled``).
        seed: the seed of masks, random scores and sampled labels.
        mass: for ``density="auto"``, in (0, 1].
        granularity: the unit of selection: ``element``, ``row``, ``column``, ``block``, ``parameter``.
        budget: what training may cost, as a share of full fine-tuning: ``step=0.5``, or a ``Budget``. The child is the
            one of most Fisher information that fits, in place of the share ``density``.
        scope: rank all parameters together (``global``) or each separately (``parameter``).
        estimator: Fisher ``per-example`` (the formula) or ``per-batch`` (the official code's).
        fisher_examples: estimate from this many examples at most; ``auto``: 64 at a time, in random order, from
            256 on until the child shares 98 % of its entries with the one before; ``None``: all.
        fisher_device: keep the Fisher scores on the ``model``'s device or on the ``cpu``; this affects memory, and
            results only by rounding.
        fisher_dtype: keep them in ``float32`` (float64 for float64 parameters) or in ``bfloat16``; for its error, see
            ``fisher_information``.
        eligible: patterns over parameter names; ``None``: every pretrained floating-point parameter.
        always: patterns over names of parameters trained in full besides the child; ``None``: the model's new head.
        rescale: divide the gradient by the density; ``None``: yes, except for a fixed child with the official
            preset.
        release_gradients: free each dense gradient as soon as the child's entries are copied; ``None``: yes for a
            fixed child in one process. It affects memory, not results.
        preset: ``official`` reproduces the official code's child, masks and update; only for comparison with it.
    Raises:
        ConfigError: listing all faults in one line.
    """

    variant: Literal["task-driven", "task-free"] = option("task-driven", "Fixed, or fresh each step.")
    density: float | Literal["auto"] = option(0.3, "Share of the eligible entries.", check=density_fault)
    scores: Literal["fisher", "magnitude", "random"] = option("fisher", "Scores that rank the entries.")
    lowest: bool = option(False, "Choose the lowest scores instead.")
    labels: Literal["data", "sampled"] = option("data", "Labels of the Fisher information.")
    seed: int = option(0, "Seed of masks, random scores and sampled labels.")

    def __post_init__(self) -> None:
        if isinstance(self.budget, Budget):
            object.__setattr__(self, "budget", str(self.budget))
        faults = settle(self)
        needs = {
            "variant='task-driven'": self.variant == "task-driven",
            "scope='global'": self.scope == "global",
            "scores other than random": self.scores != "random",
            "preset=None": self.preset is None,
            "lowest=False": not self.lowest,
        }
        for name, is_asked in (
            ("density='auto'", self.density == "auto"),
            ("budget", self.budget is not None),
        ):
            if is_asked:
                faults += [
                    f"{name} needs {need}. Pass a density." for need, holds in needs.items() if not holds
                ]
        if self.budget is not None and self.density not in (0.3, 1.0):
            faults.append(f"a budget takes the place of a density, got density={self.density}. Leave it out.")
        if self.variant == "task-free" and self.scope == "parameter":
            faults.append("scope='parameter' has no meaning for a task-free child. Leave it out.")
        if self.release_gradients and (self.variant == "task-free" or self.preset):
            faults.append("release_gradients needs a fixed child without the official preset. Leave it out.")
        if self.fisher_examples == "auto" and self.preset:
            faults.append("fisher_examples='auto' needs preset=None. Pass a number.")
        if self.granularity == "parameter" and self.scope == "parameter":
            faults.append("granularity='parameter' cannot select within each parameter. Use scope='global'.")
        if self.preset == "official":
            faults += [
                f"preset='official' sets {name} itself, got {getattr(self, name)!r}. Leave it out."
                for name, default in _FIXED_BY_OFFICIAL.items()
                if getattr(self, name) != default
            ]
        if faults:
            raise ConfigError(" ".join(faults))

    def __repr__(self) -> str:
        shown = {"variant": self.variant, "density": self.density}
        shown |= {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        return f"ChildConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields; ``from_dict`` restores an equal configuration."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def of_method(cls, name: str, density: float | Literal["auto"] | None = None) -> Self:
        """Make the configuration of a method that is a child alone, such as ``child-d`` or ``child-f``.

        Args:
            name: the method's name.
            density: as in ``ChildConfig``; ``None``: 0.3.
        Raises:
            ConfigError: for an unknown name, or a density outside its range.
        """
        if name not in CHILD_METHODS:
            raise ConfigError(f"there is no child {name!r}. {did_you_mean(name, CHILD_METHODS)}")
        asked: dict[str, Any] = {} if density is None else {"density": density}
        return cls(**CHILD_METHODS[name], **asked)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a configuration from the fields that ``to_dict`` returned.

        Raises:
            ConfigError: for an unknown field, or a value outside its range.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"a child has no option {name!r}. {did_you_mean(name, known)}")
        return cls(**values)
