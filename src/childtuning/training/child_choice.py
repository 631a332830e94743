"""Choose the child of a model, as a configuration describes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedModel

from childtuning.child import (
    Budget,
    Child,
    ChildConfig,
    TaskFree,
    magnitude_scores,
    official_child,
    random_child,
    select_child,
)
from childtuning.child.budget import Costs, check_budget
from childtuning.child.eligible import as_patterns, match_names, named, unit_axes
from childtuning.child.eligible import eligible as eligible_parameters
from childtuning.errors import ConfigError, ParameterError
from childtuning.fisher import fisher_information
from childtuning.fisher.information import StopFn
from childtuning.fisher.losses import LossFn
from childtuning.training.on_disk import stored_shapes

Progress = Callable[[int, int | None], None]
Scores = dict[str, Tensor]
ScoreFn = Callable[[Callable[[], Scores]], Scores]
_LOADED = "_is_hf_initialized"  # set by transformers on parameters loaded from a checkpoint
OFFICIAL_ELIGIBLE = ("*layer*",)


def task_head(model: nn.Module) -> tuple[str, ...]:
    """Return the parameter names of a Hugging Face model's task head: all those outside its pretrained body.

    The body is the architecture's base model, as ``AutoModel`` builds it; if there is none, the submodules that are
    pretrained models themselves. A language-modelling head is pretrained, so such models have no task head; nor does
    a plain ``nn.Module``.
    """
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is not None:
        return ()
    bodies = {path: module for path, module in model.named_children() if isinstance(module, PreTrainedModel)}
    inside = _base_names(model)
    if inside is None:
        kept = {id(p) for body in bodies.values() for p in body.parameters()}
        return tuple(name for name, p in named(model, sharded=True).items() if kept and id(p) not in kept)
    prefixes = ("", *(f"{path}." for path in (model.base_model_prefix, *bodies) if path))
    own = {id(p): set[str]() for p in model.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own[id(parameter)].add(name)
    is_inside = {
        key: any(name.removeprefix(prefix) in inside for name in names for prefix in prefixes)
        for key, names in own.items()
    }
    if not any(is_inside.values()):
        return ()
    return tuple(name for name, p in named(model, sharded=True).items() if not is_inside[id(p)])


def new_parameters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters missing from the checkpoint, as marked by ``from_pretrained``.

    For example, the pooler, if the checkpoint was trained without one. A copy of a model has lost its marks; then the
    model's folder tells. () for a model that was not loaded. Resized embeddings are not new.
    """
    marked = {name: getattr(p, _LOADED, False) for name, p in named(model, sharded=True).items()}
    if not any(marked.values()):
        stored = stored_shapes(model)
        marked = {name: not stored or name in stored for name in marked}
    resized = resized_embeddings(model)
    return tuple(name for name, is_loaded in marked.items() if not is_loaded and name not in resized)


