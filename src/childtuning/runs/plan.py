"""The memory that training takes, counted from the model's shapes; no weights are loaded.

The model is prepared on the meta device, and then made of fake tensors, which have a shape and a device but no memory.
One training step of it is counted as a budget's is, by ``training_costs``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from childtuning.child import ChildConfig
from childtuning.child.budget import Amount, Costs, Place, Rates, Work
from childtuning.child.eligible import named, unit_axes
from childtuning.child.ranking import Share
from childtuning.child.units import Granularity
from childtuning.errors import ModelError
from childtuning.fisher import training_costs
from childtuning.methods import Combination
from childtuning.tasks import find_kind
from childtuning.training import Method, packaged_model, task_head

_LENGTH = 128  # tokens of an example, as training cuts them
_FLOAT = 4  # bytes of a score, and of a value that a method pulls towards


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by what they are for.

    Attributes:
        method: as it was asked for.
        trained_parameters: entries that are trained, the head included.
        weights: of the model.
        activations: what the forward pass keeps for the backward pass, for a batch of the largest size; ``None`` where
            the method or the model does not let them be counted.
        gradients: the most that is alive at once.
        optimizer: moments, indices and float32 master values.
        peak: the most that is alive at once in a training step: with the activations before the backward pass, or with
            the gradients after it. Without activations where these cannot be counted.
        scoring: the most that is alive in the Fisher pass that chooses the child; 0 where there is none.
        delta: what is saved.
        note: why activations cannot be counted; empty where they are.
    """

    method: str
    trained_parameters: int
    weights: int
    activations: int | None
    gradients: int
    optimizer: int
    peak: int
    scoring: int
    delta: int
    note: str


def plan_memory(
    model: str | None,
    methods: list[str],
    config: ChildConfig | None = None,
    *,
    task_kind: str = "classification",
    num_labels: int = 2,
    batch_size: int = 16,
    max_length: int | None = None,
    bf16: bool = False,
) -> list[MemoryPlan]:
    """Count what training by AdamW would hold, one process, without loading weights.

    Args:
        model: a folder or hub name; ``None``: the packaged model.
        methods: as ``--method`` takes them.
        config: density and granularity; ``None``: each method's own density, single entries.
        task_kind: as ``--task-kind`` takes it.
        num_labels: of the new head.
        batch_size: examples of a batch.
        max_length: tokens of an example; ``None``: 128, or as many as the model has positions.
        bf16: whether the weights are in bf16, which get float32 master values for what is trained; else they are as
            the model's configuration says.
    Raises:
        ModelError: there is no such model, or a method does not apply to it.
    """
    plans = []
    for name in methods:
        empty = _empty_model(model, task_kind, num_labels, bf16=bf16)
        with FakeTensorMode() as fake:
            most = getattr(empty.config, "max_position_embeddings", None) or _LENGTH
            batch = _largest_batch(task_kind, empty.config, batch_size, max_length or min(most, _LENGTH))
        plans.append(_plan(empty, batch, fake, name, config))
    return plans


def _empty_model(name: str | None, task_kind: str, num_labels: int, *, bf16: bool) -> Any:
    import transformers

    auto = getattr(transformers, find_kind(task_kind).auto_model)
    source = str(packaged_model()) if name is None else name
    try:
        config = transformers.AutoConfig.from_pretrained(source, num_labels=num_labels)
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = 0  # training gives it one
        with torch.device("meta"):
            return auto.from_config(config, dtype=torch.bfloat16 if bf16 else config.dtype or torch.float32)
    except Exception as fault:  # any: a configuration may hold anything
        reason = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise ModelError(f"model {source!r} cannot be read ({reason}). Pass a folder or hub name.") from None


def _largest_batch(task_kind: str, config: Any, batch_size: int, max_length: int) -> dict[str, Tensor]:
    kind = find_kind(task_kind)
    if kind.auto_processor == "AutoImageProcessor":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        pixels = torch.zeros(batch_size, getattr(config, "num_channels", 3), height, width, device="cpu")
        return {"pixel_values": pixels, "labels": torch.zeros(batch_size, dtype=torch.long, device="cpu")}
    ids = torch.zeros(batch_size, max_length, dtype=torch.long, device="cpu")
    is_by_token = kind.auto_model in ("AutoModelForTokenClassification", "AutoModelForCausalLM")
    labels = ids if is_by_token else torch.zeros(batch_size, dtype=torch.long, device="cpu")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _faked(model: nn.Module) -> nn.Module:
    """Put fake tensors in the place of an empty model's, in this mode."""
    made: dict[int, Any] = {}  # a tensor that several modules share stays one
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None and id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = (
                        tensor,
                        nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake,
                    )
                held[key] = None if tensor is None else made[id(tensor)][1]
    return model


