"""child-dynamic: a child that is chosen again at regular intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from childtuning.child import Child, ChildConfig, Part
from childtuning.child.eligible import named
from childtuning.errors import ConfigError, counted
from childtuning.methods.registry import register
from childtuning.training import ChildTraining, Method, MethodCallback, choose_child


@register
@dataclass(frozen=True)
class ChildDynamic(Method):
    """Child-Tuning_D with a child that is updated during training, as in DPS [Zhang et al. 2022].

    It starts with the child of highest Fisher information. Every ``interval`` steps the child is chosen again by the
    squared gradients, summed over the steps since the last choice. Entries that stay keep their optimizer state; new
    entries start with the mean of these squares as Adam's second moment after its bias correction; entries that leave
    keep their current value. The saved delta contains every entry that was ever in the child. Full gradients are
    computed, so that it needs memory for them and for one statistic of the same size.

    Args:
        interval: the number of optimizer steps between choices.
    """

    interval: int = 100

    name = "child-dynamic"
    summary = "child-d that chooses its child again at intervals, by the gradients in between"
    source = "Zhang et al. 2022 (DPS), arXiv 2211.01642"
    trains = "the top share p, chosen again at intervals"
    memory = "3n with AdamW, and a statistic of every gradient"
    part = "child"
    excludes: ClassVar[Mapping[str, str]] = {
        "l2-sp": "entries that join the child late have no pretrained value on record",
        "recadam": "entries that join the child late have no pretrained value on record",
        "sam": "gradients at the displaced weights are not statistics of the task",
    }
    density = 0.3
    whole_gradients = True
    reselects = True

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ConfigError(f"interval of child-dynamic must be at least 1 step, got {self.interval}.")

    def child(self, config: ChildConfig) -> ChildConfig:
        """Return the configuration of the first child."""
        if config.preset is not None:
            raise ConfigError("child-dynamic has no official preset. Leave out preset.")
        if config.budget is not None:
            raise ConfigError("child-dynamic chooses without costs, got a budget. Pass a density.")
        return replace(config, variant="task-driven", scores="fisher", lowest=False)

    def warning(self, num_steps: int) -> str | None:
        """Tell where no second child is chosen."""
        if self.interval < num_steps:
            return None
        return (
            f"child-dynamic chooses again after {counted(self.interval, 'step')}, and the run has {num_steps:,}: it is "
            f"child-d. Pass interval={max(num_steps // 5, 1)}."
        )

    def callback(self, trainer: ChildTraining) -> MethodCallback:
        """Return the callback that keeps the statistics and chooses the child."""
        return _Reselection(trainer, self.interval)


class _Reselection(MethodCallback):
    """Accumulate squared gradients, choose the child at intervals, and track every entry that was ever chosen."""

    def __init__(self, trainer: ChildTraining, interval: int) -> None:
        self.trainer = trainer
        self.interval = interval
        self.squares: dict[str, Tensor] = {}
        self.num_steps = 0
        self.ever: Child | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Request the gradients of all eligible parameters; begin anew, unless the run is resumed."""
        if state.global_step == 0:
            self.squares, self.num_steps, self.ever = {}, 0, self.trainer.touched
        self._watch()

    @torch.no_grad()
    def gradients_ready(self) -> None:
        """Add this step's squared gradients, before they are clipped."""
        gradients = {name: p.grad for name, p in self._eligible().items() if p.grad is not None}
        if not all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
            return
        for name, gradient in gradients.items():
            known = self.squares.get(name)
            if known is None:
                known = self.squares[name] = torch.zeros_like(gradient, dtype=torch.float32)
            known.addcmul_(gradient.float(), gradient.float())
        self.num_steps += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the child again at the end of an interval, but not after the last step."""
        if state.global_step % self.interval or state.global_step >= state.max_steps or not self.num_steps:
            return
        trainer, now = self.trainer, self._child()
        assert trainer.child_config is not None
        parameters = self._eligible()
        scores = {
            name: self.squares.get(name, torch.zeros_like(p, dtype=torch.float32))
            for name, p in parameters.items()
        }
        chosen = choose_child(
            trainer.child_config, trainer.bare_model, lambda: (), always=trainer.always, scores=scores
        )
        assert isinstance(chosen, Child)
        self.ever = _union(self.ever or now, chosen)
        moments = {name: square / self.num_steps for name, square in self.squares.items()}
        trainer.child_optimizer.reselect(chosen, moments)
        trainer.child, trainer.touched = chosen, self.ever
        self.squares, self.num_steps = {}, 0
        self._watch()

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics, and the entries that were ever chosen."""
        ever = self.ever or self._child()
        return {
            "squares": self.squares,
            "num_steps": self.num_steps,
            "ever": {name: part.mask() for name, part in ever.parts.items()} if self.ever else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state returned by ``state_dict``."""
        device = next(self.trainer.bare_model.parameters()).device
        self.squares = {name: square.to(device) for name, square in state["squares"].items()}
        self.num_steps = state["num_steps"]
        if state["ever"] is not None:
            self.ever = self.trainer.touched = Child.from_masks(state["ever"], always=self._child().always)

    def _child(self) -> Child:
        child = self.trainer.select()
        assert isinstance(child, Child)
        return child

    def _eligible(self) -> dict[str, nn.Parameter]:
        plain = named(self.trainer.bare_model)
        return {name: plain[name] for name in self._child().parts}

    def _watch(self) -> None:
        self.trainer.child_optimizer.observe()


def _union(first: Child, second: Child) -> Child:
    parts = {
        name: Part.from_mask(part.mask() | second.parts[name].mask()) if not part.is_whole else part
        for name, part in first.parts.items()
    }
    return Child(parts, always=first.always)
