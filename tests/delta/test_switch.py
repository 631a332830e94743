"""Several deltas in one live model: bitwise there and back, in the memory of the entries."""

from __future__ import annotations

import pytest
import torch
from tests.delta.test_delta import CHILDREN, a_model, same, snapshot, tune
from torch import nn

from childtuning import Child, ChildSwitch, Delta, random_child
from childtuning.errors import BaseMismatchError, DeltaError


def tuned(child_of, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Delta, dict[str, torch.Tensor]]:
    model = a_model(dtype=dtype)
    child = child_of(model)
    tune(model, child, steps=2 + seed)
    return Delta.capture(model, child), snapshot(model)


@pytest.mark.parametrize("kind", list(CHILDREN))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_is_there_bitwise_and_the_base_is_back(kind: str, dtype: torch.dtype) -> None:
    one, with_one = tuned(CHILDREN[kind], 0, dtype)
    two, with_two = tuned(CHILDREN["row"], 1, dtype)
    model = a_model(dtype=dtype)
    base = snapshot(model)
    switch = ChildSwitch(model, {"one": one, "two": two})
    for name in ("one", "two", "one", "one", None, "two", None):
        if name is None:
            switch.deactivate()
        else:
            switch.activate(name)
        assert switch.active == name
        assert same(snapshot(model), base if name is None else {"one": with_one, "two": with_two}[name])
    with switch.using("two"):
        with switch.using("one"):
            assert same(snapshot(model), with_one)
        with switch.using(None):
            assert same(snapshot(model), base)
        assert same(snapshot(model), with_two)
    assert same(snapshot(model), base)


def test_an_error_in_a_block_leaves_what_was_active() -> None:
    one, _ = tuned(CHILDREN["element"], 0)
    model = a_model()
    base = snapshot(model)
    switch = ChildSwitch(model, {"one": one})
    with pytest.raises(ZeroDivisionError), switch.using("one"):
        _ = 1 / 0
    assert same(snapshot(model), base) and switch.active is None


@pytest.mark.parametrize("active", [None, "one"])
def test_after_an_interruption_half_way_every_switch_is_refused(
    active: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tuned(CHILDREN["element"], 0)[0], tuned(CHILDREN["row"], 1)[0]
    model = a_model()
    switch = ChildSwitch(model, {"one": one, "two": two})
    if active is not None:
        switch.activate(active)

    def interrupted(*members: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("childtuning.delta.switch.exchange_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            switch.activate("two")
    for again in (switch.deactivate, lambda: switch.activate("one"), lambda: switch.activate("two")):
        with pytest.raises(DeltaError, match="Load the model anew"):
            again()
    with pytest.raises(DeltaError, match="Load the model anew"), switch.using(None):
        pass


def test_deltas_are_not_changed_and_can_be_removed() -> None:
    one, _ = tuned(CHILDREN["element"], 0)
    values = {name: value.clone() for name, value in one.values.items()}
    model = a_model()
    base = snapshot(model)
    switch = ChildSwitch(model, {"one": one})
    switch.activate("one")
    assert all(torch.equal(one.values[name], value) for name, value in values.items())
    switch.remove("one")
    assert same(snapshot(model), base) and switch.names == ()


def test_what_cannot_be_right_is_refused() -> None:
    one, _ = tuned(CHILDREN["element"], 0)
    switch = ChildSwitch(a_model(), {"one": one})
    with pytest.raises(DeltaError, match="Did you mean 'one'"):
        switch.activate("ones")
    with pytest.raises(DeltaError, match="already"):
        switch.add("one", one)
    switch.activate("one")
    with pytest.raises(DeltaError, match="is active"):
        switch.add("two", one)
    with pytest.raises(BaseMismatchError):
        ChildSwitch(a_model(seed=5), {"one": one})


def test_ten_children_take_positions_and_values() -> None:
    model = nn.Linear(400, 300, bias=False).bfloat16()
    children = {str(i): random_child(model, 0.05, seed=i) for i in range(10)}
    switch = ChildSwitch(model, {name: Delta.capture(model, child) for name, child in children.items()})
    entries = sum(child.num_trained for child in children.values())
    assert switch.num_bytes == entries * (2 + 4)
    switch.activate("3")
    assert switch.num_bytes == entries * (2 + 4)  # the base's values in place of the child's


def test_a_view_of_the_weights_sees_the_switch() -> None:
    """Tied weights, and a model that a compiled or wrapped one shares, stay one."""
    model = nn.Linear(8, 8)
    child = Child.from_masks({"weight": torch.ones(8, 8, dtype=torch.bool)})
    delta = Delta.capture(model, child)
    delta.values["weight"].fill_(2.0)
    before = model.weight.data_ptr()
    ChildSwitch(model, {"two": delta}).activate("two")
    assert model.weight.data_ptr() == before and float(model.weight.detach().sum()) == 128


def test_a_switch_that_cannot_be_made_changes_nothing() -> None:
    one, with_one = tuned(CHILDREN["element"], 0)
    model = a_model()
    base = snapshot(model)
    switch = ChildSwitch(model, {"one": one})
    last = list(model.parameters())[-1]
    kept = last.data
    for broken, words in (
        (kept.double(), "is torch.float64 now"),
        (kept.flatten()[:1].expand(kept.numel()).view(kept.shape), "no memory of its own"),
        (torch.cat([kept, kept]), "has shape"),
    ):
        last.data = broken
        with pytest.raises(DeltaError, match=words):
            switch.activate("one")
        last.data = kept
        assert switch.active is None and same(snapshot(model), base)
    switch.activate("one")
    assert same(snapshot(model), with_one)


def test_parameters_that_share_memory_come_back() -> None:
    """Two parameters over one storage, which no name ties."""
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    model["b"].weight.data = model["a"].weight.data
    base = model["a"].weight.detach().clone()
    child = random_child(model, 0.5, seed=0)
    delta = Delta.capture(model, child)
    for seed, value in enumerate(delta.values.values()):
        value.add_(1.0 + seed)
    switch = ChildSwitch(model, {"one": delta})
    for _ in range(3):
        with switch.using("one"):
            assert not torch.equal(model["a"].weight, base)
        assert torch.equal(model["a"].weight, base)


def test_a_delta_that_was_removed_inside_a_block_leaves_the_base() -> None:
    one, _ = tuned(CHILDREN["element"], 0)
    two, _ = tuned(CHILDREN["row"], 1)
    model = a_model()
    base = snapshot(model)
    switch = ChildSwitch(model, {"one": one, "two": two})
    switch.activate("one")

    def fails() -> None:
        with switch.using("two"):
            switch.remove("one")
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        fails()
    assert switch.active is None and same(snapshot(model), base)


def test_a_delta_with_a_head_of_its_own() -> None:
    """Its model shares all but the head with the switch's."""
    body = nn.Linear(6, 6)
    small, large = (nn.Sequential(body, nn.Linear(6, n)) for n in (2, 3))
    base = {name: p.clone() for name, p in small.named_parameters()}
    deltas = {}
    for name, model in (("small", small), ("large", large)):
        delta = Delta.capture(model, random_child(model, 0.5, eligible=("0.*",), always=("1.*",)))
        for value in delta.values.values():
            value.add_(1.0)
        deltas[name] = delta
    switch = ChildSwitch(small, {"small": deltas["small"]})
    switch.add("large", deltas["large"], model=large)
    with switch.using("large") as model:
        assert model is large and torch.equal(model[1].weight, deltas["large"].values["1.weight"])
    with switch.using("small") as model:
        assert model is small
    assert all(torch.equal(p, base[name]) for name, p in small.named_parameters())
