"""Follow the torch calls of a forward pass that take parameters, or tensors made of parameters alone.

Every tensor of a pass is one of three kinds. It belongs to the examples: the batch, and what is computed from it. It is
shared: computed from parameters alone, such as a table of relative positions, with the names of these parameters. Or it
is neither, such as a mask of causal attention. A call that takes a parameter or a shared tensor is handled.

``Alone`` follows the pass of one example and keeps what handled calls return. A call of the batch's pass is found again
by its function, the parameters it depends on and its number. Comparing the two shows which axis counts examples.

Shapes: B examples, k rows an example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from childtuning.fast.rules import RULES

Names = frozenset[str]
NONE: Names = frozenset()

_MARK = "_childtuning_mark"
_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
_ROUTING = {"nonzero", "argwhere", "masked_select", "masked_scatter", "unique", "unique_consecutive", "sort"}
_ROUTING |= {"argsort", "topk", "tolist", "item"}
_SHAPE_ONLY = {"zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty"}
_SHAPE_ONLY |= {"new_full", "new_tensor"}
_FIRST_ONLY = {"type_as", "expand_as", "view_as", "reshape_as", "to"}


@dataclass
class Seen:
    """What one handled call of an example's pass took and returned."""

    outputs: list[Tensor]
    shapes: list[torch.Size]


Record = dict[tuple[Any, Names, int], Seen]


@dataclass(frozen=True)
class Layout:
    """Where a tensor [… B·k …] has its examples: k rows next to each other, or row after row of all examples."""

    size: int
    axis: int
    rows: int = 1
    interleaved: bool = False

    def split(self, tensor: Tensor) -> Tensor:
        """[… B·k …] -> [B, k, …]."""
        tensor = tensor.movedim(self.axis, 0)
        if self.interleaved:
            return tensor.unflatten(0, (self.rows, self.size)).transpose(0, 1)
        return tensor.unflatten(0, (self.size, self.rows))

    def example(self, tensor: Tensor, index: int) -> Tensor:
        """[… B·k …] -> [… k …], what one example has."""
        if self.interleaved:
            return tensor.unflatten(self.axis, (self.rows, self.size)).select(self.axis + 1, index)
        return tensor.narrow(self.axis, index * self.rows, self.rows)


def find_layouts(out: Tensor, alone: list[tuple[int, Tensor]], size: int, eps: float = 0.0) -> list[Layout]:
    """Return the layouts that the batch's tensor may have, from the tensors of some examples alone.

    Two fit where rows are alike, as those of an expanded table are.
    """
    shape = alone[0][1].shape
    if out.dim() != len(shape) or any(one.shape != shape for _, one in alone):
        return []
    axes = [axis for axis in range(out.dim()) if out.shape[axis] != shape[axis]]
    if len(axes) != 1 or out.shape[axes[0]] != size * shape[axes[0]]:
        return []
    (axis,) = axes
    if shape[axis] == 1:
        return [Layout(size, axis)]
    found = [Layout(size, axis, shape[axis], interleaved) for interleaved in (False, True)]
    return [one for one in found if not any(bool(differs(one.example(out, i), t, eps)) for i, t in alone)]


@torch.no_grad()
def differs(found: Tensor, wanted: Tensor, eps: float = 0.0) -> Tensor:
    """Tell, in a tensor, whether two tensors of one shape differ by more than rounding to ``eps``."""
    if not wanted.is_floating_point():
        return (found != wanted).any()
    if not wanted.numel():
        return torch.zeros((), dtype=torch.bool, device=wanted.device)
    tolerance = max(1e-3, 32 * max(eps, rounding(wanted)))
    magnitude = wanted.abs()
    scale = magnitude.amax().clamp(max=32)  # the large numbers of masks do not blur what is beside them
    return ((found - wanted).abs() > tolerance * (magnitude + scale)).any()


def rounding(tensor: Tensor, function_name: str = "") -> float:
    """Return the unit roundoff that a function computed a tensor with: of its dtype, or of TF32."""
    if not tensor.is_floating_point():
        return 0.0
    eps = torch.finfo(tensor.dtype).eps
    is_convolution = function_name.startswith("conv")
    backend = torch.backends.cudnn if is_convolution else torch.backends.cuda.matmul
    return max(eps, 2.0**-10) if tensor.is_cuda and backend.allow_tf32 else eps


