"""A child within a budget: the costs it is counted by, the child of most score, and what is refused."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import childtuning as ct
from childtuning import fast
from childtuning.child import Budget, Child, random_child, select_child
from childtuning.child.budget import Costs, Place, Rates, Work
from childtuning.errors import ConfigError, DataError, ParameterError
from childtuning.fisher.costs import measured_rates

RATES = Rates(1e9, 1e9, 1e9)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


class Net(nn.Module):
    """Tokens in, one loss out: an embedding, four blocks, a head."""

    def __init__(self, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, 3)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x).mean(1))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch["tokens"]), batch["labels"], reduction="none")


def batch(size: int = 8, length: int = 12):
    generator = torch.Generator().manual_seed(0)
    return {
        "tokens": torch.randint(0, 50, (size, length), generator=generator),
        "labels": torch.randint(0, 3, (size,), generator=generator),
    }


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def scores(net):
    generator = torch.Generator().manual_seed(1)
    return {
        n: torch.rand(p.shape, generator=generator) ** 4 for n, p in net.named_parameters() if "head" not in n
    }


def linear_work(rows: int, width: int, depth: int) -> float:
    """The operations of one forward pass of the blocks: 2 · N · W."""
    return depth * 2 * (2 * rows * width * 2 * width)


def test_operations_are_those_of_the_layers(net):
    costs = ct.training_costs(net, batch(), loss_fn)
    rows, width = 8 * 12, 16
    one = linear_work(rows, width, 1)
    assert [work.operations for work in costs.forward] == [0, one, one, one, one, 2 * 8 * width * 3]
    assert [work.operations for work in costs.backward[1:5]] == [one] * 4
    for name in ("up", "down"):
        place = costs.places[f"blocks.2.{name}.weight"]
        assert place.depth == 3
        assert place.gradient.operations == pytest.approx(one / 2, rel=0.1)  # biases have a share of it
    assert costs.places["blocks.0.up.weight"].input_bytes == rows * width * 4
    assert costs.places["blocks.0.down.weight"].input_bytes == rows * 2 * width * 4
    assert costs.places["embedding.weight"].input_bytes == 0
    work = (costs.forward[-1] + costs.backward[-1] + costs.unspared[-1][1]).draws
    assert work == pytest.approx(8 * 12 * 16)  # with torch's dropout


def test_counting_leaves_no_trace_and_is_the_same_every_time(net):
    net.eval()
    net.blocks[0].up.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in net.named_parameters()}
    torch.manual_seed(5)
    first = ct.training_costs(net, batch(), loss_fn)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == drawn
    assert not net.training and not net.blocks[0].up.weight.requires_grad
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert ct.training_costs(net, batch(), loss_fn) == first


@pytest.mark.parametrize("granularity", ["element", "row", "column"])
def test_shares_of_the_whole_and_of_nothing(net, granularity):
    costs = ct.training_costs(net, batch(), loss_fn)
    whole = Child.whole({name: p.shape for name, p in net.named_parameters()})
    assert costs.shares(whole) == pytest.approx(dict.fromkeys(Budget.KINDS, 1.0))
    head = costs.shares(Child({}, always=("head.*",)))
    small = costs.shares(random_child(net, 0.1, granularity=granularity, always=("head.*",)))
    large = costs.shares(random_child(net, 0.5, granularity=granularity, always=("head.*",)))
    for kind in Budget.KINDS:
        assert 0 < head[kind] < small[kind] < large[kind] < 1
    assert large["state"] == pytest.approx(0.5 * (1.5 if granularity == "element" else 1), rel=0.05)


@pytest.mark.skipif(not fast.enabled(), reason="is about layers of the fast room")
def test_what_columns_keep_is_what_autograd_keeps(net):
    """Frozen layers below keep nothing; trained ones keep what lies between them, and their columns of the inputs."""
    costs = ct.training_costs(net, batch(), loss_fn)
    parts = {"blocks.1.up.weight": 4, "blocks.1.down.weight": 8, "blocks.3.up.weight": 4}
    shapes = {name: dict(net.named_parameters())[name].shape for name in parts}
    column = ct.child.Granularity("column")
    child = Child({n: ct.child.Part(tuple(shapes[n]), torch.arange(k), column) for n, k in parts.items()})
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    optimizer = ct.ChildOptimizer(net.named_parameters(), child, torch.optim.AdamW, lr=1e-3, model=net)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_fn(net.train(), batch()).mean()
    real = sum(size for address, size in kept.items() if address not in weights)
    del loss
    optimizer.remove()
    resolved = child.resolve({n: p.shape for n, p in net.named_parameters()})
    before = costs.moments("memory", resolved)[1] - costs.working[1]
    states = 8 * child.num_trained
    predicted = before - states - 4 * sum(p.numel() for p in net.parameters())
    assert predicted == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(
    "budget", [Budget(step=0.6), Budget(memory=0.75), Budget(state=0.1), Budget(delta=0.05)]
)
@pytest.mark.parametrize("granularity", ["column", "row", "element"])
def test_the_child_fits_and_uses_the_budget(net, scores, budget, granularity, monkeypatch):
    costs = ct.training_costs(net, batch(), loss_fn)
    options = {"granularity": granularity, "row_axes": ct.unit_axes(net, granularity), "always": ("head.*",)}
    child = select_child(scores, budget=budget, costs=costs, **options)
    share = costs.shares(child)[budget.kind]
    assert 0.85 * budget.share < share <= budget.share * (1 + 1e-9)
    monkeypatch.setattr("childtuning.child.budget._SLICE", 37)  # however many units are looked at together
    assert child.fingerprint() == select_child(scores, budget=budget, costs=costs, **options).fingerprint()


def test_equal_costs_are_a_density(net, scores):
    """Of the optimizer's state every entry costs the same, so that the budget is a density."""
    costs = ct.training_costs(net, batch(), loss_fn)
    total = sum(p.numel() for p in net.parameters())
    count = round(0.2 * total)
    child = select_child(
        scores, budget=Budget(state=(count + 0.5) / total), costs=costs, granularity="column"
    )
    eligible = sum(score.numel() for score in scores.values())
    by_density = select_child(scores, density=count / eligible, granularity="column")
    assert child.overlap(by_density) > 0.99
    assert abs(child.num_trained - by_density.num_trained) < 100


