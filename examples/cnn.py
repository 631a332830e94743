"""Fine-tune a plain CNN, a CIFAR-10 ResNet-20, on a few images per class, in five ways.

    python examples/cnn.py --weights resnet20.npz --images usps.npz --per-class 10 --method child-d

Child-Tuning needs no particular model library: it works with any nn.Module and a loss function.

BatchNorm keeps running statistics besides its parameters, and optimizers do not update them. `--batch-norm updated`
lets the statistics follow the new images, from the first trained layer on; the layers below are frozen, including
their statistics. `--batch-norm frozen` keeps all statistics from pretraining, so that training changes only the child;
it learns more slowly if many layers are trained (docs/transfer.md). The delta holds the statistics in both cases.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import childtuning as ct

HEAD = ("linear.*",)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the values used to pretrain this ResNet-20


class Block(nn.Module):
    """Two convolutions and a parameter-free shortcut that skips pixels and adds channels of zeros."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.stride, self.new_channels = stride, num_out - num_in

    def forward(self, x: Tensor) -> Tensor:
        side = self.new_channels // 2
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, side, side))
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet20(nn.Module):
    """Three stages of three blocks with 16, 32 and 64 channels. [He et al. 2016, section 4.2]"""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, images: Tensor, *, start: int = 0) -> Tensor:
        """Return the logits [B, classes] of images [B, 3, 32, 32], or of the input of block `start`."""
        x = images if start else self.stem(images)
        for block in self.blocks[start:]:
            x = block(x)
        return self.linear(x.mean((2, 3)))

    def stem(self, images: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(images)))

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.layer1, *self.layer2, *self.layer3]


class Images(NamedTuple):
    """Images [N, 3, 32, 32], normalised, and their labels [N]."""

    x: Tensor
    y: Tensor

    def of(self, index: Tensor) -> Images:
        return Images(self.x[index], self.y[index])

    def batches(self, size: int) -> Iterator[Images]:
        return (Images(*batch) for batch in zip(self.x.split(size), self.y.split(size), strict=True))


def load_pretrained(path: Path, num_classes: int) -> ResNet20:
    """Read the pretrained network and give it a new, randomly initialised head."""
    model = ResNet20()
    with np.load(path) as file:
        model.load_state_dict({name: torch.from_numpy(file[name]) for name in file.files})
    model.linear = nn.Linear(model.linear.in_features, num_classes)
    return model


def load_images(path: Path) -> tuple[Images, Images]:
    """Read x_train, y_train, x_test and y_test: grey or colour, bytes or floats from -1 to 1, of any size."""
    with np.load(path) as file:
        return tuple(
            Images(
                _network_input(torch.from_numpy(file[f"x_{part}"])),
                torch.from_numpy(file[f"y_{part}"]).long(),
            )
            for part in ("train", "test")
        )  # type: ignore[return-value]


