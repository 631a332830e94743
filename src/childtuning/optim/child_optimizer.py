"""Any element-wise torch optimizer, training only a child."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from childtuning.child import Child
from childtuning.errors import ConfigError, ParameterError
from childtuning.kernels import Places
from childtuning.optim.bucket import Bucket
from childtuning.optim.closure import evaluated
from childtuning.optim.compact import CompactStep
from childtuning.optim.elementwise import check_elementwise
from childtuning.optim.fresh_rows import FreshRows
from childtuning.optim.fused_adamw import can_fuse as can_fuse_update
from childtuning.optim.groups import named_groups
from childtuning.optim.official import OfficialAdamW
from childtuning.optim.planning import check_released, check_trained, plan_compact, plan_masked
from childtuning.optim.reselect import carry_state
from childtuning.patterns import canonical_names
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
        release_gradients: for a fixed child: take its entries' gradient out of each parameter's as the backward pass
            forms it, and free that, so that at most one dense gradient lives at a time. ``.grad`` of partly trained
            parameters is then always ``None``, ``param_groups`` shows the flat tensors in their place, ``step()``
            uses the gradient up, and clipping goes through ``clip_grad_norm_``.
        model: for a fixed child of rows or blocks, or a task-free one of rows: the model whose layers are to form the
            gradients of the trained rows or tiles alone, which is where computation is saved. Its ``Linear``,
            ``Conv``, ``Conv1D`` and ``Embedding`` layers change their class to a subclass until ``remove()``; every
            other use of a weight stays right. Implies ``release_gradients`` for a fixed child.
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
        release_gradients: bool = False,
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        if preset not in (None, "official"):
            raise ConfigError(f"preset must be None or 'official', got {preset!r}. Leave it out.")
        inner = inner or (OfficialAdamW if preset else torch.optim.AdamW)
        rescale = (preset is None or isinstance(child, TaskFree)) if rescale is None else rescale
        check_released(child, release_gradients, preset is not None)
        groups = named_groups(params)
        self.child = child
        self.preset = preset
        self._num_steps = 0
        self._built = False
        scale = 1.0 / child.density if rescale and child.density > 0 else 1.0
        can_fuse = [can_fuse_update(inner, {**options, **group.options}) for group in groups]
        self._plan_again = partial(
            plan_compact, groups, can_fuse=can_fuse, release_gradients=False, model=None
        )
        self._rescales, self._named, self._options = rescale, groups, options
        if isinstance(child, TaskFree) or preset:
            official = preset is not None
            plan = plan_masked(groups, child, scale, can_fuse, official=official, model=model)
        else:
            plan = plan_compact(
                groups, child, scale, can_fuse=can_fuse, release_gradients=release_gradients, model=model
            )
        self._work, self._changed = plan.work, plan.changed
        try:
            check_trained(plan)
            if self._buckets():
                known = inspect.signature(inner).parameters
                for group in groups:
                    own = {key: value for key, value in group.options.items() if key in known}
                    check_elementwise(inner, {**options, **own})
            self.inner = inner(
                [{"params": given, **group.options} for given, group in zip(plan.inner, groups, strict=True)],
                **options,
            )
        except BaseException:
            self.remove()
            raise
        super().__init__(
            [
                {**group.options, "params": shown, **({} if shown else {"param_names": []})}
                for group, shown in zip(groups, plan.shown, strict=True)
            ],
            self.inner.defaults,
        )
        self.state = self.inner.state
        if isinstance(self._changed, FreshRows):
            self._step_supports_amp_scaling = True  # a GradScaler then says in step() that it is there
        plan.freeze()
        self._built = True

    @torch.no_grad()
    def reselect(self, child: Child, second_moments: Mapping[str, Tensor] | None = None) -> None:
        """Train another fixed child from the next step on; entries that stay keep their optimizer state.

        Entries that leave keep the value they have. Schedulers go on: ``param_groups`` are the same dicts.

        Args:
            child: over the same parameters.
            second_moments: by parameter name, dense estimates of the squared gradient (before any division by the
                density), which Adam's second moment of the entries that join starts from; zero where there is none.
        Raises:
            ConfigError: the optimizer trains no fixed child, or does not see whole gradients.
            ParameterError: the child does not fit, or trains nothing.
        """
        if not isinstance(self._work, CompactStep) or self._changed is not None:
            raise ConfigError(
                "another child can be trained only by a fixed child's optimizer that sees whole gradients. "
                "Leave out release_gradients, model and preset."
            )
        self._share_options()
        scale = 1.0 / child.density if self._rescales and child.density > 0 else 1.0
        plan = self._plan_again(child, scale)
        check_trained(plan)
        assert isinstance(plan.work, CompactStep)
        groups = [
            {**{key: value for key, value in group.items() if key != "params"}, "params": given}
            for group, given in zip(self.inner.param_groups, plan.inner, strict=True)
        ]
        inner = type(self.inner)(groups, **self._options)
        named = {name: p for group in self._named for name, p in group.named.items()}
        plain = dict(zip(canonical_names(named), named.values(), strict=True))
        moments = {plain[name]: value * scale**2 for name, value in (second_moments or {}).items()}
        carry_state(self._work, self.inner, plan.work, inner, moments)
        self.child, self._work, self.inner, self.state = child, plan.work, inner, inner.state
        for group, shown in zip(self.param_groups, plan.shown, strict=True):
            group["params"] = [parameter for _, parameter in shown]
            group["param_names"] = [name for name, _ in shown]
        plan.freeze()

    def remove(self) -> None:
        """Give the model its layers and gradients back as they were; call it before another optimizer takes over.

        Only ``release_gradients`` and ``model`` need it. What was trained stays; ``attach()`` goes on.
        """
        if self._changed is not None:
            self._changed.remove()

    def attach(self) -> None:
        """Undo ``remove()``."""
        if self._changed is not None and not self._changed.attached:
            self._changed.attach()
            self._work.draw(self._num_steps)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the child by one step; a closure is evaluated once, before it."""
        if self._changed is not None and not self._changed.attached:
            raise ParameterError("the optimizer was removed from its model. Call attach() before going on.")
        if isinstance(self._changed, FreshRows) and "found_inf" in vars(self):
            del self.found_inf, self.grad_scale  # type: ignore[attr-defined]
            raise ConfigError(
                "a GradScaler does not see the gradients of a task-free child's rows alone. "
                "Leave out model, or the scaler."
            )
        loss = evaluated(closure)
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
        for a task-free one, and under the official preset, the whole unmasked gradient, as in the paper. Where only
        drawn rows have a gradient, the whole one's norm is estimated from them, Σ|g|ᵏ/p in place of Σ|g|ᵏ.

        Args:
            max_norm: the largest norm allowed; infinite only measures.
            norm_type: the p of the norm.
        Returns:
            the norm before clipping, a scalar tensor.
        """
        gradients = self._work.gradients()
        sampled, share = self._work.sampled_gradients()
        norm = nn.utils.get_total_norm(gradients, norm_type)
        if sampled:
            part = nn.utils.get_total_norm(sampled, norm_type) * share ** (-1 / norm_type)
            norm = torch.linalg.vector_norm(torch.stack([norm.to(part.device), part]), norm_type)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if max_norm != float("inf"):
            for gradient in [*gradients, *sampled]:
                gradient.mul_(factor.to(gradient.device))
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, also those that were released or formed for the child alone."""
        super().zero_grad(set_to_none)
        self._work.zero_grad()

    def trained(self) -> list[tuple[nn.Parameter, Places | None]]:
        """Return what is trained: each parameter with the places of its entries in it, or ``None`` for all of it."""
        return list(self._work.trained())

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
        """Copy whole, where torch's own keeps three fields only; but not a ``step`` that a scheduler wrapped."""
        if self._changed is not None:
            raise ParameterError(
                "an optimizer that takes gradients from its model's layers cannot be copied. "
                "Build another and load this one's state_dict()."
            )
        return {key: value for key, value in self.__dict__.items() if key != "step"}

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
        self._work.draw(self._num_steps)
        for bucket, masters in zip(self._buckets(), about["masters"], strict=True):
            if masters is not None:
                bucket.restore(masters)
