"""Models by shape with random weights, and random inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HEAD = ("classifier.*",)  # new for every task: always trained whole
SHAPES: dict[str, dict[str, Any]] = {
    "bert-base": {},  # the defaults of BertConfig: 12 layers of 768, 30,522 tokens
    "minilm": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "tiny": {
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
    },
}


LLAMAS: dict[str, dict[str, Any]] = {
    "llama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "llama-86m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 512,
    },
    "llama-tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
    },
}


def classifier(shape: str, seed: int = 0) -> Any:
    """Return a BERT classifier of that shape with random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**SHAPES[shape], num_labels=2))


def random_batch(model: Any, batch_size: int, num_tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Return a labelled batch of random tokens without padding; 0 is the padding token."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, num_tokens)
    return {
        "input_ids": torch.randint(1, model.config.vocab_size, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.int64),
        "labels": torch.randint(2, (batch_size,), generator=generator),
    }


class SharedGradients:
    """One set of random gradients that several models of a shape use in turn.

    ``fill(model)`` puts the same fresh values into the model's ``grad`` fields, whatever the last step did to them.
    """

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.source = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
        for gradient in self.source.values():
            gradient.mul_(1e-3)
        self.buffers = {name: torch.empty_like(gradient) for name, gradient in self.source.items()}

    def fill(self, model: nn.Module) -> None:
        """Give every parameter that requires a gradient its own."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = self.buffers[name].copy_(self.source[name])


def clear(model: nn.Module) -> None:
    """Take the gradients away."""
    for parameter in model.parameters():
        parameter.grad = None
