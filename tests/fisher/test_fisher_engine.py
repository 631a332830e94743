"""One backward pass a batch gives what one backward pass an example gives, without a warning."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.products import BackwardProducts
from tests.reference.fisher_loop import hugging_face_loss, per_example
from torch import nn
from torch.nn import functional as F

from childtuning import fast
from childtuning.fast import products
from childtuning.fisher import fisher_information


def test_equals_the_loop(case, agree, fast):
    batch = case.batch(5)
    wanted = per_example(case.model, [batch], case.loss_fn or hugging_face_loss)
    found = fisher_information(case.model, [batch], **case.keywords)
    agree(found, wanted, case.rtol)
    assert set(found.paths.values()) == {"engine" if fast else "loop"}


@pytest.mark.parametrize("name", ["bert", "bert-tokens", "gpt2-tied-lm", "llama", "convnet"])
@pytest.mark.parametrize("cut", [1, 2, 3, 6])
def test_batching_never_changes_the_scores(name, cut, make_case, agree):
    case = make_case(name)
    whole = case.batch(7)
    keys = list(whole) if isinstance(whole, dict) else range(len(whole))
    parts = [{key: whole[key][i : i + cut] for key in keys} for i in range(0, 7, cut)]
    if not isinstance(whole, dict):
        parts = [tuple(part.values()) for part in parts]
    agree(
        fisher_information(case.model, parts, **case.keywords),
        fisher_information(case.model, [whole], **case.keywords),
        case.rtol,
    )


@settings(max_examples=15, deadline=None)
@given(
    size=st.integers(2, 5),
    tokens=st.integers(1, 4),
    width=st.integers(2, 4),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_linear_and_norm_for_any_shape(size, tokens, width, bias, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(3, width, bias=bias), nn.LayerNorm(width, bias=bias), nn.RMSNorm(width)
    ).double()
    batch = (torch.randn(size, tokens, 3).double(), torch.randn(size, tokens, width).double())

    def loss_fn(model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    found = fisher_information(model, [batch], loss_fn, "mean")
    for name, score in per_example(model, [batch], loss_fn).items():
        torch.testing.assert_close(found[name], score, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(4), (4,)),
        (nn.BatchNorm1d(4), (4, 3)),
        (nn.BatchNorm3d(4), (4, 2, 1, 3)),
        (nn.GroupNorm(2, 4), (4, 3)),
        (nn.LayerNorm((4, 3)), (2, 4, 3)),
        (nn.RMSNorm((4, 3), eps=1e-3), (4, 3)),
        (nn.Conv1d(4, 6, 2, dilation=2, groups=2), (4, 5)),
        (nn.Conv3d(4, 2, 2, padding=1, padding_mode="reflect"), (4, 2, 3, 2)),
        (nn.Linear(3, 2), (4, 2, 3)),
        (nn.Linear(3, 2), (3,)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_layers(layer, shape, agree):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), layer).double()
    batch = (torch.randn(3, *shape).double(),)
    target = torch.randn_like(model.eval()(batch[0])[:1])

    def loss_fn(model, batch):
        return (model(batch[0]).sin() * target).flatten(1).sum(1).square().mean()

    agree(fisher_information(model, [batch], loss_fn, "mean"), per_example(model, [batch], loss_fn))


def test_embedding_sums_repeated_tokens_and_leaves_out_padding(agree):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 2, padding_idx=0), nn.Flatten(), nn.Linear(8, 3)).double()
    batch = (torch.tensor([[1, 1, 1, 0], [2, 1, 2, 0], [4, 4, 0, 0]]), torch.tensor([0, 1, 2]))

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    found = fisher_information(model, [batch], loss_fn, "mean")
    agree(found, per_example(model, [batch], loss_fn))
    assert not found["0.weight"][[0, 3]].any()


class TiedTwice(nn.Module):
    """One layer called twice, and one weight in two layers, of which one call does not reach the loss."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.again = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids)
        self.again(x)
        return self.out(torch.tanh(self.again(torch.tanh(self.again(x))))).mean(1)


def test_uses_of_one_parameter_are_summed_before_squaring(agree):
    torch.manual_seed(0)
    model = TiedTwice().double()
    batch = (torch.randint(7, (4, 3)), torch.randint(7, (4,)))

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    agree(fisher_information(model, [batch], loss_fn, "mean"), per_example(model, [batch], loss_fn))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_low_precision_accumulates_in_float32(dtype, rtol, make_case, agree):
    case = make_case("gpt2")
    batch = case.batch(4)
    wanted = per_example(case.model, [batch])
    found = fisher_information(case.model.to(dtype), [batch])
    assert {score.dtype for score in found.values()} == {torch.float32}
    for name, score in wanted.items():
        if score.max() > 1e-3 * max(s.max() for s in wanted.values()):
            assert (found[name] - score).abs().max() <= rtol * score.max(), name


@pytest.mark.parametrize(
    "eligible", [["bert.encoder.layer.1.*"], ["*.bias"], ["*LayerNorm*"], ["classifier.weight"]]
)
def test_a_part_of_the_model(eligible, make_case):
    case = make_case("bert")
    batch = case.batch(4)
    wanted = per_example(case.model, [batch])
    found = fisher_information(case.model, [batch], eligible=eligible)
    assert 0 < len(found) < len(wanted)
    for name, score in found.items():
        torch.testing.assert_close(score, wanted[name], rtol=1e-8, atol=1e-18)


@pytest.mark.parametrize("size", [1, 4])
def test_where_a_cpu_has_no_product_of_bf16_the_pass_takes_float32(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)

    class ByName(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(input=x, weight=self.weight, bias=self.bias)

    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Tanh(), ByName(8, 1))
    wide = copy.deepcopy(model)
    batches = [(torch.randn(size, 3, 6).bfloat16(), torch.randn(size).bfloat16()) for _ in range(3)]

    def loss_fn(model, batch):
        return (model(batch[0]).sum((1, 2)) - batch[1]).square()

    monkeypatch.setattr(products, "_SLOW", frozenset({torch.bfloat16}))
    with BackwardProducts() as seen:
        found = fisher_information(model.bfloat16(), batches, loss_fn)
    if fast.enabled():
        assert seen.dtypes == {torch.float32}
    exact = fisher_information(wide, [(x.float(), y.float()) for x, y in batches], loss_fn)
    for name, scores in exact.items():
        torch.testing.assert_close(found[name], scores, rtol=0.1, atol=0.05 * float(scores.max()))
