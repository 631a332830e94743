"""Transfer of the CIFAR-10 ResNet-20 of examples/cnn.py to CIFAR-100 and USPS, by method.

Each seed draws its own training images. Of CIFAR-100 a seed also has its own twenty classes of the hundred (every
fifth, from the seed's number on), so that five seeds use each test image once. The learning rate of a method is the
best on seed 0 with 10 images a class, on 30 a class of the training images that were not drawn; no test image is
asked. It serves for 50 images a class as well.

    python benchmarks/cnn.py --data-dir DATA
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, restart_with_settings
from recorded_runs import RecordedRuns, Way, best_rate, example, folder_bytes
from torch import Tensor, nn

import childtuning as ct
from childtuning.methods import Combination
from childtuning.training import choose_child

cnn = example("cnn")
HEAD = ("linear.weight", "linear.bias")
BATCH_SIZE = 32
NUM_SEEDS = 5
START = (1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Target:
    """What is learned: a file of images, how many classes a seed has (0: all), and steps by images a class."""

    file: str
    num_classes: int
    steps: dict[int, int]


TARGETS = {
    "CIFAR-100": Target("cifar100_subset/data.npz", 20, {10: 40, 50: 60}),
    "USPS": Target("usps/usps.npz", 0, {10: 30, 50: 50}),
}


@dataclass(frozen=True)
class CnnWay(Way):
    """And what BatchNorm's statistics do."""

    batch_norm: str = "updated"

    def __str__(self) -> str:
        return super().__str__() + (", statistics frozen" if self.batch_norm == "frozen" else "")


WAYS = (
    CnnWay("head"),
    CnnWay("last-k:2"),
    CnnWay("last-k:3"),
    CnnWay("full"),
    CnnWay("child-f", 0.3),
    CnnWay("child-d", 0.3),
    CnnWay("child-d", 0.3, "row"),
)
MORE_WAYS = (
    CnnWay("last-k:3", batch_norm="frozen"),
    CnnWay("full", batch_norm="frozen"),
    CnnWay("child-f", 0.3, batch_norm="frozen"),
    CnnWay("child-d", 0.3, batch_norm="frozen"),
    CnnWay("child-d", 0.1),
    CnnWay("child-d", 0.1, "row"),
)


class Data:
    """The images of one target, size, seed and split, the network they start from, and what runs of them share."""

    def __init__(self, folder: Path, target: Target, per_class: int, seed: int, split: str) -> None:
        self.seed = seed
        self.weights = folder / "weights_resnet_cifar10" / "resnet20.npz"
        pool, test = cnn.load_images(folder / target.file)
        if target.num_classes:
            step = int(pool.y.max() + 1) // target.num_classes
            pool, test = (_of_classes(images, seed % step, step) for images in (pool, test))
        generator = torch.Generator().manual_seed(seed)
        drawn = cnn.draw(pool.y, per_class, generator)
        self.train, self.measured = pool.of(drawn), test
        if split == "validation":
            is_left = torch.ones(len(pool.y), dtype=torch.bool).index_fill(0, drawn, False)
            left = pool.of(is_left.nonzero().squeeze(1))
            self.measured = left.of(cnn.draw(left.y, 30, generator))
        self._features: dict[tuple[str, int], Any] = {}

    def model(self) -> Any:
        """Load the network; the head's numbers are the seed's, and so the same for every method."""
        torch.manual_seed(self.seed)
        return cnn.load_pretrained(self.weights, int(self.train.y.max()) + 1)

    @cached_property
    def fisher(self) -> dict[str, Tensor]:
        """The scores of all parameters but the head's."""
        return ct.fisher_information(self.model(), self.train.batches(64), cnn.loss_fn, "mean", always=HEAD)

    @torch.inference_mode()
    def before_block(self, which: str, start: int) -> Any:
        """What frozen blocks make of the images: computed once, as nothing in them changes."""
        if start == 0:
            return getattr(self, which)
        if (which, start) not in self._features:
            model, images = self.model().eval(), self.before_block(which, start - 1)
            first = model.stem if start == 1 else nn.Identity()
            x = torch.cat([model.blocks[start - 1](first(batch.x)) for batch in images.batches(64)])
            self._features[which, start] = images._replace(x=x)
        return self._features[which, start]


