"""select_child: the exact budget, scopes, ties, baselines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from childtuning import magnitude_scores, random_child, select_child
from childtuning.child import official_child
from childtuning.errors import ConfigError, ParameterError


def some_scores(seed: int = 0, ties: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = {
        f"p{i}": torch.rand(shape, generator=generator)
        for i, shape in enumerate([(7, 5), (5,), (3, 2, 4), ()])
    }
    return {name: (score * 4).round() for name, score in scores.items()} if ties else scores


@given(st.floats(0.001, 1.0), st.booleans(), st.sampled_from(["global", "parameter"]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_budget_is_exact(density: float, ties: bool, scope: str, lowest: bool) -> None:
    child = select_child(some_scores(ties=ties), density, scope=scope, lowest=lowest)  # type: ignore[arg-type]
    assert child.num_eligible == 65
    assert child.num_trained == round(density * 65)


@given(st.floats(0.01, 1.0), st.sampled_from(["row", "block"]), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_coarse_units_fill_the_budget_while_single_entries_remain(density, granularity, seed) -> None:
    scores = some_scores(seed) | {"bias": torch.rand(80) if granularity == "row" else torch.rand(())}
    child = select_child(scores, density, granularity=granularity)
    budget = round(density * child.num_eligible)
    assert child.num_trained <= budget
    left = [
        int(size)
        for part in child.parts.values()
        for unit, size in enumerate(part.granularity.sizes(part.shape))
        if part.units is not None and unit not in part.units.tolist()
    ]
    assert not left or budget - child.num_trained < min(left)


def test_rows_are_ranked_by_their_mean() -> None:
    weight = torch.tensor([[1.0, 1.0], [0.0, 9.0], [3.0, 3.0]])
    child = select_child({"w": weight, "b": torch.tensor([2.0, 4.0, 0.0])}, 5 / 9, granularity="row")
    assert child.mask("w").all(1).tolist() == [False, True, True]
    assert child.mask("b").tolist() == [False, True, False]


def test_conv1d_rows_lie_along_the_other_axis() -> None:
    scores = {"w": torch.tensor([[1.0, 5.0], [1.0, 5.0], [1.0, 5.0]])}
    child = select_child(scores, 0.5, granularity="row", row_axes={"w": 1})
    assert child.mask("w").tolist() == [[False, True]] * 3


def test_ties_go_to_the_earlier_parameter_and_index() -> None:
    child = select_child({"a": torch.ones(3), "b": torch.ones(3)}, 0.5)
    assert child.mask("a").all() and not child.mask("b").any()
    assert select_child({"a": torch.ones(4)}, 0.5).mask("a").tolist() == [True, True, False, False]


def test_scope_parameter_gives_each_its_share() -> None:
    scores = {"a": torch.arange(100.0), "b": torch.arange(100.0) + 1000}
    child = select_child(scores, 0.1, scope="parameter")
    assert [part.num_trained for part in child.parts.values()] == [10, 10]
    assert [part.num_trained for part in select_child(scores, 0.1).parts.values()] == [0, 20]


def test_lowest_is_the_complement_of_highest_without_ties() -> None:
    scores = some_scores()
    top, bottom = select_child(scores, 0.4), select_child(scores, 0.6, lowest=True)
    for name in scores:
        assert torch.equal(top.mask(name), ~bottom.mask(name))


def test_eligible_and_always_patterns() -> None:
    scores = some_scores()
    child = select_child(scores, 0.5, eligible=("p0", "p1"), always=("p1", "head.*"))
    assert (child.num_eligible, child.always) == (35, ("p1", "head.*"))
    with pytest.raises(ParameterError, match="'encoder.*' matched no parameter"):
        select_child(scores, 0.5, eligible=("encoder.*",))
    with pytest.raises(ParameterError, match="no scores"):
        select_child(scores, 0.5, always=("p*",))


def test_wrong_options() -> None:
    with pytest.raises(ConfigError, match="'global'"):
        select_child(some_scores(), 0.5, scope="globl")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Did you mean 'row'"):
        select_child(some_scores(), 0.5, granularity="rows")
    with pytest.raises(ParameterError, match="'p0' hold NaN"):
        select_child({"p0": torch.tensor([1.0, float("nan")])}, 0.5)


def test_half_precision_scores_and_other_devices_types() -> None:
    scores = {"w": torch.tensor([1.0, 3.0, 2.0], dtype=torch.bfloat16)}
    assert select_child(scores, 1 / 3).mask("w").tolist() == [False, True, False]


@pytest.mark.parametrize("granularity", ["element", "row", "block", "parameter"])
@pytest.mark.parametrize("lowest", [False, True])
def test_bf16_scores_choose_what_the_same_numbers_in_float32_choose(granularity: str, lowest: bool) -> None:
    """Their ties are many: 4000 entries have some 600 values."""
    draw = torch.Generator().manual_seed(5)
    scores = {
        name: torch.randn(shape, generator=draw).exp().bfloat16()
        for name, shape in {"a": (60, 40), "b": (40,), "c": (1500,), "d": ()}.items()
    }
    assert len(torch.cat([score.flatten() for score in scores.values()]).unique()) < 1000
    wide = {name: score.float() for name, score in scores.items()}
    for density in (0.003, 0.1, 0.5, 1.0):
        child, same = (
            select_child(s, density, granularity=granularity, lowest=lowest) for s in (scores, wide)
        )
        assert child.fingerprint() == same.fingerprint()
        if granularity == "element":
            assert child.num_trained == round(density * 3941)


def test_bf16_scores_beside_others_and_by_other_ways() -> None:
    draw = torch.Generator().manual_seed(6)
    scores = {name: torch.rand(300, generator=draw).bfloat16() for name in "ab"}
    wide = {name: score.float() for name, score in scores.items()}
    mixed = {"a": scores["a"], "b": wide["b"]}
    for ways in ({}, {"scope": "parameter"}):
        wanted = select_child(wide, 0.2, **ways).fingerprint()
        assert select_child(scores, 0.2, **ways).fingerprint() == wanted
        assert select_child(mixed, 0.2, **ways).fingerprint() == wanted
    assert (
        select_child(scores, "auto", mass=0.7).fingerprint()
        == select_child(wide, "auto", mass=0.7).fingerprint()
    )
    assert official_child(scores, 0.2).fingerprint() == official_child(wide, 0.2).fingerprint()
    scores["b"][7] = float("nan")
    with pytest.raises(ParameterError, match="'b' hold NaN"):
        select_child(scores, 0.2)


def test_random_child_is_a_function_of_seed_names_and_shapes() -> None:
    first, second = torch.nn.Linear(50, 40), torch.nn.Linear(50, 40)
    torch.manual_seed(3)
    assert random_child(first, 0.2, seed=1).fingerprint() == random_child(second, 0.2, seed=1).fingerprint()
    assert random_child(first, 0.2, seed=1).fingerprint() != random_child(first, 0.2, seed=2).fingerprint()
    assert random_child(first, 0.2).num_trained == round(0.2 * 2040)


def test_magnitude_scores() -> None:
    model = torch.nn.Linear(4, 3).to(torch.bfloat16)
    scores = magnitude_scores(model, always=("bias",))
    assert list(scores) == ["weight"] and scores["weight"].dtype == torch.float32
    assert torch.equal(scores["weight"], model.weight.detach().float().abs())


def test_official_child_thresholds_at_the_percentile_and_lets_ties_exceed() -> None:
    scores = some_scores(ties=True)
    child = official_child(scores, 0.3)
    everything = np.concatenate([score.numpy().ravel() for score in scores.values()])
    threshold = np.percentile(everything, 70)
    for name, score in scores.items():
        assert np.array_equal(child.mask(name).numpy(), score.numpy() >= threshold)
    assert child.num_trained > round(0.3 * child.num_eligible)


def test_a_model_is_no_scores() -> None:
    with pytest.raises(
        ConfigError, match=r"by scores, by parameter name, got Linear. Pass what fisher_information"
    ):
        select_child(torch.nn.Linear(2, 2), density=0.5)  # type: ignore[arg-type]
