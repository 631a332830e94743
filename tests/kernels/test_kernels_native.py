"""The compiled CPU kernels against numpy, torch and float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from tests.kernels.adamw_twin import STEPS, assert_near, twin
from torch import Tensor

from childtuning.kernels import (
    AdamWStep,
    ChildTable,
    MaskDraw,
    NotNumbersError,
    Places,
    WholeTensors,
    adamw_masked_,
    adamw_rows_,
    keep_mask,
    mask_scale_,
    native_library,
    native_ranking,
    philox,
    top_entries,
)
from childtuning.kernels.native_ranking import top_entries_native

pytestmark = pytest.mark.skipif(
    native_library.LIBRARY is None, reason="the CPU kernels are not compiled: python hatch_build.py"
)

DENSITIES = [1e-12, 1 / 256, 0.3, 0.5, 0.7331, 0.999, 1 - 1e-9]


@pytest.fixture
def threads() -> Iterator[None]:
    """Put torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestMasks:
    @pytest.mark.parametrize("density", DENSITIES)
    @pytest.mark.parametrize(
        ("start", "numel"), [(0, 0), (0, 1), (0, 4096), (31, 2), (77, 1000), (2**40 + 5, 999)]
    )
    def test_bits_are_numpys(
        self, density: float, start: int, numel: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        native = keep_mask(density, "seed", 7, numel=numel, start=start)
        monkeypatch.setattr(philox, "LIBRARY", None)
        assert torch.equal(native, keep_mask(density, "seed", 7, numel=numel, start=start))

    def test_several_tasks_and_threads_draw_one_stream(
        self, monkeypatch: pytest.MonkeyPatch, threads: None
    ) -> None:
        numel = 2 * philox._ENTRIES_A_TASK + 321
        torch.set_num_threads(3)
        native = keep_mask(0.37, "many", numel=numel, start=9)
        monkeypatch.setattr(philox, "LIBRARY", None)
        assert torch.equal(native, keep_mask(0.37, "many", numel=numel, start=9))

    @pytest.mark.parametrize("numel", [1, 255, 1000])
    def test_masking_a_gradient(self, numel: int) -> None:
        draw = MaskDraw.of(0.3, "g")
        assert draw is not None
        gradient = draws(numel)
        gradient[0] = torch.inf  # where it is dropped it leaves 0, not NaN
        kept = keep_mask(0.3, "g", numel=numel)
        expected = torch.where(kept, gradient * 2.5, 0.0)
        mask_scale_(gradient, draw, 2.5)
        assert torch.equal(gradient, expected)


def _many(seed: int = 0) -> list[Tensor]:
    return [draws(700_001, seed=seed), draws(3), draws(1 << 20, seed=seed + 1), draws(65, 7)]


def _with_infinities() -> list[Tensor]:
    scores = _many()
    scores[0][::100_000] = torch.inf
    scores[2][5::90_000] = -torch.inf
    scores[2][:3] = torch.tensor([0.0, -0.0, torch.inf])
    return scores


SCORES = {
    "normal": _many,
    "normal, one small tensor": lambda: [draws(1000)],
    "negative": lambda: [-score.abs() for score in _many()],
    "squares": lambda: [score**2 for score in _many()],
    "few values": lambda: [(3 * score).round() for score in _many()],
    "two values": lambda: [(score > 1).float() for score in _many()],
    "zeros": lambda: [torch.zeros_like(score) for score in _many()],
    "zeros of both signs": lambda: [torch.where(score > 0, 0.0, -0.0) for score in _many()],
    "infinities": _with_infinities,
    "sorted": lambda: [torch.arange(1_500_000.0), torch.arange(900.0)],
    "sorted downwards": lambda: [torch.arange(1_500_000.0, 0, -1.0), torch.arange(900.0)],
    "period 64": lambda: [draws(64).repeat(20_000)],
    "few large": lambda: [torch.where(score > 4, score, 0.0) for score in _many()],
    "an empty tensor": lambda: [torch.zeros(0), draws(50), torch.zeros(0, 4)],
    "bf16": lambda: [score.bfloat16() for score in _many()],
    "bf16, period 64": lambda: [draws(64).repeat(20_000).bfloat16()],
}


def ranked_by_torch(scores: Sequence[Tensor], count: int, lowest: bool) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_ranking, "LIBRARY", None)
        return top_entries(scores, count, lowest=lowest)


