"""Gradients that are released, or formed for the child alone: the same training, bitwise where it can be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from childtuning import Child, ChildOptimizer, TaskFree, fast, random_child
from childtuning.errors import ConfigError, ParameterError

ADAMW = {"lr": 3e-3, "weight_decay": 0.1}


class Net(nn.Module):
    """An embedding tied to the output layer, a shared layer, a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(24, 8)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 30, bias=False)
        self.out.weight = self.embedding.weight
        self.head = nn.Linear(30, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for _ in range(2):
            x = self.norm(x + self.down(torch.tanh(self.up(x))))
        return self.head(self.out(x).mean(1))


needs_fast = pytest.mark.skipif(not fast.enabled(), reason="is about layers of the fast room")


def a_net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randint(0, 30, (4, 6), generator=generator),
            torch.randint(0, 3, (4,), generator=generator),
        )
        for _ in range(steps)
    ]


def train(net: nn.Module, opt: ChildOptimizer, steps: int = 6, accumulate: int = 2, clip: float | None = 0.5):
    norms = []
    for step, (tokens, labels) in enumerate(batches(steps * accumulate)):
        (F.cross_entropy(net(tokens), labels) / accumulate).backward()
        if (step + 1) % accumulate == 0:
            if clip is not None:
                norms.append(float(opt.clip_grad_norm_(clip)))
            opt.step()
            net.zero_grad()
    return norms


def both(child: Child | TaskFree, *, dtype=torch.float32, inner=torch.optim.AdamW, clip=0.5, **given):
    """Train twice, dense gradients and not; return the two nets, optimizers and clipping norms."""
    dense, other = a_net().to(dtype), a_net().to(dtype)
    plain = ChildOptimizer(dense.named_parameters(), child, inner, **ADAMW)
    if "model" in given:
        given["model"] = other
    lean = ChildOptimizer(other.named_parameters(), child, inner, **ADAMW, **given)
    return dense, other, plain, lean, train(dense, plain, clip=clip), train(other, lean, clip=clip)


def assert_alike(dense: nn.Module, other: nn.Module, **tolerance: float) -> None:
    theirs = dict(other.named_parameters())
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(theirs[name], parameter, **tolerance)


@pytest.mark.parametrize("granularity", ["element", "row", "column", "block", "parameter"])
@pytest.mark.parametrize("inner", [torch.optim.AdamW, torch.optim.RAdam])
@pytest.mark.parametrize("clip", [0.5, None])
def test_released_gradients_train_the_same(granularity, inner, clip) -> None:
    child = random_child(a_net(), 0.3, granularity=granularity, always=("head.*",))
    dense, other, _, _, norms, lean_norms = both(child, inner=inner, clip=clip, release_gradients=True)
    assert_alike(
        dense, other, rtol=1e-5, atol=1e-7
    )  # accumulated gradients are added in the same order, but clipped
    assert norms == pytest.approx(lean_norms, rel=1e-5)
    assert all(
        p.grad is None for n, p in other.named_parameters() if not n.startswith("head")
        and not child.parts[n].is_whole
    )  # fmt: skip


