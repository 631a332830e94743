"""Any element-wise torch optimizer, training only a child."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from childtuning.child.child import Child
from childtuning.child.eligible import match_names
from childtuning.child.pieces import is_sharded
from childtuning.child.task_free import TaskFree
from childtuning.child.units import Part
from childtuning.errors import ConfigError, ParameterError
from childtuning.fast.runs import Runs
from childtuning.optim.d_step import d_step, hidden
from childtuning.optim.f_step import f_step
from childtuning.optim.frozen import Frozen
from childtuning.optim.gradients import (
    DrawnRows,
    Release,
    WholeGradients,
    check_first_gradients,
    check_released,
    check_sharded,
    no_scaler,
    total_norm,
)
from childtuning.optim.groups import (
    canonical_names_of,
    check_arguments,
    check_elementwise,
    named_groups,
    refuse_closures,
)
from childtuning.optim.inner import OfficialAdamW, evaluated
from childtuning.optim.one_pass import OnePass
from childtuning.optim.state import (
    about_child,
    carry_over,
    from_version_1,
    load_by_name,
    pieces_held,
    scaled_moments,
    settings,
    state_by_name,
    with_state_hooks,
)
from childtuning.optim.trained import Trained
from childtuning.ranks import Ranks, check_same_child


@with_state_hooks
class ChildOptimizer(Optimizer):
    """Train a child network with an optimizer from ``torch.optim``. [Xu et al. 2021, Algorithm 1]

    With a ``Child`` (task-driven, or any fixed one) the entries outside it are frozen bitwise, weight decay and
    momentum included, and the inner optimizer's state exists for the child's entries only: it works on flat tensors
    that hold nothing else. A parameter with no trained entry gets ``requires_grad=False``. The child's gradient is
    divided by its density, as the document has it; the official code leaves that away for a fixed child, and lets decay
    move what is outside it (``preset="official"``).

    With ``TaskFree`` every parameter is trained; each step a fresh mask multiplies the accumulated gradient, which is
    divided by the density, before the inner optimizer's moments see it.

    Whatever is trained in bf16 or fp16 has float32 master values. It is a ``torch.optim.Optimizer``: schedulers,
    Accelerate, GradScaler and the Hugging Face Trainer use it as one. Values that something else writes into the
    child's entries between steps are noticed and kept; a write to a frozen entry is refused.

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
            parameters is then ``None``, ``param_groups`` shows the flat tensors in their place, and ``step()`` uses the
            gradient up. Only this optimizer's ``zero_grad`` and ``clip_grad_norm_`` reach it; ``step()`` warns else.
        model: for a fixed child of rows, columns or blocks, or a task-free one of rows or columns: the model whose
            layers are to form the gradients of the trained units alone, which is where computation is saved. Its
            ``Linear``, ``Conv``, ``Conv1D``, ``Embedding`` and ``Dropout`` layers change their class to a subclass
            until ``remove()``; other uses of a weight stay right. Implies ``release_gradients`` for a fixed child.
        max_grad_norm: clip to this norm in every step, where a trainer's own clipping counts frozen entries.
        options: passed to the inner optimizer (lr, weight_decay, betas, …).
    Raises:
        ConfigError: the inner optimizer mixes coordinates, or an option is unknown.
        ParameterError: names, shapes or patterns do not fit, nothing would be trained, a parameter is sharded, or the
            processes of a group hold different children.

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
        max_grad_norm: float | None = None,
        **options: Any,
    ) -> None:
        check_arguments(child, inner, preset, max_grad_norm)
        self.max_grad_norm = max_grad_norm
        inner = inner or (OfficialAdamW if preset else torch.optim.AdamW)
        self.child, self.preset = child, preset
        self._is_fixed = isinstance(child, Child) and preset is None
        check_released(self._is_fixed, release_gradients, model)
        self._rescales = (preset is None or isinstance(child, TaskFree)) if rescale is None else rescale
        self._named = named_groups(params)
        self._names = canonical_names_of(self._named, child, is_fixed=self._is_fixed)
        self._options, self._num_steps, self._built, self._is_removed = options, 0, False, True
        self._released = self._is_fixed and (release_gradients or model is not None)
        self._changed: Release | DrawnRows | WholeGradients = WholeGradients()
        self._frozen: Frozen | None = None
        self._trained = self._lay_out(child)
        self._is_sharded = any(is_sharded(p) for group in self._named for p in group.named.values())
        if self._is_sharded:
            parameters = {n: p for group in self._named for n, p in group.named.items()}
            check_sharded(parameters, preset, is_released=release_gradients and model is None)
            self._step_supports_amp_scaling = True  # as for drawn rows, below
        check_same_child(self.child.fingerprint())
        self._check_inner(inner)
        try:
            self.inner = inner(self._inner_groups([group.options for group in self._named]), **options)
        except TypeError as fault:
            raise ConfigError(f"{inner.__name__} does not take these options ({fault}).") from None
        self._one_pass = OnePass(self._trained, self.inner)
        super().__init__(
            [
                {**group.options, **self._shown(trained)}
                for group, trained in zip(self._named, self._trained, strict=True)
            ],
            self.inner.defaults,
        )
        self.state = self.inner.state
        if self._released:
            self._changed = Release(list(chain.from_iterable(self._trained)), model)
            self._step_supports_amp_scaling = Ranks.everyone().size > 1  # as below
        elif isinstance(child, TaskFree) and model is not None and preset is None:
            self._changed = DrawnRows(child, list(chain.from_iterable(self._trained)), model)
            self._step_supports_amp_scaling = True  # a GradScaler then says in step() that it is there
        self.attach()
        self._built = True

    def _check_inner(self, inner: type[Optimizer]) -> None:
        if not self._is_fixed:
            refuse_closures(inner)
        if self._is_sharded or (self._is_fixed and any(t.runs for t in chain.from_iterable(self._trained))):
            for group in self._named:
                check_elementwise(inner, self._options, group.options)

    def _lay_out(self, child: Child | TaskFree) -> list[list[Trained]]:
        """Return the trained part of each group's parameters, and record what is frozen.

        Raises:
            ParameterError: the child does not fit, or nothing would be trained.
        """
        parameters = {self._names[n]: p for group in self._named for n, p in group.named.items()}
        shapes = {name: p.shape for name, p in parameters.items()}
        scale = 1.0 / child.density if self._rescales and child.density > 0 else 1.0
        if isinstance(child, TaskFree):
            exempt = match_names(child.always, shapes) if self.preset is None else set()
            draws = {n for n in shapes if n not in exempt} if child.density < 1 else set()
            parts = {n: Part(tuple(shape), None, child.units(n)) for n, shape in shapes.items()}
        elif self._is_fixed:
            parts, draws = child.resolve(shapes), set()
        else:  # the official code's: everything is trained under a fixed mask
            parts = {n: Part(tuple(shape)) for n, shape in shapes.items()}
            resolved = child.resolve(shapes)
            self._masks = {n: resolved[n].mask() for n in child.parts if not resolved[n].is_whole}
            draws = set(self._masks)
        for name, parameter in parameters.items():
            is_trained = not parts[name].is_empty and (self._is_fixed or parameter.requires_grad)
            if is_trained and not parameter.is_floating_point():
                raise ParameterError(
                    f"{name!r} is {parameter.dtype}, and only floating-point parameters are trained. "
                    "Leave it out of the child and of always."
                )
        scaled = draws
        if self._is_fixed and isinstance(child, Child):
            scaled = {name for name, part in parts.items() if part is child.parts.get(name)}
        trained = [
            [
                Trained(
                    name,
                    parameters[name],
                    parts[name],
                    scale if name in scaled else 1.0,
                    draws=name in draws,
                    released=self._released,
                )
                for name in map(self._names.__getitem__, group.named)
                if not parts[name].is_empty and parameters[name].is_floating_point()
            ]
            for group in self._named
        ]
        if self._is_fixed:
            runs = {t.name: t.runs for t in chain.from_iterable(trained)}
            self._frozen = Frozen(((n, parameters[n], part) for n, part in parts.items()), runs)
        if not any(self._is_fixed or t.holder.requires_grad for t in chain.from_iterable(trained)):
            raise ParameterError(
                "the child trains no entry of these parameters. Raise the density, or pass always."
            )
        return trained

    def _inner_groups(self, options: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the parameter groups of the inner optimizer."""
        pairs = zip(options, self._trained, strict=True)
        return [{**own, "params": [t.value for t in group]} for own, group in pairs]

    def _shown(self, trained: list[Trained]) -> dict[str, Any]:
        """Return a group's visible tensors by name: those whose ``.grad`` holds the gradients."""
        shown = [(t.name, t.value if t.released else t.holder) for t in trained]
        return {"params": shown} if shown else {"params": [], "param_names": []}

    def _mask(self, t: Trained, step: int) -> Tensor | None:
        if not t.draws:
            return None
        if isinstance(self.child, TaskFree):
            return self.child.mask(t.name, t.piece.shape, step, t.piece)
        return self._masks[t.name]

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
        if not self._is_fixed or self._released or self._is_sharded or not isinstance(child, Child):
            raise ConfigError(
                "another fixed child can be trained only by a fixed child's optimizer that sees whole gradients. Pass "
                "a Child, leave out release_gradients, model and preset, and do not shard the model."
            )
        scale = 1.0 / child.density if self._rescales and child.density > 0 else 1.0
        shapes = {self._names[n]: p.shape for group in self._named for n, p in group.named.items()}
        moments = scaled_moments(second_moments or {}, shapes, scale**2)
        self._share_options()
        old, old_inner, frozen = self._trained, self.inner, self._frozen
        if frozen is not None:
            frozen.check()
            frozen.release()
        try:
            self._trained = self._lay_out(child)
            self._check_inner(type(old_inner))
            kept = [{k: v for k, v in group.items() if k != "params"} for group in old_inner.param_groups]
            self.inner = type(old_inner)(self._inner_groups(kept), **self._options)
            carry_over(old, old_inner, self._trained, self.inner, moments)
        except BaseException:
            self._trained, self.inner, self._frozen = old, old_inner, frozen
            if frozen is not None:
                frozen.freeze()
            raise
        self.child, self.state = child, self.inner.state
        self._one_pass = OnePass(self._trained, self.inner)
        for group, trained in zip(self.param_groups, self._trained, strict=True):
            group["params"], group["param_names"] = [t.holder for t in trained], [t.name for t in trained]
        assert self._frozen is not None
        self._frozen.freeze()

    def observe(self) -> None:
        """Let frozen parameters receive gradients too, to be read before a ``reselect``; they stay frozen."""
        if self._frozen is not None:
            self._frozen.observe()

    def accept_weights(self) -> None:
        """Take the current weights as the frozen ones: call it after changing frozen entries on purpose."""
        if self._frozen is not None:
            self._frozen.expect_weights(None)

    def remove(self) -> None:
        """Restore the model's layers, gradients and ``requires_grad`` flags.

        Call it before another optimizer takes over. Trained values and gradients stay; ``attach()`` resumes.
        """
        self._changed.remove()
        if self._frozen is not None:
            self._frozen.release()
        self._is_removed = True

    def attach(self) -> None:
        """Undo ``remove()``; where that is refused, the flags stay as they are."""
        frozen = self._frozen if self._is_removed else None
        if frozen is not None:
            frozen.freeze()  # first: hooks need parameters that require a gradient
        try:
            if not self._changed.attached:
                self._changed.attach()
                self._changed.draw(self._num_steps)
        except BaseException:
            if frozen is not None:
                frozen.release()
            raise
        self._is_removed = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the child by one step; a closure is evaluated once, before it.

        Raises:
            ParameterError: nothing has a gradient at the first step, the model was moved, cast, resized or unfrozen
                since the optimizer was built, or frozen entries were written to.
        """
        if self._is_removed:
            raise ParameterError("the optimizer was removed from its model. Call attach() before going on.")
        if "found_inf" in vars(self):
            del self.found_inf, self.grad_scale  # type: ignore[attr-defined]
            raise no_scaler()
        loss = evaluated(closure)
        self._share_options()
        trained = self._check()
        if self.max_grad_norm is not None:
            self.clip_grad_norm_(self.max_grad_norm)
        free = self.child if isinstance(self.child, TaskFree) else None
        done, rest = [], trained
        if free is not None or self._is_fixed:
            done, rest = self._one_pass.run(self._trained, self.inner, free, self._num_steps)
        with hidden(done):
            if self._is_fixed:
                d_step(rest, self.inner)
            else:
                f_step(rest, self.inner, self._mask, self._num_steps)
        if self._frozen is not None:
            self._frozen.note()
        for t in trained:
            t.forget()
        self._num_steps += 1
        self._changed.draw(self._num_steps)
        return loss

    def _check(self) -> list[Trained]:
        """Return what is trained; raise if the step would train anything but the child, or nothing."""
        trained = self._collect()
        if self._frozen is not None:
            self._frozen.check()
        if self._num_steps == 0:
            check_first_gradients(trained, are_copies=not (self._is_sharded or self._released))
        return trained

    def _collect(self) -> list[Trained]:
        """Bring together this step's gradients, from layers and other processes; return what is trained."""
        trained = list(chain.from_iterable(self._trained))
        for t in trained:
            t.check()
        self._changed.check(clips=self.max_grad_norm is not None)
        self._changed.average()
        return trained

    def _share_options(self) -> None:
        """Pass on what schedulers wrote into the outer groups."""
        for ours, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: value for key, value in ours.items() if key not in ("params", "param_names")})

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the norm of the gradients that this step uses; replaces ``torch.nn.utils.clip_grad_norm_``.

        For a fixed child that is the gradient of the child's entries alone (before the division by the density);
        for a task-free one, and under the official preset, the whole unmasked gradient, as in the paper. Where only
        drawn rows have a gradient, the whole one's norm is estimated from them, Σ|g|ᵏ/p in place of Σ|g|ᵏ. The
        gradients are scaled where they lie, as torch does it: ``.grad`` of a partly trained parameter as a whole.

        Args:
            max_norm: the largest norm allowed; infinite only measures.
            norm_type: the p of the norm.
        Returns:
            the norm before clipping, a scalar tensor.
        """
        trained = self._collect()
        gradients = [gradient for t in trained if (gradient := t.gradient()) is not None]
        norm = total_norm(trained, norm_type, self.child.density)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if max_norm != float("inf") and (norm.device.type != "cpu" or float(factor) < 1):
            for gradient in gradients:
                gradient.mul_(factor.to(gradient.device))
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, including those that were released or formed for the child alone."""
        super().zero_grad(set_to_none)
        for t in chain.from_iterable(self._trained):
            t.forget()
        if self._frozen is not None:
            self._frozen.forget()
        self._changed.forget()

    def trained(self) -> list[tuple[nn.Parameter, Runs | None]]:
        """Return what is trained: each parameter with the runs of its entries in it, or ``None`` for all of it."""
        return [(t.parameter, t.runs) for t in chain.from_iterable(self._trained)]

    def __repr__(self) -> str:
        return f"ChildOptimizer({type(self.inner).__name__}, {self.child!r})"

    @property
    def structured(self) -> tuple[str, ...]:
        """Names of the parameters without a dense gradient."""
        return tuple(t.name for t in chain.from_iterable(self._trained) if t.leaf is not None)

    @property
    def num_state_bytes(self) -> int:
        """Bytes held beside the model and its gradients: the inner state, values, indices and compact gradients."""
        held = [v for state in self.inner.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(v.nbytes for v in chain(held, *(t.held() for t in chain.from_iterable(self._trained))))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse groups after construction, with a ParameterError."""
        if self._built:
            raise ParameterError(
                "groups cannot be added to a ChildOptimizer. Build a new one with all of them."
            )
        super().add_param_group(param_group)

    def local_shapes(self) -> dict[str, torch.Size]:
        """Return by name the shape of what this process holds of a parameter's state and master values."""
        return {t.name: t.value.shape for t in chain.from_iterable(self._trained)}

    def __getstate__(self) -> dict[str, Any]:
        """Copy all fields and gradients, but not a ``step`` wrapped by a scheduler; torch copies three fields only."""
        if not isinstance(self._changed, WholeGradients):
            raise ParameterError(
                "an optimizer that takes gradients from its model's layers cannot be copied. "
                "Build another and load this one's state_dict()."
            )
        kept = {key: value for key, value in self.__dict__.items() if key != "step"}
        trained = list(chain.from_iterable(self._trained))
        return {**kept, "_gradients": [(t.holder.grad, t.value.grad) for t in trained]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy with its gradients, which copied parameters lose."""
        gradients = state.pop("_gradients")
        super().__setstate__(state)
        for t, (dense, compact) in zip(chain.from_iterable(self._trained), gradients, strict=True):
            t.holder.grad = dense if t.holder.grad is None else t.holder.grad
            if not t.is_direct:
                t.value.grad = compact

    @property
    def _settings(self) -> dict[str, Any]:
        return settings(self.child, self.inner, rescale=self._rescales, preset=self.preset)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return what a bitwise resume needs, keyed by parameter name: inner state, options, masters, step, child.

        Of a sharded model it holds this process's pieces; ``childtuning.distributed.save`` writes them all.
        """
        self._share_options()
        about = {**self._settings, "num_steps": self._num_steps}
        if self._frozen is not None:
            about["frozen_bits"] = self._frozen.checksums()
        if (pieces := pieces_held(self._trained)) is not None:
            about["pieces"] = pieces
        return {**state_by_name(self._trained, self.inner), "child": about}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Resume from a ``state_dict``; load the model's weights separately, before or after.

        Raises:
            ParameterError: it is that of another child, or of other parameters.
        """
        about = about_child(state_dict, self._settings, self._trained)
        is_old = "version" not in about
        saved = from_version_1(state_dict, self._trained, is_fixed=self._is_fixed) if is_old else state_dict
        load_by_name(saved, self._trained, self.inner)
        for ours, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            ours.update({key: value for key, value in inner.items() if key != "params"})
        self._num_steps = about["num_steps"]
        if self._frozen is not None:
            self._frozen.expect_weights(about.get("frozen_bits"))
        self._changed.draw(self._num_steps)
