"""Which parameters a selection may choose from, and what they are called.

Every room asks here: ``named`` gives a model's parameters by canonical name, ``eligible`` those that a child may be
chosen from, ``match_names`` what patterns such as ``classifier.*`` mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import Tensor, nn

from childtuning.child.pieces import is_sharded
from childtuning.child.units import Axes
from childtuning.errors import ParameterError, did_you_mean
from childtuning.fast.layers import CONV1D


def as_patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """Return the patterns as a tuple; a lone string is one pattern."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether the name fits any of the patterns (case matters)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def match_names(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """Return the names that fit any of the patterns.

    Raises:
        ParameterError: a pattern fits no name; all such patterns are named.
    """
    names = list(names)
    found: set[str] = set()
    unmatched: list[str] = []
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        found |= hits
        if not hits:
            unmatched.append(pattern)
    if unmatched:
        listing = ", ".join(repr(p) for p in unmatched)
        shown = names if len(names) <= 8 else [*names[:4], "…", *names[-2:]]
        hint = did_you_mean(unmatched[0], names).split(" Known:")[0] if len(names) else "There are none."
        hint = "" if hint.startswith("Known:") else f" {hint}"
        raise ParameterError(f"pattern {listing} matched no parameter. Names are {', '.join(shown)}.{hint}")
    return found


# What torch.compile, FSDP and checkpointing put into the names of what they wrap.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def canonical_name(name: str) -> str:
    """Return the name that a parameter has before torch.compile, FSDP or checkpointing wrap its module."""
    if not any(wrapper in name for wrapper in _WRAPPERS):
        return name
    return ".".join(word for word in name.split(".") if word not in _WRAPPERS)


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DistributedDataParallel and DataParallel."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def named(model: nn.Module, *, sharded: bool = False) -> dict[str, nn.Parameter]:
    """Return a model's parameters by canonical name, in the model's order, each once.

    The name of a parameter depends on the model alone, not on what wraps it or what else is trained.

    Args:
        model: the model.
        sharded: whether the caller knows what to do with a DTensor, of which this process holds a piece.
    Raises:
        ParameterError: a parameter is sharded.
    """
    found = {canonical_name(name): parameter for name, parameter in bare_model(model).named_parameters()}
    for name, parameter in () if sharded else found.items():
        refuse_sharded(name, parameter)
    return found


def refuse_sharded(name: str, tensor: Tensor) -> None:
    """Raise a ParameterError for a DTensor: its local values are not the parameter's."""
    if is_sharded(tensor):
        raise ParameterError(
            f"{name!r} is sharded (a DTensor), which is not supported here. "
            "Load the model unsharded: one process, or DistributedDataParallel."
        )


def eligible(
    model: nn.Module, patterns: str | Iterable[str] | None = None, always: str | Iterable[str] | None = None
) -> dict[str, nn.Parameter]:
    """Return the parameters that a child may be chosen from, by canonical name, in the model's order.

    Args:
        model: the pretrained network with its head.
        patterns: over parameter names; ``None``: every floating-point parameter that requires a gradient. What the
            patterns name is eligible whether or not it requires one now.
        always: patterns over the names that are trained whole and therefore left out, such as a new head.
    Raises:
        ParameterError: a pattern matches nothing, or nothing is eligible.
    """
    parameters = named(model, sharded=True)
    left_out = match_names(as_patterns(always or ()), parameters)
    if patterns is None:
        chosen = {name for name, parameter in parameters.items() if parameter.requires_grad}
    else:
        chosen = match_names(as_patterns(patterns), parameters)
    found = {
        name: parameter
        for name, parameter in parameters.items()
        if name in chosen and name not in left_out and parameter.is_floating_point()
    }
    if not found:
        raise ParameterError(
            "no parameter is eligible. Check the eligible and always patterns, and requires_grad."
        )
    return found


