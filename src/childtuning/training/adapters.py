"""PEFT's adapters that train values of the base model's own weights: a mask for SHiRA, and deltas from them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from childtuning.child import Child, select_child
from childtuning.child.eligible import named
from childtuning.delta import Delta
from childtuning.delta.files import bits
from childtuning.errors import DeltaError, ParameterError

_EXACT = ("ShiraLayer", "TrainableTokensLayer")  # they compute with the very weights that they merge into


def shira_mask(model: nn.Module, chosen: Mapping[str, Tensor] | Child) -> Callable[..., Tensor]:
    """Return a ``mask_fn`` for PEFT's ``ShiraConfig``: SHiRA then trains the entries that a child would.

    SHiRA trains r·(in + out) entries of each [out, in] matrix [Bhardwaj et al. 2024].

    Args:
        model: the model that ``get_peft_model`` is called with.
        chosen: scores by parameter name, of which each matrix's highest are taken; or a child, which must have that
            many entries in each matrix.
    Raises:
        ParameterError: from the function: a matrix has no scores, or the child another number of entries.

    Example:
        >>> import torch
        >>> layer = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> mask_fn = shira_mask(layer, {"0.weight": torch.arange(64.0).view(8, 8)})
        >>> mask_fn(layer[0], 1).sum().item()
        16.0
    """
    names = {id(parameter): name for name, parameter in named(model).items()}

    def mask_fn(base_layer: nn.Module, r: int, **_: Any) -> Tensor:
        weight = base_layer.weight
        assert isinstance(weight, Tensor)
        name = names.get(id(weight))
        if name is None:
            raise ParameterError(
                "a layer is not of the model that the mask was made for. Pass the same model."
            )
        wanted = r * sum(weight.shape)
        if isinstance(chosen, Child):
            child = chosen
        elif name in chosen:
            child = select_child({name: chosen[name]}, density=wanted / weight.numel())
        else:
            raise ParameterError(
                f"there are no scores for {name!r}. Score it, or leave it out of target_modules."
            )
        part = child.parts.get(name)
        count = 0 if part is None else part.num_trained
        if part is None or count != wanted:
            raise ParameterError(
                f"SHiRA with r={r} trains {wanted:,} entries of {name!r}, and the child has {count:,} there. "
                "Pass scores in place of the child."
            )
        return part.mask().to(weight)

    return mask_fn


def adapter_delta(model: nn.Module, folder: str | Path) -> Delta:
    """Return what a PEFT adapter changes in its base model, as a delta.

    Only adapters whose merged model computes what they compute, bit for bit: SHiRA, trainable tokens, and modules that
    are trained whole (``modules_to_save``).

    Args:
        model: the base model, which is not changed.
        folder: the adapter's, as PEFT saved it.
    Returns:
        the entries that differ from the base model's.
    Raises:
        DeltaError: the adapter is of another kind, or is not this model's.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        adapted = PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    except (OSError, ValueError, RuntimeError, KeyError) as fault:
        reason = " ".join(str(fault).split())[:200]
        raise DeltaError(
            f"{str(folder)!r} is not a PEFT adapter of this model ({reason}). Pass its folder."
        ) from None
    for name, module in adapted.named_modules():
        if isinstance(module, BaseTunerLayer) and not {c.__name__ for c in type(module).__mro__} & {*_EXACT}:
            raise DeltaError(
                f"{name!r} is of {type(module).__module__.split('.')[2]}: merged, it computes something else in the "
                "last bits. Merge it with PEFT's merge_and_unload(), and evaluate that model."
            )
    merged = adapted.merge_and_unload() if hasattr(adapted, "merge_and_unload") else None
    before = named(model)
    if merged is None or set(named(merged)) != set(before):
        raise DeltaError(
            f"the adapter in {str(folder)!r} adds inputs to the model and changes no weight of it. Serve it with PEFT."
        )
    masks = {}
    for name, parameter in named(merged).items():
        old = before[name]
        if (old.shape, old.dtype) != (parameter.shape, parameter.dtype):
            raise DeltaError(
                f"the adapter changes the shape or dtype of {name!r}. Load the base model as it was."
            )
        masks[name] = bits(old).ne(bits(parameter)).any(-1).view(old.shape)
    return Delta.capture(merged, Child.from_masks(masks), base=getattr(model, "name_or_path", None) or None)