class TestRanking:
    @pytest.mark.parametrize("lowest", [False, True])
    @pytest.mark.parametrize("name", SCORES)
    def test_entries_are_torchs(self, name: str, lowest: bool) -> None:
        scores = SCORES[name]()
        total = sum(score.numel() for score in scores)
        for share in (0.0, 0.001, 0.1, 0.77, 1.0):
            count = max(1, round(share * total))
            native = top_entries(scores, count, lowest=lowest)
            expected = ranked_by_torch(scores, count, lowest)
            assert sum(len(taken) for taken in native) == count
            for got, wanted in zip(native, expected, strict=True):
                assert torch.equal(got.long(), wanted.long())

    @pytest.mark.parametrize(
        "name", ["normal", "few values", "zeros", "sorted", "period 64", "bf16", "bf16, period 64"]
    )
    def test_the_sample_serves(self, name: str) -> None:
        """The cases above are no comparison of torch with itself."""
        scores = SCORES[name]()
        assert top_entries_native(scores, sum(score.numel() for score in scores) // 10) is not None

    def test_threads_do_not_show(self, threads: None) -> None:
        scores = SCORES["few values"]()
        torch.set_num_threads(1)
        one = top_entries(scores, 123_456)
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(one, top_entries(scores, 123_456), strict=True))

    @pytest.mark.parametrize("where", [(0, 5), (2, 1_000_000), (3, 454)])
    def test_nan_is_refused(self, where: tuple[int, int]) -> None:
        scores = _many()
        scores[where[0]].view(-1)[where[1]] = torch.nan
        with pytest.raises(NotNumbersError) as caught:
            top_entries_native(scores, 10_000)
        assert caught.value.tensor == where[0]

    def test_nan_is_refused_where_the_bracket_overflows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native_ranking, "_ROOM", 8)
        scores = _many()
        scores[-1].view(-1)[-1] = torch.nan
        assert top_entries_native(_many(), 10_000) is None
        with pytest.raises(NotNumbersError) as caught:
            top_entries(scores, 10_000)
        assert caught.value.tensor == len(scores) - 1

    def test_a_sample_that_misleads_costs_time_only(self) -> None:
        """Scores that are 0 exactly where the sample looks."""
        assert native_library.LIBRARY is not None
        total = 1 << 20
        step = total // native_ranking._SAMPLE
        looked_at = np.empty(native_ranking._SAMPLE, np.float32)
        counting = torch.arange(float(total))
        native_library.LIBRARY.ct_sample(
            counting.data_ptr(), len(looked_at), step, 1.0, looked_at.ctypes.data
        )
        scores = draws(total).abs() + 1
        scores[torch.from_numpy(looked_at).long()] = 0.0
        assert top_entries_native([scores], 1000) is None
        assert torch.equal(top_entries([scores], 1000)[0], ranked_by_torch([scores], 1000, False)[0])

    def test_no_room_for_what_is_nearly_alike(self, monkeypatch: pytest.MonkeyPatch) -> None:
        scores = torch.ones(1 << 20) + draws(1 << 20) * 1e-3
        monkeypatch.setattr(native_ranking, "_ROOM", 100)
        assert top_entries_native([scores], 1 << 19) is None
        assert torch.equal(
            top_entries([scores], 1 << 19)[0], ranked_by_torch([scores], 1 << 19, False)[0].to(torch.int32)
        )


def child_of(numel: int, width: int, seed: int) -> Places:
    units = torch.randperm(numel // width, generator=torch.Generator().manual_seed(seed))[
        : numel // width // 3
    ]
    return Places(units.sort().values.to(torch.int32), width)


