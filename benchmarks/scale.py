"""Time, memory and traffic of a training step on 1 to 1,024 devices, by arithmetic; and what real runs say of it.

    python benchmarks/scale.py                                             # the tables
    python benchmarks/scale.py --measure benchmarks/results/scale.json     # 1, 2 and 4 processes on this CPU

A network of P weights, T tokens on each device, N trained entries of n devices:

    operations = 2·P·T (forward) + 2·P·T (again, with checkpointing) + 2·P·T (gradients of inputs) + 2·P·T·g,
    where g is the share of the weights' gradients that is formed: 1 for full tuning and single entries, the density
    for rows and columns, next to 0 for LoRA; attention adds 2·T·s·h·L a pass.
    memory = weights and a layer's gathered ones + (12 or 16 bytes) · trained entries + gradients + activations: of a
    checkpointed layer 2·T·h bytes are kept, and one layer at a time is there with 34·T·h. [Korthikanti et al. 2022]
    traffic of a device = (n − 1)/n · bytes, by a ring: of copies the gradients twice; of shards the layers' weights
    twice, a child's own gradients twice, and dense ones once.
    time = the longer of operations ÷ (peak · utilisation) and traffic ÷ link, and the optimizer's bytes ÷ bandwidth.

Assumed: communication hides behind computation as far as it can; devices are alike; sequences have one length.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from costs import table

_WIDTH = 2  # bytes of a weight, and of its gradient, in bf16
_GRADIENT = 4  # bytes of a gradient of a child's entries
_MOMENTS, _MASTER, _INDEX, _UPDATE = 8, 4, 4, 28  # bytes of a trained entry; the last are moved by AdamW
_CHECKPOINT, _LAYER = 2, 34  # bytes by token and hidden unit: of a checkpoint, of a layer's activations


@dataclass(frozen=True)
class Device:
    """Published figures of a device.

    Args:
        operations: a second, dense bf16.
        num_bytes: a second, of its memory.
        memory: bytes.
        near: bytes a second between devices of a node, one direction.
        far: bytes a second between nodes, for each device.
        per_node: devices.
        utilisation: the share of ``operations`` that training reaches.
    """

    name: str
    operations: float
    num_bytes: float
    memory: float
    near: float
    far: float
    per_node: int = 8
    utilisation: float = 0.4  # 38 to 43 % in the training of Llama 3 [Grattafiori et al. 2024, table 4]


H100 = Device(
    "H100 SXM", 989e12, 3.35e12, 80e9, 450e9, 50e9
)  # NVIDIA's data sheet; 400 Gb/s InfiniBand a device


@dataclass(frozen=True)
class Network:
    """The sizes of a decoder."""

    name: str
    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    key_values: int  # width of keys and of values

    @property
    def layer(self) -> int:
        """Weights of a layer's matrices."""
        h = self.hidden
        return 2 * h * h + 2 * h * self.key_values + 3 * h * self.intermediate

    @property
    def weights(self) -> int:
        """All weights: layers, embedding and head."""
        return self.layers * self.layer + 2 * self.vocabulary * self.hidden

    def adapters(self, rank: int) -> int:
        """Weights of LoRA on every matrix of every layer."""
        h, kv, i = self.hidden, self.key_values, self.intermediate
        return self.layers * rank * (2 * 2 * h + 2 * (h + kv) + 3 * (h + i))


LLAMAS = (
    Network("7B", 4096, 32, 11008, 32000, 4096),
    Network("70B", 8192, 80, 28672, 32000, 1024),
)


@dataclass(frozen=True)
class Way:
    """A way to fine-tune.

    Args:
        share: of the weights that is trained; of LoRA ``rank`` says it.
        formed: the share of the weights' gradients that is formed and sent.
        has_index: whether entries have positions of their own.
    """

    name: str
    share: float = 1.0
    formed: float = 1.0
    rank: int = 0
    has_index: bool = False

    def trained(self, network: Network) -> float:
        """Return the number of trained entries."""
        return network.adapters(self.rank) if self.rank else self.share * network.weights


WAYS = (
    Way("full"),
    Way("LoRA r=16", formed=0.0, rank=16),
    Way("child-d 0.02, element", 0.02, has_index=True),
    Way("child-d 0.02, row", 0.02, 0.02),
    Way("child-d 0.1, row", 0.1, 0.1),
)


@dataclass(frozen=True)
class Step:
    """One step on one of n devices: seconds, bytes held, and bytes sent."""

    seconds: float
    memory: float
    traffic: float


def traffic_of_step(
    network: Network, way: Way, num_devices: int, *, sharded: bool, width: int = _WIDTH, scattered: int = 1
) -> float:
    """Return the bytes that each device sends in a step.

    Args:
        width: bytes of a weight, and of its gradient; a child's gradients are float32.
        scattered: how often a reduce-scatter sends a gradient: gloo's is an all-reduce, which sends it twice.
    """
    ring = (num_devices - 1) / num_devices
    trained = way.trained(network)
    is_dense = (way.share == 1 and not way.rank) or (sharded and way.formed == 1.0)
    gradients = width * network.weights if is_dense else (width if way.rank else _GRADIENT) * trained
    if not sharded:
        return ring * 2 * gradients
    # FSDP2 gathers layers for the forward and for the backward pass, embedding and head once.
    gathered = width * (network.weights + network.layers * network.layer)
    return ring * (gathered + gradients * (scattered if is_dense else 2))