@pytest.mark.parametrize("granularity", ["row", "column", "block", "element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_structured_layers_train_the_same(granularity, dtype) -> None:
    child = random_child(a_net(), 0.3, granularity=granularity, always=("head.*",))
    before = copy.deepcopy(a_net().to(dtype).state_dict())
    dense, other, _, lean, norms, lean_norms = both(child, dtype=dtype, model=True)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    assert_alike(dense, other, **tolerance)
    assert norms == pytest.approx(lean_norms, rel=1e-4)
    for name, part in child.parts.items():
        outside = ~part.mask()
        assert torch.equal(other.get_parameter(name)[outside], before[name][outside])
    lean.remove()
    assert type(other.up) is nn.Linear


@pytest.mark.parametrize("always", [("head.*",), ("head.*", "norm.*", "up.bias")])
@pytest.mark.parametrize("inner", [torch.optim.AdamW, torch.optim.RAdam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("granularity", ["row", "column"])
def test_task_free_units_train_the_same(inner, dtype, always, granularity) -> None:
    free = TaskFree(0.4, seed=3, granularity=granularity, always=always)
    dense, other, _, _, _, _ = both(free, dtype=dtype, inner=inner, clip=None, model=True)
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    assert_alike(dense, other, **tolerance)


@pytest.mark.parametrize("kind", ["task-free", "fixed"])
def test_what_came_before_a_removal_is_kept(kind) -> None:
    net, twin = a_net(), a_net()
    child = (
        TaskFree(0.4, seed=3, granularity="row")
        if kind == "task-free"
        else random_child(net, 0.4, granularity="row")
    )
    opts = [ChildOptimizer(n.named_parameters(), child, model=n, **ADAMW) for n in (net, twin)]
    for model, opt in zip((net, twin), opts, strict=True):
        for tokens, labels in batches(2):
            F.cross_entropy(model(tokens), labels).backward()
            if model is twin:
                opt.remove()
                opt.attach()
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


@needs_fast
def test_clipping_of_drawn_rows_estimates_the_whole_norm() -> None:
    net = a_net()
    tokens, labels = batches(1)[0]
    F.cross_entropy(net(tokens), labels).backward()
    whole = (
        float(torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])) ** 2
    )
    squares = []
    for seed in range(200):
        net = a_net()
        free = TaskFree(0.5, seed=seed, granularity="row")
        opt = ChildOptimizer(net.named_parameters(), free, model=net, **ADAMW)
        F.cross_entropy(net(tokens), labels).backward()
        squares.append(float(opt.clip_grad_norm_(float("inf"))) ** 2)
        opt.remove()
    mean = torch.tensor(squares).mean()
    error = torch.tensor(squares).std() / len(squares) ** 0.5
    assert abs(float(mean) - whole) < 4 * float(error)


@needs_fast
def test_only_the_rows_gradients_are_formed_and_other_uses_are_right() -> None:
    net = a_net()
    child = random_child(net, 0.3, granularity="row", always=("head.*",))
    opt = ChildOptimizer(net.named_parameters(), child, torch.optim.SGD, lr=0.0, model=net)
    tokens, labels = batches(1)[0]
    loss = (
        F.cross_entropy(net(tokens), labels) + F.linear(net.embedding(tokens), net.up.weight).square().sum()
    )
    loss.backward()
    assert opt.structured
    (group,) = opt.param_groups
    lean = {name: p.grad for name, p in zip(group["param_names"], group["params"], strict=True)}
    reference = a_net()
    loss = F.cross_entropy(reference(tokens), labels)
    loss = loss + F.linear(reference.embedding(tokens), reference.up.weight).square().sum()
    loss.backward()
    partial = {name: part for name, part in child.parts.items() if not part.is_empty and not part.is_whole}
    assert partial
    for name, part in partial.items():
        wanted = reference.get_parameter(name).grad.reshape(-1)[part.indices()]  # type: ignore[union-attr]
        torch.testing.assert_close(lean[name], wanted, rtol=1e-4, atol=1e-5)


def test_zero_grad_forgets_and_a_step_uses_up() -> None:
    net = a_net()
    child = random_child(net, 0.3, granularity="row", always=("head.*",))
    opt = ChildOptimizer(net.named_parameters(), child, model=net, **ADAMW)
    tokens, labels = batches(1)[0]
    F.cross_entropy(net(tokens), labels).backward()
    assert opt.clip_grad_norm_(float("inf")) > 0
    opt.zero_grad()
    assert opt.clip_grad_norm_(float("inf")) == 0
    with pytest.raises(ParameterError, match="no trained parameter has a gradient at the first step"):
        opt.step()
    F.cross_entropy(net(tokens), labels).backward()
    opt.step()
    net.zero_grad()
    assert opt.clip_grad_norm_(float("inf")) == 0
    before = copy.deepcopy(net.state_dict())
    opt.step()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("kind", ["fixed", "task-free"])
def test_resume_is_bitwise(kind) -> None:
    child = (
        random_child(a_net(), 0.3, granularity="row", always=("head.*",))
        if kind == "fixed"
        else TaskFree(0.4, granularity="row")
    )
    net = a_net()
    opt = ChildOptimizer(net.named_parameters(), child, model=net, **ADAMW)
    train(net, opt, steps=2)
    state, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(net.state_dict())
    train(net, opt, steps=3)
    again = a_net()
    again.load_state_dict(weights)
    other = ChildOptimizer(again.named_parameters(), child, model=again, **ADAMW)
    other.load_state_dict(state)
    train(again, other, steps=3)
    assert_alike(net, again, rtol=0, atol=0)


def test_gradient_scaling_reaches_released_gradients() -> None:
    net, scaled = a_net(), a_net()
    child = random_child(net, 0.3, granularity="row", always=("head.*",))
    plain = ChildOptimizer(net.named_parameters(), child, model=net, **ADAMW)
    train(net, plain, steps=3, accumulate=1, clip=None)
    opt = ChildOptimizer(scaled.named_parameters(), child, model=scaled, **ADAMW)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for tokens, labels in batches(3):
        scaler.scale(F.cross_entropy(scaled(tokens), labels)).backward()
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        scaled.zero_grad()
    assert_alike(net, scaled, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_autocast_and_a_real_architecture() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **small))
    twin = copy.deepcopy(model)
    child = random_child(model, 0.2, granularity="row", always=("classifier.*",))
    plain = ChildOptimizer(twin.named_parameters(), child, **ADAMW)
    lean = ChildOptimizer(model.named_parameters(), child, model=model, **ADAMW)
    assert lean._changed is not None
    model.activation_checkpointing_enable()
    inputs = {
        "input_ids": torch.randint(5, 50, (3, 9), generator=torch.Generator().manual_seed(0)),
        "labels": torch.tensor([0, 1, 1]),
    }
    for net, opt in ((model.train(), lean), (twin.train(), plain)):
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = net(**inputs).loss
            loss.backward()
            opt.step()
            opt.zero_grad()
    assert_alike(twin, model, rtol=0.05, atol=0.02)


def test_what_cannot_be_released_is_refused() -> None:
    net = a_net()
    with pytest.raises(ConfigError, match="task-free child"):
        ChildOptimizer(net.named_parameters(), TaskFree(0.3), release_gradients=True)
    child = random_child(net, 0.3)
    with pytest.raises(ConfigError, match="official"):
        ChildOptimizer(net.named_parameters(), child, preset="official", release_gradients=True)
    opt = ChildOptimizer(net.named_parameters(), child, release_gradients=True)
    with pytest.raises(ParameterError, match="cannot be copied"):
        copy.deepcopy(opt)
    opt.remove()
    structured = random_child(net, 0.3, granularity="row")
    first = ChildOptimizer(net.named_parameters(), structured, model=net)
    with pytest.raises(ParameterError, match="remove"):
        ChildOptimizer(net.named_parameters(), structured, model=net)
    first.remove()
    ChildOptimizer(net.named_parameters(), structured, model=net).remove()


@pytest.mark.parametrize("kind", ["released", "structured"])
@pytest.mark.parametrize("granularity", ["element", "column"])
def test_parameters_that_were_frozen_before_are_trained(kind, granularity) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).requires_grad_(False)
    before = copy.deepcopy(model)
    child = random_child(model, 0.4, granularity=granularity, eligible="*")
    how = {"release_gradients": True} if kind == "released" else {"model": model}
    optimizer = ChildOptimizer(model.named_parameters(), child, torch.optim.SGD, lr=1.0, **how)
    model(torch.randn(5, 6)).square().sum().backward()
    optimizer.step()
    optimizer.remove()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name, old in before.named_parameters():
        assert torch.equal(model.get_parameter(name) != old, child.mask(name))


