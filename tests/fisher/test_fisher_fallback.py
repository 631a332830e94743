"""What the engine does not serve: exact all the same, by a vectorised pass or the loop, and announced once."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from tests.reference.fisher_loop import hugging_face_loss, per_example
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from childtuning.errors import DataError
from childtuning.fisher import fisher_information


@pytest.fixture(scope="module", autouse=True)
def _open() -> Iterator[None]:
    """Open the fast room, whatever the environment says: these tests are about what it serves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CHILDTUNING_FAST", raising=False)
        yield


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def rows(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def announced(model, batches, loss_fn, **keywords):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = fisher_information(model, batches, loss_fn, **keywords)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    return scores, str(caught[0].message)


def batches_of(*sizes, shape=(3, 4), seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, *shape, generator=draw, dtype=torch.float64), torch.randint(3, (n,), generator=draw))
        for n in sizes
    ]


class Attention(nn.Module):
    """A bare parameter, a scale, and torch's attention, which uses its weights as arguments of one function."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(4))
        self.inside = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.scale = nn.Parameter(torch.linspace(0.5, 2, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.cat([self.first.expand(len(x), 1, 4), self.inside(x)], 1)
        return self.head((self.attention(x, x, x, need_weights=False)[0] * self.scale)[:, 0])


class Mixes(nn.Module):
    """A parameter [1, …] that multiplies from the left."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(1, 3, 3))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head((self.mix.view(3, 3) @ x).mean(1))


class Written(nn.Module):
    """A parameter that is written to rows, and one that one function of three arguments takes."""

    def __init__(self):
        super().__init__()
        self.row, self.pair = nn.Parameter(torch.randn(4)), nn.Bilinear(4, 4, 3)

    def forward(self, x):
        y = x.clone()
        y[:, 0] = self.row
        return self.pair(torch.tanh(y.mean(1)), y[:, 1])


class Rereads(nn.Module):
    """Reentrant checkpoints hide their parameters; one of them is also used outside."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        y = checkpoint(self.b, torch.tanh(self.a(x)), use_reentrant=self.reentrant)
        return self.head(torch.tanh(self.b(y)).mean(1))


class Overwrites(nn.Module):
    """A layer's input is changed in place after the layer has used it, and so is a view of its output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x.clone()
        y = self.layer(x)
        y /= 2
        y[:, 0] *= 3
        x.mul_(2)
        return self.head(torch.tanh(y).mean(1))


