"""Agreement between the processes of a distributed training."""

from __future__ import annotations

import os
from typing import TypeVar

import torch

from childtuning.errors import ParameterError

_T = TypeVar("_T")


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
    if num_processes() == 1:
        return
    identities = [identity] * num_processes()
    torch.distributed.all_gather_object(identities, identity)
    if len(set(identities)) > 1:
        raise ParameterError(
            "the processes have chosen different children. Choose on rank 0 and broadcast, or load one file."
        )
