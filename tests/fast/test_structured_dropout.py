"""Dropouts beside structured layers: the same numbers as torch's, in less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import childtuning as ct
from childtuning.child import random_child
from childtuning.fast.dropout import _SPARED, BooleanDropout, attend, spare_dropouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_values_gradients_and_random_numbers_are_torchs(dtype: torch.dtype, p: float) -> None:
    plain = nn.Dropout(p)
    ours = copy.deepcopy(plain)
    undo = spare_dropouts(ours)
    assert type(ours) is BooleanDropout
    x, found = torch.randn(17, 33, dtype=dtype), []
    for module in (plain, ours):
        torch.manual_seed(3)
        given = x.clone().requires_grad_()
        y = module(given)
        y.backward(x)
        found.append((y.detach(), given.grad, torch.rand(4)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    undo()
    assert type(ours) is nn.Dropout


def test_gradients_are_those_of_the_function() -> None:
    module = nn.Dropout(0.4)
    spare_dropouts(module)

    def call(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return module(x)

    assert torch.autograd.gradcheck(call, torch.randn(5, 4, dtype=torch.float64, requires_grad=True))


def test_the_mask_takes_a_byte_an_entry() -> None:
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
    assert sizes == [64 * 64 * 4, 64 * 64]


@pytest.mark.parametrize("change", ["eval", "no_grad", "inplace", "frozen input", "vmap"])
def test_elsewhere_torchs_own_runs(change: str) -> None:
    plain = nn.Dropout(0.5, inplace=change == "inplace").train(change != "eval")
    ours = copy.deepcopy(plain)
    spare_dropouts(ours)
    x, found = torch.randn(6, 5), []
    for module in (plain, ours):
        torch.manual_seed(1)
        given = (x.clone() * 1).requires_grad_(change not in ("inplace", "frozen input"))
        if change == "vmap":
            found.append(torch.func.vmap(module, randomness="different")(given))
            continue
        with torch.set_grad_enabled(change != "no_grad"):
            found.append(module(given))
    assert torch.equal(*found)


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
        assert isinstance(net[1], BooleanDropout) == (own is not None)
        torch.manual_seed(2)
        for _ in range(3):
            net(torch.randn(7, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.remove()
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
def test_attention_is_torchs_with_the_same_random_numbers(mask: str, dtype: torch.dtype) -> None:
    given, bias = attention_inputs(mask, dtype)
    found = []
    for function in (F.scaled_dot_product_attention, attend):
        inputs = [t.clone().requires_grad_() for t in given]
        own = bias.clone().requires_grad_() if mask == "trained" and bias is not None else bias
        torch.manual_seed(3)
        y = function(*inputs, own, 0.3, mask == "causal", scale=0.5)
        y.backward(torch.arange(8, dtype=dtype).expand_as(y))
        gradients = [t.grad for t in (*inputs, own) if t is not None and t.requires_grad]
        found.append([y.detach(), *gradients, torch.rand(4)])
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


def test_attention_keeps_a_mask_alone() -> None:
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
    assert sizes == [[4 * 64 * 64] * 3, [64 * 64]]


@pytest.mark.parametrize("change", ["no dropout", "no_grad", "frozen", "bf16", "autocast", "vmap", "grouped"])
def test_elsewhere_torchs_own_attention_runs(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16 if change == "bf16" else torch.float32
    heads = 1 if change == "grouped" else 2
    q, k, v = (torch.randn(1, n, 5, 4, dtype=dtype) for n in (2, heads, heads))
    found = []
    for function in (F.scaled_dot_product_attention, attend):
        inputs = [t.clone().requires_grad_(change not in ("frozen", "vmap")) for t in (q, k, v)]
        p = 0.0 if change == "no dropout" else 0.5
        torch.manual_seed(1)
        with (
            torch.set_grad_enabled(change != "no_grad"),
            torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"),
        ):
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
        torch.manual_seed(2)
        for _ in range(3):
            net(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.remove()
        assert not any(module in _SPARED for module in net.modules())
        trained.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


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