def tensors_in(args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors among the arguments of a call, those in lists too."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def outputs_of(out: Any) -> list[Tensor]:
    """Return the tensors that a call returned."""
    return tensors_in((out,), {})


@dataclass
class Call:
    """A call that takes parameters or shared tensors.

    Args:
        names: the parameters that it depends on.
        number: how many calls of this function with these names came before.
        takes_examples: whether what it returns depends on the examples.
    """

    func: Any
    args: Any
    kwargs: Any
    tensors: list[Tensor]
    names: Names
    number: int
    takes_examples: bool

    @property
    def name(self) -> str:
        """The function's name without the marks of operators: ``__radd__`` and ``add_`` are ``add``."""
        name = getattr(self.func, "__name__", "").strip("_")
        return name[1:] if name in ("radd", "rsub", "rmul", "rdiv", "rtruediv", "rpow") else name

    @property
    def key(self) -> tuple[Any, Names, int]:
        """What the same call of another pass has in common with this one."""
        return self.func, self.names, self.number

    @property
    def is_in_place(self) -> bool:
        """Whether the function writes to its first argument."""
        return is_in_place(self.func)

    def make(self, by_id: Mapping[int, Tensor] | None = None) -> Any:
        """Make the call, with some tensors in place of others."""
        if not by_id:
            return self.func(*self.args, **self.kwargs)
        return self.func(*_swapped(self.args, by_id), **_swapped(self.kwargs, by_id))


def _swapped(value: Any, by_id: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return by_id.get(id(value), value)
    if isinstance(value, dict):
        return {key: _swapped(item, by_id) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_swapped(item, by_id) for item in value)
    return value


def is_in_place(function: Any) -> bool:
    """Tell whether a function writes to its first argument."""
    name = getattr(function, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


class Watch(TorchFunctionMode):
    """Classify the tensors of one forward pass, and pass calls that take parameters to ``handle``.

    Args:
        parameters: the parameters to follow, by name.
        inputs: the tensors that belong to the examples.
    """

    def __init__(self, parameters: Mapping[str, Tensor], inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self._parameters = {id(parameter): frozenset((name,)) for name, parameter in parameters.items()}
        self._calls: dict[tuple[Any, Names], int] = {}
        self._token = object()  # tells the marks of this pass from those of others
        self.routes = False  # whether a value decided which rows go where
        for tensor in inputs:
            self.mark(tensor, NONE)

    def names(self, tensor: Tensor) -> Names:
        """Return the parameters that the tensor is, or is made of alone."""
        own = self._parameters.get(id(tensor))
        if own is not None:
            return own
        mark = getattr(tensor, _MARK, None)
        return mark[1] if mark is not None and mark[0] is self._token else NONE

    def is_of_examples(self, tensor: Tensor) -> bool:
        """Tell whether the tensor belongs to the examples."""
        mark = getattr(tensor, _MARK, None)
        return mark is not None and mark[0] is self._token and not mark[1]

    def mark(self, tensor: Tensor, names: Names) -> None:
        """Mark a tensor as computed from these parameters alone or, without names, as depending on the examples."""
        setattr(tensor, _MARK, (self._token, names))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in(args, kwargs)
        if not tensors:
            return func(*args, **kwargs)
        names = NONE.union(*map(self.names, tensors))
        self.routes = self.routes or _is_routing(func, args)
        if not names:
            out = func(*args, **kwargs)
            if self.takes_examples(func, tensors):
                self._mark_all(func, args, out)
            return out
        if isinstance(func, FunctionType) and func not in RULES:  # a function written in Python: look into it
            with self:
                return _inside(func)(*args, **kwargs)
        number = self._calls.get((func, names), 0)
        self._calls[func, names] = number + 1
        call = Call(func, args, kwargs, tensors, names, number, self.takes_examples(func, tensors))
        out = self.handle(call)
        if call.takes_examples:
            self._mark_all(func, args, out)
        return out

    def takes_examples(self, func: Any, tensors: list[Tensor]) -> bool:
        """Tell whether what a call returns depends on the examples."""
        name = getattr(func, "__name__", "")
        if name in _SHAPE_ONLY:
            return False
        return any(map(self.is_of_examples, tensors[:1] if name in _FIRST_ONLY else tensors))

    def _mark_all(self, func: Any, args: Any, out: Any) -> None:
        """Note that what a call returned, or wrote to, belongs to the examples."""
        for tensor in (*outputs_of(out), *(tensors_in(args[:1], {}) if is_in_place(func) else ())):
            if id(tensor) not in self._parameters:
                self.mark(tensor, NONE)

    def handle(self, call: Call) -> Any:
        """Make a call that takes parameters or shared tensors."""
        raise NotImplementedError


class Alone(Watch):
    """Record what handled calls return in the pass of one example."""

    def __init__(self, parameters: Mapping[str, Tensor], inputs: Iterable[Tensor]) -> None:
        super().__init__(parameters, inputs)
        self.record: Record = {}
        self.eps = 0.0  # of the coarsest dtype: under autocast, what follows is no more exact

    def handle(self, call: Call) -> Any:
        shapes = [tensor.shape for tensor in call.tensors]
        out = call.make()
        outputs = outputs_of(out)
        if outputs:
            self.eps = max(self.eps, *(rounding(one, call.name) for one in outputs))
            self.record[call.key] = Seen([one.detach().clone() for one in outputs], shapes)
        if not call.takes_examples and call.name != "detach" and not _is_data(call.func):
            for one in outputs:
                if one.is_floating_point():
                    self.mark(one, call.names)
        return out


def forget_marks(tensors: Iterator[Tensor]) -> None:
    """Remove the marks of a pass from tensors that outlive it."""
    for tensor in tensors:
        if hasattr(tensor, _MARK):
            delattr(tensor, _MARK)


def _is_routing(func: Any, args: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name in _ROUTING:
        return True
    if name == "where":
        return len(args) == 1
    if name in ("__getitem__", "__setitem__") and len(args) > 1:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(item, Tensor) and item.dtype == torch.bool for item in index)
    return False


def _is_data(func: Any) -> bool:
    return func.__name__ == "__get__" and getattr(func.__self__, "__name__", "") in ("data", "grad")


_INSIDE: dict[FunctionType, Callable[..., Any]] = {}


def _inside(function: FunctionType) -> Callable[..., Any]:
    """Return a function of torch's that runs its own body and leaves only what it calls to be watched."""
    if function not in _INSIDE:
        unchecked = dict.fromkeys(_CHECKS, lambda *args: False)
        scope = {**function.__globals__, **unchecked}
        body = FunctionType(
            function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
        )
        body.__kwdefaults__ = function.__kwdefaults__
        _INSIDE[function] = body
    return _INSIDE[function]
