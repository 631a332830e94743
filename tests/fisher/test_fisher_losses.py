"""The loss of each example: heads by their formulas, losses by slices, and losses that mix examples are refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.fisher.conftest import COUNTS, SMALL, VOCAB, classes, text, token_labels
from tests.reference.fisher_loop import per_example
from torch import Tensor, nn
from torch.nn import functional as F

from childtuning.errors import ConfigError, DataError
from childtuning.fisher import fisher_information, losses_by_slices, training_costs

pytestmark = pytest.mark.usefixtures("fast")
B = 5


def bert(head: str, **options) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, **COUNTS, **options)
    return getattr(transformers, f"BertFor{head}")(config).double().eval()


def several(k: int) -> torch.Tensor:
    return torch.rand(B, k, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


HEADS = {
    "classes": ("SequenceClassification", {"num_labels": 3}, lambda batch: {"labels": classes(B)}),
    "classes in a column": (
        "SequenceClassification",
        {"num_labels": 3, "problem_type": "single_label_classification"},
        lambda batch: {"labels": classes(B)[:, None]},
    ),
    "regression": ("SequenceClassification", {"num_labels": 1}, lambda batch: {"labels": several(1)[:, 0]}),
    "several outputs": (
        "SequenceClassification",
        {"num_labels": 3, "problem_type": "regression"},
        lambda batch: {"labels": several(3)},
    ),
    "several labels": (
        "SequenceClassification",
        {"num_labels": 3},
        lambda batch: {"labels": several(3).round()},
    ),
    "next sentence": ("NextSentencePrediction", {}, lambda batch: {"labels": classes(B, k=2)}),
    "tokens": ("TokenClassification", {"num_labels": 4}, lambda batch: {"labels": token_labels(batch, 4)}),
    "masked": ("MaskedLM", {}, lambda batch: {"labels": token_labels(batch, VOCAB)}),
    "spans": (
        "QuestionAnswering",
        {},
        lambda batch: {"start_positions": classes(B), "end_positions": torch.tensor([2, 3, 1, 4, 6])},
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_by_their_formulas(name, agree, fast):
    head, options, labels_of = HEADS[name]
    model, batch = bert(head, **options), text(B)
    batch |= labels_of(batch)
    wanted = per_example(copy.deepcopy(model), [batch])
    found = fisher_information(model, [batch])
    agree(found, wanted, 1e-6)
    assert set(found.paths.values()) == {"engine" if fast else "loop"}


def test_an_ignored_answer_has_no_loss():
    model, batch = bert("QuestionAnswering"), text(B)
    batch |= {"start_positions": classes(B), "end_positions": classes(B)}
    batch["start_positions"][3] = batch["end_positions"][3] = 99
    with pytest.warns(UserWarning, match="examples without any label.* add nothing"):
        found = fisher_information(model, [batch])
    keep = [row for row in range(B) if row != 3]
    wanted = fisher_information(model, [{key: value[keep] for key, value in batch.items()}])
    for name, score in wanted.items():
        torch.testing.assert_close(found[name] * B, score * (B - 1), rtol=1e-4, atol=1e-9)


class Extra(nn.Module):
    """A head whose loss is not quite the formula's."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, labels, **inputs):
        outputs = self.model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels, label_smoothing=0.1)
        return SimpleNamespace(loss=loss, logits=outputs.logits)


def test_a_formula_is_compared_with_the_models_own_loss(agree, monkeypatch):
    monkeypatch.setenv("CHILDTUNING_FAST", "1")
    model = Extra(bert("SequenceClassification", num_labels=3))
    batch = {**text(B), "labels": classes(B)}
    with pytest.warns(UserWarning, match="by the formula of its head. Pass loss_fn"):
        found = fisher_information(model, [batch])
    agree(found, per_example(model, [batch]))


def smoothed(outputs, labels):
    return F.cross_entropy(outputs["logits"], labels, label_smoothing=0.1)


