"""PEFT's adapters: SHiRA under a child's mask, and deltas that compute what an adapter does, to the last bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, ShiraConfig, TrainableTokensConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from childtuning import magnitude_scores, random_child, select_child
from childtuning.errors import DeltaError, ParameterError
from childtuning.training import adapter_delta, shira_mask

IDS = torch.tensor([[2, 7, 9, 3], [2, 8, 7, 3]])


def a_model(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    return BertForSequenceClassification(config).to(dtype).eval()


def adapted(model: Any, config: Any, folder: Path) -> torch.Tensor:
    """Move all that an adapter trains, save it, and return its logits."""
    wrapped = get_peft_model(copy.deepcopy(model), config).eval()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) / 10
    wrapped.save_pretrained(folder)
    with torch.inference_mode():
        return wrapped(IDS).logits


def test_shira_trains_the_entries_of_highest_score() -> None:
    model = a_model()
    scores = magnitude_scores(model)
    config = ShiraConfig(r=2, target_modules=["query", "dense"])
    config.mask_fn = shira_mask(model, scores)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    wrapped = get_peft_model(model, config)
    found = 0
    for name, module in wrapped.base_model.model.named_modules():
        if not hasattr(module, "shira_indices"):
            continue
        own, found = f"{name}.weight", found + 1
        count = 2 * sum(shapes[own])
        highest = scores[own].flatten().topk(count).indices.sort()[0]
        rows, columns = module.shira_indices["default"].long()
        assert torch.equal(rows * shapes[own][1] + columns, highest), name
    assert found == 9


def test_a_child_serves_where_its_entries_are_as_many() -> None:
    model = a_model()
    name = "bert.encoder.layer.0.attention.self.query.weight"
    query = model.get_parameter(name)
    child = select_child({name: magnitude_scores(model)[name]}, density=2 * 64 / query.numel())
    layer = model.get_submodule(name.removesuffix(".weight"))
    assert torch.equal(shira_mask(model, child)(layer, 2).bool(), child.parts[name].mask())
    with pytest.raises(ParameterError, match="trains 192 entries .* the child has 128"):
        shira_mask(model, child)(layer, 3)
    with pytest.raises(ParameterError, match="no scores for"):
        shira_mask(model, {})(layer, 2)
    with pytest.raises(ParameterError, match="not of the model"):
        shira_mask(a_model(), random_child(model, 0.1))(layer, 2)


EXACT = {
    "shira": lambda: ShiraConfig(r=2, target_modules=["query", "dense"], random_seed=1),
    "shira-with-head": lambda: ShiraConfig(
        r=1, target_modules=["value"], random_seed=1, modules_to_save=["classifier"]
    ),
    "tokens": lambda: TrainableTokensConfig(token_indices=[7, 9], target_modules=["word_embeddings"]),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", list(EXACT))
def test_a_delta_computes_what_the_adapter_does(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = a_model(dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    logits = adapted(model, EXACT[kind](), tmp_path)
    delta = adapter_delta(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    if kind == "tokens":
        part = delta.parts["bert.embeddings.word_embeddings.weight"]
        assert part.mask().any(1).nonzero().flatten().tolist() == [7, 9] and delta.num_trained <= 64
    delta.apply_(model)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, logits)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(r=2, target_modules=["query"]), "is of lora: merged"),
        (PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"), "changes no weight"),
    ],
    ids=["lora", "prefix"],
)
def test_adapters_that_are_not_exact_are_refused(config: Any, reason: str, tmp_path: Path) -> None:
    model = a_model()
    adapted(model, config, tmp_path)
    with pytest.raises(DeltaError, match=reason):
        adapter_delta(model, tmp_path)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match="not a PEFT adapter"):
        adapter_delta(a_model(), tmp_path)
    adapted(a_model(), EXACT["shira"](), tmp_path)
    torch.manual_seed(0)
    other = BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
        )
    )
    with pytest.raises(DeltaError):
        adapter_delta(other, tmp_path)
