"""Union, intersection and difference of children; a child that avoids another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from childtuning import Budget, Child, select_child
from childtuning.child import Granularity, Part
from childtuning.errors import ConfigError, ParameterError

SHAPES = {"a": (7, 5), "b": (6,), "c": (4, 3, 2)}
KINDS = [Granularity(), Granularity("row"), Granularity("column"), Granularity("block", block_shape=(2, 3)),
         Granularity("parameter")]  # fmt: skip


def a_part(shape: tuple[int, ...], unit: Granularity, seed: int, share: float) -> Part:
    drawn = torch.rand(unit.num_units(shape), generator=torch.Generator().manual_seed(seed)) < share
    return Part(shape, drawn.nonzero().squeeze(1), unit)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from(KINDS),
    st.sampled_from(KINDS),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_parts_combine_as_their_masks_do(name, one, two, seed, share, other) -> None:
    shape = SHAPES[name]
    ours, theirs = a_part(shape, one, seed, share), a_part(shape, two, seed + 1, other)
    assert torch.equal((ours | theirs).mask(), ours.mask() | theirs.mask())
    assert torch.equal((ours & theirs).mask(), ours.mask() & theirs.mask())
    assert torch.equal((ours - theirs).mask(), ours.mask() & ~theirs.mask())
    for part in (ours, ours | theirs, ours & theirs, ours - theirs):
        assert part.num_trained == int(part.mask().sum())
        assert torch.equal(part.runs().indices(), part.indices())


def test_the_units_stay_where_they_are_the_same() -> None:
    unit = Granularity("row")
    ours, theirs = a_part((9, 4), unit, 0, 0.5), a_part((9, 4), unit, 1, 0.5)
    assert (ours | theirs).granularity == (ours - theirs).granularity == unit


def scores(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.rand(40, 30) for name in ("x", "y")} | {"bias": torch.rand(30)}


def test_children_combine_with_their_patterns() -> None:
    one = select_child(scores(0), 0.2, always=("head.*", "norm"))
    two = select_child(scores(1), 0.2, always=("head.*", "pooler"))
    assert (one | two).always == ("head.*", "norm", "pooler")
    for wrong in (Child.__and__, Child.__sub__):  # "norm" may or may not be among "n*": no model says so
        with pytest.raises(ParameterError, match="Give both the same"):
            wrong(one, two)
    assert 0 < one.overlap(two) < 1
    two = Child(two.parts, always=("norm", "head.*"))
    assert (one & two).always == ("head.*", "norm") and (one - two).always == ()
    assert (one | two).num_trained == one.num_trained + two.num_trained - (one & two).num_trained
    assert ((one - two) & two).num_trained == 0
    assert one.overlap(two) == (one & two).num_trained / min(one.num_trained, two.num_trained)
    with pytest.raises(ParameterError, match="different parameters"):
        _ = one | Child({"x": Part((2, 2))})


@pytest.mark.parametrize("granularity", ["element", "row", "column", "block"])
@pytest.mark.parametrize("lowest", [False, True])
def test_a_child_that_avoids_another_has_none_of_its_entries(granularity: str, lowest: bool) -> None:
    first = select_child(scores(), 0.3, granularity=granularity)
    second = select_child(scores(), 0.3, granularity=granularity, avoid=first, lowest=lowest)
    assert (first & second).num_trained == 0
    if granularity == "element":
        assert second.num_trained == round(0.3 * second.num_eligible)
        best = select_child(scores(), 0.6)
        assert lowest or (first | second).fingerprint() == best.fingerprint()
    entries = select_child(scores(1), 0.01)  # of single entries: units that hold one are left
    assert (select_child(scores(), 0.3, granularity=granularity, avoid=entries) & entries).num_trained == 0


@pytest.mark.parametrize("granularity", ["element", "row"])
def test_what_is_left_must_be_enough(granularity: str) -> None:
    first = select_child(scores(), 0.6, granularity=granularity)
    with pytest.raises(ParameterError, match=r"density 0.6 is more than .* leaves"):
        select_child(scores(), 0.6, granularity=granularity, avoid=first)
    with pytest.raises(ParameterError, match="in the child to avoid"):
        select_child({"x": torch.rand(3, 3)}, 0.1, avoid=Child({"x": Part((2, 2))}))
    with pytest.raises(ConfigError, match="Pass a density"):
        select_child(scores(), budget=Budget(step=0.5), avoid=first)


def test_what_the_other_always_trains_is_avoided_too() -> None:
    name = next(iter(scores()))
    first = Child({n: Part.none(s.shape) for n, s in scores().items() if n != name}, always=(name,))
    second = select_child(scores(), 0.2, avoid=first)
    assert second.parts[name].is_empty and second.num_trained == round(0.2 * second.num_eligible)
    some = select_child(scores(), 0.9)
    with pytest.raises(ParameterError, match="is always trained"):
        select_child(scores(), 0.01, always=(name,), avoid=some)
    both = select_child(scores(), 0.2, always=(name,), avoid=first)  # each task has its own head
    assert both.always == (name,)