def held_of_step(
    network: Network, way: Way, num_devices: int, *, sharded: bool, width: int = _WIDTH
) -> float:
    """Return the bytes of weights and of the optimizer's state that each device holds."""
    state = _MOMENTS + _MASTER * (width < _GRADIENT) + _INDEX * way.has_index
    return (width * network.weights + state * way.trained(network)) / (num_devices if sharded else 1)


def seconds_to_full(way: Way) -> float:
    """Return the operations of a step without checkpointing, and without attention's, as a share of full tuning's."""
    return (2 + way.formed) / 3


def step(
    network: Network, way: Way, device: Device, num_devices: int, *, sharded: bool, tokens: int = 2048
) -> Step:
    """Return the cost of a step of one sequence of ``tokens`` on each device, with checkpointing."""
    shards = num_devices if sharded else 1
    trained = way.trained(network)
    passes = 2 * network.weights * tokens * (3 + way.formed) + 6 * trained * tokens * bool(way.rank)
    attention = 2 * tokens * tokens * network.hidden * network.layers * 4
    compute = (passes + attention) / (device.operations * device.utilisation)
    traffic = traffic_of_step(network, way, num_devices, sharded=sharded)
    link = device.near if num_devices <= device.per_node else device.far
    update = _UPDATE * trained / shards / device.num_bytes
    gathered = 2 * _WIDTH * network.layer if shards > 1 else 0
    # A structured gradient is formed alone; of dense ones full tuning keeps all, and a child one at a time.
    gradients = (_WIDTH if way.share == 1 else _GRADIENT) * trained / shards
    gradients += _WIDTH * network.layer * (way.formed == 1.0)
    activations = tokens * network.hidden * (_CHECKPOINT * network.layers + _LAYER)
    logits = 10 * tokens * network.vocabulary  # bf16 and float32, and the gradient
    held = held_of_step(network, way, num_devices, sharded=sharded)
    return Step(
        max(compute, traffic / link) + update, held + gathered + gradients + activations + logits, traffic
    )


def tables(folder: Path) -> dict[str, str]:
    """Return the tables of the docs."""
    rows = []
    for network in LLAMAS:
        for way in WAYS:
            cells = []
            for num_devices in (1, 8, 64, 1024):
                sharded = num_devices > 1
                own = step(network, way, H100, num_devices, sharded=sharded)
                full = step(network, WAYS[0], H100, num_devices, sharded=sharded)
                fits = "" if own.memory <= H100.memory else " ✗"
                cells.append(f"{own.memory / 1e9:,.1f}{fits}, {own.seconds / full.seconds:.2f}")
            rows.append([network.name, way.name, *cells])
    header = ["network", "way", *(f"{n:,} device{'s' * (n > 1)}: GB, time ÷ full" for n in (1, 8, 64, 1024))]
    layouts = ((8, False), (8, True), (64, False), (64, True))
    sent = []
    for way in WAYS:
        cells = []
        for num_devices, sharded in layouts:
            own = step(LLAMAS[0], way, H100, num_devices, sharded=sharded)
            full = step(LLAMAS[0], WAYS[0], H100, num_devices, sharded=True)
            fits = "" if own.memory <= H100.memory else " ✗"
            cells.append(f"{own.traffic / 1e9:.2f}{fits}, {own.seconds / full.seconds:.2f}")
        sent.append([way.name, *cells])
    of_traffic = ["7B", *(f"{n} {'shards' if sharded else 'copies'}" for n, sharded in layouts)]
    return {
        "scale": table(header, rows, text=(0, 1)),
        "traffic": table(of_traffic, sent),
        "checked": checked(folder / "scale.json"),
    }


def checked(path: Path) -> str:
    """Return what real runs say of the model."""
    if not path.is_file():
        return "Nothing is recorded yet."
    record = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [
            run["name"],
            str(run["num_processes"]),
            f"{run['traffic'] / 1e6:.2f}",
            f"{run['predicted_traffic'] / 1e6:.2f}",
            f"{run['held'] / 1e6:.2f}",
            f"{run['predicted_held'] / 1e6:.2f}",
            f"{run['seconds_to_full']:.2f}",
            f"{run['predicted_seconds_to_full']:.2f}",
        ]
        for run in record["runs"]
    ]
    header = [
        "run",
        "processes",
        "sent, MB",
        "predicted",
        "held, MB",
        "predicted",
        "time ÷ full",
        "predicted",
    ]
    return table(header, rows)


def measure(path: Path) -> None:
    """Run every way in 1, 2 and 4 processes on this machine, and write what they say beside the predictions."""
    from environment import environment

    runs: list[dict[str, Any]] = []
    for num_processes in (1, 2, 4):
        for layout in ("copies", "shards") if num_processes > 1 else ("copies",):
            print(f"{num_processes} processes, {layout}", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            worker = str(Path(__file__).with_name("scale_worker.py"))
            done = subprocess.run(
                [*command, str(num_processes), worker, layout], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            full = next(run for run in found if run["name"] == "full")
            for run in found:
                run["seconds_to_full"] = min(run["seconds"]) / min(full["seconds"])
                runs.append({**run, "name": f"{run['name']}, {layout}", "num_processes": num_processes})
    record = {"environment": environment(1), "runs": runs}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Print the tables, or measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", type=Path, help="write what runs on this machine say to this file")
    given = parser.parse_args()
    if given.measure is not None:
        measure(given.measure)
        return
    for content in tables(Path(__file__).with_name("results")).values():
        print(content, end="\n\n")


if __name__ == "__main__":
    main()
