"""One process of ``scale.py --measure``: what a step sends over the loopback interface, holds and takes.

torchrun --standalone --nproc-per-node 2 benchmarks/scale_worker.py copies
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import torch
import torch.distributed as dist
from scale import Network, Way, held_of_step, seconds_to_full, traffic_of_step
from torch import nn

import childtuning as ct
from childtuning.child import random_child

SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
NETWORK = Network("small", 256, 4, 704, 1000, 256)
WAYS = (
    Way("full"),
    Way("child-d 0.1, element", 0.1, has_index=True),
    Way("child-d 0.1, row", 0.1, 0.1),
    Way("child-d 0.1, column", 0.1, 0.1),
)
TOKENS, STEPS = (4, 64), 6


def main() -> None:
    """Measure every way and let the first process print what they say."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    is_sharded = sys.argv[1] == "shards"
    found = []
    for way in WAYS:
        model = llama()
        parameters = sum(p.numel() for p in model.parameters())
        if is_sharded:
            shard(model)
        step, held = prepare(model, way, is_sharded)
        step()
        seconds, sent = [], []
        for _ in range(STEPS):
            dist.barrier()
            before, start = loopback(), perf_counter()
            step()
            dist.barrier()
            seconds.append(perf_counter() - start)
            sent.append(loopback() - before)
        num_processes = dist.get_world_size()
        assert parameters == NETWORK.weights + (2 * NETWORK.layers + 1) * NETWORK.hidden  # and the norms
        options: dict[str, Any] = {"sharded": is_sharded, "width": 4}
        found.append(
            {
                "name": way.name,
                "traffic": min(sent) / num_processes,
                "predicted_traffic": traffic_of_step(NETWORK, way, num_processes, scattered=2, **options),
                "held": held(),
                "predicted_held": held_of_step(NETWORK, way, num_processes, **options),
                "seconds": seconds,
                "predicted_seconds_to_full": seconds_to_full(way),
            }
        )
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def llama() -> Any:
    """Return the network, the same in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, tie_word_embeddings=False, **SIZES)).train()


def shard(model: Any) -> None:
    """Shard it, layer by layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def prepare(model: Any, way: Way, is_sharded: bool) -> tuple[Callable[[], None], Callable[[], int]]:
    """Return a step, and what counts the bytes of weights and optimizer that this process holds."""
    net: nn.Module = model
    if way.share == 1:
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4)
        if not is_sharded and dist.get_world_size() > 1:
            net = nn.parallel.DistributedDataParallel(model)
    else:
        child = random_child(llama(), way.share, granularity=way.name.split()[-1])
        structured = {} if way.has_index else {"model": model}
        if way.has_index and not is_sharded:
            structured = {"release_gradients": True}
        optimizer = ct.ChildOptimizer(
            model.named_parameters(), child, torch.optim.AdamW, lr=1e-4, **structured
        )
    ids = torch.randint(1, 1000, TOKENS, generator=torch.Generator().manual_seed(dist.get_rank()))

    def step() -> None:
        net(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def held() -> int:
        weights = sum(local(p).nbytes for p in model.parameters())
        if way.share < 1:
            return weights + optimizer.num_state_bytes
        state = [t for own in optimizer.state.values() for t in own.values() if t.dim()]
        return weights + sum(local(t).nbytes for t in state)

    return step, held


def local(tensor: Any) -> torch.Tensor:
    """Return what this process holds of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def loopback() -> int:
    """Return the bytes that the loopback interface has sent."""
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


if __name__ == "__main__":
    main()
