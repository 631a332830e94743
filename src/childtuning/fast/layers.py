"""The structured layers, linear, Conv1D, embedding and convolution, and what they read: a `Leaf`.

Shapes: N examples times tokens, B examples, I in, O out, V vocabulary, H width, … positions, k of the kernel, r chosen
rows, n trained entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from childtuning.fast.products import multiply

# What of one axis is trained: sorted indices, a run, or ``None`` for all of it; a group is rows and columns.
Chosen = Tensor | slice | None
Group = tuple[Chosen, Chosen]

CONV1D = "transformers.pytorch_utils.Conv1D"  # a linear layer whose weight is [in, out]
BY_CLASS: dict[type[nn.Module] | str, type[StructuredLayer]] = {}


@dataclass(eq=False)
class Leaf:
    """The trained entries of one weight, and the tensor that collects their gradient.

    A structured layer reads both at every forward pass, so either may be replaced between steps.

    Args:
        groups: where rows meet columns; tensors on the weight's device.
        tensor: flat [n], requires grad. Only its ``.grad`` matters: the gradients of the n trained entries, group by
            group and row-major; empty, but there, where nothing is trained and the loss reached the weight. Its data
            is never read, so it may be one number expanded: ``Leaf.of``.
        weight: the weight that it is of, once installed.
        num_hooks: how many hooks its owner has on the weight, which run after a gradient has been accumulated.
    """

    groups: Sequence[Group]
    tensor: Tensor
    weight: Tensor | None = field(default=None, repr=False)
    num_hooks: int = 0

    @classmethod
    def of(cls, groups: Sequence[Group], size: int, weight: Tensor, dtype: torch.dtype | None = None) -> Leaf:
        """Return a leaf of ``size`` entries that takes no memory, for gradients of a dtype (default the weight's)."""
        one = torch.empty(1, dtype=dtype or weight.dtype, device=weight.device)
        return cls(groups, one.expand(size).requires_grad_())


class StructuredLayer(nn.Module):
    """A layer that computes only the part of its weight's gradient that its ``leaf`` needs.

    A subclass says in ``compute`` what it does while it is ``in_use``; else the class that it stands in for goes on. It
    lets only ``weight.detach()`` into the graph, and gives the leaf its gradient. It has the state of the class that it
    stands in for and nothing more.
    """

    leaf: Leaf

    compute: Callable[..., Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer."""
        return self.compute(*args, **kwargs) if self.in_use else super().forward(*args, **kwargs)

    def __reduce__(self) -> Any:
        """Copy and pickle it as what it was."""
        plain = plain_class(self)
        return plain.__new__, (plain,), {name: value for name, value in vars(self).items() if name != "leaf"}

    @property
    def in_use(self) -> bool:
        """Whether gradients are wanted, and the module still has the weight that the leaf was installed for.

        It does not where the weight was frozen, parametrized or replaced since, or under ``torch.func``'s transforms:
        then the gradient belongs to another tensor, or to none. Somebody's hook on the weight waits for all of it.
        """
        weight = self.leaf.weight
        return (
            torch.is_grad_enabled()
            and weight is not None
            and weight is self._parameters.get("weight")
            and weight.requires_grad
            and not weight._backward_hooks
            and len(weight._post_accumulate_grad_hooks or ()) <= self.leaf.num_hooks
            and not torch._C._are_functorch_transforms_active()  # the one form that torch.compile can trace
        )

    @staticmethod
    def fits(module: nn.Module, leaf: Leaf) -> bool:
        """Return whether this module's options are supported; otherwise it keeps its class and dense gradient."""
        return True


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return a module's class or, of a structured layer, that which it stands in for."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, StructuredLayer))


T = TypeVar("T", bound=type[StructuredLayer])


def register_structured(module_class: type[nn.Module] | str) -> Callable[[T], T]:
    """Register the decorated class as the replacement for modules of exactly this class.

    Subclasses do not match: they, or the modules that own them, may use the weight in a way of their own.

    Args:
        module_class: the class to replace, ideally a base class of the decorated one; or its "module.qualified name",
            to avoid importing it.
    """

    def register(structured: T) -> T:
        BY_CLASS[module_class] = structured
        return structured

    return register


def take(tensor: Tensor, chosen: Chosen) -> Tensor:
    """Return the chosen coordinates of axis 1, as a view where possible."""
    if chosen is None:
        return tensor
    return tensor[:, chosen] if isinstance(chosen, slice) else tensor.index_select(1, chosen)


def _copy(x: Tensor, chosen: Tensor | slice) -> Tensor:
    """Return the chosen coordinates of axis 1 in memory of their own: a view would keep all of x."""
    taken = take(x, chosen)
    return taken.clone(memory_format=torch.contiguous_format) if isinstance(chosen, slice) else taken


def join(gradients: Iterable[Tensor]) -> Tensor:
    """Concatenate the groups' gradients in the layout of the leaf."""
    flat = [gradient.reshape(-1) for gradient in gradients]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def lowered(x: Tensor) -> Tensor:
    """Return x as ``torch.autocast`` would hand it to a matrix product here."""
    device = x.device.type
    if not x.is_floating_point() or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _read(x: Tensor, groups: Sequence[Group], axis: int) -> tuple[Tensor, Sequence[Group]]:
    """Return what the groups read of an input [N, I] on this side of a group, and the groups within that.

    Where columns are trained, these alone are copied and kept, and the layers that read the same input keep nothing of
    it in common.
    """
    chosen = groups[0][axis] if len(groups) == 1 else None
    if chosen is None:
        return x, groups
    return _copy(x, chosen), [(None, groups[0][1]) if axis == 0 else (groups[0][0], None)]


class _Product(Function):
    """``y = x Wᵀ + b``, and of ``dW = dYᵀ x`` only the groups."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [N, I]
        weight: Tensor,  # [O, I]
        bias: Tensor | None,  # [O]
        leaf: Tensor,  # [n]
        groups: Sequence[Group],
        transposed: bool,
    ) -> Tensor:
        kept = None
        if leaf.numel():
            kept, groups = _read(x, groups, 0 if transposed else 1)
        ctx.groups, ctx.transposed = groups, transposed
        needs_x = ctx.needs_input_grad[0]
        # The weight as it is: autocast's copy of it is cheaper to make again than to keep.
        ctx.save_for_backward(kept, weight if needs_x else None)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # [N, O]
        x, weight = ctx.saved_tensors
        needs_x, _, needs_bias, *_ = ctx.needs_input_grad
        dx = dbias = None
        dleaf = dY.new_zeros(0)
        if needs_x:
            dx = multiply(dY, weight.to(dY.dtype))
        if needs_bias:
            dbias = dY.sum(0)
        if x is not None:
            left, right = (x, dY) if ctx.transposed else (dY, x)
            dleaf = join(multiply(take(left, rows).t(), take(right, columns)) for rows, columns in ctx.groups)
        return dx, None, dbias, dleaf, None, None


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, leaf: Leaf, *, transposed: bool = False
) -> Tensor:
    """Return ``x Wᵀ + b`` for x [..., I] and W [O, I]; the groups are of W or, if transposed, of Wᵀ."""
    x = lowered(x)
    # Flat outside of the function: what one returns may be changed in place only if it is no view.
    y = _Product.apply(
        x.reshape(-1, x.shape[-1]), weight.detach(), bias, leaf.tensor, leaf.groups, transposed
    )
    return y.view(*x.shape[:-1], weight.shape[0])


@register_structured(nn.Linear)
class StructuredLinear(StructuredLayer, nn.Linear):
    """A Linear whose weight gradient is ``dY[:, rows]ᵀ x[:, columns]`` for each group."""

    def compute(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return product(input, self.weight, self.bias, self.leaf)


@register_structured(CONV1D)
class StructuredConv1D(StructuredLayer):
    """A Conv1D whose weight gradient is ``x[:, rows]ᵀ dY[:, columns]`` for each group."""

    weight: Tensor
    bias: Tensor

    def compute(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return product(x, self.weight.t(), self.bias, self.leaf, transposed=True)


class _Lookup(Function):
    """``y = W[tokens]``, and of the gradient of W only the groups."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,  # [N]
        weight: Tensor,  # [V, H]
        leaf: Tensor,  # [n]
        groups: Sequence[Group],
        padding_idx: int | None,
    ) -> Tensor:
        ctx.groups, ctx.padding_idx, ctx.size = groups, padding_idx, weight.shape[0]
        ctx.save_for_backward(tokens if leaf.numel() else None)
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # [N, H]
        (tokens,) = ctx.saved_tensors
        if tokens is None:
            return None, None, dY.new_zeros(0), None, None

        def gradient(rows: Chosen, columns: Chosen) -> Tensor:
            places, r = _places(tokens, rows, ctx.size, ctx.padding_idx)
            # Torch's own kernel, for a vocabulary of the r chosen rows and one to which nothing is added.
            return torch.ops.aten.embedding_dense_backward(take(dY, columns), places, r + 1, r, False)[:r]

        return None, None, join(gradient(*group) for group in ctx.groups), None, None


def _places(tokens: Tensor, rows: Chosen, size: int, padding_idx: int | None) -> tuple[Tensor, int]:
    """Return each token's place among the r chosen rows, r for a token that has none; and r."""
    if isinstance(rows, Tensor):
        r = len(rows)
        places = torch.searchsorted(rows, tokens).clamp(max=r - 1)
        chosen = rows[places] == tokens
    else:
        start, stop = (rows.start, rows.stop) if rows else (0, size)
        r, places = stop - start, tokens - start
        chosen = (places >= 0) & (places < r)
    if padding_idx is not None:
        chosen &= tokens != padding_idx
    return torch.where(chosen, places, r), r


@register_structured(nn.Embedding)
class StructuredEmbedding(StructuredLayer, nn.Embedding):
    """An embedding whose gradient is that of the chosen tokens' rows."""

    @staticmethod
    def fits(module: nn.Module, leaf: Leaf) -> bool:
        """Refuse what rescales or sparsifies, and tiles: each group is one pass over all tokens."""
        return (
            isinstance(module, nn.Embedding)
            and module.max_norm is None
            and not (module.scale_grad_by_freq or module.sparse)
            and len(leaf.groups) <= 1
        )

    def compute(self, input: Tensor) -> Tensor:
        """[...] -> [..., H]."""
        weight, leaf = self.weight.detach(), self.leaf
        y = _Lookup.apply(input.reshape(-1).long(), weight, leaf.tensor, leaf.groups, self.padding_idx)
        return y.view(*input.shape, self.embedding_dim)


class _Options(NamedTuple):
    """How a kernel moves over its input; ``groups`` cut the channels, and are not those of trained entries."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def gradient(self, dY: Tensor, x: Tensor, weight: Tensor, *, of_x: bool) -> Tensor:
        """Return the gradient of x, for which x need have only a shape, or of the weight, and likewise."""
        stride, padding, dilation, groups = self
        no_output_padding = (0,) * len(stride)
        mask = (of_x, not of_x, False)
        return torch.ops.aten.convolution_backward(
            dY, x, weight, None, stride, padding, dilation, False, no_output_padding, groups, mask
        )[0 if of_x else 1]


class _Convolution(Function):
    """``y = W * x + b``, and of the gradient of W only the groups."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [B, I, …]
        weight: Tensor,  # [O, I, k…], or [O, 1, k…] if depthwise
        bias: Tensor | None,  # [O]
        leaf: Tensor,  # [n]
        groups: Sequence[Group],
        options: _Options,
    ) -> Tensor:
        ctx.options, ctx.x_shape, ctx.weight_shape = options, x.shape, weight.shape
        kept = None
        if leaf.numel():
            kept, groups, ctx.weight_shape = _read_channels(x, groups, weight.shape, options)
        ctx.groups = groups
        needs_x = ctx.needs_input_grad[0]
        ctx.save_for_backward(kept, weight if needs_x else None)
        return _CONVOLVE[len(options.stride)](x, weight, bias, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # [B, O, …]
        x, weight = ctx.saved_tensors
        needs_x, _, needs_bias, *_ = ctx.needs_input_grad
        dx = dbias = None
        dleaf = dY.new_zeros(0)
        if needs_x:
            shaped = _shape_only(dY, ctx.x_shape)
            dx = ctx.options.gradient(dY, shaped, weight.to(dY.dtype), of_x=True)
        if needs_bias:
            dbias = dY.sum((0, *range(2, dY.dim())))
        if x is not None:
            dleaf = join(_gradient(x, dY, ctx.weight_shape, group, ctx.options) for group in ctx.groups)
        return dx, None, dbias, dleaf, None, None


def _read_channels(
    x: Tensor, groups: Sequence[Group], shape: torch.Size, options: _Options
) -> tuple[Tensor, Sequence[Group], torch.Size]:
    """Return what the groups read of an input [B, I, …], the groups within that, and their kernel's shape."""
    if len(groups) != 1 or options.groups != 1:
        return x, groups, shape
    channels = input_channels(groups[0][1], math.prod(shape[2:]))
    if channels is None:
        return x, groups, shape
    kept = _copy(x, channels)
    return kept, [(groups[0][0], None)], torch.Size((shape[0], kept.shape[1], *shape[2:]))


def input_channels(columns: Chosen, width: int) -> Chosen:
    """Return the input channels that columns of a kernel [O, I · width] make up; ``None`` if all, or not whole ones."""
    if columns is None or width == 1:
        return columns
    if isinstance(columns, slice):
        whole = columns.start % width == 0 and columns.stop % width == 0
        return slice(columns.start // width, columns.stop // width) if whole else None
    if len(columns) % width:
        return None
    channels = columns[::width] // width
    inside = torch.arange(width, device=columns.device)
    return channels if bool((channels[:, None] * width + inside == columns.view(-1, width)).all()) else None


def _gradient(x: Tensor, dY: Tensor, shape: torch.Size, group: Group, options: _Options) -> Tensor:
    """The gradient of one group: that of a kernel with the r chosen rows: [r, columns]."""
    rows, columns = group
    dY = take(dY, rows)
    r = dY.shape[1]
    channels = input_channels(columns, math.prod(shape[2:])) if options.groups == 1 else None
    if channels is not None:
        x, columns = take(x, channels), None
    elif options.groups > 1 and rows is not None:
        x = x.index_select(1, _channels(rows, shape[0] // options.groups, x.device))
        options = options._replace(groups=r)
    kernel = _shape_only(dY, (r, x.shape[1] // options.groups, *shape[2:]))
    return take(options.gradient(dY, x, kernel, of_x=False).flatten(1), columns)


def _channels(rows: Tensor | slice, multiplier: int, device: torch.device) -> Tensor:
    """The input channel that each chosen row of a depthwise convolution reads."""
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=device)
    return rows // multiplier


def _shape_only(like: Tensor, shape: Sequence[int]) -> Tensor:
    return like.new_empty(1).expand(tuple(shape))


class _StructuredConvolution(StructuredLayer):
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    kernel_size: tuple[int, ...]
    groups: int
    padding_mode: str

    @staticmethod
    def fits(module: Any, leaf: Leaf) -> bool:
        """Accept zero padding, the same on both sides; channels that are one group or each its own; and rows.

        Columns must be whole input channels: else they would be cut from the gradient of all.
        """
        return (
            module.padding_mode == "zeros"
            and (module.groups == 1 or module.groups == module.in_channels)
            and (module.padding != "same" or all(span % 2 == 0 for span in _spans(module)))
            and all(
                columns is None
                or (module.groups == 1 and input_channels(columns, math.prod(module.kernel_size)) is not None)
                for _, columns in leaf.groups
            )
        )

    def compute(self, input: Tensor) -> Tensor:
        """[B, I, …] or [I, …] -> [B, O, …] or [O, …]."""
        x, weight, leaf = lowered(input), self.weight.detach(), self.leaf
        single = x.dim() < weight.dim()
        x = x.unsqueeze(0) if single else x
        options = _Options(self.stride, _padding(self), self.dilation, self.groups)
        y = _Convolution.apply(x, weight, self.bias, leaf.tensor, leaf.groups, options)
        return y.squeeze(0) if single else y


def _spans(module: Any) -> list[int]:
    """How far the kernel reaches beyond its first position, along each axis."""
    return [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]


def _padding(module: Any) -> tuple[int, ...]:
    if module.padding == "same":
        return tuple(span // 2 for span in _spans(module))
    return (0,) * len(module.stride) if module.padding == "valid" else module.padding


@register_structured(nn.Conv1d)
class StructuredConv1d(_StructuredConvolution, nn.Conv1d):
    """A Conv1d whose weight gradient is that of the chosen output channels."""


@register_structured(nn.Conv2d)
class StructuredConv2d(_StructuredConvolution, nn.Conv2d):
    """A Conv2d whose weight gradient is that of the chosen output channels."""


@register_structured(nn.Conv3d)
class StructuredConv3d(_StructuredConvolution, nn.Conv3d):
    """A Conv3d whose weight gradient is that of the chosen output channels."""
