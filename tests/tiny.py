"""Tiny random models and tokenizers, made on the spot."""

from __future__ import annotations

from pathlib import Path

from torch import nn

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "flew",
    "on",
    "in",
    "over",
    "mat",
    "house",
    "tree",
    "good",
    "bad",
    "nice",
    "awful",
    "very",
    "not",
    "is",
    "was",
    "it",
    "this",
    "that",
    "film",
    "book",
    "food",
    "plot",
    "actor",
    "story",
    "great",
    "boring",
    "dull",
    "bright",
    "happy",
    "sad",
]


def save_tiny_bert(folder: Path, seed: int = 0) -> Path:
    """Write a two-layer random BERT without a head, and a word-level tokenizer, as a model folder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token="[MASK]", model_max_length=64, **names
    )
    fast.save_pretrained(folder)
    set_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def without_dropout(model: nn.Module) -> None:
    """Let a model drop nothing: what trains beside structured layers draws other random numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
