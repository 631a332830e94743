"""The inner loops: random bits, coded indices, exact ranking."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from childtuning.child import select_child
from childtuning.child.files import decode_gaps, encode_gaps
from childtuning.child.ranking import top_entries, top_units
from childtuning.child.task_free import keep_mask, uniform


def philox_block(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x64-10 with Python's whole numbers, from the paper's definition."""
    word = (1 << 64) - 1
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c[0], 1 << 64)
        high1, low1 = divmod(0xCA5A826395121157 * c[2], 1 << 64)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B97F4A7C15) & word, (k[1] + 0xBB67AE8584CAA73B) & word]
    return c


def reference_mask(density: float, coordinates: tuple[object, ...], numel: int) -> list[bool]:
    """keep_mask entry by entry: u < p·2^64, top byte from the stream, the rest drawn at (i, 1)."""
    from childtuning.child.task_free import _key

    key = _key(*coordinates)
    kept = []
    for i in range(numel):
        block = philox_block(key, (i // 32 + 1, 0, 0, 0))
        stream = b"".join(value.to_bytes(8, "little") for value in block)
        low = philox_block(key, (i, 1, 0, 0))[0] >> 8
        kept.append(((stream[i % 32] << 56) | low) < math.floor(density * 2.0**64))
    return kept


@pytest.mark.parametrize("density", [0.3, 0.1, 1 / 3, 0.004, 0.5, 0.9999])
def test_masks_are_philox_bits(density: float) -> None:
    drawn = keep_mask(density, "task-free", 7, 3, "encoder.weight", numel=600)
    assert drawn.tolist() == reference_mask(density, ("task-free", 7, 3, "encoder.weight"), 600)


@given(st.floats(0.001, 1.0), st.integers(0, 300), st.integers(0, 300))
@settings(max_examples=50, deadline=None)
def test_a_shard_draws_its_own_part(density: float, start: int, numel: int) -> None:
    whole = keep_mask(density, "x", numel=start + numel)
    assert torch.equal(whole[start:], keep_mask(density, "x", numel=numel, start=start))


def test_mask_shares_are_binomial_and_coordinates_matter() -> None:
    n = 400_000
    for density in (0.02, 0.3, 0.77):
        drawn = keep_mask(density, 1, 2, "w", numel=n)
        error = abs(float(drawn.double().mean()) - density)
        assert error < 5 * math.sqrt(density * (1 - density) / n)
        for other in ((2, 2, "w"), (1, 3, "w"), (1, 2, "v")):
            both = float((drawn & keep_mask(density, *other, numel=n)).double().mean())
            assert abs(both - density**2) < 5 * density / math.sqrt(n)


def test_uniform_numbers() -> None:
    drawn = uniform("a", numel=100_000)
    assert float(drawn.min()) >= 0 and float(drawn.max()) < 1
    assert abs(float(drawn.double().mean()) - 0.5) < 0.005
    assert torch.equal(drawn[:10], uniform("a", numel=10))


@given(st.sets(st.integers(0, 5000)), st.integers(0, 2**33))
@settings(max_examples=200, deadline=None)
def test_gap_code_round_trip(chosen: set[int], offset: int) -> None:
    indices = np.array(sorted(chosen), dtype=np.int64) + offset
    stream, low_bits = encode_gaps(indices)
    assert np.array_equal(decode_gaps(stream, len(indices), low_bits), indices)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.03, 0.1, 0.22, 0.3, 0.4, 0.5])
@pytest.mark.parametrize("pattern", ["independent", "clustered", "even"])
def test_gap_code_is_near_the_entropy_bound(density: float, pattern: str) -> None:
    numel = 400_000
    rng = np.random.default_rng(0)
    if pattern == "independent":
        indices = np.flatnonzero(rng.random(numel) < density)
    elif pattern == "clustered":
        rows = np.flatnonzero(rng.random(numel // 400) < density)
        indices = (rows[:, None] * 400 + np.arange(400)).reshape(-1)
    else:
        indices = np.unique((np.arange(int(density * numel)) / density).astype(np.int64))
    stream, _ = encode_gaps(indices)
    p = len(indices) / numel
    bound = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) / p
    assert 8 * len(stream) / len(indices) <= 1.3 * bound + 0.01


def test_damaged_gap_code_is_noticed() -> None:
    stream, low_bits = encode_gaps(np.arange(0, 1000, 7, dtype=np.int64))
    with pytest.raises(ValueError, match="does not hold"):
        decode_gaps(stream[: len(stream) // 3], 143, low_bits)


scores_strategy = st.lists(
    st.lists(st.floats(-10, 10, width=32) | st.sampled_from([0.0, -0.0, 1.0, float("inf")]), max_size=40),
    min_size=1,
)


@given(
    scores_strategy,
    st.floats(0, 1),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
@settings(max_examples=200, deadline=None)
def test_top_entries_is_a_stable_sort(lists: list[list[float]], share: float, dtype: torch.dtype) -> None:
    scores = [torch.tensor(values, dtype=dtype) for values in lists]
    together = torch.cat(scores)
    count = round(share * len(together))
    wanted = torch.zeros(len(together), dtype=torch.bool)
    wanted[torch.sort(together, descending=True, stable=True).indices[:count]] = True
    found = torch.zeros(len(together), dtype=torch.bool)
    offset = 0
    for score, taken in zip(scores, top_entries(scores, count), strict=True):
        found[taken + offset] = True
        offset += len(score)
    assert torch.equal(found, wanted)


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 50)), min_size=1, max_size=60), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_top_units_fills_the_budget(units: list[tuple[float, int]], share: float) -> None:
    means = torch.tensor([mean for mean, _ in units], dtype=torch.float64)
    sizes = torch.tensor([size for _, size in units])
    budget = round(share * int(sizes.sum()))
    taken = top_units(means, sizes, budget)
    spent = 0
    for index in torch.sort(means, descending=True, stable=True).indices.tolist():
        fits = spent + int(sizes[index]) <= budget
        assert bool(taken[index]) == fits
        spent += int(sizes[index]) if fits else 0


@pytest.mark.parametrize("granularity", ["row", "column", "block", "element"])
def test_a_file_is_near_the_entropy_of_its_units(granularity, tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (3072, 768), "down": (768, 3072), "square": (768, 768), "conv": (64, 128, 3, 3)}
    scores = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    child = select_child(scores, 0.1, granularity=granularity)
    bits = 0.0
    for name, part in child.parts.items():
        n, k = part.granularity.num_units(shapes[name]), 0 if part.units is None else len(part.units)
        bits += (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
    child.save(tmp_path / "child.safetensors")
    with safe_open(tmp_path / "child.safetensors", framework="numpy") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert bits / 8 <= stored <= 1.1 * bits / 8 + 16 * len(shapes)
