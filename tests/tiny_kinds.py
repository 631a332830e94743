"""Tiny random models of other kinds of task than texts with labels, and examples that they can learn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from tests.tiny import WORDS

COLORS = {"red": 0, "green": 1, "blue": 2}


def save_tokenizer(folder: Path, *, bos: bool = False, template: str | None = None) -> Any:
    """Write a word-level tokenizer with an end-of-text token and no padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "?", ":", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece(prefix="##")
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "eos_token": "</s>", **({"bos_token": "<s>"} if bos else {})}
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **names)
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


def save_tiny_lm(folder: Path, family: str = "llama", **tokenizer: Any) -> Path:
    """Write a two-layer random causal language model, "llama" or "gpt2", as a model folder."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, set_seed

    size = len(save_tokenizer(folder, **tokenizer))
    set_seed(0)
    if family == "llama":
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=64,
                bos_token_id=1,
                eos_token_id=2,
                initializer_range=0.1,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
    model.save_pretrained(folder)
    return folder


def write_instructions(folder: Path, count: int = 48) -> tuple[Path, Path]:
    """Write prompts that name an animal, and responses that say what it did: learnable word for word."""
    did = {"cat": "sat on the mat", "dog": "ran in the house", "bird": "flew over the tree"}
    rng = random.Random(0)
    files = []
    for name, rows in (("train", count), ("eval", 12)):
        lines = []
        for index in range(rows):
            animal = list(did)[index % 3]
            prompt = f"{' '.join(rng.choices(WORDS[14:20], k=rng.randint(1, 4)))} {animal} ?"
            lines.append(json.dumps({"prompt": prompt, "response": did[animal]}))
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("\n".join(lines) + "\n")
    return files[0], files[1]


def write_sentences(folder: Path, count: int = 64) -> tuple[Path, Path]:
    """Write sentences whose animals are entities of one word, and whose "the house" is one of two."""
    rng = random.Random(0)
    files = []
    for name, rows in (("train", count), ("eval", 16)):
        lines = []
        for _ in range(rows):
            words, tags = [], []
            for _ in range(rng.randint(2, 4)):
                part = rng.choice([("cat",), ("dog",), ("the", "house"), ("a", "film"), ("was",), ("nice",)])
                kind = {"cat": "ANIMAL", "dog": "ANIMAL", "the": "PLACE"}.get(part[0])
                words += part
                tags += ["O" if kind is None else ("B-" if i == 0 else "I-") + kind for i in range(len(part))]
            lines.append({"tokens": words, "tags": tags})
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files[0], files[1]


def color_images(count: int, seed: int = 0, side: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Return images [count, side, side, 3] that are mostly red, green or blue, and which."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    pixels = rng.integers(0, 120, (count, side, side, 3), dtype=np.uint8)
    for index, label in enumerate(labels):
        pixels[index, :, :, label] += 120
    return pixels, labels.astype(np.uint8)


def write_image_folders(folder: Path) -> tuple[Path, Path]:
    """Write train/ and eval/ with a folder a class."""
    from PIL import Image

    for part, count in (("train", 48), ("eval", 12)):
        pixels, labels = color_images(count, seed=count)
        for index, label in enumerate(labels):
            target = folder / part / list(COLORS)[label]
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[index]).save(target / f"{index}.png")
    return folder / "train", folder / "eval"


def save_tiny_vision(folder: Path, family: str = "vit", *, processor: bool = True) -> Path:
    """Write a random "vit" or "resnet" of images of 8 × 8 as a model folder, with an image processor or without."""
    from transformers import (
        ResNetConfig,
        ResNetForImageClassification,
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessor,
        set_seed,
    )

    set_seed(0)
    if family == "vit":
        config = ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=5,
        )
        ViTForImageClassification(config).save_pretrained(folder)
    else:
        resnet = ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
        )
        ResNetForImageClassification(resnet).save_pretrained(folder)
    if processor:
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder
