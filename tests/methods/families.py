"""Tiny random models of every family, each with a batch's worth of examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "num_labels": 2,
    "pad_token_id": 0,
}
_DECODER = {**_SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
_IMAGES: dict[str, Any] = {"num_labels": 2, "num_channels": 3}


@dataclass(frozen=True)
class Family:
    """How to make a model, and what its examples are: ``class``, ``token``, ``text`` (language) or ``image``."""

    make: Callable[[], nn.Module]
    kind: str = "class"


class Perceptron(nn.Module):
    """Any module with a loss: two blocks and a head over floating-point features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(48, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.1)) for _ in range(2)
        )
        self.classifier = nn.Linear(16, 2)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return logits, and the loss where there are labels."""
        hidden = self.stem(pixel_values.flatten(1)[:, :48])
        for block in self.blocks:
            hidden = hidden + block(hidden)
        logits = self.classifier(hidden)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def _gpt2(model: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: model(
        hf.GPT2Config(
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_inner=24,
            vocab_size=40,
            num_labels=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            use_cache=False,
        )
    )


FAMILIES: dict[str, Family] = {
    "bert": Family(lambda: hf.BertForSequenceClassification(hf.BertConfig(**_SIZES))),
    "roberta": Family(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**{**_SIZES, "pad_token_id": 1}))
    ),
    "distilbert": Family(
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=40, num_labels=2)
        )
    ),
    "electra": Family(
        lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(embedding_size=8, **_SIZES))
    ),
    "xlnet": Family(
        lambda: hf.XLNetForSequenceClassification(
            hf.XLNetConfig(d_model=16, n_layer=2, n_head=2, d_inner=24, vocab_size=40, num_labels=2)
        )
    ),
    "deberta": Family(
        lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(
                relative_attention=True,
                pos_att_type=["p2c", "c2p"],
                position_buckets=4,
                share_att_key=True,
                norm_rel_ebd="layer_norm",
                **_SIZES,
            )
        )
    ),
    "t5": Family(
        lambda: hf.T5ForTokenClassification(
            hf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=40, num_labels=2)
        ),
        "token",
    ),
    "gpt2": Family(_gpt2(hf.GPT2ForSequenceClassification)),
    "gpt2-lm": Family(_gpt2(hf.GPT2LMHeadModel), "text"),
    "llama": Family(lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**_DECODER))),
    "llama-lm": Family(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER)), "text"),
    "qwen": Family(lambda: hf.Qwen2ForSequenceClassification(hf.Qwen2Config(**_DECODER))),
    "qwen-lm": Family(lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_DECODER)), "text"),
    "vit": Family(
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=24,
                image_size=8,
                patch_size=4,
                **_IMAGES,
            )
        ),
        "image",
    ),
    "resnet": Family(
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(
                embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", **_IMAGES
            )
        ),
        "image",
    ),
    "convnext": Family(
        lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, patch_size=2, **_IMAGES)
        ),
        "image",
    ),
    "plain": Family(Perceptron, "image"),
}


def family_examples(kind: str, count: int = 8) -> list[dict[str, Tensor]]:
    """Return random examples of a kind."""
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Tensor]] = []
    for index in range(count):
        if kind == "image":
            rows.append(
                {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": torch.tensor(index % 2)}
            )
            continue
        tokens = torch.randint(3, 40, (6,), generator=generator)
        labels = {"class": torch.tensor(index % 2), "token": tokens % 2, "text": tokens}[kind]
        rows.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
    return rows
