"""Running sums of squares per parameter: formed in float32 on the parameter's device, stored as requested."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from childtuning.errors import ConfigError
from childtuning.fisher.rounding import add_rounded_

DTYPES = (torch.float32, torch.bfloat16)


class ScoreSums:
    """A running sum for each parameter.

    Terms are added in place if the sum has the device and dtype in which squares are formed. Otherwise each term is
    formed in a temporary tensor, one parameter at a time, and then added; to bf16 by ``add_rounded_``, under the
    coordinates (seed, name, number of terms so far).

    Args:
        parameters: by name; squares are formed on their devices, in their dtypes but at least float32.
        device: where the sums are kept; ``None``: where they are formed.
        dtype: float32 or bf16; ``None``: as they are formed.
        seed: names the random bits that bf16 is rounded by.
    Raises:
        ConfigError: another dtype, or no device.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        if dtype not in (None, *DTYPES):
            raise ConfigError(f"scores_dtype must be torch.float32 or torch.bfloat16, got {dtype!r}.")
        self.parameters, self.seed = parameters, seed
        self.tensors = {
            name: torch.zeros(
                parameter.shape,
                dtype=dtype or _formed_dtype(parameter),
                device=parameter.device if device is None else _device(device),
            )
            for name, parameter in parameters.items()
        }
        self._num_terms = dict.fromkeys(parameters, 0)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def add(self, name: str, add_fn: Callable[[Tensor], object]) -> None:
        """Add what ``add_fn(tensor)`` adds to a tensor of the parameter's shape on its device."""
        kept, parameter = self.tensors[name], self.parameters[name]
        if kept.device == parameter.device and kept.dtype == _formed_dtype(parameter):
            add_fn(kept)
            return
        term = self.zero(name)
        add_fn(term)
        if kept.dtype == torch.bfloat16:
            term = term.to(kept.device, torch.float32)
            add_rounded_(kept, term, "fisher-sum", self.seed, name, self._num_terms[name])
            self._num_terms[name] += 1
        else:
            kept.add_(term.to(kept.device))

    def add_square(self, name: str, gradient: Tensor) -> None:
        """Add the square of a gradient."""
        gradient = gradient.to(_formed_dtype(self.parameters[name]))
        self.add(name, lambda total: total.addcmul_(gradient, gradient))

    def zero(self, name: str) -> Tensor:
        """Return zeros in which squares of one parameter can be formed."""
        parameter = self.parameters[name]
        return torch.zeros(parameter.shape, dtype=_formed_dtype(parameter), device=parameter.device)

    def means_(self, num_terms: int) -> dict[str, Tensor]:
        """Divide by the number of terms, in place, and return the tensors by name."""
        for total in self.tensors.values():
            total.div_(num_terms)
        return self.tensors


def _formed_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError:
        raise ConfigError(f"scores_device must be a device of torch, got {device!r}. Pass 'cpu'.") from None
