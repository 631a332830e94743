"""What the scores mean, that the pass leaves no trace, and what it refuses."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tests.reference.fisher_loop import per_batch, per_example
from torch import nn
from torch.nn import functional as F

from childtuning.errors import ConfigError, DataError, ParameterError
from childtuning.fisher import fisher_information

pytestmark = pytest.mark.usefixtures("fast")


class Regression(nn.Module):
    """A linear model in Hugging Face's manner: labels in, loss and logits out."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 1, bias=False)

    def forward(self, x, labels=None):
        from types import SimpleNamespace

        logits = self.linear(x)
        loss = None if labels is None else F.mse_loss(logits.squeeze(-1), labels)
        return SimpleNamespace(loss=loss, logits=logits)


def linear_gaussian(n, width=3):
    torch.manual_seed(0)
    x = torch.randn(n, width, dtype=torch.float64)
    return Regression(width).double(), {"x": x, "labels": torch.randn(n, dtype=torch.float64)}


def test_closed_form_of_the_empirical_fisher():
    model, batch = linear_gaussian(20)
    residual = model.linear(batch["x"]).squeeze(-1) - batch["labels"]
    wanted = (2 * residual.unsqueeze(1) * batch["x"]).square().mean(0, keepdim=True)
    found = fisher_information(model, [batch])["linear.weight"]
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=0)


def test_sampled_labels_give_the_true_fisher():
    """Squared error is −log N(f(x), 1/2), whose Fisher information is 2 x²."""
    model, batch = linear_gaussian(8)
    many = {key: value.repeat_interleave(4000, 0) for key, value in batch.items()}
    found = fisher_information(model, [many], labels="sampled", seed=3)["linear.weight"]
    wanted = 2 * batch["x"].square().mean(0, keepdim=True)
    torch.testing.assert_close(found, wanted, rtol=0.03, atol=0)


def test_per_batch_is_the_official_estimate(make_case, agree):
    case = make_case("bert")
    for module in case.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for layer in case.model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    batches = [case.batch(n) for n in (4, 3)]
    with torch.no_grad():
        case.model.classifier.weight.mul_(20)  # so that some gradients are clipped and some are not
    found = fisher_information(case.model, batches, estimator="per-batch", training=True)
    agree(found, per_batch(case.model, batches), rtol=1e-4)


class Raises(Exception):
    pass


@pytest.mark.parametrize(
    "keywords", [{}, {"training": True}, {"estimator": "per-batch", "training": True}, {"fail": 1}]
)
def test_leaves_no_trace(keywords, make_case):
    case = make_case("convnet")
    model, batch = case.model, case.batch(3)
    model.train()
    model.norm2.eval()
    if keywords == {"training": True}:  # batch statistics would mix examples
        model.norm, model.norm2, model.norm3 = nn.GroupNorm(2, 4), nn.GroupNorm(2, 8), nn.Identity()
        model.double()
    model.stem.weight.requires_grad_(False)
    case.loss_fn(model, batch).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    values = {name: None if g is None else g.clone() for name, g in grads.items()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    calls = []

    def loss_fn(model, batch):
        calls.append((torch.rand(1), random.random(), np.random.rand()))
        if len(calls) > 3 and keywords.get("fail"):
            raise Raises
        return case.loss_fn(model, batch)

    options = {key: value for key, value in keywords.items() if key != "fail"}
    if keywords.get("fail"):
        with pytest.raises(Raises):
            fisher_information(model, [batch], loss_fn, "mean", **options)
    else:
        scores = fisher_information(model, [batch], loss_fn, "mean", **options)
        assert "stem.weight" not in scores
        assert all(not score.requires_grad for score in scores.values())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name != "stem.weight")
        assert parameter.grad is grads[name]
        assert parameter.grad is None or torch.equal(parameter.grad, values[name])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert np.random.get_state()[1].tolist() == streams[2]


def test_an_example_is_scored_as_it_was_given(make_case, agree):
    """Padding stays, and so do labels at the padding: the loss of the batch of one counts them."""
    case = make_case("llama-lm")
    batch = case.batch(4)
    careless = {**batch, "labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, 3)}
    agree(fisher_information(case.model, [careless]), per_example(case.model, [careless]), case.rtol)


def test_where_no_gradient_reaches_scores_are_zero():
    model = nn.ModuleDict({"used": nn.Linear(2, 3), "unused": nn.Linear(2, 3)})

    def loss_fn(model, batch):
        return F.cross_entropy(model["used"](batch[0]), batch[1])

    for estimator in ("per-example", "per-batch"):
        scores = fisher_information(
            model, [(torch.randn(3, 2), torch.tensor([0, 1, 2]))], loss_fn, "mean", estimator
        )
        assert scores["used.weight"].any()
        assert not scores["unused.weight"].any()


def test_progress_counts_examples(make_case, capsys):
    case = make_case("bert")
    seen = []
    batches = [case.batch(2), case.batch(3)]
    fisher_information(case.model, batches, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, None), (5, None)]
    fisher_information(case.model, [case.batch(2)], progress=True)
    assert "2 examples" in capsys.readouterr().err


