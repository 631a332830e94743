"""Rows, columns and blocks of weights that hold several matrices: experts, and attention cut into heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from childtuning import Child, ChildOptimizer, Delta, TaskFree, random_child, select_child, unit_axes
from childtuning.child import Part
from childtuning.child.pieces import Piece
from childtuning.child.units import Granularity

EXPERTS, WIDTH, INNER = 4, 16, 8
SMALL = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "num_local_experts": EXPERTS,
}


def network(name: str) -> Any:
    torch.manual_seed(0)
    if name == "mixtral":  # [experts, out, in]
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL))
    if name == "gpt-oss":  # [experts, in, out], with biases
        model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SMALL, head_dim=8))
    else:  # llama-4: the same, of another kind of module
        config = transformers.Llama4TextConfig(**SMALL, head_dim=8, intermediate_size_mlp=INNER)
        model = transformers.Llama4ForCausalLM(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def experts_of(model: nn.Module) -> tuple[str, nn.Module]:
    return next((path, module) for path, module in model.named_modules() if path.endswith(".experts"))


def run_experts(experts: Any, x: Tensor) -> Tensor:
    """Let every expert answer every token: [tokens, width] -> [tokens, width]."""
    if "Llama4" in type(experts).__name__:
        return experts(x.repeat(EXPERTS, 1)).view(EXPERTS, len(x), WIDTH).sum(0)
    index = torch.arange(EXPERTS).expand(len(x), EXPERTS)
    return experts(x, index, torch.ones(len(x), EXPERTS))


NETWORKS = ("mixtral", "gpt-oss", "llama-4")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_row_of_stacked_experts_is_an_output_of_one_expert(name: str) -> None:
    model = network(name)
    path, experts = experts_of(model)
    unit = Granularity("row", unit_axes(model, "row")[f"{path}.down_proj"])
    weight: Any = experts.down_proj
    x = torch.randn(5, WIDTH)
    with torch.no_grad():
        before = run_experts(experts, x)
        for number in (0, 3, EXPERTS * WIDTH - 1):
            mask = Part(weight.shape, torch.tensor([number]), unit).mask()
            assert int(mask.sum()) == INNER and int(mask.flatten(1).any(1).sum()) == 1
            kept = weight.clone()
            weight[mask] += 1
            changed = (run_experts(experts, x) != before).any(0).nonzero().view(-1)
            weight.copy_(kept)
            assert changed.tolist() == [number % WIDTH]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_column_of_stacked_experts_is_an_input_of_one_expert(name: str) -> None:
    model = network(name)
    path, experts = experts_of(model)
    unit = Granularity("column", unit_axes(model, "column")[f"{path}.gate_up_proj"])
    weight: Any = experts.gate_up_proj
    with torch.no_grad():
        for number in (0, 3, EXPERTS * WIDTH - 1):
            mask = Part(weight.shape, torch.tensor([number]), unit).mask()
            assert int(mask.sum()) == 2 * INNER and int(mask.flatten(1).any(1).sum()) == 1
            x = torch.randn(5, WIDTH)
            x[:, number % WIDTH] = 0  # the only input that the column reads
            before = run_experts(experts, x)
            weight[mask] += 1
            assert torch.equal(run_experts(experts, x), before)
            assert not torch.equal(run_experts(experts, x + 1), run_experts(experts, x))
            weight[mask] -= 1


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_and_biases_stay_within_an_expert(name: str) -> None:
    model = network(name)
    path, experts = experts_of(model)
    axes = unit_axes(model, "block")
    for own, weight in experts.named_parameters():
        unit = Granularity("block", axes[f"{path}.{own}"], (3, 4))
        for number in range(unit.num_units(weight.shape)):
            mask = Part(tuple(weight.shape), torch.tensor([number]), unit).mask()
            assert int(mask.flatten(1).any(1).sum()) == 1 and int(mask.sum()) <= 12
        if own.endswith("bias"):
            for granularity in ("row", "column"):
                unit = Granularity(granularity, unit_axes(model, granularity)[f"{path}.{own}"])
                assert unit.num_units(weight.shape) == weight.numel()


def test_attention_cut_into_heads() -> None:
    config = transformers.XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=8, vocab_size=20)
    model = transformers.XLNetModel(config)
    rows, columns = unit_axes(model, "row"), unit_axes(model, "column")
    assert {rows[f"layer.0.rel_attn.{one}"] for one in "qkvr"} == {(1, 2)}
    assert {columns[f"layer.0.rel_attn.{one}"] for one in "qkvr"} == {0}
    assert "layer.0.rel_attn.o" not in rows and columns["layer.0.rel_attn.o"] == (1, 2)
    assert not unit_axes(model, "block") and not unit_axes(model, "element")


def train(model: Any, child: Child | TaskFree, *, inside: bool = False, steps: int = 3) -> dict[str, Tensor]:
    options = {"model": model} if inside else {}
    optimizer = ChildOptimizer(
        model.named_parameters(), child, torch.optim.AdamW, lr=1e-2, weight_decay=0.1, **options
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(0, 50, (2, 6), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.remove()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("inside", [False, True], ids=["dense", "model="])
@pytest.mark.parametrize("granularity", ["row", "column", "block"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_child_of_experts_trains_as_its_entries_do(
    name: str, granularity: str, inside: bool, tmp_path: Path
) -> None:
    model = network(name)
    path, _ = experts_of(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    units: Any = Granularity("block", block_shape=(3, 4)) if granularity == "block" else granularity
    child = select_child(
        {n: p.detach().square() for n, p in model.named_parameters()},
        0.3,
        granularity=units,
        row_axes=unit_axes(model, granularity),
    )
    part = child.parts[f"{path}.gate_up_proj"]
    assert 0 < part.num_trained < part.numel
    child.save(tmp_path / "child.safetensors")
    loaded = Child.load(tmp_path / "child.safetensors")
    assert loaded.fingerprint() == child.fingerprint()
    after = train(model, loaded, inside=inside)
    for n, value in after.items():
        assert torch.equal(value[~child.mask(n)], before[n][~child.mask(n)])
    wanted = train(network(name), Child.from_masks({n: child.mask(n) for n in child.parts}))
    for n, value in after.items():
        torch.testing.assert_close(value, wanted[n], rtol=0, atol=1e-5 if inside else 0)
    delta = Delta.capture(model, child)
    delta.save(tmp_path / "delta")
    served = network(name)
    Delta.load(tmp_path / "delta").apply_(served)
    assert all(torch.equal(p, after[n]) for n, p in served.named_parameters())


@pytest.mark.parametrize("granularity", ["row", "column", "block"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_task_free_units_of_experts(name: str, granularity: str) -> None:
    model = network(name)
    path, _ = experts_of(model)
    free = TaskFree(0.4, seed=2, granularity=granularity, row_axes=unit_axes(model, granularity))
    own, shape = f"{path}.gate_up_proj", (EXPERTS, WIDTH, 2 * INNER)
    mask = free.mask(own, shape, 5)
    per_unit = free.units(own).sums(mask.double()) / free.units(own).sizes(shape)
    assert set(per_unit.tolist()) == {0.0, 1.0}
    for start in range(EXPERTS - 1):
        piece = Piece(shape, start, 2)
        assert torch.equal(free.mask(own, shape, 5, piece), piece.slice(mask))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    after = train(model, free, steps=1)
    for n, value in after.items():
        drawn = free.mask(n, value.shape, 0)
        moved = value != before[n] * (1 - 1e-2 * 0.1)  # what weight decay alone leaves
        assert not moved[~drawn].any()
    torch.testing.assert_close(train(network(name), free, inside=True, steps=1), after)


def test_a_random_child_is_of_the_models_units(tmp_path: Path) -> None:
    for granularity in ("row", "column", "block"):
        model = network("gpt-oss")
        path, _ = experts_of(model)
        child = random_child(model, 0.3, seed=1, granularity=granularity)
        child.save(tmp_path / "child.safetensors")
        loaded = Child.load(tmp_path / "child.safetensors")
        unit = loaded.parts[f"{path}.down_proj"].granularity
        assert unit.axis == unit_axes(model, granularity)[f"{path}.down_proj"]
        assert all(torch.equal(loaded.mask(n), child.mask(n)) for n in child.parts)
