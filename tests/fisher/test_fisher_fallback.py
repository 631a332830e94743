"""Where the layer-wise pass cannot be right, the batch-of-one loop takes over: exact, and announced once."""

from __future__ import annotations

import warnings

import pytest
import torch
from tests.reference.fisher_loop import hugging_face_loss, per_example
from torch import nn
from torch.nn import functional as F

from childtuning.fisher import fisher_information, register_rule
from childtuning.fisher.estimators import PerExample
from childtuning.fisher.rules import _BY_CLASS


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def announced(model, batches, loss_fn=cross_entropy, **keywords):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = fisher_information(model, batches, loss_fn, **keywords)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    return scores, str(caught[0].message)


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 2, width))

    def forward(self, x):
        return x * self.factor


class Attention(nn.Module):
    """A bare parameter, a layer without a rule, and torch's attention, which uses out_proj.weight as a function."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(4))
        self.inside = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.scale = Scale(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.cat([self.first.expand(len(x), 1, 4), self.inside(x)], 1)
        return self.head(self.scale(self.attention(x, x, x, need_weights=False)[0])[:, 0])


def batches_of(*sizes, shape=(3, 4), seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, *shape, generator=draw, dtype=torch.float64), torch.randint(3, (n,), generator=draw))
        for n in sizes
    ]


def test_an_unknown_layer_and_a_functional_use(agree, monkeypatch):
    torch.manual_seed(0)
    model = Attention().double()
    batches = batches_of(3, 2)
    wanted = per_example(model, batches, cross_entropy)
    looped = set()
    original = PerExample._loop

    def record(self, batch, size, names, into, **keywords):
        if not keywords.get("indices"):
            looped.update(names)
        return original(self, batch, size, names, into, **keywords)

    monkeypatch.setattr(PerExample, "_loop", record)
    found, message = announced(model, batches)
    agree(found, wanted)
    assert looped == {"first", "scale.factor"} | {name for name in wanted if name.startswith("attention.")}
    for part in ("the model (Attention)", "attention (MultiheadAttention)", "scale (Scale)", "register_rule"):
        assert part in message
    assert "head (" not in message


def test_a_rule_of_the_users_is_used(agree):
    model = nn.Sequential(nn.Linear(4, 4), Scale(4), nn.Flatten(), nn.Linear(12, 3)).double()
    batches = batches_of(3)
    calls = []

    def scale_rule(module, x, dY):
        calls.append(len(x))
        return {"factor": (dY * x).sum(1)}

    register_rule(Scale, scale_rule)
    try:
        agree(fisher_information(model, batches, cross_entropy), per_example(model, batches, cross_entropy))
        assert calls == [2, 3]
        for wrong in (lambda m, x, dY: {"factor": dY.sum(1)}, lambda m, x, dY: {}, lambda m, x, dY: 1 / 0):
            register_rule(Scale, wrong)
            found, message = announced(model, batches)
            agree(found, per_example(model, batches, cross_entropy))
            assert "1 (Scale)" in message
    finally:
        del _BY_CLASS[Scale]


class Misfit(nn.Module):
    """A parameter [1, …] that is not one for each example, and one that is."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(1, 3, 3))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head((self.mix.view(3, 3) @ x).mean(1))


def test_a_parameter_that_cannot_be_lent(agree):
    model = Misfit().double()
    batches = batches_of(4, 3)
    found, message = announced(model, batches)
    agree(found, per_example(model, batches, cross_entropy))
    assert "1 of 3 parameters" in message
    assert isinstance(model.mix, nn.Parameter)


def regulariser(model, batch):
    return cross_entropy(model, batch) + 0.1 * model[1].weight.square().sum()


def contrast(model, batch):
    z = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(torch.cat([z @ z.T, torch.ones(len(z), 1)], 1), torch.arange(len(z)))


@pytest.mark.parametrize(("loss_fn", "num"), [(regulariser, 1), (contrast, 2)])
def test_losses_that_are_no_sum_over_layers_or_examples(loss_fn, num, agree):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    batches = batches_of(4, 3)
    found, message = announced(model, batches, loss_fn)
    agree(found, per_example(model, batches, loss_fn))
    assert f"{num} of 2 parameters" in message


def test_a_loss_that_is_a_sum_needs_no_loop(agree):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    batches = batches_of(4, 3)

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    agree(fisher_information(model, batches, loss_fn), per_example(model, batches, loss_fn))