class TestFixedChild:
    @pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
    @pytest.mark.parametrize("compact", [False, True])
    def test_step_is_the_twins(self, step: AdamWStep, compact: bool) -> None:
        kept = [child_of(1000, 1, 0), child_of(990, 33, 1), child_of(64, 2, 2), child_of(70_000 * 3, 1, 3)]
        weights = [draws(1000), draws(30, 33), draws(8, 8), draws(70_000, 3)]
        before = [weight.clone() for weight in weights]
        dense = [draws(*weight.shape, seed=9 + i) for i, weight in enumerate(weights)]
        size = sum(len(place) for place in kept)
        first, second = draws(size, seed=5), draws(size, seed=6) ** 2
        m0, v0 = first.clone(), second.clone()
        compacted = [place.gather(g, torch.empty(len(place))) for place, g in zip(kept, dense, strict=True)]
        ChildTable(kept).adamw_(weights, compacted if compact else dense, first, second, step)

        start = 0
        for weight, old, place, gradient in zip(weights, before, kept, compacted, strict=True):
            flat = slice(start, start := start + len(place))
            inside = place.gather(old, torch.empty(len(place)))
            w, m, v = twin(inside, gradient, m0[flat], v0[flat], step)
            assert_near(place.gather(weight, torch.empty(len(place))), w)
            assert_near(first[flat], m)
            assert_near(second[flat], v)
            restored = weight.clone()
            place.scatter_(restored, inside)
            assert torch.equal(restored, old)  # frozen entries, bitwise

    def test_parameters_without_a_gradient_stay(self) -> None:
        kept = [child_of(100, 1, 0), child_of(100, 5, 1)]
        weights = [draws(100), draws(20, 5)]
        before = weights[0].clone()
        first, second = draws(33 + 30), draws(63) ** 2
        m0, v0 = first.clone(), second.clone()
        ChildTable(kept).adamw_(weights, [None, draws(20, 5, seed=4)], first, second, STEPS["adamw"])
        assert torch.equal(weights[0], before)
        assert torch.equal(first[:33], m0[:33]) and torch.equal(second[:33], v0[:33])
        assert not torch.equal(first[33:], m0[33:])

    @pytest.mark.parametrize("add", [False, True])
    def test_gathering(self, add: bool) -> None:
        kept = [child_of(1000, 1, 0), child_of(990, 33, 1)]
        gradients = [draws(1000), draws(30, 33)]
        before = draws(333 + 330)
        expected, out = before.clone(), before.clone()
        kept[0].gather(gradients[0], expected[:333], add=add)
        kept[1].gather(gradients[1], expected[333:], add=add)
        table = ChildTable(kept)
        table.gather(gradients, out, add=add)
        assert torch.equal(out, expected)

        table.gather_one(1, gradients[1], one := before.clone(), add=add)
        assert torch.equal(one, torch.cat([before[:333], expected[333:]]))

    def test_a_parameter_without_entries(self) -> None:
        kept = [Places(torch.zeros(0, dtype=torch.int32)), child_of(100, 1, 0)]
        weights = [draws(4), draws(100)]
        before = weights[0].clone()
        first, second = torch.zeros(33), torch.zeros(33)
        ChildTable(kept).adamw_(weights, [draws(4), draws(100)], first, second, STEPS["adamw"])
        assert torch.equal(weights[0], before) and first.any()

    def test_a_table_without_entries(self) -> None:
        weight = draws(4)
        table = ChildTable([Places(torch.zeros(0, dtype=torch.int32))])
        table.adamw_([weight], [draws(4)], torch.zeros(0), torch.zeros(0), STEPS["adamw"])
        table.gather([draws(4)], torch.zeros(0))
        assert torch.equal(weight, draws(4))

    def test_ten_steps_are_torchs(self) -> None:
        place, weight = child_of(600, 1, 0), draws(20, 30)
        flat = torch.nn.Parameter(place.gather(weight, torch.empty(len(place))))
        options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        inner = torch.optim.AdamW([flat], **options)
        table, first, second = ChildTable([place]), torch.zeros(len(place)), torch.zeros(len(place))
        for step in range(1, 11):
            gradient = draws(20, 30, seed=step)
            flat.grad = place.gather(gradient, torch.empty(len(place)))
            inner.step()
            table.adamw_([weight], [gradient], first, second, AdamWStep(0.01, 0.9, 0.99, 1e-8, 0.1, step))
        torch.testing.assert_close(
            place.gather(weight, torch.empty(len(place))), flat.detach(), rtol=1e-5, atol=1e-6
        )


