"""One trained parameter: the positions of its entries, and the tensor that the inner optimizer updates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from childtuning.child.pieces import is_sharded, local_of, piece_of
from childtuning.child.units import Granularity, Part
from childtuning.errors import ParameterError
from childtuning.fast.layers import Leaf
from childtuning.fast.runs import Runs


class Trained:
    """One trained parameter, or what this process holds of it.

    ``parameter`` is the local tensor of a sharded one, and ``part`` the local entries; all else works on those. Where
    nothing is sharded, it is the model's own (``holder``).

    The inner optimizer knows it by ``value``. That is the parameter itself where all of it is trained in at least
    float32; else a tensor of the trained entries [n], or of the whole shape, in at least float32: bf16 and fp16 weights
    have float32 master values. The tensor takes no memory until ``read`` fills it.

    Args:
        name: the parameter's canonical name.
        holder: the model's tensor.
        part: which entries of the whole parameter are trained.
        scale: what their gradient is multiplied with: 1/p, or 1.
        draws: whether a task-free child's masks lie on it.
        released: whether its gradient is taken during the backward pass, into ``value.grad``.
    """

    def __init__(
        self,
        name: str,
        holder: nn.Parameter,
        part: Part,
        scale: float = 1.0,
        *,
        draws: bool = False,
        released: bool = False,
    ) -> None:
        self.name, self.holder, self.scale, self.draws = name, holder, scale, draws
        self.released = released and not part.is_whole
        self.piece, self.whole = piece_of(name, holder), part
        self.start = self.piece.before(
            part
        )  # how many of the trained entries other processes hold before this one
        self.part = part = self.piece.part(part)
        self.formed: Tensor | None = (
            None  # the gradient of a sharded part's entries on all processes, not yet averaged
        )
        self.parameter = parameter = nn.Parameter(local_of(holder)) if is_sharded(holder) else holder
        self.runs: Runs | None = None if part.is_whole else part.runs().to(parameter.device)
        self.leaf: Leaf | None = None  # forms the gradient of the trained or drawn entries alone
        self.rows: Tensor | None = None  # those drawn for this step, where a leaf forms them
        self.dtype = torch.promote_types(parameter.dtype, torch.float32)
        self.value = parameter
        if self.runs is not None or self.dtype != parameter.dtype:
            self.value = nn.Parameter(torch.empty(0, dtype=self.dtype, device=parameter.device))
            self.empty()
        self._built_as = (holder.shape, holder.device, holder.dtype)

    @property
    def is_direct(self) -> bool:
        """Whether the inner optimizer updates the parameter itself."""
        return self.value is self.parameter

    @property
    def is_filled(self) -> bool:
        """Whether ``value`` holds values, and not one number expanded, or none."""
        return self.value.numel() > 0 and self.value.untyped_storage().nbytes() >= self.value.nbytes

    def check(self) -> None:
        """Raise a ParameterError if the parameter was moved, cast or resized since the optimizer was built."""
        now = self.holder
        if (now.shape, now.device, now.dtype) == self._built_as:
            if not self.piece.is_all and local_of(now).data_ptr() != self.parameter.data_ptr():
                self.parameter.data = local_of(now)  # FSDP2 lays its shards out anew
            return
        shape, device, dtype = self._built_as
        if now.shape != shape:
            raise ParameterError(
                f"{self.name!r} of shape {list(shape)} became {list(now.shape)} after its optimizer was built. "
                "Resize the model first, then choose its child and build the optimizer."
            )
        if now.device != device:
            raise ParameterError(
                f"{self.name!r} was moved from {device} to {now.device} after its optimizer was built. "
                "Move the model first, then build the optimizer."
            )
        raise ParameterError(
            f"{self.name!r} was cast from {dtype} to {now.dtype} after its optimizer was built. "
            "Cast the model first, then build the optimizer."
        )

    # Values

    def empty(self) -> None:
        """Drop master values: until ``read`` fills it, ``value`` is one expanded NaN."""
        if not self.is_direct:
            size = self.parameter.shape if self.runs is None else (len(self.runs),)
            one = torch.full((), float("nan"), dtype=self.dtype, device=self.parameter.device)
            self.value.data = one.expand(size)

    @torch.no_grad()
    def read(self) -> None:
        """Read the parameter's values, keeping the extra precision of unchanged entries."""
        if self.is_direct:
            return
        current = self.of(self.parameter).to(self.dtype)
        if not self.is_filled:
            self.value.data = current.clone() if current is self.parameter else current
            return
        if self.parameter.dtype != self.dtype:
            rounded = self.value.to(self.parameter.dtype).to(self.dtype)
            current = torch.where(rounded == current, self.value, current)
        self.value.copy_(current)

    @torch.no_grad()
    def write(self) -> None:
        """Write the updated values into the parameter; entries outside the child keep their bits."""
        if self.runs is not None:
            self.runs.scatter_(self.parameter.detach(), self.value)
        elif not self.is_direct:
            self.parameter.copy_(self.value)

    def of(self, dense: Tensor) -> Tensor:
        """Return the trained entries of a tensor of the parameter's shape, laid out as ``value`` is."""
        return dense if self.runs is None else self.runs.gather(dense)

    # Gradients

    @torch.no_grad()
    def accept(self, gradient: Tensor, *, compact: bool = False) -> None:
        """Add a dense or compact gradient from the backward pass to this step's gradient.

        A compact one of a sharded parameter is of its entries on all processes.
        """
        if compact and not self.piece.is_all:
            taken = gradient.to(self.dtype)
            self.formed = taken if self.formed is None else self.formed + taken
            return
        taken = (gradient if compact else self.of(gradient)).to(self.dtype)
        if self.value.grad is None:
            self.value.grad = taken
        else:
            self.value.grad += taken

    def gradient(self) -> Tensor | None:
        """Return this step's gradient, unscaled and unmasked; scaling it in place scales the step.

        It is compact where it was formed or released so (``value.grad``, or the drawn rows'), else the parameter's.
        """
        dense = None if self.holder.grad is None else local_of(self.holder.grad)
        if self.released:
            if dense is not None:  # put there by hand, or before the backward pass was watched
                self.accept(dense)
                self.holder.grad = None
            return self.value.grad
        if self.rows is None or self.leaf is None:
            return dense
        if dense is not None:  # from a use of the weight elsewhere than in a structured layer
            gradient = dense.to_dense() if dense.is_sparse else dense
            rows = gradient.index_select(self.row_axis, self.rows).reshape(-1)
            formed = self.leaf.tensor.grad
            self.leaf.tensor.grad = rows if formed is None else formed + rows
            self.parameter.grad = None
        return self.leaf.tensor.grad

    @property
    def units(self) -> Granularity:
        """The units that a task-free child draws."""
        return self.part.granularity

    @property
    def row_axis(self) -> int:
        """The axis of the rows that are drawn one by one."""
        return self.units.axes(self.parameter.shape)[0]

    def formed_rows(self, gradient: Tensor) -> Tensor:
        """Return the drawn rows' flat gradient in the parameter's shape, but for the number of rows."""
        shape = list(self.parameter.shape)
        assert self.rows is not None
        shape[self.row_axis] = len(self.rows)
        return gradient.view(shape)

    def dense(self, gradient: Tensor) -> Tensor:
        """Return a gradient that ``gradient()`` gave as ``value`` is laid out, in the parameter's dtype or its own."""
        if self.rows is not None and self.leaf is not None:
            full = torch.zeros_like(self.parameter)
            return full.index_copy_(self.row_axis, self.rows, self.formed_rows(gradient).to(full.dtype))
        return gradient if self.released else self.of(gradient)

    def forget(self) -> None:
        """Drop gradients stored outside the parameter, and one in it that is older than the optimizer."""
        self.formed = None
        if self.released:
            self.holder.grad = None
        if not self.is_direct or self.released:
            self.value.grad = None
        if self.leaf is not None:
            self.leaf.tensor.grad = None

    def held(self) -> list[Tensor]:
        """Return the tensors held beside the model, its gradients and the inner optimizer's state."""
        held = [] if self.runs is None else [self.runs.starts]
        held += [] if self.is_direct or self.value.grad is None else [self.value.grad]
        return held + ([self.value] if self.is_filled and not self.is_direct else [])