def _plan(
    model: Any, batch: dict[str, Tensor], mode: FakeTensorMode, name: str, config: ChildConfig | None
) -> MemoryPlan:
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
    with mode:
        net = _faked(prepared.model)
    parameters = named(net)
    sizes = {name: p.numel() for name, p in parameters.items() if p.requires_grad}
    chosen = [
        n for n in sizes if n not in prepared.always and (prepared.eligible is None or n in prepared.eligible)
    ]
    eligible = sum(sizes[name] for name in chosen)
    amounts = {
        name: Amount(size) for name, size in sizes.items() if name in prepared.always or name in chosen
    }
    is_fixed = child.variant == "task-driven" and child.density != 1.0
    if is_fixed:
        units = Share(1.0, granularity=Granularity(granularity), row_axes=unit_axes(net, granularity))
        share = float(child.density)
        amounts |= {name: Amount(round(share * sizes[name]), units.units(name)) for name in chosen}
    with mode:
        costs, note = _costs(net, batch, methods)
    weights = sum(p.nbytes for p in parameters.values())
    optimizer = costs.total("state", amounts)
    *before, after = (round(moment - weights - optimizer) for moment in costs.moments("memory", amounts))
    # L2-SP and RecAdam keep the values that they pull towards.
    pulled = _FLOAT * eligible * any(type(method).inner is not Method.inner for method in methods.methods)
    optimizer = round(optimizer) + pulled
    if is_fixed and granularity == "element":  # taken out of each dense gradient before the next is formed
        after += max((parameters[name].nbytes for name in chosen), default=0)
    scoring = 0
    if is_fixed and child.scores == "fisher":
        with mode:
            scored, _ = _costs(net, batch, methods, training=False)
        everything = {name: Amount(place.numel) for name, place in scored.places.items()}
        held = scored.total("state", everything)
        scoring = round(scored.moments("memory", everything)[1] - held) + _FLOAT * eligible
    return MemoryPlan(
        method=name,
        trained_parameters=sum(amount.num_trained for amount in amounts.values()),
        weights=weights,
        activations=None if note else max(before),
        gradients=after,
        optimizer=optimizer,
        peak=weights + optimizer + max(*before, after),
        scoring=scoring,
        delta=round(costs.total("delta", amounts)),
        note=note,
    )


def _costs(
    model: Any, batch: dict[str, Tensor], methods: Combination, *, training: bool = True
) -> tuple[Costs, str]:
    """Return the costs of a step, and why its activations are not counted; empty where they are."""
    note = "the method runs the model in a way of its own"
    if not any(map(_changes_passes, methods.methods)):
        log = logging.getLogger("torch._subclasses.fake_tensor")
        was, log.disabled = log.disabled, True  # it shows a traceback
        try:
            return training_costs(model, batch, training=training), ""
        except Exception as fault:  # any: the forward pass asks for values, and fake tensors have none
            length = batch["input_ids"].shape[1] if "input_ids" in batch else 0
            most = getattr(model.config, "max_position_embeddings", None) or length
            if length > most:
                raise ModelError(
                    f"the model has {most} positions, got {length}. Pass a shorter --max-length."
                ) from None
            reason = (str(fault).splitlines() or [""])[0]
            note = f"the model does not run without values ({type(fault).__name__}: {reason[:100]})"
        finally:
            log.disabled = was
    places = {name: Place(0, tuple(p.shape), p.element_size(), Work()) for name, p in named(model).items()}
    return Costs((Work(),), (Work(),), (0,), places, Rates(1.0, 1.0, 1.0)), note


def _changes_passes(method: Method) -> bool:
    """Tell whether a method runs the model in another way than once a step."""
    own = type(method)
    return any(getattr(own, hook) is not getattr(Method, hook) for hook in ("begin", "loss", "training_step"))