def test_the_depth_is_the_one_of_most_score():
    """By hand: two blocks of one weight; training the lower one costs the backward pass through the upper."""
    shape = (2, 1)
    work = lambda n: Work(operations=n * 1e9)  # noqa: E731
    place = lambda depth: Place(depth, shape, 4, work(0.5))  # noqa: E731
    costs = Costs(
        forward=(work(0), work(1), work(1), work(0)),
        backward=(work(0), work(1), work(1), work(0)),
        kept=(0, 0, 0, 0),
        places={"a": place(1), "b": place(2)},
        rates=RATES,
    )
    full = 2 + 2 + 1
    assert costs.full("step") == pytest.approx(full, rel=1e-6)
    scores = {"a": torch.tensor([[3.0], [3.0]]), "b": torch.tensor([[2.0], [2.0]])}
    upper = select_child(scores, budget=Budget(step=3.6 / full), costs=costs, granularity="row")
    assert upper.names == ("b",) and upper.density == 0.5
    both = select_child(scores, budget=Budget(step=4.6 / full), costs=costs, granularity="row")
    assert both.names == ("a",) and both.density == 0.5  # 6 in a for half the price more than 4 in b: 4.5
    scores["b"] += 5
    upper = select_child(scores, budget=Budget(step=4.6 / full), costs=costs, granularity="row")
    assert upper.names == ("b",) and upper.density == 0.5


def test_scores_of_a_pass_know_the_costs(net):
    big, small = batch(8), batch(2)
    scores = ct.fisher_information(net, [small, big], loss_fn, always=("head.*",))
    child = select_child(scores, budget=Budget(step=0.6), granularity="column", always=("head.*",))
    costs = ct.training_costs(net, big, loss_fn)
    assert costs.shares(child)["step"] <= 0.6
    assert scores.costs() == costs
    with pytest.raises(ParameterError, match="costs=training_costs"):
        select_child(dict(scores), budget=Budget(step=0.6))
    del net
    gc.collect()


def test_the_model_is_not_kept_alive_by_its_scores():
    model = Net()
    scores = ct.fisher_information(model, [batch()], loss_fn)
    del model
    gc.collect()
    assert scores.costs() is None
    with pytest.raises(ParameterError, match="costs=training_costs"):
        select_child(scores, budget=Budget(step=0.6))


