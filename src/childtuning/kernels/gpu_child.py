"""A fixed child's entries on a GPU: gather, update and scatter in one launch over all parameters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from childtuning.kernels.adamw import AdamWStep
from childtuning.kernels.gpu import RECORD, launch
from childtuning.kernels.places import Places


class GpuChildTable:
    """``ChildTable`` for tensors on a GPU.

    Args:
        places: of each parameter's entries, int32, on the GPU; they follow one another in the compact tensors.
    """

    def __init__(self, places: Sequence[Places]) -> None:
        self._keep = list(places)
        self._sizes = [len(place) for place in places]
        self._records = np.zeros(len(places), RECORD)
        self._records["places"] = [place.units.data_ptr() for place in places]
        self._records["count"] = self._sizes
        self._records["width"] = [place.width for place in places]
        self._records["start"] = np.cumsum([0, *self._sizes])[:-1]

    def __reduce__(self) -> tuple[type[GpuChildTable], tuple[list[Places]]]:
        """Copy as a table of the copied places: the records hold addresses."""
        return type(self), (self._keep,)

    def adamw_(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        first: Tensor,
        second: Tensor,
        step: AdamWStep,
        values: Tensor | None = None,
    ) -> None:
        """Update the child's entries in place; nothing else is written to.

        Args:
            weights: the parameters, of one dtype.
            gradients: of each parameter's shape, or compact [n], or ``None`` to leave the parameter as it is.
            first, second: the moments, flat float32.
            step: hyperparameters.
            values: the weights' master values, flat float32, updated as well; where given, the weights are only
                written to. Pass them for weights of fewer bits.
        """
        records = self._records.copy()
        records["weight"] = [weight.data_ptr() for weight in weights]
        records["first"], records["second"] = first.data_ptr(), second.data_ptr()
        records["values"] = 0 if values is None else values.data_ptr()
        records["numbers"] = step.numbers()[()]
        for dtype in _dtypes(gradients):
            self._fill_gradients(records, gradients, dtype)
            launch(
                "child",
                "child_kernel",
                records,
                self._sizes,
                first.device,
                W=weights[0].dtype,
                G=dtype,
                MASTER=values is not None,
            )

    def gather(self, gradients: Sequence[Tensor | None], out: Tensor, *, add: bool = False) -> None:
        """Write the child's entries of dense gradients into the flat tensor out, or add them to it."""
        records = self._records.copy()
        records["first"] = out.data_ptr()
        for dtype in _dtypes(gradients):
            self._fill_gradients(records, gradients, dtype)
            launch(
                "child", "gather_kernel", records, self._sizes, out.device, G=dtype, OUT=out.dtype, ADD=add
            )

    def gather_one(self, owner: int, gradient: Tensor, out: Tensor, *, add: bool = False) -> None:
        """Do the same for one parameter, which is the owner-th."""
        record = self._records[owner : owner + 1].copy()
        record["first"], record["gradient"] = out.data_ptr(), gradient.data_ptr()
        size = self._sizes[owner]
        launch("child", "gather_kernel", record, [size], out.device, G=gradient.dtype, OUT=out.dtype, ADD=add)

    def _fill_gradients(
        self, records: NDArray, gradients: Sequence[Tensor | None], dtype: torch.dtype
    ) -> None:
        """Point to the gradients of a dtype; programs of the others find nothing to do."""
        mine = [g if g is not None and g.dtype == dtype else None for g in gradients]
        records["gradient"] = [0 if g is None else g.data_ptr() for g in mine]
        records["compact_gradient"] = [
            g is not None and g.dim() == 1 and len(g) == size
            for g, size in zip(mine, self._sizes, strict=True)
        ]


def _dtypes(gradients: Sequence[Tensor | None]) -> list[torch.dtype]:
    """List the gradients' dtypes, each once, in order."""
    return list(dict.fromkeys(g.dtype for g in gradients if g is not None))