class _FromBlock(nn.Module):
    """The network behind its frozen blocks."""

    def __init__(self, model: nn.Module, start: int) -> None:
        super().__init__()
        self.model, self.start = model, start

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, start=self.start)


def _of_classes(images: Any, first: int, step: int) -> Any:
    chosen = (images.y % step == first).nonzero().squeeze(1)
    return cnn.Images(images.x[chosen], images.y[chosen] // step)


def num_frozen_blocks(model: Any) -> int:
    """Return how many blocks lie before the first trained parameter; none where the stem is trained."""
    stem = {"conv1.weight", "bn1.weight", "bn1.bias"}
    if any(p.requires_grad for name, p in model.named_parameters() if name in stem):
        return 0
    is_trained = [any(p.requires_grad for p in block.parameters()) for block in model.blocks]
    return is_trained.index(True) if any(is_trained) else len(is_trained)


def measure(way: CnnWay, data: Data, steps: int, rate: float) -> dict[str, Any]:
    """Train once; return accuracy on what is measured, and the costs."""
    model = data.model()
    combination = Combination.parse(way.method)
    prepared = combination.prepare(model, HEAD)
    config = ct.ChildConfig(**{"density": combination.density, "seed": data.seed, **way.child_options})
    config = combination.child(config)
    if prepared.eligible is not None:
        config = replace(config, eligible=prepared.eligible)
    by_scores = config.variant == "task-driven" and config.density != 1.0
    child = choose_child(
        config, model, lambda: (), always=prepared.always, scores=data.fisher if by_scores else None
    )
    opt = ct.ChildOptimizer(
        model.named_parameters(),
        child,
        torch.optim.AdamW,
        lr=rate,
        weight_decay=0.01,
        rescale=config.rescale,
        model=model if way.granularity == "row" else None,
    )
    start = num_frozen_blocks(model)
    tuned = _FromBlock(model, start)
    generator = torch.Generator().manual_seed(data.seed)
    train = data.before_block("train", start)
    cnn.fit(tuned, opt, train, steps, BATCH_SIZE, way.batch_norm, generator)
    opt.remove()
    delta = ct.Delta.capture(model, child)
    with tempfile.TemporaryDirectory() as folder:
        delta.save(folder)
        num_bytes = folder_bytes(folder)
    return {
        "accuracy": cnn.accuracy(tuned, data.before_block("measured", start)),
        "trained_parameters": delta.num_trained,
        "state_bytes": opt.num_state_bytes,
        "delta_bytes": num_bytes,
        "train_images": len(data.train.y),
        "measured_images": len(data.measured.y),
        "steps": steps,
    }


def main() -> None:
    """Run what is missing from the table."""
    parser = argparse.ArgumentParser(description="Transfer of a ResNet-20, by method: runs what is missing.")
    parser.add_argument("--data-dir", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--per-class", nargs="+", type=int, choices=(10, 50), default=[10, 50])
    parser.add_argument(
        "--all", action="store_true", help="also density 0.1, and BatchNorm's statistics frozen"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "cnn.json")
    given = parser.parse_args()
    restart_with_settings(threads=1)
    torch.set_num_threads(1)
    recorded = RecordedRuns(given.output, threads=1)
    for ways in (WAYS, MORE_WAYS) if given.all else (WAYS,):
        for name in given.targets:
            _fill(recorded, given.data_dir, name, given.per_class, ways)


def _fill(
    recorded: RecordedRuns, folder: Path, name: str, sizes: Sequence[int], ways: Sequence[CnnWay]
) -> None:
    target = TARGETS[name]

    def accuracy(data: Data, size: int, split: str, way: CnnWay, rate: float) -> float:
        key = {
            "target": name,
            "per_class": size,
            "method": str(way),
            "lr": rate,
            "seed": data.seed,
            "split": split,
        }
        return recorded.run(key, lambda: measure(way, data, target.steps[size], rate))["accuracy"]

    held_out = Data(folder, target, 10, 0, "validation")
    rates = {
        way: best_rate(lambda rate, way=way: accuracy(held_out, 10, "validation", way, rate), START)
        for way in ways
    }
    for size in sizes:
        for seed in range(NUM_SEEDS):
            data = Data(folder, target, size, seed, "test")
            for way in ways:
                accuracy(data, size, "test", way, rates[way])


if __name__ == "__main__":
    main()
