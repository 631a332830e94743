"""Which dtypes the matrix products of a backward pass have."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_OPERATIONS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm_.default}


class BackwardProducts(TorchDispatchMode):
    """Note the dtypes of the products that backward passes inside the context compute."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OPERATIONS and torch._C._current_graph_task_id() != -1:
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))
