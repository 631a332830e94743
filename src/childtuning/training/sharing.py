"""Several processes see the batches that one would see: each batch is cut across them, and its loss weighed.

With n_rm of an update's n examples (or predicted tokens) in micro-batch m of M on rank r of W, its mean has the weight
W · M · n_rm / n, so that the average over ranks and micro-batches is the mean over the update. A rank without an
example takes one with the weight 0.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.training_args import ParallelMode

from childtuning.child import Child, ChildConfig, TaskFree
from childtuning.child.eligible import named
from childtuning.child.pieces import piece_of
from childtuning.delta.delta import persistent_buffers
from childtuning.errors import ConfigError
from childtuning.fisher.batches import is_token_level, num_examples
from childtuning.fisher.without_trace import without_trace
from childtuning.ranks import Ranks
from childtuning.training.further_pass import IGNORED, predicted_labels, unwrapped
from childtuning.training.method import Method

_FREED = "free_full_weight"  # transformers' word for: gather for each pass, and free
_COUNTS, _LABELS, SHARE = "_counts", "_labels", "_share"


def shared_loader(
    dataset: Any,
    batches: Sampler[list[int]],
    collate: Callable[..., Any],
    accelerator: Accelerator,
    **options: Any,
) -> DataLoader:
    """Return a loader of this process's share of each batch.

    Args:
        dataset: by index.
        batches: the whole batches, the same on every process.
        collate: makes a batch of a list of examples.
        accelerator: moves them to its device.
        options: of the ``DataLoader``.
    """
    ranks = Ranks.everyone()
    if ranks.size == 1:
        return accelerator.prepare(DataLoader(dataset, batch_sampler=batches, collate_fn=collate, **options))

    def collated(items: list[tuple[Any, bool]]) -> dict[str, Any]:
        batch = collate([example for example, _ in items])
        return {**batch, _COUNTS: torch.tensor([counts for _, counts in items], device="cpu")}

    loader = DataLoader(
        _Marked(dataset), batch_sampler=_Shares(batches, ranks), collate_fn=collated, **options
    )
    return prepare_data_loader(
        loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True
    )


class _Shares(Sampler[list[int]]):
    """This process's share of each batch; ``~i`` is example i, which another process counts."""

    def __init__(self, batches: Any, ranks: Ranks) -> None:
        self.batches, self.ranks = batches, ranks

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch[self.ranks.rank :: self.ranks.size] or [~batch[0]]

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(epoch)


class _Marked(Dataset):
    """Examples, each with whether it counts."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, bool]:
        return self.dataset[max(index, ~index)], index >= 0


def weigh(samples: list[Any], model: Any, *, divides_by_items: bool, is_models: bool) -> None:
    """Put the weight of its loss into each sample, in place of the mark of the examples that count.

    Args:
        samples: the micro-batches of an update; those that a trainer makes itself keep the weight 1.
        model: which says whether labels are shifted.
        divides_by_items: whether the loss is a sum divided by the items of the update: it has its weight already.
        is_models: whether the model computes the loss. What another is a mean of is not known: one process adds its
            micro-batches up as transformers does.
    """
    ranks = Ranks.everyone()
    is_shared = bool(samples) and _COUNTS in samples[0]
    is_known = is_models and not divides_by_items and _are_labelled(samples)
    if not is_shared and (ranks.size > 1 or len(samples) < 2 or not is_known):
        return
    counts = [_num_items(sample, model) for sample in samples]
    total = int(ranks.sum_(torch.stack(counts).sum())) if ranks.size > 1 else sum(map(int, counts))
    for sample, own in zip(samples, map(int, counts), strict=True):
        sample.pop(_COUNTS, None)
        whole = ranks.size * len(samples) * own / max(total, 1)
        sample[SHARE] = float(own > 0) if divides_by_items else whole


def hide_uncounted(sample: Any) -> Any:
    """Return a sample in which what another process counts has no label: transformers counts the labels."""
    if not isinstance(sample, Mapping):  # a trainer that makes its batches itself
        return sample
    counts, labels = sample.get(_COUNTS), sample.get("labels")
    if counts is None or bool(counts.all()) or not isinstance(labels, Tensor):
        return sample
    return {**sample, "labels": torch.full_like(labels, IGNORED), _LABELS: labels}


def show_uncounted(sample: Any) -> Any:
    """Return a sample with all its labels: what they say of others' examples weighs nothing."""
    if not isinstance(sample, Mapping) or _LABELS not in sample:
        return sample
    return {**{k: v for k, v in sample.items() if k != _LABELS}, "labels": sample[_LABELS]}


def _are_labelled(samples: list[Any]) -> bool:
    labels = [sample.get("labels") if isinstance(sample, dict) else None for sample in samples]
    return all(isinstance(some, Tensor) and some.dim() > 0 for some in labels)


def _num_items(sample: Mapping[str, Any], model: Any) -> Tensor:
    """Count the predicted tokens of a sample, or its examples."""
    counts, labels = sample.get(_COUNTS), sample.get("labels")
    if counts is not None and not bool(counts.any()):
        return counts.sum()
    if is_token_level(labels):
        return (predicted_labels(unwrapped(model), labels, labels.shape[-1]) != IGNORED).sum()
    if counts is None:
        return torch.tensor(len(sample["labels"]), device="cpu")
    held = {key: value for key, value in sample.items() if key != _COUNTS}
    return torch.tensor(num_examples(held), device=counts.device)


