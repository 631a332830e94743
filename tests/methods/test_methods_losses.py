"""Methods that add a term to the loss: r3f, r-drop, smart."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.trainers import check_resume, examples, method_trainer, weights
from tests.reference import loss_terms as twin
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from childtuning import Child
from childtuning.errors import ConfigError
from childtuning.fast.dropout import spare_dropouts
from childtuning.methods import Combination
from childtuning.training import ChildTrainer, LossStep

R3F = "r3f:weight=2,eps=0.5"
SMART = "smart:weight=3,step=0.3,noise_variance=0.1,epsilon=0.25"
ALL = f"{R3F}+r-drop:4+{SMART}"
Loss = Callable[[Any, dict[str, Tensor], twin.PairFn, twin.PairFn], Tensor]


def bert(*, regression: bool = False, dropout: float = 0.0) -> Any:
    torch.manual_seed(3)
    options: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "max_position_embeddings": 16,
        "initializer_range": 0.5,
        "num_labels": 1 if regression else 3,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    return BertForSequenceClassification(BertConfig(**options)).double().train()


def batches(count: int, *, regression: bool = False) -> list[dict[str, Tensor]]:
    rows = examples(3 * count, num_labels=3)
    made = [{key: torch.stack([row[key] for row in rows[i::count]]) for key in rows[0]} for i in range(count)]
    for batch in made:
        batch["attention_mask"][1:, 9:] = 0
        if regression:
            batch["labels"] = batch["labels"].double()
    return made


def a_trainer(model: Any, output: Path, method: str, **options: Any) -> ChildTrainer:
    trainer = method_trainer(model, output, method, save_strategy="no", **options)
    trainer.bare_model.train()
    return trainer


def r3f_loss(model: Any, batch: dict[str, Tensor], apart: twin.PairFn, _: twin.PairFn, noise: str) -> Tensor:
    outputs = model(**batch)
    return outputs.loss + 2 * twin.r3f(model, batch, outputs.logits, apart, eps=0.5, noise=noise)


def smart_loss(
    model: Any, batch: dict[str, Tensor], apart: twin.PairFn, _: twin.PairFn, order: float
) -> Tensor:
    outputs = model(**batch)
    term = twin.smart(model, batch, outputs.logits, apart, eta=0.3, sd=0.1, epsilon=0.25, order=order)
    return outputs.loss + 3 * term


def r_drop_loss(model: Any, batch: dict[str, Tensor], _: twin.PairFn, half_apart: twin.PairFn) -> Tensor:
    first, second = model(**batch), model(**batch)
    return (first.loss + second.loss) / 2 + 4 * half_apart(first.logits, second.logits)


def loss_of_all(model: Any, batch: dict[str, Tensor], apart: twin.PairFn, half_apart: twin.PairFn) -> Tensor:
    first = model(**batch)
    r3f = twin.r3f(model, batch, first.logits, apart, eps=0.5, noise="uniform")
    second = model(**batch)
    task = (first.loss + second.loss) / 2
    r_drop = half_apart(first.logits, second.logits)
    smart = twin.smart(model, batch, first.logits, apart, eta=0.3, sd=0.1, epsilon=0.25, order=math.inf)
    return task + 2 * r3f + 4 * r_drop + 3 * smart


PARITY: dict[str, tuple[Loss, float]] = {
    R3F: (partial(r3f_loss, noise="uniform"), 0.0),
    R3F + ",noise=normal": (partial(r3f_loss, noise="normal"), 0.0),
    "r-drop:4": (r_drop_loss, 0.2),
    SMART: (partial(smart_loss, order=math.inf), 0.0),
    SMART + ",norm=l2": (partial(smart_loss, order=2.0), 0.0),
    ALL: (loss_of_all, 0.2),
}


@pytest.mark.parametrize(
    ("method", "regression"),
    [*((method, False) for method in PARITY), (R3F, True), ("r-drop:4", True), (SMART, True)],
)
def test_twenty_steps_are_the_twins(tmp_path: Path, method: str, regression: bool) -> None:
    """Same seed before each step, so that noise and dropout are drawn alike."""
    twin_loss, dropout = PARITY[method]
    apart = partial(twin.per_example, pair=twin.squared if regression else twin.both_ways)
    half_apart = partial(twin.per_example, pair=twin.squared if regression else twin.half_both_ways)
    ours = bert(regression=regression, dropout=dropout)
    theirs = copy.deepcopy(ours)
    trainer = a_trainer(ours, tmp_path, method)
    firsts, ends = [], []
    torch.manual_seed(0)
    first_task_loss = ours(**batches(20, regression=regression)[0]).loss.item()
    for model, loss_fn in (
        (ours, lambda batch: trainer.compute_loss(ours, dict(batch))),
        (theirs, lambda batch: twin_loss(theirs, batch, apart, half_apart)),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        for step, batch in enumerate(batches(20, regression=regression)):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = loss_fn(batch)
            loss.backward()
            optimizer.step()
            if step == 0:
                firsts.append(loss.item())
        ends.append(loss.item())
    assert [firsts[0], ends[0]] == pytest.approx([firsts[1], ends[1]], rel=1e-11)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)
    assert abs(firsts[0] - first_task_loss) > 1e-3  # the term is no matter of rounding


@pytest.mark.parametrize("norm", ["inf", "l2"])
def test_padding_has_no_share_in_the_ball(monkeypatch: pytest.MonkeyPatch, norm: str) -> None:
    """Noise is the same at the tokens of a text however far it is padded."""
    drawn = torch.randn(1, 16, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    smart = Combination.parse(f"{SMART},norm={norm}").methods[0]
    model, found, none = bert().eval(), [], torch.zeros((), dtype=torch.double)
    monkeypatch.setattr(Tensor, "normal_", lambda x, mean, std: x.copy_(std * drawn[:, : x.shape[1]]))
    for length in (5, 9, 16):
        ids = torch.full((1, length), 1)
        ids[:, :5] = torch.tensor([7, 3, 9, 4, 12])
        batch = {"input_ids": ids, "attention_mask": (torch.arange(length) < 5).long()[None]}
        step = LossStep(model, batch, model(**batch), none, lambda *_: (none, None))
        found.append(smart.loss(none, step).item())
    assert found[0] > 1e-4 and found == pytest.approx([found[0]] * 3, rel=1e-9)


def test_terms_do_not_depend_on_the_order_in_which_they_are_named(tmp_path: Path) -> None:
    """Without dropout the passes of r-drop draw nothing."""
    model, (batch,) = bert(), batches(1)
    values = []
    for method in (f"{R3F}+r-drop:4", f"r-drop:4+{R3F}"):
        torch.manual_seed(0)
        values.append(a_trainer(model, tmp_path, method).compute_loss(model, dict(batch)).item())
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.parametrize(
    ("method", "granularity"), [("child-d", "element"), ("child-d", "row"), ("child-f", "row")]
)
def test_released_gradients_hold_all_terms(
    tiny_bert: Path, tmp_path: Path, method: str, granularity: str
) -> None:
    ends, trainers = [], []
    for release in (None, False):
        child = {"granularity": granularity, "release_gradients": release, "fisher_examples": 8}
        options: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 2, "max_grad_norm": 0.0}
        trainer = a_trainer(tiny_bert, tmp_path, f"{method}+{ALL}", child=child, optim="sgd", **options)
        spare_dropouts(trainer.bare_model)  # both draw the same masks
        start = weights(trainer)
        trainer.train()
        ends.append(weights(trainer))
        trainers.append((trainer, start))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-6)
    trainer, start = trainers[0]
    child = trainer.select()
    assert any(not torch.equal(start[name], value) for name, value in ends[0].items())
    if isinstance(child, Child):
        for name, part in child.parts.items():
            assert torch.equal(start[name][~part.mask()], ends[0][name][~part.mask()])


@pytest.mark.parametrize("child", ["child-d", "child-f"])
def test_resume_in_mid_epoch_is_bitwise(tiny_bert: Path, tmp_path: Path, child: str) -> None:
    check_resume(tiny_bert, tmp_path, f"{child}+{ALL}", max_steps=9, child={"fisher_examples": 8})


def test_evaluation_is_as_ever(tiny_bert: Path, tmp_path: Path) -> None:
    results = []
    for method in ("full", f"full+{ALL}"):
        trainer = a_trainer(tiny_bert, tmp_path, method, eval_dataset=examples(8))
        torch.manual_seed(0)
        results.append((trainer.evaluate()["eval_loss"], torch.rand(()).item()))
    assert results[0] == results[1]


def test_both_losses_of_r_drop_are_the_trainers(tmp_path: Path) -> None:
    """Smoothed labels are smoothed in the second pass as well; transformers sums them in float32."""
    model, (batch,) = bert(dropout=0.2), batches(1)
    torch.manual_seed(0)
    smoothed = []
    for _ in range(2):
        log_p = model(**batch).logits.log_softmax(-1)
        target = 0.7 * torch.nn.functional.one_hot(batch["labels"], 3) + 0.3 / 3
        smoothed.append(-(target * log_p).sum(-1).mean())
    trainer = a_trainer(model, tmp_path, "r-drop:1e-12", label_smoothing_factor=0.3)
    torch.manual_seed(0)
    loss = trainer.compute_loss(model, dict(batch))
    assert loss.item() == pytest.approx((smoothed[0] + smoothed[1]).item() / 2, rel=1e-7)
    assert smoothed[0].item() != pytest.approx(smoothed[1].item(), rel=1e-3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("r3f:0", "weight of 'r3f' must be above 0, got 0.0. Pass weight=1.0."),
        ("r3f:eps=-1", "eps of 'r3f' must be above 0"),
        ("r3f:noise=pink", "noise of 'r3f' must be one of uniform, normal, got 'pink'"),
        ("r-drop:nan", "weight of 'r-drop' must be above 0, got nan"),
        ("r-drop:inf", "got inf"),
        (
            "smart:step=0,epsilon=0",
            "step of 'smart' must be above 0, got 0.0. Pass step=0.001. epsilon of 'smart'",
        ),
        ("smart:norm=l1", "norm of 'smart' must be one of inf, l2, got 'l1'"),
    ],
)
def test_bad_hyperparameters(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Combination.parse(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_defaults_are_the_papers() -> None:
    r3f, r_drop, smart = (Combination.parse(name).methods[0] for name in ("r3f", "r-drop", "smart"))
    assert (r3f.weight, r3f.eps, r3f.noise) == (1.0, 1e-5, "uniform")  # type: ignore[attr-defined]
    assert r_drop.weight == 1.0  # type: ignore[attr-defined]
    assert (smart.weight, smart.step, smart.noise_variance, smart.epsilon, smart.norm) == (  # type: ignore[attr-defined]
        1.0,
        1e-3,
        1e-5,
        1e-6,
        "inf",
    )
