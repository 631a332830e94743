"""Dropouts beside structured layers: torch's function, with masks that are drawn from a seed and not kept."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification

import childtuning as ct
from childtuning.child import random_child
from childtuning.fast import dropout
from childtuning.fast.dropout import _SPARED, SeededDropout, attend, spare_dropouts, torchs_dropouts


def mask_of(module: nn.Module, shape: tuple[int, ...], seed: int = 3) -> torch.Tensor:
    """Return what a dropout multiplies with, by letting ones through: [shape]."""
    torch.manual_seed(seed)
    return module(torch.ones(shape, dtype=torch.float64, requires_grad=True)).detach()


def seeded(p: float) -> nn.Module:
    module = nn.Dropout(p)
    spare_dropouts(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_values_and_gradients_are_those_of_one_mask(dtype: torch.dtype, p: float) -> None:
    module = nn.Dropout(p)
    undo = spare_dropouts(module)
    assert type(module) is SeededDropout
    x = torch.randn(17, 33, dtype=dtype)
    mask = mask_of(module, (17, 33))
    assert set(mask.unique().tolist()) == {0.0, 1 / (1 - p)}
    torch.manual_seed(3)
    given = x.clone().requires_grad_()
    y = module(given)
    y.backward(x)
    assert given.grad is not None
    for found in (y.detach(), given.grad):
        torch.testing.assert_close(found, (x.double() * mask).to(dtype))
    undo()
    assert type(module) is nn.Dropout


def test_masks_are_as_bernoulli_and_repeat_with_the_generator() -> None:
    module, shape = nn.Dropout(0.1), (400, 1000)
    spare_dropouts(module)
    masks = [mask_of(module, shape, seed) > 0 for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    share = float(masks[0].double().mean())
    assert abs(share - 0.9) < 5 * (0.9 * 0.1 / 400_000) ** 0.5
    both = float((masks[0] & masks[2]).double().mean())  # of independent masks 0.81
    assert abs(both - 0.81) < 5 * (0.81 * 0.19 / 400_000) ** 0.5
    torch.manual_seed(0)
    again = [module(torch.ones(9, 9, requires_grad=True)) for _ in range(2)]
    assert not torch.equal(*again)  # each call has its own


@pytest.mark.parametrize("p", [0.0, 1.0, 1e-20])
def test_what_drops_nothing_or_everything_is_torchs(p: float) -> None:
    module = nn.Dropout(p)
    spare_dropouts(module)
    x = torch.randn(6, 5, requires_grad=True)
    assert torch.equal(module(x), nn.Dropout(p)(x))


def test_gradients_are_those_of_the_function() -> None:
    module = nn.Dropout(0.4)
    spare_dropouts(module)

    def call(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return module(x)

    assert torch.autograd.gradcheck(call, torch.randn(5, 4, dtype=torch.float64, requires_grad=True))


def test_a_seed_is_kept_alone() -> None:
    module, x = nn.Dropout(0.5), torch.randn(64, 64, requires_grad=True)
    sizes = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    for install in (False, True):
        if install:
            spare_dropouts(module)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module(x)
    assert sizes == [64 * 64 * 4, 16]


@pytest.mark.parametrize("change", ["eval", "inplace", "nested", "vmap"])
def test_elsewhere_torchs_own_runs(change: str) -> None:
    plain = nn.Dropout(0.5, inplace=change == "inplace").train(change != "eval")
    ours = copy.deepcopy(plain)
    spare_dropouts(ours)
    x, found = torch.randn(6, 5), []
    for module in (plain, ours):
        torch.manual_seed(1)
        given = (x.clone() * 1).requires_grad_(change != "inplace")
        if change == "vmap":
            found.append(torch.func.vmap(module, randomness="different")(given))
        elif change == "nested":
            lengths = torch.nested.nested_tensor([given[:2], given], layout=torch.jagged)
            found.append(module(lengths).to_padded_tensor(0.0))
        else:
            found.append(module(given))
    assert torch.equal(*found)


def test_a_mask_is_the_same_without_gradients() -> None:
    """So that a checkpoint, which runs forward without them and again with them, differentiates what it ran."""
    module, x = seeded(0.5), torch.randn(20, 50)
    found = []
    for needs, enabled in ((False, True), (True, False), (True, True)):
        torch.manual_seed(4)
        with torch.set_grad_enabled(enabled):
            found.append(module(x.clone().requires_grad_(needs)).detach())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    given = x.clone().requires_grad_()
    y = checkpoint(module, given, use_reentrant=True)
    assert isinstance(y, torch.Tensor)
    y.backward(torch.ones_like(y))
    assert given.grad is not None and torch.equal(given.grad > 0, y != 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(300,), (30, 10)])
def test_what_is_not_finite_stays_so(value: float, shape: tuple[int, ...]) -> None:
    y = seeded(0.5)(torch.full(shape, value))
    assert not y.isfinite().any()
    assert y.isnan().any()


def test_a_seed_lies_on_the_cpu_whatever_the_default_device() -> None:
    module, x = seeded(0.5), torch.ones(4, 8, requires_grad=True)
    with torch.device("meta"):
        y = module(x)
    assert y.device.type == "cpu" and set(y.unique().tolist()) <= {0.0, 2.0}


def test_copies_are_plain_and_two_may_want_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2))
    undo, undo_again = spare_dropouts(model), spare_dropouts(model)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(made[1]) is nn.Dropout and made[1].p == 0.2
    undo()
    assert type(model[1]) is SeededDropout and model[1] in _SPARED
    with torchs_dropouts():
        torch.manual_seed(0)
        theirs = model[1](torch.ones(64))
    torch.manual_seed(0)
    assert torch.equal(theirs, nn.Dropout(0.2)(torch.ones(64)))
    undo_again()
    assert type(model[1]) is nn.Dropout and model[1] not in _SPARED


def test_a_row_of_minus_infinity_and_the_least_number() -> None:
    least = torch.finfo(torch.float32).min
    bias = torch.tensor([[-torch.inf, least, least, least]])
    q, k = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 4, 4)
    y = attend(q, k, torch.eye(4)[None, None], bias, 0.01)
    assert float(y[..., 0].abs().max()) == 0.0


def test_they_come_and_go_with_the_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 2))
    dense = copy.deepcopy(model)
    child = random_child(model, 0.4, granularity="column")
    trained = []
    for net, own in ((dense, None), (model, model)):
        optimizer = ct.ChildOptimizer(
            net.named_parameters(), child, torch.optim.AdamW, lr=0.1, model=own, release_gradients=True
        )
        assert isinstance(net[1], SeededDropout) == (own is not None)
        undo = None if own is not None else spare_dropouts(net)
        torch.manual_seed(2)
        for _ in range(3):
            net(torch.randn(7, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.remove()
        if undo is not None:
            undo()
        assert type(net[1]) is nn.Dropout
        trained.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert type(copy.deepcopy(model)[1]) is nn.Dropout


def attention_inputs(mask: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    torch.manual_seed(0)
    given = [torch.randn(2, 3, length, 8, dtype=dtype) for length in (5, 7, 7)]
    if mask == "boolean":
        bias = torch.rand(2, 1, 5, 7) > 0.3
        bias[0, 0, 2] = False  # attends to nothing
        return given, bias
    if mask not in ("added", "trained"):
        return given, None
    bias = torch.randn(2, 1, 5, 7, dtype=dtype)
    if mask == "added":
        bias[0, 0, 2], bias[1, 0, :, 3] = -torch.inf, -torch.inf
    return given, bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask", ["none", "boolean", "added", "trained", "causal"])
def test_attention_is_torchs_with_a_dropout_of_the_probabilities(mask: str, dtype: torch.dtype) -> None:
    given, bias = attention_inputs(mask, dtype)
    p, is_causal = 0.3, mask == "causal"
    kept = mask_of(seeded(p), (2, 3, 5, 7)).to(dtype)
    found = []
    for is_ours in (False, True):
        inputs = [t.clone().requires_grad_() for t in given]
        own = bias.clone().requires_grad_() if mask == "trained" and bias is not None else bias
        torch.manual_seed(3)
        if is_ours:
            y = attend(*inputs, own, p, is_causal, scale=0.5)
        else:  # torch's, with the values that the probabilities stand at in place of them
            eye = torch.eye(7, dtype=dtype).expand(2, 3, 7, 7)
            probabilities = F.scaled_dot_product_attention(
                inputs[0], inputs[1], eye, own, 0.0, is_causal, scale=0.5
            )
            y = (probabilities * kept) @ inputs[2]
        y.backward(torch.arange(8, dtype=dtype).expand_as(y))
        gradients = [t.grad for t in (*inputs, own) if t is not None and t.requires_grad]
        found.append([y.detach(), *gradients])
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("mask", ["none", "boolean", "trained", "causal"])
def test_the_gradient_of_attention(mask: str) -> None:
    given, bias = attention_inputs(mask, torch.float64)
    given += [bias] if mask == "trained" and bias is not None else []

    def call(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: torch.Tensor | None = bias
    ) -> torch.Tensor:
        torch.manual_seed(1)
        return attend(q, k, v, b, 0.4, mask == "causal")

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in given])


def test_attention_keeps_nothing_of_the_probabilities() -> None:
    sizes = []
    for function in (F.scaled_dot_product_attention, attend):
        q, k, v = (torch.randn(1, 1, 64, 4).requires_grad_() for _ in range(3))
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = function(q, k, v, dropout_p=0.5)
        sizes.append([size for size in kept.values() if size >= 64 * 64])
        del y
    assert sizes == [[4 * 64 * 64] * 3, []]


@pytest.mark.parametrize("change", ["no dropout", "bf16", "autocast", "vmap", "grouped"])
def test_elsewhere_torchs_own_attention_runs(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16 if change == "bf16" else torch.float32
    heads = 1 if change == "grouped" else 2
    q, k, v = (torch.randn(1, n, 5, 4, dtype=dtype) for n in (2, heads, heads))
    found = []
    for function in (F.scaled_dot_product_attention, attend):
        inputs = [t.clone().requires_grad_(change != "vmap") for t in (q, k, v)]
        p = 0.0 if change == "no dropout" else 0.5
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
            if change == "vmap":
                call = torch.func.vmap(lambda *t, f=function: f(*t, dropout_p=0.5), randomness="different")
                found.append(call(*inputs))
            else:
                found.append(function(*inputs, dropout_p=p, enable_gqa=change == "grouped"))
    assert torch.equal(*found) and type(found[1].grad_fn) is type(found[0].grad_fn)


def tiny_bert_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=16, **sizes))


def test_a_transformers_model_attends_so_beside_structured_layers() -> None:
    model = tiny_bert_model()
    assert model.config._attn_implementation == "sdpa" and model.config.attention_probs_dropout_prob > 0
    dense = copy.deepcopy(model)
    batch = {"input_ids": torch.tensor([[2, 5, 3, 6], [2, 4, 3, 0]]), "labels": torch.tensor([1, 0])}
    batch["attention_mask"] = (batch["input_ids"] > 0).long()
    child = random_child(model, 0.4, granularity="column")
    trained = []
    for net, own in ((dense, None), (model, model)):
        optimizer = ct.ChildOptimizer(
            net.named_parameters(), child, torch.optim.AdamW, lr=1e-2, model=own, release_gradients=True
        )
        assert net.config._attn_implementation == "sdpa"
        assert all((module in _SPARED) == (own is not None) for module in net.modules())
        assert not any(module in _SPARED for module in copy.deepcopy(net).modules())
        net.train()
        undo = None if own is not None else spare_dropouts(net)
        torch.manual_seed(2)
        for _ in range(3):
            net(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.remove()
        if undo is not None:
            undo()
        assert not any(module in _SPARED for module in net.modules())
        trained.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("drops", [True, False])
def test_attention_without_dropout_is_transformers_own(drops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert_model()
    undo = spare_dropouts(model.train(drops))
    seen: list[float] = []
    monkeypatch.setattr(dropout, "attend", lambda *a, **k: seen.append(k["dropout_p"]) or attend(*a, **k))
    model(input_ids=torch.tensor([[2, 5, 3, 6]]))
    undo()
    assert bool(seen) == drops and all(seen)


def test_another_attention_is_left_alone() -> None:
    model = tiny_bert_model()
    undo = spare_dropouts(model)
    model.set_attn_implementation("eager")
    undo()
    assert model.config._attn_implementation == "eager"


def test_attention_keeps_less_in_a_model_while_it_is_spared() -> None:
    model = tiny_bert_model().train()
    ids = torch.ones(4, 32, dtype=torch.long)
    sizes = []
    for spared in (False, True, False):
        undo = spare_dropouts(model) if spared else None
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=torch.zeros(4, dtype=torch.long)).loss
        square = 4 * 2 * 32 * 32 * 4  # bytes of the probabilities of a layer
        sizes.append(sum(size >= square for size in kept.values()))
        del loss
        if undo is not None:
            undo()
    assert sizes[1] < sizes[0] == sizes[2]
