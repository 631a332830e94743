"""What the transfer benchmarks rest on: recorded runs, the choice of a rate, and features kept of frozen blocks."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a benchmark's module, and forget it and what it imports afterwards: names like `cnn` are short."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_recorded_run_is_not_run_again(bench: Any, tmp_path: Path) -> None:
    runs = bench("recorded_runs")
    asked: list[int] = []

    def measure(value: int) -> dict[str, int]:
        asked.append(value)
        return {"value": value}

    for _ in range(2):  # a second process finds what the first wrote
        recorded = runs.RecordedRuns(tmp_path / "x.json", threads=1)
        assert recorded.run({"seed": 0}, lambda: measure(1)) == {"value": 1}
        assert recorded.run({"seed": 1}, lambda: measure(2)) == {"value": 2}
    assert asked == [1, 2]
    assert len(recorded.environments) == 1
    assert [run["environment"] for run in recorded.runs] == [0, 0]
    assert str(BENCHMARKS.parent) not in (tmp_path / "x.json").read_text()


@pytest.mark.parametrize(
    ("peak", "asked"),
    [
        (3e-3, [1e-3, 3e-3, 1e-2]),
        (3e-2, [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]),
        (1e-4, [1e-3, 3e-3, 1e-2, 3e-4, 1e-4]),
    ],
)
def test_the_grid_grows_until_the_best_is_inside(peak: float, asked: list[float], bench: Any) -> None:
    tried: list[float] = []

    def score(rate: float) -> float:
        tried.append(rate)
        return -abs(np.log(rate / peak))

    assert bench("recorded_runs").best_rate(score, (1e-3, 3e-3, 1e-2)) == peak
    assert tried == asked


def test_of_equal_rates_the_lower_is_taken(bench: Any) -> None:
    assert bench("recorded_runs").best_rate(lambda rate: float(rate < 5e-3), (1e-3, 3e-3, 1e-2)) == 1e-4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Random weights and a random target of ten classes, of which seeds take two each."""
    network = bench_example()
    torch.manual_seed(0)
    state = network.ResNet20().state_dict()
    (tmp_path / "weights_resnet_cifar10").mkdir()
    path = tmp_path / "weights_resnet_cifar10" / "resnet20.npz"
    np.savez(path, **{k: v.numpy() for k, v in state.items() if "num_batches" not in k})
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, each in (("train", 20), ("test", 2)):
        arrays[f"y_{part}"] = np.repeat(np.arange(10), each).astype(np.uint8)
        arrays[f"x_{part}"] = rng.uniform(-1, 1, (10 * each, 16, 16)).astype(np.float32)
        arrays[f"x_{part}"][:, 0, 0] = arrays[f"y_{part}"] / 10  # so that an image tells its class
    np.savez(tmp_path / "images.npz", **arrays)
    return tmp_path


def bench_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("examples_cnn", BENCHMARKS.parent / "examples" / "cnn.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_splits_do_not_share_images(bench: Any, folder: Path) -> None:
    cnn = bench("cnn")
    target = cnn.Target("images.npz", 2, {5: 1})
    tested = []
    for seed in range(5):
        data = cnn.Data(folder, target, 5, seed, "test")
        assert data.train.y.bincount().tolist() == [5, 5]
        tested.append(data.measured.x)
    assert len(torch.cat(tested).flatten(1).unique(dim=0)) == 20  # each test image is one seed's
    data = cnn.Data(folder, target, 5, 0, "validation")
    both = torch.cat([data.train.x, data.measured.x]).flatten(1)
    assert len(both.unique(dim=0)) == len(both) == 2 * 20
    pool = cnn.cnn.load_images(folder / "images.npz")[0]
    classes = {tuple(x[:, 0, 0].tolist()): int(y) for x, y in zip(pool.x, pool.y, strict=True)}
    drawn = [classes[tuple(x[:, 0, 0].tolist())] for x in data.train.x]
    assert drawn == [5 * int(y) for y in data.train.y]  # seed 0 of five has classes 0 and 5


@pytest.mark.parametrize(("method", "blocks"), [("head", 9), ("last-k:2", 7), ("full", 0)])
def test_kept_features_are_what_the_frozen_blocks_make(
    method: str, blocks: int, bench: Any, folder: Path
) -> None:
    cnn = bench("cnn")
    data = cnn.Data(folder, cnn.Target("images.npz", 2, {5: 1}), 5, 0, "test")
    model = data.model().eval()
    for name, parameter in model.named_parameters():
        is_trained = {"head": ("linear",), "last-k:2": ("layer3.1", "layer3.2", "linear"), "full": ("",)}[
            method
        ]
        parameter.requires_grad_(name.startswith(is_trained))
    assert cnn.num_frozen_blocks(model) == blocks
    with torch.no_grad():
        kept = model(data.before_block("measured", blocks).x, start=blocks)
        torch.testing.assert_close(kept, model(data.measured.x))


def test_a_run_says_what_it_cost(bench: Any, folder: Path) -> None:
    cnn = bench("cnn")
    data = cnn.Data(folder, cnn.Target("images.npz", 2, {5: 1}), 5, 0, "test")
    results = {
        str(way): cnn.measure(way, data, 2, 1e-3) for way in (cnn.CnnWay("head"), cnn.CnnWay("child-d", 0.1))
    }
    head = 64 * 2 + 2
    assert results["head"]["trained_parameters"] == head
    assert results["child-d 0.1 element"]["trained_parameters"] == head + round(0.1 * 269_072)
    assert all(0 <= result["accuracy"] <= 1 for result in results.values())
    assert results["head"]["delta_bytes"] < results["child-d 0.1 element"]["delta_bytes"]


def test_tables_compare_seed_by_seed(bench: Any, tmp_path: Path) -> None:
    values = {"full": {0: 0.25, 1: 0.75}, "head": {0: 0.5, 1: 0.875}}
    costs = {"trained_parameters": 1300, "state_bytes": 10_408, "delta_bytes": 28_014}
    more = {"train_images": 200, "steps": 40}
    runs = [
        {
            "key": {"target": "T", "per_class": 10, "method": m, "lr": 0.003, "seed": seed, "split": split},
            "result": {"accuracy": value if split == "test" else 1.0, **costs, **more},
        }
        for split in ("validation", "test")
        for m, seeds in values.items()
        for seed, value in seeds.items()
    ]
    (tmp_path / "cnn.json").write_text(json.dumps({"environments": [], "runs": runs}))
    tables = bench("transfer_tables")
    rows = [line for line in tables.cnn(tmp_path).splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        "| full | 0.500 ± 0.354 | — | 0.003 | 1,300 | 10 kB | 28 kB |",
        "| head | 0.688 ± 0.265 | +0.188 ± 0.088 | 0.003 | 1,300 | 10 kB | 28 kB |",
    ]
    assert "10 a class: 200 images, 40 steps of 32; 2 seeds" in tables.cnn(tmp_path)
    assert tables.decoder(tmp_path) == tables.NOTHING
