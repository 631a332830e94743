"""lora: low-rank updates of the weight matrices, with PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from childtuning.child.eligible import is_conv1d
from childtuning.errors import ConfigError
from childtuning.methods.checks import not_for
from childtuning.methods.peft_modules import PeftMethod, to_save
from childtuning.methods.registry import register
from childtuning.training.bottleneck import is_linear

_ALL = "all-linear"


@register
@dataclass(frozen=True)
class Lora(PeftMethod):
    """Replace W x by W x + (alpha / rank) B A x with W frozen, A [rank, in] random and B [out, rank] zero at the start.

    The new head is trained in full. ``merge`` adds (alpha / rank) B A to W, which restores the base model's
    architecture.

    In a combination such as ``child-d+lora`` the child is chosen among the entries of A and B. While B is zero, no
    gradient reaches A, so that Fisher information ranks every entry of A last.

    Args:
        rank: the rank of the update.
        alpha: the factor of the update, times the rank.
        dropout: dropout of the input of A in training.
        targets: the layers: ``all-linear`` for all but the head, or a pattern over module names (``*.query``).
    """

    name = "lora"
    summary = "train low-rank updates of the weight matrices and the head (PEFT)"
    source = "Hu et al. 2021, arXiv 2106.09685"
    trains = "two thin matrices for each weight matrix"
    memory = "2n state, n values"
    rate = 3.0

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str = _ALL

    def __post_init__(self) -> None:
        for option in ("rank", "alpha"):
            if getattr(self, option) < 1:
                raise ConfigError(f"{option} of 'lora' must be at least 1, got {getattr(self, option)}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout of 'lora' must be in [0, 1), got {self.dropout}. Pass a share: 0.1.")
        if not self.targets:
            raise ConfigError(f"targets of 'lora' is empty. Pass {_ALL!r} or a pattern over module names.")

    def peft_config(self, model: nn.Module, task_type: str | None, head: list[str]) -> Any:
        """Return PEFT's ``LoraConfig``."""
        from peft import LoraConfig

        return LoraConfig(
            task_type=task_type,  # type: ignore[arg-type]
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self._targets(model, head),
            modules_to_save=to_save(task_type, head),
            # Whether weights are stored as [in, out]; PEFT corrects a wrong value with a warning.
            fan_in_fan_out=any(is_conv1d(module) for module in model.modules()),
        )

    def _targets(self, model: nn.Module, head: list[str]) -> str | list[str]:
        """PEFT's ``all-linear`` if possible, else the names of the layers."""
        from transformers import PreTrainedModel

        layers = {
            path: module
            for path, module in model.named_modules()
            if path
            and getattr(getattr(module, "weight", None), "ndim", 0) > 1
            and not any(path == top or path.startswith(top + ".") for top in head)
        }
        everything = self.targets == _ALL
        found = [
            path
            for path, module in layers.items()
            if (is_linear(module) if everything else fnmatchcase(path, self.targets))
        ]
        if not found:
            known = f" such as {next(iter(layers))!r}" if layers and not everything else ""
            raise not_for(self.name, model, f"targets {self.targets!r} matches none of its layers{known}")
        for path in found:
            if not _is_product(layers[path]):
                raise not_for(
                    self.name,
                    model,
                    f"{path!r} ({type(layers[path]).__name__}) computes other than W x + b, so that no update can be "
                    "merged into W. Name other layers: targets=",
                )
        return _ALL if everything and isinstance(model, PreTrainedModel) else found

    def merge(self, model: nn.Module) -> nn.Module:
        """Return the base model with the update added to its weights, and with the tuned head."""
        return model.merge_and_unload()  # type: ignore[operator]


@torch.no_grad()
def _is_product(layer: Any) -> bool:
    """Tell whether a layer's output grows by D x where its stored weight grows by D: on it merging relies.

    A parametrized weight is not stored. A subclass may scale or quantise the weight: it is tried out, but for weights
    to which nothing can be added, which are PEFT's own concern. What are not linear layers are taken as torch's.
    """
    weight = layer._parameters.get("weight")
    if weight is None:
        return False
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward) or not is_linear(layer):
        return True
    if weight.is_meta or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return True
    draw = torch.Generator("cpu").manual_seed(0)
    added = torch.randn(weight.shape, generator=draw, device="cpu").to(weight)
    matrix = added if is_conv1d(layer) else added.T
    x = torch.randn((3, len(matrix)), generator=draw, device="cpu").to(weight)
    kept, was_training = weight.clone(), layer.training
    layer.eval()
    try:
        before = layer(x)
        weight.add_(added)
        grown, wanted = layer(x) - before, x @ matrix
    except (TypeError, ValueError, RuntimeError):  # it is called in another way
        return False
    finally:
        weight.copy_(kept)
        layer.train(was_training)
    return bool((grown - wanted).norm() < 0.1 * wanted.norm())