class Switch(nn.Module):
    """Experts that see some examples only, in an order of their own."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))
        self.mixed = nn.Linear(3, 3)

    def forward(self, x):
        x = x.mean(1)
        chosen = (x[:, 0] > 0).long()
        y = x.new_zeros(len(x), 3)
        for index, expert in enumerate(self.experts):
            y[chosen == index] = expert(x[chosen == index])
        return self.mixed(y)


class Late(nn.Module):
    """A layer that some batches only use, and then with the examples twice, one whole batch after the other."""

    def __init__(self):
        super().__init__()
        self.head, self.late = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = x.mean(1)
        y = self.head(x)
        if bool((x[:, 0] < 0).any()):
            first, second = torch.tanh(self.late(torch.cat([x, -x]))).chunk(2)
            y = y + (x[:, :1] < 0) * (first + second.square())
        return y


# By name: the model, and how many parameters do not go through the engine; None: it depends on the examples.
CALLS = {
    "attention": (Attention, {}),
    "mixes": (Mixes, {}),
    "written": (Written, {"vectorised": 3}),
    "reentrant": (lambda: Rereads(True), {"loop": 2}),
    "recomputed": (lambda: Rereads(False), {"loop": 2}),
    "overwrites": (Overwrites, {"vectorised": 1}),
    "switch": (Switch, {"loop": 4}),
    "late": (Late, None),
}


@pytest.mark.parametrize("name", CALLS)
def test_parameters_go_the_fastest_way_that_is_right(name, agree, fast):
    torch.manual_seed(0)
    build, paths = CALLS[name]
    model = build().double()
    batches = batches_of(4, 1, 3)
    if name == "overwrites":  # autograd itself refuses the weight's gradient
        model.layer.weight.requires_grad_(False)
    keywords = {"eligible": ["layer.bias", "head.*"]} if name == "overwrites" else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Fisher information of", UserWarning)
        found = fisher_information(model, batches, rows, **keywords)
    wanted = per_example(model, batches, lambda model, batch: rows(model, batch).sum())
    agree(found, {name: wanted[name] for name in found})
    if fast and paths is not None:
        assert {path: n for path, n in Counter(found.paths.values()).items() if path != "engine"} == paths


class Faint(nn.Module):
    """A layer whose outputs are nearly constant takes rows in an order that none of them shows."""

    def __init__(self):
        super().__init__()
        self.inside, self.faint, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        nn.init.normal_(self.faint.weight, std=1e-6)

    def forward(self, x):
        y = torch.tanh(self.inside(x.flatten(0, 1))).view_as(x)
        z = self.faint(y.transpose(0, 1).flatten(0, 1)).view(*x.shape[1::-1], 4)
        return self.head((y + z.transpose(0, 1)).mean(1))


@pytest.mark.parametrize(("loss_fn", "reduction"), [(rows, None), (cross_entropy, "mean")])
def test_rows_are_not_taken_for_another_examples(loss_fn, reduction, agree):
    torch.manual_seed(0)
    model, batches = Faint().double(), batches_of(4, 3, shape=(5, 4))
    found = fisher_information(model, batches, loss_fn, reduction)
    agree(found, per_example(model, batches, cross_entropy))


class Square(nn.Module):
    """A checkpoint computes again a product of two tensors of one shape."""

    def __init__(self):
        super().__init__()
        self.inside, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(checkpoint(lambda x: torch.tanh(self.inside(x.sin())), x, use_reentrant=False))


@pytest.mark.filterwarnings("ignore:Fisher information of:UserWarning")
def test_a_checkpoint_of_as_many_examples_as_inputs(agree):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Square()).double()
    batches = batches_of(4, shape=(4,))
    agree(fisher_information(model, batches, rows), per_example(model, batches, cross_entropy))


def pull(model, batch):
    """Bring outputs of one class together: examples without another of their class stand alone."""
    x, labels = batch
    outputs = model(x)
    others = labels[:, None].eq(labels).fill_diagonal_(False)
    distances = (outputs[:, None] - outputs).square().sum(2)
    return F.cross_entropy(outputs, labels, reduction="none") + 0.01 * (distances * others).sum(1)


def centred(model, batch):
    """Add what is zero in sum, and less than bf16 tells apart."""
    outputs = model(batch[0])
    return F.cross_entropy(outputs, batch[1], reduction="none") + 1e-3 * (outputs - outputs.mean(0)).sum(1)


@pytest.mark.filterwarnings("ignore:Fisher information of:UserWarning")
@pytest.mark.parametrize("loss_fn", [pull, centred])
def test_losses_that_mix_some_examples_or_a_little_are_refused(loss_fn):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).bfloat16()
    batches = [(x.bfloat16(), torch.tensor([0, 1, 1, 2])) for x, _ in batches_of(*[4] * 8, shape=(4,))]
    with pytest.raises(DataError, match="the loss mixes examples"):
        fisher_information(model, batches, loss_fn)


def test_the_loop_is_announced_with_its_modules(agree):
    model = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4, batch_first=True)).double()

    def loss_fn(model, batch):
        return model(batch[0])[0].square().sum((1, 2))

    found, message = announced(model, batches_of(4, 3), loss_fn)
    agree(found, per_example(model, batches_of(4, 3), lambda model, batch: loss_fn(model, batch).sum()))
    assert message.startswith("Fisher information of 4 of 6 parameters is taken one example at a time, which")
    assert "1 (GRU): gru has no rule" in message and "0 (Linear)" not in message


def regulariser(model, batch):
    return cross_entropy(model, batch) + 0.1 * model[1].weight.square().sum()


def class_weights(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], weight=torch.tensor([1.0, 1.0, 5.0]).double())


def example_weights(model, batch):
    weights = 1 + batch[1]
    return (weights * rows(model, batch)).sum() / weights.sum()


@pytest.mark.parametrize("loss_fn", [cross_entropy, regulariser, class_weights, example_weights])
@pytest.mark.parametrize("labels", [[[0, 0, 0, 0], [0, 1, 2, 1]], [[0, 1, 0, 1], [2, 1, 2, 2]]])
def test_how_a_scalar_weighs_examples_is_never_guessed(loss_fn, labels, agree):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    batches = [(torch.randn(4, 3, 4).double(), torch.tensor(row)) for row in labels]
    found, message = announced(model, batches, loss_fn)
    agree(found, per_example(model, batches, loss_fn))
    assert "2 of 2 parameters" in message and "reduction='mean' or 'sum'" in message


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_stated_reduction_needs_no_loop(reduction, agree, fast):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    batches = batches_of(4, 3)

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction=reduction)

    agree(fisher_information(model, batches, loss_fn, reduction), per_example(model, batches, loss_fn))


def test_a_regulariser_in_each_loss_needs_no_loop(agree, fast):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    batches = batches_of(4, 3)

    def loss_fn(model, batch):
        return rows(model, batch) + 0.1 * model[1].weight.square().sum()

    found = fisher_information(model, batches, loss_fn)
    agree(found, per_example(model, batches, lambda model, batch: loss_fn(model, batch).sum()))
    assert set(found.paths.values()) == {"engine" if fast else "loop"}


def test_a_model_that_takes_no_batch(make_case, agree):
    case = make_case("gpt2")
    case.model.config.pad_token_id = None
    batch = {key: value[:, :4] for key, value in case.batch(3).items() if key != "labels"}
    batch = {**batch, "attention_mask": torch.ones(3, 4, dtype=torch.long), "labels": torch.tensor([0, 1, 2])}
    found, message = announced(case.model, [batch], None)
    agree(found, per_example(case.model, [batch], hugging_face_loss))
    assert "A batch of 3 raised ValueError" in message


def test_training_mode_takes_the_loop_silently():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 3)).double()
    batches = batches_of(4)
    first = fisher_information(model, batches, cross_entropy, training=True, seed=1)
    again = fisher_information(model, batches, cross_entropy, training=True, seed=1)
    other = fisher_information(model, batches, cross_entropy, training=True, seed=2)
    assert torch.equal(first["2.weight"], again["2.weight"])
    assert not torch.equal(first["2.weight"], other["2.weight"])


class Shared(nn.Module):
    """One module without a rule, at two paths."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first = {"prelu": nn.PReLU(6), "lstm": nn.LSTM(6, 6, batch_first=True)}[kind]
        self.again = nn.ModuleList([self.first])
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.first, nn.LSTM):
            return self.head(self.again[0](x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1])
        return self.head(self.again[0](self.first(x) - 1))