def test_losses_by_slices_are_those_of_examples_alone(agree, fast):
    model = bert("SequenceClassification", num_labels=3)
    batch = {**text(B), "labels": classes(B)}
    found = fisher_information(model, [batch], losses_by_slices(smoothed))

    def alone(model, batch):
        return smoothed(model(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"])

    agree(found, per_example(model, [batch], alone))
    assert set(found.paths.values()) == {"engine" if fast else "loop"}
    with pytest.raises(DataError, match="no 'labels'"):
        fisher_information(model, [text(B)], losses_by_slices(smoothed))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def pairs(n=4):
    return torch.randn(n, 4, dtype=torch.float64), torch.arange(n) % 3


def contrast(model, batch):
    z = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(5 * z @ z.T, torch.arange(len(z)), reduction="none")


def centred(model, batch):
    z = model(batch[0])
    return (z - z.mean(0)).square().sum(1)


MIXING = {
    "one loss an example, which depends on the others": (contrast, None),
    "a scalar of the same": (lambda m, b: contrast(m, b).mean(), None),
    "a stated mean of the same": (lambda m, b: contrast(m, b).mean(), "mean"),
    "a mean that is stated to be a sum": (lambda m, b: F.cross_entropy(m(b[0]), b[1]), "sum"),
    "all scores are zero": (lambda m, b: centred(m, b).mean(), None),
}


@pytest.mark.filterwarnings("ignore:Fisher information of:UserWarning")
@pytest.mark.parametrize("name", MIXING)
def test_losses_that_mix_examples_are_refused(name):
    loss_fn, reduction = MIXING[name]
    with pytest.raises(DataError, match="mixes examples|examples' own losses|every score is exactly 0"):
        fisher_information(net(), [pairs()], loss_fn, reduction)


def test_batch_statistics_are_refused():
    for norm, training in ((nn.BatchNorm1d(4), True), (nn.BatchNorm1d(4, track_running_stats=False), False)):
        model = nn.Sequential(norm, nn.Linear(4, 3)).double()
        with pytest.raises(DataError, match="statistics of the batch"):
            fisher_information(
                model, [pairs()], lambda m, b: F.cross_entropy(m(b[0]), b[1]), training=training
            )


def test_reductions_are_checked():
    rows = lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")  # noqa: E731
    with pytest.raises(ConfigError, match="reduction must be one of"):
        fisher_information(net(), [pairs()], rows, "average")
    with pytest.raises(ConfigError, match="is for a loss_fn that returns a scalar"):
        fisher_information(net(), [pairs()], rows, "mean")
    with pytest.raises(ConfigError, match="without one"):
        fisher_information(net(), [pairs()], reduction="mean")
    with pytest.raises(DataError, match="or one an example, got shape"):
        fisher_information(net(), [pairs()], lambda m, b: m(b[0]))
    model, batch = net(), pairs()
    found = fisher_information(model, [batch], rows, estimator="per-batch")
    assert found["0.weight"].any()
    summed = fisher_information(
        model, [batch], lambda *both: rows(*both).sum(), reduction="sum", estimator="per-batch"
    )
    for name, score in found.items():
        torch.testing.assert_close(summed[name], score)


@pytest.mark.parametrize(
    "count",
    [
        training_costs,
        lambda model, batch, loss_fn: fisher_information(model, [batch], loss_fn),
        lambda model, batch, loss_fn: fisher_information(model, [batch], loss_fn, estimator="per-batch"),
    ],
    ids=["costs", "per-example", "per-batch"],
)
@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (lambda model, batch: 1.0, "got float"),
        (lambda model, batch: model(batch), r"got shape \(., 2\)"),
        (lambda model, batch: model(batch)[:0, 0], r"got shape \(0,\)"),
        (lambda model, batch: model(batch).argmax(-1), "got dtype torch.int64"),
        (lambda model, batch: model(batch).sum() * 1j, "got dtype torch.complex128"),
    ],
    ids=["a number", "a matrix", "nothing", "integers", "complex"],
)
@pytest.mark.filterwarnings("ignore:Fisher information of")
def test_what_is_no_loss_is_refused_in_one_line(count: Any, wrong: Any, got: str) -> None:
    model, batch = nn.Linear(4, 2).double(), torch.ones(3, 4, dtype=torch.float64)
    with pytest.raises(DataError, match=f"the loss must be a real number, or one an example, {got}"):
        count(model, batch, wrong)


def test_a_model_without_values_is_refused_in_one_line() -> None:
    model, batch = nn.Linear(4, 2, device="meta"), torch.ones(3, 4)
    for of in (training_costs, lambda model, batch, loss_fn: fisher_information(model, [batch], loss_fn)):
        with pytest.raises(DataError, match="on the meta device, where tensors have no values"):
            of(model, batch, lambda model, batch: model(batch).sum(-1))


@pytest.mark.parametrize("wrong", ["mean over tokens", "class weights", "sum"])
def test_a_reduction_that_does_not_hold_is_refused(wrong: str) -> None:
    """A batch shows it whose examples do not all weigh the same, be it the first or a later one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3))
    labels = torch.tensor([[0, 1, 2, 1], [2, -100, -100, -100], [1, 1, -100, -100]])
    ids = torch.randint(20, labels.shape)

    def token_mean(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-100)

    def weighted(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).mean(1), batch[1][:, 0], weight=torch.tensor([1.0, 5.0, 0.1]))

    def total(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).mean(1), batch[1][:, 0], reduction="sum")

    loss_fn = {"mean over tokens": token_mean, "class weights": weighted, "sum": total}[wrong]
    with pytest.raises(DataError, match="the mean of its examples' own losses"):
        fisher_information(model, [(ids, labels)], loss_fn, "mean")
    even = (ids[:1].repeat(2, 1), labels[:1].repeat(2, 1))
    for first in (even, (ids[:1], labels[:1])):
        with pytest.raises(DataError, match="the mean of its examples' own losses"):
            fisher_information(model, [first, (ids, labels)], loss_fn, "mean")
    if wrong == "sum":
        assert fisher_information(model, [(ids, labels)], loss_fn, "sum")


def test_scores_are_saved_as_a_plain_dict() -> None:
    scores = fisher_information(nn.Linear(2, 1), [(torch.ones(3, 2),)], lambda m, b: m(b[0]).squeeze(1) ** 2)
    assert type(pickle.loads(pickle.dumps(scores))) is dict


def test_a_stated_reduction_under_dropout_is_taken_as_stated() -> None:
    """In training mode two passes differ, so that there is nothing to compare."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    batch = (torch.randn(4, 3), torch.randn(4, 1))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    scores = fisher_information(model, [batch], loss_fn, "mean", training=True)
    assert all(bool(score.isfinite().all()) for score in scores.values())


def test_a_routers_loss_is_scored_in_bf16_too():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "vocab_size": 20, "num_local_experts": 4, "output_router_logits": True}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**sizes, **more, router_aux_loss_coef=0.02)).bfloat16()
    ids = torch.randint(20, (4, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the head's formula lacks this loss: the loop
        found = fisher_information(model, [{"input_ids": ids, "labels": ids}])
    gate = next(name for name in found if "gate.weight" in name)
    model.eval()
    wanted = torch.zeros_like(found[gate])
    for one in ids.split(1):
        model.zero_grad()
        model(input_ids=one, labels=one).loss.backward()
        wanted += model.get_parameter(gate).grad.float().square() / len(ids)
    torch.testing.assert_close(found[gate], wanted, rtol=0.05, atol=1e-9)