def test_what_is_refused(net, scores):
    costs = ct.training_costs(net, batch(), loss_fn)
    for asked in ({}, {"step": 0.5, "memory": 0.5}):
        with pytest.raises(ConfigError, match="limits one of step, memory, state, delta"):
            Budget(**asked)
    for value in (0, 1.2, -1, float("nan"), True, "0.5"):
        with pytest.raises(ConfigError, match="share in"):
            Budget(step=value)
    for text in ("step", "step=", "time=0.5", "step=half", ""):
        with pytest.raises(ConfigError, match="budget must be step=0.5"):
            Budget.parse(text)
    with pytest.raises(ConfigError, match="density must be a number"):
        select_child(scores)
    with pytest.raises(ConfigError, match="takes the place of a density"):
        select_child(scores, 0.1, budget=Budget(step=0.5), costs=costs)
    with pytest.raises(
        ConfigError, match=r"no child fits the budget step=0.05: with none at all it is 0\.\d+"
    ):
        select_child(scores, budget=Budget(step=0.05), costs=costs)
    with pytest.raises(ConfigError, match="all parameters"):
        select_child(scores, budget=Budget(step=0.6), costs=costs, scope="parameter")
    with pytest.raises(ParameterError, match="from 0 up"):
        select_child({n: -s for n, s in scores.items()}, budget=Budget(step=0.6), costs=costs)
    with pytest.raises(ParameterError, match="costs are not of a model"):
        select_child({"other": torch.ones(3)}, budget=Budget(step=0.6), costs=costs)
    with pytest.raises(ConfigError, match="takes the place of a density"):
        ct.ChildConfig(density=0.1, budget="step=0.5")
    assert ct.ChildConfig(budget=Budget(step=0.5)).budget == "step=0.5"


def test_rates_of_a_device_are_measured():
    before = torch.get_rng_state()
    rates = measured_rates(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert rates.operations > 1e9 and rates.num_bytes > 1e8 and rates.draws > 1e6


def test_whole_parameters_pay_when_they_are_taken(net, scores):
    costs = ct.training_costs(net, batch(), loss_fn)
    child = select_child(scores, budget=Budget(memory=0.6), costs=costs, granularity="parameter")
    assert all(part.is_whole or part.is_empty for part in child.parts.values())
    assert 0.3 < costs.shares(child)["memory"] <= 0.6


def test_a_parameter_at_the_bottom_that_is_not_used_is_passed_over(net):
    net.embedding.unused = nn.Parameter(torch.zeros(1))
    costs = ct.training_costs(net, batch(), loss_fn)
    assert costs.backward[1].operations > 0 and costs.kept[1] > 0


def test_fused_attention_is_counted():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48, bias=False)

        def forward(self, x):
            q, k, v = self.qkv(x).view(2, 10, 3, 4, 4).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v).sum((1, 2, 3))

    model = Attention()
    costs = ct.training_costs(model, torch.randn(2, 10, 16), lambda model, x: model(x))
    linear, products = 2 * 2 * 10 * 16 * 48, 2 * (2 * 2 * 4 * 10 * 10 * 4)
    assert sum(work.operations for work in costs.forward) == linear + products


def test_inputs_by_name_and_reused_layers(net):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(input=self.layer(input=x)).sum(1)

    costs = ct.training_costs(Twice(), torch.randn(4, 8), lambda model, x: model(x))
    assert costs.places["layer.weight"].input_bytes == 2 * 4 * 8 * 4


def test_columns_of_a_conv1d_are_its_input_units():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    tokens = torch.randint(0, 50, (4, 16))
    costs = ct.training_costs(model, {"input_ids": tokens, "labels": tokens})
    name = "transformer.h.1.mlp.c_fc.weight"
    place, axes = costs.places[name], ct.unit_axes(model, "column")
    assert (place.input_axis, place.input_bytes) == (axes[name], 4 * 16 * 16 * 4) and place.input_axis == 0
    kept = {}
    for granularity in ("row", "column"):
        units = ct.child.Granularity("row", axis=0 if granularity == "column" else 1)
        part = ct.child.Part(place.shape, torch.arange(4), units)
        kept[granularity] = costs.moments("memory", {name: part})[1] - 8 * part.num_trained
    assert kept["row"] - kept["column"] == pytest.approx(
        place.shared * place.input_bytes - place.input_bytes / 4
    )


def test_short_weights_have_master_values(net):
    costs = ct.training_costs(net.bfloat16(), batch(), loss_fn)
    place = costs.places["blocks.0.up.weight"]
    assert (place.itemsize, place.state) == (2, 12)


def test_a_parameter_that_is_not_taken_costs_nothing(net, scores):
    """Single entries pay for the dense gradient of their own parameter, not for those of others."""
    costs = ct.training_costs(net, batch(), loss_fn)
    alone = costs.moments("step", {"blocks.3.down.weight": ct.child.Part((16, 32), torch.arange(9))})[0]
    sparse = {name: torch.zeros_like(score) for name, score in scores.items()}
    sparse["blocks.3.down.weight"][0, :9] = 1.0
    child = select_child(sparse, budget=Budget(step=1.001 * alone / costs.full("step")), costs=costs)
    assert (child.mask("blocks.3.down.weight")[0, :9]).all()


