"""Both fast rankings, by a sampled bracket and by counting, against the definition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tests.fast.adamw_twin import draws
from torch import Tensor

from childtuning.child.ranking import top_entries
from childtuning.errors import ConfigError
from childtuning.fast import library, ranking
from childtuning.fast.ranking import NotNumbersError

needs_kernels = pytest.mark.skipif(
    library.LIBRARY is None, reason="the CPU kernels are not compiled: python hatch_build.py"
)


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
    "float16": lambda: [score.half() for score in _many()],
}


def by_definition(scores: Sequence[Tensor], count: int, lowest: bool = False) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHILDTUNING_FAST", "0")
        return top_entries(scores, count, lowest=lowest)


def assert_alike(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for got, expected in zip(found, wanted, strict=True):
        assert torch.equal(got.long(), expected.long())


@needs_kernels
class TestByBracket:
    @pytest.mark.parametrize("lowest", [False, True])
    @pytest.mark.parametrize("name", SCORES)
    def test_entries_are_the_definitions(self, name: str, lowest: bool) -> None:
        scores = SCORES[name]()
        total = sum(score.numel() for score in scores)
        assert ranking.supports(scores)
        for share in (0.0, 0.001, 0.1, 0.77, 1.0):
            count = max(1, round(share * total))
            found = top_entries(scores, count, lowest=lowest)
            assert sum(len(taken) for taken in found) == count
            assert_alike(found, by_definition(scores, count, lowest))

    @pytest.mark.parametrize(
        "name", ["normal", "few values", "zeros", "sorted", "period 64", "bf16", "bf16, period 64", "float16"]
    )
    def test_the_sample_serves(self, name: str) -> None:
        """The cases above are no comparison of the definition with itself."""
        scores = SCORES[name]()
        assert ranking.top_entries(scores, sum(score.numel() for score in scores) // 10) is not None

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
        for rank in (ranking.top_entries, by_definition):
            with pytest.raises(NotNumbersError) as caught:
                rank(scores, 10_000)
            assert caught.value.tensor == where[0]

    def test_nan_is_refused_where_the_bracket_overflows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ranking, "_ROOM", 8)
        scores = _many()
        scores[-1].view(-1)[-1] = torch.nan
        assert ranking.top_entries(_many(), 10_000) is None
        with pytest.raises(NotNumbersError) as caught:
            top_entries(scores, 10_000)
        assert caught.value.tensor == len(scores) - 1

    def test_a_sample_that_misleads_costs_time_only(self) -> None:
        """Scores that are 0 exactly where the sample looks."""
        assert library.LIBRARY is not None
        total = 1 << 20
        step = total // ranking._SAMPLE
        looked_at = np.empty(ranking._SAMPLE, np.float32)
        counting = torch.arange(float(total))
        library.LIBRARY.ct_sample(counting.data_ptr(), len(looked_at), step, 1.0, looked_at.ctypes.data)
        scores = draws(total).abs() + 1
        scores[torch.from_numpy(looked_at).long()] = 0.0
        assert ranking.top_entries([scores], 1000) is None
        assert_alike(top_entries([scores], 1000), by_definition([scores], 1000))

    def test_no_room_for_what_is_nearly_alike(self, monkeypatch: pytest.MonkeyPatch) -> None:
        scores = torch.ones(1 << 20) + draws(1 << 20) * 1e-3
        monkeypatch.setattr(ranking, "_ROOM", 100)
        assert ranking.top_entries([scores], 1 << 19) is None
        assert_alike(top_entries([scores], 1 << 19), by_definition([scores], 1 << 19))

    def test_what_it_supports(self, monkeypatch: pytest.MonkeyPatch) -> None:
        scores = draws(6, 4)
        assert ranking.supports([scores, scores[1:]])
        assert not ranking.supports([])
        assert not ranking.supports([scores, scores.t()])
        assert not ranking.supports([scores.double()])
        assert not ranking.supports([scores.to_sparse()])
        monkeypatch.setenv("CHILDTUNING_FAST", "0")
        assert not ranking.supports([scores])


class TestByCounting:
    """The ranking of scores on a GPU, which asks nothing of the device."""

    @pytest.mark.parametrize("dtype", [None, torch.float64])
    @pytest.mark.parametrize("lowest", [False, True])
    @pytest.mark.parametrize("name", SCORES)
    def test_entries_are_the_definitions(self, name: str, lowest: bool, dtype: torch.dtype | None) -> None:
        scores = [score[:20_000].to(dtype or score.dtype) for score in SCORES[name]()]
        if dtype is not None:  # what differs beyond float32 alone
            scores = [score + 1e-12 * draws(*score.shape, seed=9) for score in scores]
        total = sum(score.numel() for score in scores)
        for share in (0.0, 0.1, 0.77, 1.0):
            count = max(1, round(share * total))
            found = ranking._by_counting(scores, count, lowest=lowest)
            assert sum(len(taken) for taken in found) == count
            assert_alike(found, by_definition(scores, count, lowest))

    def test_nan_is_refused(self) -> None:
        scores = [draws(50), torch.zeros(0), draws(9, 8)]
        scores[2][4, 4] = torch.nan
        with pytest.raises(NotNumbersError) as caught:
            ranking._by_counting(scores, 10, lowest=False)
        assert caught.value.tensor == 2

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("name", SCORES)
    def test_scores_on_a_gpu_are_counted(self, name: str) -> None:
        scores = SCORES[name]()
        there = [score.cuda() for score in scores]
        assert ranking.supports(there)
        count = max(1, sum(score.numel() for score in scores) // 10)
        found = top_entries(there, count)
        assert all(taken.is_cuda for taken in found)
        assert_alike([taken.cpu() for taken in found], by_definition(scores, count))


def test_scores_of_two_dtypes_are_refused() -> None:
    with pytest.raises(ConfigError, match="share one dtype, got bfloat16 and float32"):
        top_entries([draws(4), draws(4).bfloat16()], 2)
