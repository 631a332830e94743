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

_NO_BIAS = "pretrained layers have none"
_NO_TOKENS = "no token embeddings to add virtual tokens to"
_NO_PAST = "does not support past key values"
_PADDING = "it treats padding as text"
_NOT_TEXT = ("vit", "resnet", "convnext", "plain")
# (family, method) -> words of the reason.
REFUSED: dict[tuple[str, str], str] = {
    **{(family, "bitfit"): _NO_BIAS for family in ("t5", "llama", "llama-lm")},
    **{(family, method): _NO_TOKENS for family in _NOT_TEXT for method in ("prompt", "prefix")},
    **{(family, "prefix"): _NO_PAST for family in ("distilbert", "xlnet", "deberta", "t5")},
    **{(family, "prompt"): _PADDING for family in ("gpt2", "llama", "qwen")},
    ("t5", "prompt"): "its output would include positions for the virtual tokens",
    ("resnet", "mixout"): "no linear layer except the head",
    ("resnet", "lora"): "matches none of its layers",
    ("resnet", "adapter"): "none of its layers has linear layers",
    ("plain", "adapter"): "does not end in a feed-forward's output projection",
    ("xlnet", "adapter"): "attention's output projection. Use placement=pfeiffer",
    ("convnext", "adapter"): "attention's output projection. Use placement=pfeiffer",
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
    "recadam": "recadam:k=0.5,t0=1,weight=1",
    "freeze": "freeze+full",
}


@cache
def _model(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family].make()


@pytest.mark.filterwarnings("ignore:.*one example at a time")
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