def resized_embeddings(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the embeddings, of the input and the output, of another shape than in the model's folder."""
    if not isinstance(model, PreTrainedModel):
        return ()
    try:
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
    except NotImplementedError:  # a model without a table of tokens
        return ()
    ids = {id(p) for layer in layers if isinstance(layer, nn.Module) for p in layer.parameters(recurse=False)}
    found = {name: p for name, p in named(model, sharded=True).items() if id(p) in ids}
    stored = stored_shapes(model) if found else {}
    return tuple(name for name, p in found.items() if stored.get(name, p.shape) != p.shape)


def _base_names(model: PreTrainedModel) -> set[str] | None:
    """The parameter names of the architecture's base model, built on the meta device; ``None`` without one."""
    base = AutoModel._model_mapping.get(type(model.config), None)
    base = base[0] if isinstance(base, (tuple, list)) else base
    if base is None:
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return {name for name, _ in base(model.config).named_parameters(remove_duplicate=False)}
    except Exception:  # a configuration that the base model does not accept
        return None


def as_child(child: Any, density: float | Literal["auto"] | None) -> ChildConfig | Child | TaskFree:
    """Return what ``child=`` stands for: a name becomes a configuration.

    Raises:
        ConfigError: for an unknown name, for something else, and for a density beside anything but a name.
    """
    if isinstance(child, str):
        return ChildConfig.of_method(child, density)
    if not isinstance(child, (ChildConfig, Child, TaskFree)):
        raise ConfigError(
            f"child must be a method's name, a ChildConfig, a Child or a TaskFree, got {child!r:.80}. Pass 'child-d'."
        )
    if density is not None:
        raise ConfigError(
            f"density belongs to the name of a method, got one beside a {type(child).__name__}. Leave it out."
        )
    return child


def choose_child(
    config: ChildConfig,
    model: nn.Module,
    batches: Callable[[], Iterable[Any]],
    *,
    always: Sequence[str],
    scores: Scores | ScoreFn | None = None,
    progress: bool | Progress = False,
    loss_fn: LossFn | None = None,
    costs_fn: Callable[[], Costs] | None = None,
    share: bool = False,
) -> Child | TaskFree:
    """Choose the child that a configuration describes.

    Args:
        config: how to choose it.
        model: the pretrained model with its head.
        batches: makes the batches of the task's training set; called only if scores need them.
        always: names or patterns of parameters trained in full besides the child; used if the configuration has none.
        scores: precomputed scores; or a function that takes the Fisher pass and returns its scores, or cached scores
            of an equal pass.
        progress: as for ``fisher_information``.
        loss_fn: the loss of the Fisher pass, as for ``fisher_information``; ``None``: the model's own.
        costs_fn: counts a training step; called if the configuration has a budget.
        share: let all processes share the Fisher pass; all of them call this.
    Raises:
        ParameterError: when a pattern matches no parameter.
    """
    always = config.always if config.always is not None else as_patterns(always)
    if config.variant == "task-free":
        match_names(always, named(model, sharded=True))
        if config.eligible is not None:
            _freeze_others(model, config.eligible, always)
        axes = unit_axes(model, config.granularity)
        return TaskFree(_number(config.density), config.seed, config.granularity, always, axes)
    if config.density == 1.0 and not config.preset and config.budget is None:
        return _whole(model, config.eligible, always)
    if callable(scores):
        score_fn, scores = scores, None
    else:
        score_fn, scores = _made, None if scores is None else in_model_order(model, scores)
    if config.preset == "official":
        if scores is None:
            scores = score_fn(lambda: _official_scores(config, model, batches, progress))
        return official_child(scores, _number(config.density))
    options: dict[str, Any] = {
        "scope": config.scope,
        "granularity": config.granularity,
        "row_axes": unit_axes(model, config.granularity),
        "eligible": config.eligible,
        "always": always,
    }
    if config.scores == "random" and scores is None:
        return random_child(
            model,
            _number(config.density),
            seed=config.seed,
            **options,
        )
    if config.budget is None:
        options |= {"density": config.density, "mass": config.mass, "lowest": config.lowest}
    else:
        budget, costs = Budget.parse(config.budget), None if costs_fn is None else costs_fn()
        if costs is not None:
            check_budget(budget, costs, always)  # before the scores take their time
        options |= {"budget": budget, "costs": costs}
    choose = partial(select_child, **options)
    if scores is None and config.scores == "magnitude":
        scores = magnitude_scores(model, eligible=config.eligible, always=always)
    if scores is None:
        stop_fn = StopWhenStable(choose) if config.fisher_examples == "auto" else None
        scores = score_fn(
            lambda: fisher_scores(
                config,
                model,
                batches(),
                always=always,
                progress=progress,
                loss_fn=loss_fn,
                stop_fn=stop_fn,
                share=share and stop_fn is None,
            )
        )
    return choose(scores)


class StopWhenStable:
    """End a Fisher pass once more examples hardly change the child.

    After every ``EXAMPLES`` examples, from ``LEAST`` on, it compares the child of all so far with the one before. What
    is rarer than one example in some hundreds may not have been seen by then.

    Args:
        choose: the selection.
    """

    EXAMPLES = 64
    LEAST = 256
    OVERLAP = 0.98

    def __init__(self, choose: Callable[[Mapping[str, Tensor]], Child]) -> None:
        self.choose = choose
        self._last: Child | None = None
        self._next = self.EXAMPLES

    def __call__(self, sums: Mapping[str, Tensor], done: int) -> bool:
        """Tell whether to stop after ``done`` examples."""
        if done < self._next:
            return False
        self._next = done + self.EXAMPLES
        if not any(bool(total.any()) for total in sums.values()):
            return False
        last, child = self._last, self.choose(sums)
        self._last = child
        if last is None or done < self.LEAST:
            return False
        sizes = sorted((last.num_trained, child.num_trained))
        return child.overlap(last) * sizes[0] / max(sizes[1], 1) >= self.OVERLAP


def saves_computation(child: Child | TaskFree) -> bool:
    """Return whether a step with ``model=`` computes less: for a child of rows, columns or blocks."""
    if isinstance(child, TaskFree):
        return child.granularity in ("row", "column") and child.density < 1
    return any(
        part.granularity.kind in ("row", "block") and not (part.is_empty or part.is_whole)
        for part in child.parts.values()
    )


def fisher_scores(
    config: ChildConfig,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    always: Sequence[str],
    progress: bool | Progress = False,
    loss_fn: LossFn | None = None,
    stop_fn: StopFn | None = None,
    share: bool = False,
) -> dict[str, Tensor]:
    """Estimate Fisher information with the options of a configuration."""
    return fisher_information(
        model,
        batches,
        loss_fn,
        estimator=config.estimator,
        labels=config.labels,
        eligible=config.eligible,
        always=always,
        progress=progress,
        seed=config.seed,
        scores_device=_kept_on(config),
        scores_dtype=torch.bfloat16 if config.fisher_dtype == "bfloat16" else None,
        stop_fn=stop_fn,
        share=share,
    )


def in_model_order(model: nn.Module, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return scores in the order of the model's parameters, which breaks ties; files do not preserve it.

    Raises:
        ParameterError: when the model has no parameter of a score's name and shape.
    """
    shapes = {name: p.shape for name, p in named(model, sharded=True).items()}
    for name, score in scores.items():
        if shapes.get(name) != score.shape:
            raise ParameterError(
                f"the scores have {name!r} of shape {list(score.shape)}, but the model does not. Score this model."
            )
    return {name: scores[name] for name in shapes if name in scores}


def fisher_sample(
    num_examples: int,
    limit: int | Literal["auto"] | None,
    seed: int,
    lengths: Sequence[int] | None = None,
    batch_size: int = 1,
) -> list[int]:
    """Return the indices of the examples for Fisher information, in the order of the pass.

    All, or a random ``limit`` of them, sorted by length where that is known; for ``auto`` all in random order, sorted
    within each group that the child is looked at after, of whole batches.
    """
    order = list(range(num_examples))
    if limit == "auto" or (limit is not None and limit < num_examples):
        order = torch.randperm(
            num_examples, generator=torch.Generator().manual_seed(seed), device="cpu"
        ).tolist()
    whole_batches = -(-StopWhenStable.EXAMPLES // batch_size) * batch_size
    group = num_examples if limit is None else whole_batches if limit == "auto" else limit
    order = order if limit == "auto" else sorted(order[:limit])
    found = []
    for start in range(0, len(order), max(group, 1)):
        found += sorted(
            order[start : start + group], key=lengths.__getitem__ if lengths is not None else None
        )
    return found


def _whole(model: nn.Module, eligible: Sequence[str] | None, always: Sequence[str]) -> Child:
    chosen = {} if eligible == () else eligible_parameters(model, eligible, always)
    return Child.whole({name: p.shape for name, p in chosen.items()}, always=always)


def _official_scores(
    config: ChildConfig, model: nn.Module, batches: Callable[[], Iterable[Any]], progress: bool | Progress
) -> Scores:
    """The official code's scores: encoder layers only, its Fisher estimate in train mode."""
    return fisher_information(
        model,
        batches(),
        estimator="per-batch",
        eligible=config.eligible or OFFICIAL_ELIGIBLE,
        progress=progress,
        training=True,
        seed=config.seed,
        scores_device=_kept_on(config),
    )


def _kept_on(config: ChildConfig) -> str | None:
    return None if config.fisher_device == "model" else config.fisher_device


def _made(make_fn: Callable[[], Scores]) -> Scores:
    return make_fn()


def _number(density: float | str) -> float:
    """The density, in cases where ``ChildConfig`` allows only numbers."""
    assert not isinstance(density, str)
    return density


def _freeze_others(model: nn.Module, eligible: Sequence[str], always: Sequence[str]) -> None:
    plain = named(model, sharded=True)
    trained = match_names((*eligible, *always), plain)
    for name, parameter in plain.items():
        if name not in trained:
            parameter.requires_grad_(False)


@contextmanager
def fisher_bar() -> Iterator[Progress]:
    """Yield a progress function that draws a bar on standard error from its first call on."""
    bars: list[tqdm] = []

    def advance(done: int, total: int | None) -> None:
        if not bars:
            bars.append(tqdm(total=total, desc="Fisher information", unit=" examples"))
        bars[0].update(done - bars[0].n)

    try:
        yield advance
    finally:
        for bar in bars:
            bar.close()