def refuse_rewritten(model: nn.Module, names: Iterable[str]) -> None:
    """Raise a ParameterError if the forward pass of the model writes into one of these parameters.

    ``nn.Embedding(max_norm=…)`` scales the rows that it looks up, in place: entries outside a child would move.
    """
    names = set(names)
    for path, module in bare_model(model).named_modules():
        name = canonical_name(f"{path}.weight" if path else "weight")
        if getattr(module, "max_norm", None) is not None and name in names:
            raise ParameterError(
                f"the forward pass writes into {name!r} (max_norm={module.max_norm}), so that entries outside a child "
                "would move. Set max_norm=None, or train it whole: always=."
            )


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is transformers' Conv1D, or a subclass of it, without importing it."""
    return any(f"{cls.__module__}.{cls.__qualname__}" == CONV1D for cls in type(module).__mro__)


def unit_axes(model: nn.Module, granularity: str) -> dict[str, Axes]:
    """Return by parameter name the axes of a weight's units where they are not the usual ones.

    A weight is [out, in, …], so that a row is an output unit, axis 0, and a column an input unit, axis 1. GPT-2's
    Conv1D and transposed convolutions are [in, out, …]. An embedding is a table with a row for each token: it has no
    columns, and is cut into rows in either case. The experts that transformers stacks, [experts, out, in] or
    [experts, in, out], are matrices of their own: a row or a column is one expert's, and a block lies in one expert.
    So it is with a few more weights of its models, such as XLNet's attention.

    Args:
        model: the model.
        granularity: any; ``row``, ``column`` and ``block`` have axes.
    Example:
        >>> net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
        >>> unit_axes(net, "column"), unit_axes(net, "row")
        ({'0.weight': 0}, {})
    """
    if granularity not in _USUAL:
        return {}
    found: dict[int, Axes] = {}
    for module in bare_model(model).modules():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            if name == "weight" and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                if granularity == "column":
                    found[id(weight)] = 0  # also where a linear layer shares it
            elif (layout := _layout(module, name, weight.dim())) is not None:
                found.setdefault(id(weight), layout[granularity])
    usual = _USUAL[granularity]
    return {
        name: axes
        for name, p in named(model, sharded=True).items()
        if (axes := found.get(id(p), usual)) != usual
    }


def _layout(module: nn.Module, name: str, num_axes: int) -> dict[str, Axes] | None:
    """Return the axes of a weight by granularity, if they are not the usual ones."""
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    if name == "weight" and (is_conv1d(module) or isinstance(module, transposed)):
        return _TRANSPOSED
    if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):  # transformers' experts of any model
        if num_axes == 2:  # biases
            return {"row": (0, 1), "column": (0, 1), "block": (0,)}
        return (_STACKED_TRANSPOSED if module.is_transposed else _STACKED) if num_axes == 3 else None
    patterns = _LAYOUTS.get(f"{type(module).__module__}.{type(module).__qualname__}", {})
    return next((layout for pattern, layout in patterns.items() if fnmatchcase(name, pattern)), None)


_USUAL: dict[str, Axes] = {"row": 0, "column": 1, "block": ()}
_TRANSPOSED: dict[str, Axes] = {"row": 1, "column": 0, "block": ()}
_STACKED: dict[str, Axes] = {"row": (0, 1), "column": (0, 2), "block": (0,)}
_STACKED_TRANSPOSED: dict[str, Axes] = {"row": (0, 2), "column": (0, 1), "block": (0,)}
_INTO_HEADS: dict[str, Axes] = {"row": (1, 2), "column": 0, "block": ()}  # [in, heads, out of a head]
_FROM_HEADS: dict[str, Axes] = {"row": 0, "column": (1, 2), "block": ()}  # [out, heads, in of a head]
_MODELS = "transformers.models."
_LAYOUTS: dict[str, dict[str, dict[str, Axes]]] = {  # by class, and by pattern over its parameters' names
    f"{_MODELS}convbert.modeling_convbert.GroupedLinearLayer": {"weight": _STACKED_TRANSPOSED},
    f"{_MODELS}funnel.modeling_funnel.FunnelRelMultiheadAttention": {"r_kernel": _INTO_HEADS},
    f"{_MODELS}jetmoe.modeling_jetmoe.JetMoeParallelExperts": {"weight": _STACKED},
    f"{_MODELS}llama4.modeling_llama4.Llama4TextExperts": {"*": _STACKED_TRANSPOSED},
    f"{_MODELS}xlnet.modeling_xlnet.XLNetRelativeAttention": {"[qkvr]": _INTO_HEADS, "o": _FROM_HEADS},
}