def test_refusals(make_case):
    case = make_case("bert")
    batch = case.batch(2)
    unlabelled = {key: value for key, value in batch.items() if key != "labels"}
    with pytest.raises(DataError, match="no loss"):
        fisher_information(case.model, [unlabelled])
    with pytest.raises(DataError, match="dict"):
        fisher_information(case.model, [tuple(batch.values())])
    with pytest.raises(DataError, match="no batches"):
        fisher_information(case.model, [])
    with pytest.raises(ConfigError, match="per-example"):
        fisher_information(case.model, [batch], estimator="per_example")
    with pytest.raises(ConfigError, match="sampled"):
        fisher_information(case.model, [batch], labels="drawn")
    with pytest.raises(ConfigError, match="loss_fn"):
        fisher_information(case.model, [batch], lambda model, batch: 0, labels="sampled")
    with pytest.raises(ParameterError, match="matched no parameter"):
        fisher_information(case.model, [batch], eligible=["nothing.*"])
    with pytest.raises(ParameterError, match="eligible"):
        fisher_information(case.model, [batch], always=["*"])
    with pytest.raises(ParameterError, match="does not depend"):
        fisher_information(case.model, [batch], lambda model, batch: torch.tensor(1.0), "mean")
    with pytest.raises(DataError, match="or one an example, got shape"):
        fisher_information(case.model, [batch], lambda model, batch: model(**batch).logits)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("estimator", ["per-example", "per-batch"])
def test_a_loss_that_is_not_finite(estimator, first, make_case):
    case = make_case("convnet")
    good, bad = case.batch(3), case.batch(3)
    bad[0][1] = float("nan")
    with pytest.raises(DataError, match="the loss is nan"):
        fisher_information(case.model, [bad] if first else [good, bad], case.loss_fn, "mean", estimator)


@pytest.mark.parametrize("first", [True, False])
def test_an_example_without_a_label(first, make_case):
    case = make_case("bert-tokens")
    good, bad = case.batch(3), case.batch(3)
    bad["labels"][2] = -100
    with pytest.warns(UserWarning, match="examples without any label.* add nothing"):
        found = fisher_information(case.model, [bad] if first else [good, bad])
    known = {key: value[:2] for key, value in bad.items()}
    wanted = fisher_information(case.model, [known] if first else [good, known])
    for name, score in wanted.items():
        torch.testing.assert_close(
            found[name] * (3 if first else 6), score * (2 if first else 5), rtol=1e-4, atol=1e-9
        )


def test_a_pass_that_is_stopped_scores_what_it_has_seen():
    model, batch = linear_gaussian(12)
    batches = [{key: value[start : start + 4] for key, value in batch.items()} for start in (0, 4, 8)]
    seen = []

    def stop(sums, done):
        seen.append((done, sums["linear.weight"].clone()))
        return done >= 8

    found = fisher_information(model, batches, stop_fn=stop)
    assert [done for done, _ in seen] == [4, 8] and found.num_examples == 8
    wanted = fisher_information(model, batches[:2])
    torch.testing.assert_close(found["linear.weight"], wanted["linear.weight"], rtol=0, atol=0)
    torch.testing.assert_close(seen[-1][1] / 8, wanted["linear.weight"], rtol=1e-12, atol=0)


def test_zero_times_infinity_is_not_cut_away_with_the_padding():
    linear = nn.Linear(4, 3, bias=False)
    x = torch.randn(3, 5, 4)
    x[:, 3:] = 0
    loss = lambda model, x: model(x).square().sum(-1).sqrt().sum(1)  # noqa: E731  # its gradient at 0 is no number
    scores = fisher_information(linear, [x], loss)
    assert scores["weight"].isnan().all()


def test_sequences_of_no_tokens():
    linear = nn.Linear(4, 3)
    data = [torch.randn(2, 0, 4), torch.randn(2, 3, 4)]
    found = fisher_information(linear, data, lambda model, x: model(x).sum((1, 2)))
    one = fisher_information(linear, data[1:], lambda model, x: model(x).sum((1, 2)))
    torch.testing.assert_close(found["weight"] * 2, one["weight"])
