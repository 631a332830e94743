"""A pass that several processes share: which batches are whose, the whole weights, and the sums of all.

Every process is given the same batches. It takes its share of them, and adds up squares in tensors of the whole
parameters; the sums of all processes are added at the end. The weights of a sharded model (FSDP2) are gathered once,
and stay so during the pass: its forward and backward passes are then those of one process, and no process waits for
another until the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from childtuning.child.eligible import bare_model, named
from childtuning.child.pieces import Piece, gathered, is_sharded, piece_of, reshard
from childtuning.errors import ParameterError
from childtuning.ranks import Ranks


@dataclass(frozen=True)
class SharedPass:
    """The processes of a pass, and what each of them holds of a sharded model's parameters.

    Args:
        ranks: the processes that share the pass; one, where the model is neither sharded nor wrapped by DDP.
        laid_out: by name, a sharded parameter, and the piece of it that this process holds.
    """

    ranks: Ranks = field(default_factory=Ranks)
    laid_out: Mapping[str, tuple[Tensor, Piece]] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def of(cls, model: nn.Module, *, share: bool = False) -> Iterator[SharedPass]:
        """Gather the weights of a sharded model; shard them again afterwards.

        Args:
            model: as the user has it. In a model that DistributedDataParallel has wrapped all processes share the pass;
                a bare one is this process's own, unless they are to ``share`` it.
        Raises:
            ParameterError: it is sharded otherwise than by ``fully_shard``.
        """
        reshard(model)
        parameters = named(model, sharded=True)
        laid_out = {name: (p, piece_of(name, p)) for name, p in parameters.items() if is_sharded(p)}
        if not laid_out:
            yield cls(Ranks.everyone() if share or _has_ddp(model) else Ranks())
            return
        groups = {piece.ranks for _, piece in laid_out.values()}
        if len(groups) > 1:
            raise ParameterError("the model is sharded over several groups of processes. Shard it over one.")
        with gathered(bare_model(model)):
            yield cls(groups.pop(), laid_out)

    def is_mine(self, number: int) -> bool:
        """Tell whether this process takes a batch, by its number."""
        return number % self.ranks.size == self.ranks.rank

    def total(self, count: int) -> int:
        """Add up a count over all processes."""
        return int(self.ranks.sum_(torch.tensor(count, device="cpu"))) if self.ranks.size > 1 else count

    def add_up_(self, sums: Mapping[str, Tensor]) -> None:
        """Add up the sums of all processes, in place, one parameter at a time."""
        for total in sums.values() if self.ranks.size > 1 else ():
            exact = total if total.dtype != torch.bfloat16 else total.float()
            on_device = exact.to(next(iter(self.laid_out.values()))[0].device) if self.laid_out else exact
            total.copy_(self.ranks.sum_(on_device))

    def as_laid_out(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return scores laid out as the parameters are: of a sharded one a DTensor."""
        for name, score in scores.items():
            if name in self.laid_out:
                parameter, piece = self.laid_out[name]
                scores[name] = _sharded_like(parameter, piece.slice(score).clone())
        return scores


def _sharded_like(parameter: Tensor, local: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def _has_ddp(model: nn.Module) -> bool:
    return any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules())
