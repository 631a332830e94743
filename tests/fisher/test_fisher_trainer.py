"""ChildTrainer scores the loss that it trains: its own function of the outputs, its label smoother, a subclass's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.fisher.conftest import COUNTS, SMALL, classes, text
from tests.reference.fisher_loop import per_example
from torch import nn
from torch.nn import functional as F

from childtuning import fast
from childtuning.child import ChildConfig
from childtuning.fisher import fisher_information
from childtuning.training import ChildTrainer


def squared(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return (outputs["logits"].softmax(-1) - F.one_hot(labels, 3)).square().sum(1).mean()


class Weighted(ChildTrainer):
    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **options: Any
    ) -> Any:
        return 3 * model(**inputs).loss


SMOOTHED = lambda o, y: F.cross_entropy(o["logits"], y, label_smoothing=0.1)  # noqa: E731
LOSSES = {
    "a function": (ChildTrainer, {"compute_loss_func": squared}, {}, squared),
    "smoothed": (ChildTrainer, {}, {"label_smoothing_factor": 0.1}, SMOOTHED),
    "a subclass": (Weighted, {}, {}, lambda o, y: 3 * F.cross_entropy(o["logits"], y)),
}


@pytest.mark.filterwarnings("ignore:Fisher information of:UserWarning")
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_that_is_trained_is_scored(name, tmp_path, agree):
    from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

    cls, options, settings, loss = LOSSES[name]
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SMALL, **COUNTS, num_labels=3)).double()
    whole = {**text(6), "labels": classes(6)}
    data = [{key: value[i] for key, value in whole.items()} for i in range(6)]
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, per_device_train_batch_size=3, **settings
    )
    trainer = cls(model=model, args=args, train_dataset=data, child=ChildConfig(), **options)
    found = fisher_information(model, trainer._fisher_batches(), trainer._fisher_loss())
    if name != "a subclass":  # how it weighs examples is not known
        assert set(found.paths.values()) == {"engine" if fast.enabled() else "loop"}

    def alone(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return loss(model(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"])

    agree(found, per_example(model, [whole], alone), 1e-6)
    assert (
        ChildTrainer(
            model=model,
            args=TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True),
            train_dataset=data,
            child=ChildConfig(),
        )._fisher_loss()
        is None
    )
