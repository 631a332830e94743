"""Delta: bitwise way and way back, files, refusals, size."""

from __future__ import annotations

import contextlib
import json
import math
import os

import pytest
import torch
from torch import nn

from childtuning import Child, ChildOptimizer, Delta, TaskFree, random_child, select_child
from childtuning.errors import BaseMismatchError, CorruptFileError, DeltaError, ParameterError


def a_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Linear(20, 7), nn.Linear(7, 2))
    return model.to(dtype)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def tune(model: nn.Module, child: Child | TaskFree, steps: int = 5) -> None:
    torch.manual_seed(1)
    opt = ChildOptimizer(model.named_parameters(), child, torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    for _ in range(steps):
        model(torch.randn(8, 12, dtype=next(model.parameters()).dtype)).square().mean().backward()
        opt.step()
        opt.zero_grad()


CHILDREN = {
    "element": lambda model: select_child(magnitudes(model), 0.3, always=("3.*",)),
    "row": lambda model: select_child(magnitudes(model), 0.3, granularity="row", always=("3.*",)),
    "column": lambda model: select_child(magnitudes(model), 0.3, granularity="column", always=("3.*",)),
    "block": lambda model: select_child(magnitudes(model), 0.5, granularity="block", always=("3.*",)),
    "parameter": lambda model: select_child(magnitudes(model), 0.5, granularity="parameter"),
    "random": lambda model: random_child(model, 0.2, seed=9, always=("3.*",)),
    "task-free": lambda model: TaskFree(0.3),
    "whole": lambda model: Child.whole({n: p.shape for n, p in model.named_parameters()}),
}


def magnitudes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().float().abs() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", list(CHILDREN))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_there_and_back_is_bitwise(tmp_path, kind: str, dtype: torch.dtype) -> None:
    model = a_model(dtype=dtype)
    base, child = snapshot(model), CHILDREN[kind](model)
    tune(model, child)
    tuned = snapshot(model)
    assert not same(base, tuned)
    Delta.capture(model, child, base="a model").save(tmp_path)
    delta = Delta.load(tmp_path)
    fresh = a_model(dtype=dtype)
    displaced = delta.apply_(fresh)
    assert same(fresh.state_dict(), tuned)
    displaced.apply_(fresh)
    assert same(fresh.state_dict(), base)
    assert delta.base == {"name": "a model"}


@pytest.mark.parametrize("kind", ["element", "row", "column", "random"])
def test_another_base_is_refused_and_left_alone(kind: str) -> None:
    model = a_model()
    child = CHILDREN[kind](model)
    delta = Delta.capture(model, child, base="the right one")
    for other in (a_model(seed=1), a_model(dtype=torch.bfloat16), nn.Sequential(nn.Linear(12, 20))):
        before = snapshot(other)
        with pytest.raises(BaseMismatchError, match="Load the base model"):
            delta.apply_(other)
        assert same(before, other.state_dict())


def test_one_changed_bit_of_the_base_is_noticed_also_in_untouched_tensors() -> None:
    model = a_model()
    child = Child.from_masks({"0.weight": torch.eye(20, 12).bool()})
    delta = Delta.capture(model, child)
    for name, index in (("0.weight", 1), ("2.bias", 0)):
        other = a_model()
        with torch.no_grad():
            flat = dict(other.named_parameters())[name].view(-1)
            flat[index] = torch.nextafter(flat[index], torch.tensor(9.0))
        with pytest.raises(BaseMismatchError, match=name):
            delta.apply_(other)
    delta.apply_(other, check=False)


def test_a_delta_is_a_folder(tmp_path) -> None:
    model = a_model()
    Delta.capture(model, CHILDREN["element"](model)).save(tmp_path / "mine")
    with pytest.raises(CorruptFileError, match=r"is a folder, got the file .*Pass .*mine\."):
        Delta.load(tmp_path / "mine" / "delta.safetensors")
    with pytest.raises(CorruptFileError, match=r"there is no delta at .*nowhere\. Check the path"):
        Delta.load(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["truncate", "flip", "about", "missing", "version", "format", "not json"])
def test_damaged_files_are_refused(tmp_path, damage: str) -> None:
    model = a_model()
    Delta.capture(model, CHILDREN["element"](model)).save(tmp_path)
    values, about = tmp_path / "delta.safetensors", tmp_path / "delta.json"
    whole, text = values.read_bytes(), about.read_text()
    if damage == "truncate":
        values.write_bytes(whole[:-10])
    elif damage == "flip":
        values.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "about":
        about.write_text(
            text.replace('"count": 1', '"count": 2', 1)
            if '"count": 1' in text
            else text.replace("all", "none", 1)
        )
    elif damage == "missing":
        values.unlink()
    elif damage == "not json":
        about.write_text(text[: len(text) // 2])
    else:
        content = json.loads(text)
        content[damage] = 99 if damage == "version" else "something else"
        about.write_text(json.dumps(content))
    with pytest.raises(CorruptFileError) as caught:
        Delta.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_child_for_another_model_is_refused() -> None:
    with pytest.raises(ParameterError):
        Delta.capture(a_model(), Child.from_masks({"9.weight": torch.ones(3, dtype=torch.bool)}))


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3])
def test_size_is_the_values_and_near_the_entropy(tmp_path, density: float) -> None:
    model = nn.Sequential(nn.Linear(600, 500), nn.Linear(500, 400))
    child = select_child(magnitudes(model), density)
    Delta.capture(model, child).save(tmp_path)
    stored = sum((tmp_path / name).stat().st_size for name in ("delta.json", "delta.safetensors"))
    bits = -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) / density
    overhead = 3000
    assert stored - overhead <= child.num_trained * (4 + 1.3 * bits / 8)