def test_weights_that_show_only_in_a_later_batch(make_case, agree):
    """Alike examples do not tell a mean over examples from one over labels; the first unlike ones do."""
    case = make_case("bert-tokens")
    batch = case.batch(6)
    alike = {key: value[:1].expand(2, -1).clone() for key, value in batch.items()}
    batches = [alike, batch]

    def loss_fn(model, batch):
        return model(**batch).loss

    agree(fisher_information(case.model, batches, loss_fn), per_example(case.model, batches))


class Switch(nn.Module):
    """Experts that see some examples only, in an order of their own."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))
        self.mixed = nn.Linear(3, 3)

    def forward(self, x):
        chosen = (x[:, 0] > 0).long()
        y = x.new_zeros(len(x), 3)
        for index, expert in enumerate(self.experts):
            y[chosen == index] = expert(x[chosen == index])
        return self.mixed(y)


def test_modules_that_take_part_only_later(agree):
    model = Switch().double()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).double()
    x[:, 0] = torch.tensor([1.0, 1, 1, -1, 1, -1])
    batches = [(x[:2], torch.tensor([0, 1])), (x[2:], torch.tensor([0, 1, 2, 0]))]
    with pytest.warns(UserWarning, match=r"experts\.\d \(Linear\)"):
        found = fisher_information(model, batches, cross_entropy)
    agree(found, per_example(model, batches, cross_entropy))


class Late(nn.Module):
    """A layer that some batches only use, and then with the examples twice, one whole batch after the other."""

    def __init__(self):
        super().__init__()
        self.head, self.late = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        y = self.head(x)
        if bool((x[:, 0] < 0).any()):
            first, second = torch.tanh(self.late(torch.cat([x, -x]))).chunk(2)
            y = y + first + second.square()
        return y


def test_a_layer_that_is_met_late_is_compared_before_it_is_trusted(agree):
    model = Late().double()
    x, labels = batches_of(8, shape=(4,))[0]
    x[:, 0] = torch.tensor([1.0, 1, 1, -1, -1, -1, -1, -1])
    batches = [(x[:3], labels[:3]), (x[3:5], labels[3:5]), (x[5:], labels[5:])]
    found, message = announced(model, batches)
    assert "late (Linear)" in message
    agree(found, per_example(model, batches, cross_entropy))


def test_class_weights_are_seen_through(agree):
    """The mean over a batch then weighs examples by their class; the first two of one class would not tell."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    x, _ = batches_of(4)[0]
    batches = [(x, torch.tensor([0, 0, 2, 1]))]

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], weight=torch.tensor([1.0, 2.0, 5.0]).double())

    found, message = announced(model, batches, loss_fn)
    assert "no weighted mean" in message
    agree(found, per_example(model, batches, loss_fn))


class Overwrites(nn.Module):
    """A layer's input is changed in place after the layer has used it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x.clone()
        y = self.layer(x)
        x.mul_(2)
        return self.head(torch.tanh(y))


def test_an_input_changed_in_place(agree):
    """Autograd itself refuses the weight's gradient here; the bias's is right, and the loop takes it."""
    model = Overwrites().double()
    (batch,) = batches_of(3, shape=(4,))
    model.layer.weight.requires_grad_(False)
    found, message = announced(model, [batch], eligible=["layer.bias", "head.*"])
    assert "layer (Linear): the input of its module was changed in place" in message
    wanted = per_example(model, [batch], cross_entropy)
    agree(found, {name: wanted[name] for name in found})


def test_a_model_that_takes_no_batch(make_case, agree):
    case = make_case("gpt2")
    case.model.config.pad_token_id = None
    batch = {key: value[:, :4] for key, value in case.batch(3).items() if key != "labels"}
    batch = {**batch, "attention_mask": torch.ones(3, 4, dtype=torch.long), "labels": torch.tensor([0, 1, 2])}
    found, message = announced(case.model, [batch], None)
    agree(found, per_example(case.model, [batch], hugging_face_loss))
    assert "a batch of two raised" in message


def test_training_mode_takes_the_loop_silently():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 3)).double()
    batches = batches_of(4)
    first = fisher_information(model, batches, cross_entropy, training=True, seed=1)
    again = fisher_information(model, batches, cross_entropy, training=True, seed=1)
    other = fisher_information(model, batches, cross_entropy, training=True, seed=2)
    assert torch.equal(first["2.weight"], again["2.weight"])
    assert not torch.equal(first["2.weight"], other["2.weight"])