def whole(*shape: int, step: AdamWStep, seed: int, gradient: Tensor | None = None) -> WholeTensors:
    return WholeTensors(
        draws(*shape, seed=seed),
        draws(*shape, seed=seed + 1) if gradient is None else gradient,
        draws(*shape, seed=seed + 2),
        draws(*shape, seed=seed + 3) ** 2,
        step,
    )


def copied(t: WholeTensors) -> WholeTensors:
    return WholeTensors(t.weight.clone(), t.gradient.clone(), t.first.clone(), t.second.clone(), t.step)


def assert_updated(got: WholeTensors, expected: tuple[Tensor, Tensor, Tensor]) -> None:
    for tensor, wanted in zip((got.weight, got.first, got.second), expected, strict=True):
        assert_near(tensor, wanted)


class TestTaskFree:
    @pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
    @pytest.mark.parametrize("density", [1e-12, 0.3, 0.5, 0.999])
    def test_entries_are_the_twins(self, density: float, step: AdamWStep) -> None:
        shapes = [(1,), (255,), (7, 77), (70_000,)]
        before = [whole(*shape, step=step, seed=10 * i) for i, shape in enumerate(shapes)]
        after = [copied(tensors) for tensors in before]
        named = [MaskDraw.of(density, "mask", i) for i in range(len(shapes))]
        adamw_masked_([(t, draw) for t, draw in zip(after, named, strict=True) if draw is not None])
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            keep = keep_mask(density, "mask", i, numel=old.weight.numel()).view(old.weight.shape)
            assert_updated(new, twin(old.weight, old.gradient, old.first, old.second, step, keep))
            assert torch.equal(old.gradient, new.gradient)

    @pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
    @pytest.mark.parametrize("shape", [(9,), (5, 1), (40, 33), (6, 3, 500)])
    @pytest.mark.parametrize("compact", [False, True])
    def test_rows_are_the_twins(self, shape: tuple[int, ...], step: AdamWStep, compact: bool) -> None:
        keep = torch.arange(shape[0]) % 3 == 1
        dense = draws(*shape, seed=3)
        place = torch.where(keep, torch.arange(shape[0]), -1)
        if compact:
            place = torch.where(keep, keep.cumsum(0) - 1, -1)
        before = whole(*shape, step=step, seed=20, gradient=dense[keep] if compact else dense)
        after = copied(before)
        adamw_rows_([(after, place.to(torch.int32))])
        spread = keep.view(-1, *[1] * (len(shape) - 1)).expand(shape)
        assert_updated(after, twin(before.weight, dense, before.first, before.second, step, spread))

    def test_nothing_to_do(self) -> None:
        adamw_masked_([])
        adamw_rows_([])


def test_threads_do_not_show_in_the_bits(threads: None) -> None:
    step, draw, results = STEPS["adamw"], MaskDraw.of(0.3, "threads"), []
    assert draw is not None
    kept = [child_of(400_000, 1, 0), child_of(200_000, 50, 1)]
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        masked, rows = whole(300_001, step=step, seed=1), whole(3000, 70, step=step, seed=2)
        adamw_masked_([(masked, draw), (whole(100, step=step, seed=9), draw)])
        adamw_rows_([(rows, torch.arange(3000, dtype=torch.int32))])
        weights = [draws(400_000), draws(4000, 50)]
        size = sum(len(place) for place in kept)
        first, second = draws(size), draws(size) ** 2
        ChildTable(kept).adamw_(weights, [draws(400_000, seed=8), draws(4000, 50)], first, second, step)
        results.append([masked.weight, masked.second, rows.weight, rows.first, *weights, first, second])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
