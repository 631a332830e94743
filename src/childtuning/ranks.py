"""The processes of a distributed training: what they add up, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from childtuning import errors
from childtuning.errors import ParameterError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """The processes that hold one thing together.

    Args:
        group: their process group; ``None``: this process alone, for which everything here is free.
    """

    group: ProcessGroup | None = None

    @classmethod
    def everyone(cls) -> Ranks:
        """Return all processes of the default group, or this one alone."""
        return cls(torch.distributed.group.WORLD) if num_processes() > 1 else cls()

    @property
    def size(self) -> int:
        """How many they are."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """This process's number among them."""
        return 0 if self.group is None else self.group.rank()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all of them, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, value: _T) -> list[_T]:
        """Return the value of each of them, in the order of their ranks: small Python objects."""
        values = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Raise on every process what one of them raises inside, so that none waits for it.

        Raises:
            ChildTuningError: another process raised it.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as fault:
            error = fault
        if self.size > 1:
            told = None if error is None else (type(error).__name__, str(error))
            others = [one for one in self.gather(told) if one is not None]
            if error is None and others:
                name, text = others[0]
                kind = getattr(errors, name, None)
                raise RuntimeError(f"{name}: {text}") if kind is None else kind(text)
        if error is not None:
            raise error

    def max_(self, tensor: Tensor) -> Tensor:
        """Take the largest of each entry over all of them, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=self.group)
        return tensor


def num_processes() -> int:
    """Return how many processes train together; 1 without a process group."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_main_process() -> bool:
    """Return whether this process writes files and prints: rank 0, or the only one."""
    if num_processes() > 1:
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # as torchrun sets it, before there is a process group


def wait_for_all() -> None:
    """Wait until every process has arrived."""
    if num_processes() > 1:
        torch.distributed.barrier()


def of_main_process(value: _T) -> _T:
    """Return rank 0's value, on every rank."""
    if num_processes() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def check_same_child(identity: str) -> None:
    """Raise a ParameterError unless all processes train the same child."""
    if len(set(Ranks.everyone().gather(identity))) > 1:
        raise ParameterError(
            "the processes have chosen different children. Choose on rank 0 and broadcast, or load one file."
        )


def is_lost_process(error: RuntimeError) -> bool:
    """Tell whether an error says that another process of the group has ended."""
    if num_processes() == 1:
        return False
    said = str(error)
    is_told = "Connection closed by peer" in said or "Connection reset by peer" in said
    return is_told or isinstance(error, torch.distributed.DistError)