def _network_input(x: Tensor) -> Tensor:
    x = x / 255 if x.dtype == torch.uint8 else (x.float() + 1) / 2
    x = x.permute(0, 3, 1, 2) if x.dim() == 4 else x.unsqueeze(1).expand(-1, 3, -1, -1)
    if x.shape[-1] != 32:
        x = F.interpolate(x, size=(32, 32), mode="bilinear")
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def draw(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Draw the indices of `per_class` images of each class."""
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([order[labels[order] == label][:per_class] for label in labels.unique()])


def loss_fn(model: nn.Module, batch: Images) -> Tensor:
    return F.cross_entropy(model(batch.x), batch.y)


def to_training(model: nn.Module, batch_norm: str) -> None:
    """Put a model into training mode, but a BatchNorm layer only if its statistics should be updated.

    Modules are visited in the order in which they run; the first one with a trained parameter ends the frozen part.
    """
    model.train()
    is_reached = False
    for module in model.modules():
        is_reached = is_reached or any(p.requires_grad for p in module.parameters(recurse=False))
        if isinstance(module, nn.BatchNorm2d):
            module.train(batch_norm == "updated" and is_reached)


def fit(
    model: nn.Module,
    opt: ct.ChildOptimizer,
    train: Images,
    steps: int,
    batch_size: int,
    batch_norm: str,
    generator: torch.Generator,
) -> None:
    """Train for `steps` steps, with a rate that rises for a tenth of them and then falls to zero."""
    rise = max(1, steps // 10)
    fall = max(1, steps - rise)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: min((t + 1) / rise, (steps - t) / fall))
    to_training(model, batch_norm)
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(train.y), generator=generator)])
        index, order = order[:batch_size], order[batch_size:]
        loss = loss_fn(model, train.of(index))
        loss.backward()
        opt.clip_grad_norm_(1.0)
        opt.step()
        schedule.step()
        opt.zero_grad()
        if step % 20 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.3f}")


@torch.inference_mode()
def accuracy(model: nn.Module, images: Images) -> float:
    model.eval()
    right = sum(int((model(batch.x).argmax(1) == batch.y).sum()) for batch in images.batches(64))
    return right / len(images.y)


def choose(options: argparse.Namespace, model: ResNet20, train: Images) -> ct.Child | ct.TaskFree:
    """Choose what is trained. The new head always is."""
    if options.method == "child-f":
        return ct.TaskFree(options.density, options.seed, options.granularity, always=HEAD)
    if options.method == "child-d":
        scores = ct.fisher_information(model, train.batches(64), loss_fn, "mean", always=HEAD)
        return ct.select_child(scores, options.density, granularity=options.granularity, always=HEAD)
    blocks = {"head": [], "last-k": model.blocks[-options.blocks :], "full": [model]}[options.method]
    trained = {id(parameter) for block in blocks for parameter in block.parameters()}
    head = {id(parameter) for parameter in model.linear.parameters()}
    shapes = {name: p.shape for name, p in model.named_parameters() if id(p) in trained - head}
    return ct.Child.whole(shapes, always=HEAD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="the pretrained ResNet-20, npz")
    parser.add_argument(
        "--images", type=Path, required=True, help="npz with x_train, y_train, x_test, y_test"
    )
    parser.add_argument("--per-class", type=int, default=10, help="training images per class")
    parser.add_argument(
        "--method", choices=["head", "last-k", "full", "child-f", "child-d"], default="child-d"
    )
    parser.add_argument("--blocks", type=int, default=2, help="how many of the nine blocks last-k trains")
    parser.add_argument("--density", type=float, default=0.3, help="share of the child")
    parser.add_argument(
        "--granularity", choices=["element", "row"], default="element", help="row: output channel"
    )
    parser.add_argument("--batch-norm", choices=["frozen", "updated"], default="updated")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/cnn"))
    options = parser.parse_args()

    # Data and model: nothing here is specific to Child-Tuning.
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    pool, test = load_images(options.images)
    train = pool.of(draw(pool.y, options.per_class, generator))
    model = load_pretrained(options.weights, int(pool.y.max()) + 1)

    # The child and the optimizer. With rows, the layers compute only the gradients of the trained channels.
    child = choose(options, model, train)
    print(child)
    by_rows = options.method.startswith("child") and options.granularity == "row"
    opt = ct.ChildOptimizer(
        model.named_parameters(),
        child,
        torch.optim.AdamW,
        lr=options.lr,
        model=model if by_rows else None,
    )
    fit(model, opt, train, options.steps, options.batch_size, options.batch_norm, generator)
    opt.remove()  # restores torch's own layers
    print(f"optimizer state: {opt.num_state_bytes:,} bytes")
    print(f"accuracy {accuracy(model, test):.3f} on {len(test.y)} images")
    ct.Delta.capture(model, child, base=options.weights.stem).save(options.output)
    print(f"delta in {options.output}")


if __name__ == "__main__":
    main()