def test_random_child_is_stored_as_a_seed(tmp_path) -> None:
    model = nn.Linear(400, 300)
    child = random_child(model, 0.3)
    Delta.capture(model, child).save(tmp_path)
    assert (tmp_path / "delta.safetensors").stat().st_size < 4 * child.num_trained + 600
    assert Delta.load(tmp_path).parts["weight"].num_trained == child.parts["weight"].num_trained


def test_then_is_one_after_the_other() -> None:
    model = a_model()
    base = snapshot(model)
    first_child, second_child = CHILDREN["element"](model), CHILDREN["row"](model)
    tune(model, first_child)
    first = Delta.capture(model, first_child)
    tune(model, second_child)
    second = Delta.capture(model, second_child)
    tuned = snapshot(model)
    both = first.then(second)
    fresh = a_model()
    both.apply_(fresh, check=False)
    assert same(fresh.state_dict(), tuned)
    assert not same(base, tuned)
    with pytest.raises(DeltaError, match="different architectures"):
        first.then(Delta.capture(nn.Linear(2, 2), TaskFree(0.5)))


def test_tied_parameters_are_stored_once(tmp_path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.wte.weight

    model = Tied()
    child = select_child(magnitudes(model), 0.5)
    assert child.num_eligible == 40
    delta = Delta.capture(model, child)
    delta.save(tmp_path)
    with torch.no_grad():
        other = Tied()
        other.load_state_dict(model.state_dict())
    Delta.load(tmp_path).apply_(other)
    assert list(delta.parts) == ["wte.weight"]


def test_an_interrupted_save_leaves_the_old_delta_or_the_new_one(tmp_path, monkeypatch) -> None:
    """Whichever file was the last to be renamed, one pair fits."""
    model = a_model()
    first = Delta.capture(model, Child.whole({n: p.shape for n, p in model.named_parameters()}))
    first.save(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    second = Delta.capture(model, Child.whole({n: p.shape for n, p in model.named_parameters()}))
    renames, replace = [0], os.replace
    for allowed in range(4):
        renames[0] = 0

        def interrupted(source, target, allowed=allowed):
            renames[0] += 1
            if renames[0] > allowed:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            second.save(tmp_path)
        monkeypatch.setattr(os, "replace", replace)
        found = Delta.load(tmp_path)
        wanted = first if allowed < 2 else second
        assert all(torch.equal(found.values[name], value) for name, value in wanted.values.items())
        first.save(tmp_path)
        assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_composing_refuses_what_applying_refuses() -> None:
    model = a_model()
    names = [name for name, _ in model.named_parameters()]
    shapes = {name: p.shape for name, p in model.named_parameters()}
    head, rest = {names[0]: shapes[names[0]]}, {n: shapes[n] for n in names[1:]}
    first = Delta.capture(model, Child.whole(head))
    with torch.no_grad():
        model.get_parameter(names[0]).add_(1)
    later = Delta.capture(model, Child.whole(rest))
    with pytest.raises(DeltaError, match="made on another model"):
        first.then(later)
    with pytest.raises(DeltaError, match="one dtype"):
        first.then(Delta.capture(a_model().bfloat16(), Child.whole(head)))
