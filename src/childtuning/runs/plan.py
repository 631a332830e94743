"""The memory that a method needs beside activations, counted from the model's shapes; no weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from childtuning.child import ChildConfig
from childtuning.child.eligible import named
from childtuning.errors import ModelError
from childtuning.methods import Combination
from childtuning.training import Method, packaged_model, task_head

_MOMENTS = 8  # bytes of AdamW's two, float32
_INDEX, _FLOAT = 4, 4


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by what they are for.

    Attributes:
        method: as it was asked for.
        trained_parameters: entries that are trained, the head included.
        weights: of the model.
        gradients: the most that is alive at once.
        optimizer: moments, indices and float32 master values.
        delta: what is saved.
    """

    method: str
    trained_parameters: int
    weights: int
    gradients: int
    optimizer: int
    delta: int

    @property
    def total(self) -> int:
        """Weights, gradients and optimizer; activations come on top."""
        return self.weights + self.gradients + self.optimizer


def plan_memory(
    model: str | None,
    methods: list[str],
    config: ChildConfig | None = None,
    *,
    num_labels: int = 2,
    bf16: bool = False,
) -> list[MemoryPlan]:
    """Count what training by AdamW would hold, one process, without loading weights.

    Args:
        model: a folder or hub name; ``None``: the packaged model.
        methods: as ``--method`` takes them.
        config: density and granularity; ``None``: each method's own density, single entries.
        num_labels: of the new head.
        bf16: whether the weights are in bf16, which get float32 master values for what is trained.
    Raises:
        ModelError: there is no such model, or a method does not apply to it.
    """
    return [_plan(_empty_model(model, num_labels), name, config, bf16) for name in methods]


def _empty_model(name: str | None, num_labels: int) -> nn.Module:
    import transformers

    source = str(packaged_model()) if name is None else name
    try:
        config = transformers.AutoConfig.from_pretrained(source, num_labels=num_labels)
        with torch.device("meta"):
            return transformers.AutoModelForSequenceClassification.from_config(config)
    except (OSError, ValueError, KeyError) as fault:
        reason = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise ModelError(f"model {source!r} cannot be read ({reason}). Pass a folder or hub name.") from None


def _plan(model: Any, name: str, config: ChildConfig | None, bf16: bool) -> MemoryPlan:
    methods = Combination.parse(name)
    density = config.density if config is not None and methods.takes_density else methods.density
    granularity = "element" if config is None else config.granularity
    child = methods.child(ChildConfig(density=density, granularity=granularity))
    cannot = ModelError(f"plan cannot count {name!r} without the model's weights. Leave it out.")
    if any(method.name == "child-pruned" for method in methods.methods):
        raise cannot  # its delta holds the zeros outside the child
    try:
        prepared = methods.prepare(model, task_head(model))
    except NotImplementedError:
        raise cannot from None
    except ModelError as fault:
        if "meta tensor" in str(fault):
            raise cannot from None
        raise
    sizes = {name: p.numel() for name, p in named(prepared.model).items() if p.requires_grad}
    always = sum(size for name, size in sizes.items() if name in prepared.always)
    chosen = [
        n for n in sizes if n not in prepared.always and (prepared.eligible is None or n in prepared.eligible)
    ]
    eligible = sum(sizes[name] for name in chosen)
    is_fixed = child.variant == "task-driven" and child.density != 1.0
    share = float(child.density) if is_fixed else 1.0
    trained = always + round(share * eligible)
    width = 2 if bf16 else _FLOAT
    everything = sum(p.numel() for p in named(prepared.model).values())
    masters = _FLOAT * trained if bf16 else 0
    indices = _INDEX * round(share * eligible) if is_fixed and granularity == "element" else 0
    # Single entries are taken out of each dense gradient before the next is formed; rows are formed alone.
    largest = max((sizes[name] for name in chosen), default=0) if granularity == "element" else 0
    gradients = _FLOAT * trained + width * largest if is_fixed else width * trained
    # L2-SP and RecAdam keep the values that they pull towards.
    pulls = any(type(method).inner is not Method.inner for method in methods.methods)
    optimizer = _MOMENTS * trained + masters + indices + _FLOAT * eligible * pulls
    return MemoryPlan(name, trained, width * everything, gradients, optimizer, width * trained)
