"""Whole models: BERT, GPT-2 with tied embeddings, and a ResNet."""

from __future__ import annotations

import math

import pytest
import torch
from tests.fast.layer_cases import check, part_of
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)


def _bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    ids = torch.randint(0, 30, (3, 7))
    return BertForSequenceClassification(config), {"input_ids": ids, "labels": torch.tensor([0, 1, 1])}


def _gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    ids = torch.randint(0, 30, (3, 7))
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


def _resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=2
    )
    return ResNetForImageClassification(config), {
        "pixel_values": torch.randn(2, 3, 32, 32),
        "labels": torch.tensor([0, 1]),
    }


MODELS = {"bert": _bert, "gpt2": _gpt2, "resnet": _resnet}


@pytest.mark.parametrize("kind", ["rows", "columns", "blocks"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_whole_model(name: str, kind: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.double().eval()
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    matrices = {n: tuple(p.shape) for n, p in model.named_parameters() if p.dim() > 1}
    parts = {n: part_of(shape, kind) for n, shape in matrices.items() if shape[0] > 1 and shape[1] > 1}
    # An embedding's tiles are left dense, unless they are one group; but a head that is tied to it takes them.
    # So are a kernel's blocks, unless they are whole channels.
    groups = {name: part.groups() or [] for name, part in parts.items()}
    embeddings = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    dense = {n for n in embeddings if len(groups[n]) > 1} - {"transformer.wte.weight"}
    if kind == "blocks":
        dense |= {n for n, shape in matrices.items() if math.prod(shape[2:]) > 1}
    check(model, parts, lambda model: model(**inputs).loss, names=set(parts) - dense, rtol=1e-9, atol=1e-11)