def test_a_unit_that_is_too_large_is_passed_over():
    places = {"big": Place(1, (1000,), 4, Work()), "small": Place(1, (10,), 4, Work())}
    costs = Costs((Work(),) * 3, (Work(),) * 3, (0,) * 3, places, RATES)
    scores = {"big": torch.full((1000,), 3.0), "small": torch.full((10,), 1.0)}
    child = select_child(scores, budget=Budget(state=0.5), costs=costs, granularity="parameter")
    assert child.names == ("small",)


@pytest.mark.parametrize("granularity", ["element", "row", "column", "block", "parameter"])
@pytest.mark.parametrize("kind", Budget.KINDS)
def test_the_whole_budget_is_the_whole_network(net, scores, kind, granularity):
    costs = ct.training_costs(net, batch(), loss_fn)
    options = {"granularity": granularity, "row_axes": ct.unit_axes(net, granularity), "always": ("head.*",)}
    child = select_child(scores, budget=Budget(**{kind: 1.0}), costs=costs, **options)
    assert child.density == 1.0


def test_dropouts_cost_the_weights_nothing():
    plain, dropped = (
        nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(p)) for _ in range(4)))
        for p in (0.0, 0.1)
    )
    found = [ct.training_costs(m, torch.randn(64, 32), lambda m, x: m(x).sum(1)) for m in (plain, dropped)]
    for name, place in found[0].places.items():
        assert place.gradient == found[1].places[name].gradient
        assert place.gradient.num_bytes >= 0 and (place.gradient.operations > 0) == name.endswith("weight")


def test_a_tied_heads_gradient_is_the_embeddings():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    tokens = torch.randint(0, 500, (4, 16))
    places = ct.training_costs(model, {"input_ids": tokens, "labels": tokens}).places
    assert places["transformer.wte.weight"].gradient.operations == 2 * 4 * 16 * 16 * 500
    assert places["transformer.ln_f.weight"].gradient.operations == 0


def test_fake_tensors_cost_what_real_ones_do(net):
    real = ct.training_costs(net, batch(), loss_fn)
    with FakeTensorMode():
        assert (
            ct.training_costs(
                Net(),
                {"tokens": torch.zeros(8, 12, dtype=torch.long), "labels": torch.zeros(8, dtype=torch.long)},
                loss_fn,
            )
            == real
        )


def test_wrong_arguments_are_one_line(net, scores):
    costs = ct.training_costs(net, batch(), loss_fn)
    assert select_child(scores, budget="state=0.1", costs=costs).num_trained
    with pytest.raises(ConfigError, match="budget must be a Budget"):
        select_child(scores, budget=0.5, costs=costs)
    with pytest.raises(ParameterError, match="costs=training_costs"):
        select_child(scores, budget=Budget(step=0.5), costs={})
    with pytest.raises(DataError, match="no floating-point parameters"):
        ct.training_costs(nn.ReLU(), batch(), loss_fn)


def test_a_gradient_that_no_layer_forms_alone_costs_as_a_whole_one():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 8, sparse=True)
            self.plain, self.grouped = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1, groups=2)
            self.ring = nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular")
            self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, tokens):
            x = self.ring(self.grouped(self.plain(self.table(tokens).transpose(1, 2)))).transpose(1, 2)
            return self.head(self.lstm(x)[0].mean(1))

    net = Net()
    tokens, labels = torch.randint(20, (4, 6)), torch.randint(2, (4,))
    costs = ct.training_costs(
        net, (tokens, labels), lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none")
    )
    formed = {name: place.formed for name, place in costs.places.items() if len(place.shape) > 1}
    assert formed.pop("plain.weight") == ("row", "column")
    assert formed.pop("head.weight") == ("row", "column", "block")
    assert set(formed.values()) == {()}
    for name in formed:
        as_columns = costs.of_entries(
            "step", name, random_child(net, 0.5, granularity="column").parts[name].granularity
        )
        as_entries = costs.of_entries("step", name, random_child(net, 0.5).parts[name].granularity)
        assert as_columns == as_entries
    # The layers that do and do not are those that an optimizer with model= installs.
    if fast.enabled():
        child = random_child(net, 0.5, granularity="column")
        optimizer = ct.ChildOptimizer(net.named_parameters(), child, torch.optim.SGD, lr=0.1, model=net)
        assert {type(m).__name__ for m in net.modules() if "Structured" in type(m).__name__} == {
            "StructuredConv1d", "StructuredLinear"
        }  # fmt: skip
        assert ct.training_costs(
            net, (tokens, labels), lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none")
        ).shares(child) == costs.shares(child)
        optimizer.remove()


def test_a_budget_keeps_its_digits():
    for share in (0.9999999, 0.123456789, 0.1, 1.0):
        assert Budget.parse(str(Budget(step=share))).share == share
