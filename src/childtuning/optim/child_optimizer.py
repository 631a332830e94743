"""Any element-wise torch optimizer, training only a child."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from childtuning.child import Child
from childtuning.errors import ConfigError, ParameterError
from childtuning.optim.bucket import Bucket
from childtuning.optim.compact import CompactStep
from childtuning.optim.elementwise import check_elementwise
from childtuning.optim.fused_adamw import can_fuse as can_fuse_update
from childtuning.optim.groups import Group, named_groups
from childtuning.optim.masked import FixedMasks, FreshMasks, MaskedStep
from childtuning.optim.official import OfficialAdamW
from childtuning.part import Part
from childtuning.patterns import canonical_names, match_names
from childtuning.task_free import TaskFree


class ChildOptimizer(Optimizer):
    """Train a child network with an optimizer from ``torch.optim``. [Xu et al. 2021, Algorithm 1]

    With a ``Child`` (task-driven, or any fixed one) the entries outside it are frozen bitwise, weight decay and
    momentum included, and the inner optimizer's state exists for the child's entries only: it works on flat tensors
    that hold nothing else, in float32 where the weights are bf16 or fp16. A parameter with no trained entry gets
    ``requires_grad=False``. The child's gradient is divided by its density, as the document has it; the official
    code leaves that away for a fixed child, and lets decay move what is outside it (``preset="official"``).

    With ``TaskFree`` every parameter is trained; each step a fresh mask multiplies the accumulated gradient, which is
    divided by the density, before the inner optimizer's moments see it.

    It is a ``torch.optim.Optimizer``: schedulers, Accelerate, GradScaler and the Hugging Face Trainer use it as one.
    Values that something else writes into the model between steps are noticed and kept.

    Args:
        params: ``model.named_parameters()``, or groups (dicts) whose ``params`` are (name, parameter) pairs, with
            options of their own. Names are how the child finds them.
        child: which entries are trained: a ``Child``, or ``TaskFree(density)``.
        inner: the optimizer's class; element-wise for a fixed child, which is checked by running it on a few
            numbers. With ``preset="official"`` it is ``OfficialAdamW``.
        rescale: divide the gradient of the eligible entries by the density. ``None``: yes, except for a fixed child
            under ``preset="official"``.
        preset: ``"official"`` reproduces the official code for parity: masks instead of frozen entries, decay on
            everything, no exemption for heads in the task-free variant, and its AdamW.
        options: passed to the inner optimizer (lr, weight_decay, betas, …).
    Raises:
        ConfigError: the inner optimizer mixes coordinates, or an option is unknown.
        ParameterError: names, shapes or patterns do not fit, or nothing would be trained.

    Example:
        >>> import torch
        >>> from childtuning import Child
        >>> line = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(line.weight)
        >>> child = Child.from_masks({"weight": torch.tensor([[True, False]])})
        >>> opt = ChildOptimizer(line.named_parameters(), child, torch.optim.SGD, lr=0.5, rescale=False)
        >>> line(torch.tensor([[1.0, 1.0]])).sum().backward()
        >>> opt.step()
        >>> line.weight.tolist()
        [[0.5, 1.0]]
    """

    def __init__(
        self,
        params: Iterable[Any],
        child: Child | TaskFree,
        inner: type[Optimizer] | None = None,
        *,
        rescale: bool | None = None,
        preset: Literal["official"] | None = None,
        **options: Any,
    ) -> None:
        if preset not in (None, "official"):
            raise ConfigError(f"preset must be None or 'official', got {preset!r}. Leave it out.")
        inner = inner or (OfficialAdamW if preset else torch.optim.AdamW)
        rescale = (preset is None or isinstance(child, TaskFree)) if rescale is None else rescale
        groups = named_groups(params)
        self.child = child
        self.preset = preset
        self._num_steps = 0
        self._built = False
        scale = 1.0 / child.density if rescale and child.density > 0 else 1.0
        can_fuse = [can_fuse_update(inner, {**options, **group.options}) for group in groups]
        self._work: CompactStep | MaskedStep
        if isinstance(child, TaskFree) or preset:
            trained, inner_groups = self._plan_masked(groups, child, scale, can_fuse)
        else:
            trained, inner_groups = self._plan_compact(groups, child, scale, can_fuse)
            if self._buckets():
                known = inspect.signature(inner).parameters
                for group in groups:
                    own = {key: value for key, value in group.options.items() if key in known}
                    check_elementwise(inner, {**options, **own})
        if not any(trained):
            raise ParameterError(
                "the child trains no entry of these parameters. Raise the density, or pass always."
            )
        self.inner = inner(
            [
                {"params": inner_params, **group.options}
                for inner_params, group in zip(inner_groups, groups, strict=True)
            ],
            **options,
        )
        super().__init__(
            [
                {
                    **group.options,
                    "params": [(name, group.named[name]) for name in names],
                    **({} if names else {"param_names": []}),
                }
                for group, names in zip(groups, trained, strict=True)
            ],
            self.inner.defaults,
        )
        self.state = self.inner.state
        if isinstance(self._work, CompactStep):
            _freeze_others(groups, trained)
        self._built = True

    def _plan_compact(
        self, groups: list[Group], child: Child, scale: float, can_fuse: list[bool]
    ) -> tuple[list[list[str]], list[list[nn.Parameter]]]:
        """Lay out the compact tensors for the child's entries."""
        parts = child.resolve({name: p.shape for group in groups for name, p in group.named.items()})
        plain = dict(zip(parts, canonical_names(parts), strict=True))
        members: list[list[tuple[nn.Parameter, Part]]] = []
        scaled: list[nn.Parameter] = []
        for group in groups:
            for name, parameter in group.named.items():
                eligible_part = child.parts.get(plain[name])
                if eligible_part is not None and eligible_part.is_whole and parts[name] is eligible_part:
                    scaled.append(parameter)
            members.append([(p, parts[name]) for name, p in group.named.items() if not parts[name].is_empty])
        work = CompactStep(members, scale, scaled, can_fuse=can_fuse)
        self._work = work
        trained = [[name for name in group.named if not parts[name].is_empty] for group in groups]
        return trained, work.inner_parameters()

    def _plan_masked(
        self, groups: list[Group], child: Child | TaskFree, scale: float, can_fuse: list[bool]
    ) -> tuple[list[list[str]], list[list[nn.Parameter]]]:
        """Train everything that requires a gradient, under masks."""
        trained = [[name for name, p in group.named.items() if p.requires_grad] for group in groups]
        names = list(chain.from_iterable(trained))
        plain = dict(zip(names, canonical_names(names), strict=True))
        work_groups = [
            {plain[name]: group.named[name] for name in names}
            for group, names in zip(groups, trained, strict=True)
        ]
        shapes = {name: p.shape for named in work_groups for name, p in named.items()}
        if isinstance(child, TaskFree):
            exempt = match_names(child.always, shapes) if not self.preset else set()
            masks: FixedMasks | FreshMasks = FreshMasks(child, shapes, exempt)
        else:
            parts = child.resolve(shapes)
            masks = FixedMasks({name: parts[name] for name in child.parts})
        self._work = MaskedStep(work_groups, masks, scale, can_fuse=can_fuse)
        return trained, [list(named.values()) for named in work_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the child by one step; a closure is evaluated once, before it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share_options()
        self._work.run(self.inner, self._num_steps)
        self._num_steps += 1
        return loss

    def _share_options(self) -> None:
        """Hand on what schedulers wrote into our groups."""
        for ours, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: value for key, value in ours.items() if key not in ("params", "param_names")})

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the norm of what this step will use, in place of ``torch.nn.utils.clip_grad_norm_``.

        For a fixed child that is the gradient of the child's entries alone (before the division by the density);
        for a task-free one, and under the official preset, the whole unmasked gradient, as in the paper.

        Args:
            max_norm: the largest norm allowed; infinite only measures.
            norm_type: the p of the norm.
        Returns:
            the norm before clipping, a scalar tensor.
        """
        gradients = self._work.gradients()
        norm = nn.utils.get_total_norm(gradients, norm_type)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if max_norm != float("inf"):
            for gradient in gradients:
                gradient.mul_(factor.to(gradient.device))
        return norm

    @property
    def num_state_bytes(self) -> int:
        """Bytes held beside the model and its gradients: the inner state, values, indices and flat gradients."""
        inner = sum(
            value.nbytes
            for state in self.inner.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )
        return inner + sum(bucket.num_bytes for bucket in self._buckets())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse groups after construction: what is trained was settled then.

        Raises:
            ParameterError: always, once the optimizer is built.
        """
        if self._built:
            raise ParameterError(
                "groups cannot be added to a ChildOptimizer. Build a new one with all parameters."
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Copy whole: torch's own keeps three fields only."""
        return self.__dict__.copy()

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return what a bitwise resume needs: inner state, options, master values, step, the child's identity."""
        self._share_options()
        inner = self.inner.state_dict()
        masters: list[Tensor | None] = []
        for bucket in self._buckets():
            if bucket.is_master:
                bucket.read_values()
            masters.append(bucket.values.detach() if bucket.is_master else None)
        return {
            "state": inner["state"],
            "param_groups": inner["param_groups"],
            "child": {"identity": self._identity(), "num_steps": self._num_steps, "masters": masters},
        }

    def _buckets(self) -> list[Bucket]:
        return list(self._work.all_buckets()) if isinstance(self._work, CompactStep) else []

    def _identity(self) -> str:
        return self.child.fingerprint() if isinstance(self.child, Child) else repr(self.child)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Go on from a ``state_dict``; the model's weights are loaded beside it, before or after.

        Raises:
            ParameterError: it is that of another child.
        """
        about = state_dict.get("child")
        if about is None or about["identity"] != self._identity():
            raise ParameterError(
                "the optimizer state belongs to another child. Build the optimizer with the child saved beside it."
            )
        self.inner.load_state_dict({"state": state_dict["state"], "param_groups": state_dict["param_groups"]})
        self.state = self.inner.state
        for ours, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            ours.update({key: value for key, value in inner.items() if key != "params"})
        self._num_steps = about["num_steps"]
        for bucket, masters in zip(self._buckets(), about["masters"], strict=True):
            if masters is not None:
                bucket.restore(masters)


def _freeze_others(groups: list[Group], trained: list[list[str]]) -> None:
    """Let a parameter require a gradient exactly if it has trained entries."""
    for group, names in zip(groups, trained, strict=True):
        for name, parameter in group.named.items():
            parameter.requires_grad_(name in names)
            if name not in names:
                parameter.grad = None