def test_a_refused_optimizer_leaves_the_flags() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    child = random_child(model, 0.4, granularity="column", eligible=["0.*"])
    optimizer = ChildOptimizer(model.named_parameters(), child, torch.optim.SGD, lr=1.0, model=model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ParameterError):
        ChildOptimizer(model.named_parameters(), child, torch.optim.SGD, lr=1.0, model=model)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    optimizer.remove()
    wider = random_child(model, 0.4, granularity="column")
    other = ChildOptimizer(model.named_parameters(), wider, torch.optim.SGD, lr=1.0, model=model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ParameterError, match="another optimizer"):
        optimizer.attach()
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    other.remove()


@needs_fast
def test_a_hook_on_a_weight_sees_its_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    dense = copy.deepcopy(model)
    child = random_child(model, 0.4, granularity="column")
    optimizer = ChildOptimizer(
        model.named_parameters(), child, torch.optim.SGD, lr=1.0, rescale=False, model=model
    )
    for net in (model, dense):
        net[2].weight.register_hook(lambda gradient: gradient * 5)
    x = torch.randn(4, 6).double()
    for net in (model, dense):
        net(x).square().sum().backward()
    optimizer.step()
    for name, parameter in dense.named_parameters():
        expected = parameter - parameter.grad * child.mask(name)
        assert torch.allclose(model.get_parameter(name), expected, rtol=1e-12, atol=1e-12)


@needs_fast
def test_a_model_is_saved_and_copied_as_what_it_was(tmp_path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    classes = [type(module) for module in model.modules()]
    child = random_child(model, 0.2, granularity="column")
    optimizer = ChildOptimizer(model.named_parameters(), child, torch.optim.AdamW, model=model)
    torch.save(model, tmp_path / "model.pt")
    tokens = torch.randint(0, 50, (2, 8))
    for other in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        assert [type(module) for module in other.modules()] == classes
        assert torch.equal(other.eval()(tokens).logits, model.eval()(tokens).logits)
    optimizer.remove()
