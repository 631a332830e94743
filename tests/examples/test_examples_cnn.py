"""The CNN example: the network it describes, what each method trains, and BatchNorm's statistics."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import childtuning as ct

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("CHILDTUNING_DATA", ROOT.parent / "shared" / "data"))
METHODS = {
    "head": (),
    "last-k": ("--blocks", "1"),
    "full": (),
    "child-f": (),
    "child-d": (),
    "child-d row": ("--granularity", "row"),
}


@pytest.fixture(scope="module")
def cnn() -> ModuleType:
    spec = importlib.util.spec_from_file_location("examples_cnn", ROOT / "examples" / "cnn.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(cnn: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights of the network, and random grey images of four classes."""
    folder = tmp_path_factory.mktemp("cnn")
    torch.manual_seed(0)
    state = cnn.ResNet20().state_dict()
    np.savez(folder / "weights.npz", **{k: v.numpy() for k, v in state.items() if "num_batches" not in k})
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, count in (("train", 24), ("test", 8)):
        arrays[f"x_{part}"] = rng.uniform(-1, 1, (count, 16, 16)).astype(np.float32)
        arrays[f"y_{part}"] = (np.arange(count) % 4).astype(np.uint8)
    np.savez(folder / "images.npz", **arrays)
    return {"weights": folder / "weights.npz", "images": folder / "images.npz"}


def run(cnn: ModuleType, files: dict[str, Path], output: Path, monkeypatch: Any, *words: str) -> ct.Delta:
    options = ["--weights", files["weights"], "--images", files["images"], "--output", output]
    options += ["--per-class", 3, "--steps", 2, "--batch-size", 4, *words]
    monkeypatch.setattr(sys, "argv", ["cnn.py", *map(str, options)])
    cnn.main()
    return ct.Delta.load(output)


def base_model(cnn: ModuleType, files: dict[str, Path]) -> Any:
    torch.manual_seed(0)  # the seed that the example gives its head by default
    return cnn.load_pretrained(files["weights"], 4)


@pytest.mark.parametrize("name", METHODS)
def test_each_method_trains_its_part(
    name: str, cnn: ModuleType, files: dict, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    words = ("--batch-norm", "frozen", "--method", name.split()[0], *METHODS[name])
    delta = run(cnn, files, tmp_path, monkeypatch, *words)
    assert "accuracy" in capsys.readouterr().out

    base = base_model(cnn, files)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    delta.apply_(base)  # which refuses another base: all that is frozen is bitwise the pretrained value
    after = base.state_dict()
    changed = {key: after[key] != before[key] for key in before}
    assert not any(bool(changed[key].any()) for key, _ in base.named_buffers())

    moved = {key for key, _ in base.named_parameters() if bool(changed[key].any())}
    whole = set(dict(base.named_parameters()))
    assert {"linear.weight", "linear.bias"} <= moved
    if name == "head":
        assert moved == {"linear.weight", "linear.bias"}
    elif name == "last-k":
        assert moved == {key for key in whole if key.startswith(("layer3.2.", "linear."))}
    elif name in ("full", "child-f"):
        assert moved == whole
    else:
        body = {key: part for key, part in delta.parts.items() if not key.startswith("linear.")}
        numel = sum(part.numel for part in body.values())
        trained = sum(part.num_trained for part in body.values())
        largest_row = 64 * 9
        assert trained <= round(0.3 * numel) < trained + (1 if name == "child-d" else largest_row)
        for key, part in body.items():
            assert not bool(changed[key][~part.mask()].any())
        if name == "child-d row":
            masks = [part.mask().flatten(1) for part in body.values() if len(part.shape) == 4]
            assert all(bool((mask.all(1) | ~mask.any(1)).all()) for mask in masks)


@pytest.mark.parametrize(
    ("words", "updated"),
    [
        (("--method", "head"), ()),
        (("--method", "last-k", "--blocks", "1"), ("layer3.2.",)),
        (("--method", "full"), ("bn1", "layer1.", "layer2.", "layer3.")),
    ],
    ids=["head", "last-k", "full"],
)
def test_statistics_below_the_trained_layers_stay(
    words: tuple[str, ...],
    updated: tuple[str, ...],
    cnn: ModuleType,
    files: dict,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    delta = run(cnn, files, tmp_path, monkeypatch, *words)
    before = dict(base_model(cnn, files).named_buffers())
    assert set(delta.buffers) == set(before)
    for name, buffer in delta.buffers.items():
        assert torch.equal(buffer, before[name]) is not name.startswith(updated or ("nothing",)), name


def test_the_network_is_resnet_20(cnn: ModuleType) -> None:
    model = cnn.ResNet20()
    assert sum(p.numel() for p in model.parameters()) == 269_722
    assert sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in model.modules()) == 20
    block = cnn.Block(2, 4, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)  # what is left is the shortcut
    x = torch.rand(1, 2, 4, 4)
    expected = torch.zeros(1, 4, 2, 2)
    expected[:, 1:3] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


def test_images_of_every_kind_become_the_network_s_input(cnn: ModuleType, tmp_path: Path) -> None:
    colour = np.full((2, 32, 32, 3), 255, np.uint8)
    labels = np.array([0, 1], np.uint8)
    np.savez(
        tmp_path / "x.npz", x_train=colour, y_train=labels, x_test=np.full((2, 8, 8), 1.0), y_test=labels
    )
    white = (1 - torch.tensor(cnn.MEAN)) / torch.tensor(cnn.STD)
    for images in cnn.load_images(tmp_path / "x.npz"):
        assert images.x.shape == (2, 3, 32, 32) and images.y.dtype == torch.long
        torch.testing.assert_close(images.x, white.view(1, 3, 1, 1).expand(2, 3, 32, 32))


def test_so_many_images_of_each_class(cnn: ModuleType) -> None:
    labels = torch.arange(40) % 4
    drawn = [cnn.draw(labels, 3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert all(labels[index].bincount().tolist() == [3, 3, 3, 3] for index in drawn)
    assert all(len(index.unique()) == 12 for index in drawn)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.skipif(not (REAL / "weights_resnet_cifar10").is_dir(), reason="the real weights are not here")
def test_the_real_weights_know_trucks(cnn: ModuleType) -> None:
    """Pickup trucks and buses of CIFAR-100 are automobiles (1) or trucks (9) to a network that knows CIFAR-10."""
    model = cnn.ResNet20()
    with np.load(REAL / "weights_resnet_cifar10" / "resnet20.npz") as file:
        model.load_state_dict({name: torch.from_numpy(file[name]) for name in file.files})
    path = REAL / "cifar100_subset" / "data.npz"
    with np.load(path) as file:
        wanted = [list(file["classes"]).index(name) for name in ("pickup_truck", "bus")]
    images = cnn.load_images(path)[0]
    chosen = images.of(torch.isin(images.y, torch.tensor(wanted)).nonzero().squeeze(1))
    with torch.inference_mode():
        said = model.eval()(chosen.x).argmax(1)
    assert torch.isin(said, torch.tensor([1, 9])).float().mean() > 0.85