@pytest.mark.parametrize("kind", ["prelu", "lstm"])
def test_a_module_at_two_paths_keeps_its_parameters(kind, agree):
    torch.manual_seed(0)
    model = Shared(kind)
    before = dict(model.named_parameters())
    batches = [(torch.randn(5, 6), torch.randint(3, (5,))) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an LSTM goes through the loop
        found = fisher_information(model, batches, rows)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    copy.deepcopy(model)  # nothing of the pass is held
    rows(model, batches[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in before.values())
    agree(found, per_example(model, batches, lambda model, batch: rows(model, batch).sum()), 1e-4)


class HeldInATuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prelu, self.head = nn.PReLU(6), nn.Linear(6, 3)
        self.held = (self.prelu.weight,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.prelu(x, self.held[0]))


@pytest.mark.parametrize("where", ["tuple", "loss"])
def test_a_weight_held_elsewhere_is_not_missed(where, agree):
    torch.manual_seed(0)
    model = HeldInATuple() if where == "tuple" else nn.Sequential(nn.PReLU(6), nn.Linear(6, 3))
    weight = next(model.parameters())

    def pulled(model, batch):
        return rows(model, batch) + weight.square().sum()

    batches = [(torch.randn(5, 6), torch.randint(3, (5,)))]
    loss_fn = rows if where == "tuple" else pulled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this weight goes through the loop
        found = fisher_information(model, batches, loss_fn)
    agree(found, per_example(model, batches, lambda model, batch: loss_fn(model, batch).sum()), 1e-4)
