"""child-pruned: train the child in a network whose other weights are zero; an ablation of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from childtuning.child import Child, ChildConfig
from childtuning.child.eligible import named
from childtuning.errors import ConfigError
from childtuning.methods.registry import register
from childtuning.training import ChildTraining, Method, MethodCallback


@register
@dataclass(frozen=True)
class ChildPruned(Method):
    """Train the child of child-d, with all other weights of the eligible matrices set to zero.

    Child-Tuning uses the whole network in the forward pass; here only the child is left, as in pruning. [Xu et al.
    2021, section 5] Vectors (biases, the scales of normalisations) keep their values outside the child: without them a
    network computes nothing. The saved delta is as large as the eligible parameters, including the zeros, since it
    overwrites them.
    """

    name = "child-pruned"
    summary = "train child-d's child with all other weights set to zero (ablation)"
    source = "Xu et al. 2021, section 5"
    trains = "the top share p by Fisher information, fixed; the rest is zero"
    memory = "3n with AdamW: state and positions"
    part = "child"
    excludes: ClassVar[Mapping[str, str]] = {
        "mixout": "mixout restores the weights that were pruned",
    }
    density = 0.3
    acts_on_pretrained = True

    def child(self, config: ChildConfig) -> ChildConfig:
        """Return the child's configuration.

        Raises:
            ConfigError: when a preset is given.
        """
        if config.preset is not None:
            raise ConfigError("child-pruned has no official preset. Leave out preset.")
        return replace(config, variant="task-driven", scores="fisher", lowest=False)

    def callback(self, trainer: ChildTraining) -> MethodCallback:
        """Return the callback that prunes when training begins."""
        return _Pruning(trainer)


class _Pruning(MethodCallback):
    """Set weights outside the child to zero, and include them in the delta."""

    def __init__(self, trainer: ChildTraining) -> None:
        self.trainer = trainer

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune; when resuming, the weights are already zero."""
        child = self.trainer.select()
        assert isinstance(child, Child)
        plain = named(self.trainer.bare_model)
        for name, part in child.parts.items():
            if plain[name].ndim > 1:
                plain[name].masked_fill_(~part.mask().to(plain[name].device), 0)
        self.trainer.child_optimizer.accept_weights()
        shapes = {name: plain[name].shape for name, part in child.parts.items()}
        self.trainer.touched = Child.whole(shapes, always=child.always)
