"""Every method on a tiny model of every family: it trains, or says why it does not apply."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from tests.methods.families import FAMILIES, family_examples
from tests.methods.trainers import method_trainer, weights
from torch import nn

from childtuning.errors import ChildTuningError
from childtuning.methods import all_methods

_CNN = ("resnet", "convnext", "plain")
_NO_BIAS = "pretrained layers have none"
# (family, method) -> words of the reason.
REFUSED: dict[tuple[str, str], str] = {
    ("t5", "bitfit"): _NO_BIAS,
    ("llama", "bitfit"): _NO_BIAS,
    ("llama-lm", "bitfit"): _NO_BIAS,
}
METHODS = [method.name for method in all_methods()]
ARGUMENTS = {
    "last-k": "last-k:1",
    "reinit": "reinit:1",
    "child-dynamic": "child-dynamic:1",
    "lora": "lora:2",
    "prefix": "prefix:2",
    "prompt": "prompt:2",
    "adapter": "adapter:4",
    "recadam": "recadam:k=0.5,t0=1",
    "freeze": "freeze+full",
}


@cache
def _model(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family].make()


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("method", METHODS)
def test_it_trains_or_says_why_not(family: str, method: str, tmp_path: Path) -> None:
    reason = REFUSED.get((family, method))
    name = ARGUMENTS.get(method, method)
    model = copy.deepcopy(_model(family))

    def train() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        trainer = method_trainer(
            model,
            tmp_path,
            name,
            dataset=family_examples(FAMILIES[family].kind),
            max_steps=2,
            save_strategy="no",
            logging_strategy="no",
        )
        before = weights(trainer)
        trainer.train()
        return before, weights(trainer)

    if reason is not None:
        with pytest.raises(ChildTuningError) as caught:
            train()
        assert reason in str(caught.value)
        return
    before, after = train()
    assert list(before) == list(after)
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert any(not torch.equal(before[n], after[n]) for n in before)
