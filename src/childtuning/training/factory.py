"""The child's optimizer for trainers of others, such as TRL's, which build what they are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from childtuning.child import Child, TaskFree
from childtuning.optim import ChildOptimizer
from childtuning.ranks import num_processes
from childtuning.training.child_choice import saves_computation


class ChildOptimizerFactory:
    """Builds a ``ChildOptimizer`` where a Trainer asks for its optimizer.

    ``Trainer(…, optimizer_cls_and_kwargs=(ChildOptimizerFactory, {"child": child, "lr": 2e-5}))``, and TRL's trainers
    in the same way, call it with the model and these options. Give the trainer ``max_grad_norm=0.0``: its own clipping
    counts frozen entries, and does not see the gradients of layers that form the child's alone. The optimizer clips.

    A ``ChildTrainer`` chooses the child as well, writes deltas, and resumes bitwise: ``class T(ChildTrainer,
    SFTTrainer)``. Here the trainer's own checkpoints are used, which are whole models.
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        child: Child | TaskFree,
        inner: type[Optimizer] = torch.optim.AdamW,
        max_grad_norm: float | None = 1.0,
        **options: Any,
    ) -> ChildOptimizer:
        """Return the optimizer of a model.

        Args:
            model: to be trained; its layers form the child's gradients alone where that saves computation.
            child: which entries are trained.
            inner: the optimizer that trains them.
            max_grad_norm: the norm that their gradient is clipped to; ``None``: never.
            options: of the inner optimizer: lr, weight_decay.
        Raises:
            ConfigError, ParameterError: as ``ChildOptimizer`` does.
        """
        forms = saves_computation(child) and num_processes() == 1
        return ChildOptimizer(
            model.named_parameters(),
            child,
            inner,
            model=model if forms else None,
            max_grad_norm=max_grad_norm,
            **options,
        )