def check_processes(trainer: Any) -> bool:
    """Tell whether a trainer's model is sharded.

    Raises:
        ConfigError, ParameterError: it is, or is to be, in a way that is not supported.
    """
    remedy = "Shard the model as it is loaded: from_pretrained(…, distributed_config=DistributedConfig(fsdp_size=N))."
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ConfigError(
            f"a child cannot be trained under DeepSpeed or Accelerate's FSDP, which shard too late. {remedy}"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        raise ConfigError(
            "ACCELERATE_USE_FSDP is set, but the Accelerator does not shard: on a CPU it runs DDP instead. Unset it. "
            + remedy
        )
    parameters = named(trainer.bare_model, sharded=True)
    is_sharded = any(not piece_of(name, parameter).is_all for name, parameter in parameters.items())
    if is_sharded and trainer.args.fp16:
        raise ConfigError("fp16 needs a GradScaler, which sees one process's shards. Use bf16.")
    return is_sharded


def averages_copies(model: nn.Module, child: Child | TaskFree, arguments: TrainingArguments) -> bool:
    """Tell whether a child's optimizer can average the gradients of the processes' copies, in place of DDP.

    It pays where parameters are trained in part. DDP stays where it does more: it brings back running statistics and
    whatever else a forward pass writes into a model's saved buffers, and a GradScaler has to see the same overflow
    everywhere.
    """
    in_part = isinstance(child, Child) and not all(part.is_whole for part in child.parts.values())
    in_processes = arguments.parallel_mode is ParallelMode.DISTRIBUTED
    return in_part and in_processes and not persistent_buffers(model) and not arguments.fp16


@torch.no_grad()
def make_alike(tensors: Iterable[Tensor]) -> None:
    """Give every process the main process's values, as DDP does it."""
    for tensor in tensors:
        values = tensor.contiguous()
        torch.distributed.broadcast(values, src=0)
        if 0 not in tensor.stride():  # an expanded one cannot be written to
            tensor.copy_(values)


def divides_by_items(trainer: Any, inputs: dict[str, Any]) -> bool:
    """Return whether the loss divides by ``num_items_in_batch``: it is half as large for twice the items.

    Many models accept the argument in ``**kwargs`` but ignore it, and no attribute distinguishes them; so do losses of
    users' own. Label smoothers use it.
    """
    adds_up = trainer.args.gradient_accumulation_steps > 1 or trainer.args.world_size > 1
    own = trainer.compute_loss_func
    accepts = trainer.model_accepts_loss_kwargs or own is not None
    if not (accepts and adds_up and trainer.label_smoother is None) or "labels" not in inputs:
        return accepts
    given = trainer._prepare_inputs({key: value for key, value in inputs.items() if key != _COUNTS})
    counts = [torch.tensor(count, device=given["labels"].device) for count in (1, 2)]
    with (
        without_trace(trainer.bare_model, training=False),
        torch.no_grad(),
        trainer.compute_loss_context_manager(),
    ):
        if own is not None:
            output = trainer.bare_model(**{key: value for key, value in given.items() if key != "labels"})
            outputs: list[Any] = [[own(output, given["labels"], num_items_in_batch=n)] for n in counts]
        else:
            outputs = [trainer.bare_model(**given, num_items_in_batch=n) for n in counts]
    losses = [float(output["loss"] if isinstance(output, dict) else output[0]) for output in outputs]
    return math.isclose(losses[0], 2 * losses[1], rel_tol=1e-2)


def check_sharded_run(config: ChildConfig | None, methods: Sequence[Method]) -> None:
    """Raise a ConfigError for what does not go with a sharded model."""
    for method in methods:
        if not method.shards:
            raise ConfigError(f"method {method.name!r} does not train a sharded model. Load the model whole.")
    if config is not None and (config.budget is not None or config.fisher_examples == "auto"):
        raise ConfigError(
            "a sharded model has neither a budget nor fisher_examples='auto'. Pass a density, and a number of examples."
        )


@contextmanager
def resumable(arguments: Any) -> Iterator[None]:
    """Let a Trainer be built that saves checkpoints of a sharded model: ours can be resumed, its own cannot."""
    if not isinstance(arguments, TrainingArguments):
        yield
        return
    asked, arguments.save_only_model = arguments.save_only_model, True
    try:
        yield
    finally:
        arguments.save_only_model = asked


def shard(model: Any) -> None:
    """Shard a transformers model over all processes, by FSDP2, as ``DistributedConfig(fsdp_size=N)`` does it.

    One process keeps it whole.

    Raises:
        ConfigError: it is no transformers model.
    """
    ranks = Ranks.everyone()
    if ranks.size == 1:
        return
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"only a transformers model can be sharded, got {type(model).__name__}. Leave out shard, or the method "
            "that wraps the model."
        )
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    layers = {f"{path}.*": _FREED for path in outer}
    there = {
        re.sub(r"\.\d+(?=\.|$)", ".*", path)
        for path, _ in chain(model.named_modules(), model.named_parameters())
    }
    model.fsdp_plan = {
        rule: style for rule, style in model.fsdp_plan.items() if rule in there
    }  # else it warns
    wanted = DistributedConfig(fsdp_size=ranks.size, fsdp_plan=layers)
    config, _, mesh = model.prepare_distribute_model(wanted, device_map=None)
    model.maybe_distribute_model(model, config, mesh)


def share_of_mean(
    trainer: Any, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None
) -> float:
    """Return the weight of a batch's mean in the accumulated gradient if the model itself divides by items; else 1."""
    labels = inputs.get("labels")
    counts_items = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    if not counts_items or num_items_in_batch is None or labels is None:
        return 1.0
    predicted = predicted_labels(unwrapped(model), labels, labels.shape[-1])
    share = int((predicted != IGNORED).sum()) / float(num_items_in_batch)
    # Items counted over all processes: the gradients of the processes are averaged once more.
    return share * trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else share
