"""Convert a small pretrained decoder to transformers, and fine-tune it on a text or on generated instructions.

    python examples/decoder.py --weights stories260K --method child-d                      instructions
    python examples/decoder.py --weights stories260K --method lora --text input.txt.gz     a text

The weights are those of a Llama of 260,032 parameters that writes little stories, in the layout of llama2.c:
`weights.npz`, `config.json` and `tokenizer.json`. `OUTPUT/model` is a model folder that transformers can load. An
instruction is a prompt and a response; only the response is learned.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments, set_seed

import childtuning as ct
from childtuning.methods import Combination
from childtuning.training import ChildTrainer

Example = dict[str, list[int]]
IGNORED = -100

# The model: convert llama2.c's names and layout to those of transformers.


def load_decoder(folder: Path) -> LlamaForCausalLM:
    """Read the weights into a transformers model."""
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = LlamaConfig(
        vocab_size=about["vocab_size"],
        hidden_size=about["dim"],
        intermediate_size=about["hidden_dim"],
        num_hidden_layers=about["n_layers"],
        num_attention_heads=about["n_heads"],
        num_key_value_heads=about["n_kv_heads"],
        max_position_embeddings=about["max_seq_len"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    names = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {f"attention.w{kind}": f"self_attn.{kind}_proj" for kind in "qkvo"}
    names |= {"feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj"}
    names |= {"feed_forward.w3": "mlp.up_proj"}
    state: dict[str, Tensor] = {}
    with np.load(folder / "weights.npz") as file:
        weights = {name.removesuffix(".weight"): torch.from_numpy(file[name]) for name in file.files}
    state["model.embed_tokens.weight"] = weights.pop("tok_embeddings")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["model.norm.weight"] = weights.pop("norm")
    for name, weight in weights.items():
        _, layer, kind = name.split(".", 2)
        if kind in ("attention.wq", "attention.wk"):
            weight = halves(weight, head_size=about["head_dim"])
        state[f"model.layers.{layer}.{names[kind]}.weight"] = weight
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model


def halves(weight: Tensor, head_size: int) -> Tensor:
    """Reorder the rows of a query or key weight for rotary positions.

    llama2.c rotates the neighbours (2i, 2i + 1) of a head by one angle, transformers the entries i and
    i + head_size / 2.
    """
    return weight.view(-1, head_size // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Read llama2.c's byte-pair vocabulary; a merge is ranked by the score of the token that it produces."""
    about = json.loads(path.read_text(encoding="utf-8"))
    words = [word.encode("latin-1").decode("utf-8") for word in about["vocab"]]
    words[:3] = ["<unk>", "<s>", "</s>"]
    ids = {word: index for index, word in enumerate(words)}
    ranked = sorted(range(len(words)), key=lambda index: -about["scores"][index])
    merges = [
        (words[index][:cut], words[index][cut:])
        for index in ranked
        for cut in range(1, len(words[index]))
        if index > 258 and words[index][:cut] in ids and words[index][cut:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


# The data: blocks of a text, or instructions.

NAMES = ("Lily", "Tim", "Ben", "Mia", "Sam", "Anna", "Tom", "Sue", "Max", "Lucy")
ANIMALS = ("dog", "cat", "bird", "frog", "bear", "bunny", "duck", "fish")
THINGS = ("ball", "car", "hat", "box", "book", "toy", "cake", "kite")
COLOURS = ("red", "blue", "green", "yellow", "pink", "black")
PLACES = ("park", "house", "garden", "forest", "beach", "school")
OPPOSITES = {"big": "small", "happy": "sad", "hot": "cold", "fast": "slow", "old": "new", "up": "down"}


def make_instructions(count: int, seed: int) -> list[dict[str, str]]:
    """Generate `count` different prompts with their responses, determined by the seed."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        one, two = rng.sample(NAMES, 2)
        animal, thing, place = rng.choice(ANIMALS), rng.choice(THINGS), rng.choice(PLACES)
        colour, other = rng.sample(COLOURS, 2)
        word = rng.choice(sorted(OPPOSITES))
        prompt, response = rng.choice(
            [
                (f"{one} saw a {animal} in the {place}. What did {one} see?", f"{one} saw a {animal}."),
                (f"{one} and the {animal} went to the {place}. Where did they go?", f"They went to the {place}."),
                (f"{one} had a {colour} {thing}. {two} had a {other} {thing}. What did {two} have?",
                 f"{two} had a {other} {thing}."),
                (f"{one} gave {two} a {thing}. Who has the {thing}?", f"{two} has the {thing}."),
                (f"{one} has a {thing}. It is not {word}. How is the {thing}?", f"The {thing} is {OPPOSITES[word]}."),
                (f"The {animal} wanted the {colour} {thing}, not the {other} one. Which one did it want?",
                 f"It wanted the {colour} {thing}."),
            ]
        )  # fmt: skip
        found.setdefault(prompt, response)
    return [{"prompt": prompt, "response": response} for prompt, response in found.items()]


def encode_instructions(tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, str]]) -> list[Example]:
    """Return token ids; the labels of the prompt are ignored."""
    examples = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        response = [
            *tokenizer(row["response"], add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        examples.append({"input_ids": prompt + response, "labels": [IGNORED] * len(prompt) + response})
    return examples


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str, block: int) -> list[Example]:
    """Cut a text into blocks of `block` tokens; the remainder is dropped."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    blocks = [ids[start : start + block] for start in range(0, len(ids) - block + 1, block)]
    return [{"input_ids": block, "labels": block} for block in blocks]


def read_text(path: Path) -> str:
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes()).decode("utf-8")
    return path.read_text(encoding="utf-8")


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Pad a batch on the right."""
    lengths = [len(example["input_ids"]) for example in examples]

    def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

    return {
        "input_ids": padded([example["input_ids"] for example in examples], 0),
        "attention_mask": padded([[1] * length for length in lengths], 0),
        "labels": padded([example["labels"] for example in examples], IGNORED),
    }


# Training and evaluation.


@torch.inference_mode()
def perplexity(model: torch.nn.Module, examples: Sequence[Example]) -> float:
    """Return the exponential of the mean −log p over all labelled tokens."""
    model.eval()
    total = count = 0.0
    for start in range(0, len(examples), 32):
        batch = collate(examples[start : start + 32])
        labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += float(model(**batch).loss) * labelled
        count += labelled
    return math.exp(total / count)


def tune(
    model: Any,
    method: str,
    train: list[Example],
    *,
    rate: float,
    steps: int,
    batch_size: int,
    seed: int,
    output: Path,
    **child_options: Any,
) -> ChildTrainer:
    """Train with a method from `childtuning methods`, or with several combined by +."""
    set_seed(seed)
    methods = Combination.parse(method)
    prepared = methods.prepare(model, ())
    child = methods.child(ct.ChildConfig(**{"density": methods.density, "seed": seed, **child_options}))
    if prepared.eligible is not None:
        child = ct.ChildConfig.from_dict({**child.to_dict(), "eligible": prepared.eligible})
    trainer = ChildTrainer(
        prepared.model,
        TrainingArguments(
            output_dir=str(output),
            per_device_train_batch_size=batch_size,
            max_steps=steps,
            learning_rate=rate,
            weight_decay=0.01,
            warmup_steps=0.1,
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=max(1, steps // 5),
            disable_tqdm=True,
            report_to="none",
            dataloader_pin_memory=False,
        ),
        train_dataset=train,  # type: ignore[arg-type]
        data_collator=collate,
        child=child,
        always=prepared.always,
        methods=methods.methods,
        base_name="stories260K",
    )
    trainer.train()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description="Tune a small pretrained decoder.")
    parser.add_argument(
        "--weights", type=Path, required=True, help="folder with weights.npz and its two JSON files"
    )
    parser.add_argument("--text", type=Path, help="a text file, optionally .gz; default: instructions")
    parser.add_argument("--method", default="child-d")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/decoder"))
    options = parser.parse_args()

    model, tokenizer = load_decoder(options.weights), load_tokenizer(options.weights / "tokenizer.json")
    for part in (model, tokenizer):
        part.save_pretrained(options.output / "model")
    if options.text is not None:
        text = read_text(options.text)
        cut = int(0.9 * len(text))
        train, test = (encode_text(tokenizer, part, block=128) for part in (text[:cut], text[cut:]))
        beginning = text[cut : cut + 100]
    else:
        rows = make_instructions(600, seed=0)
        lines = "".join(json.dumps(row) + "\n" for row in rows[:500])
        (options.output / "instructions.jsonl").write_text(lines, encoding="utf-8")
        train, test = (encode_instructions(tokenizer, part) for part in (rows[:500], rows[500:]))
        beginning = rows[500]["prompt"]
    test = test[:200]
    print(f"perplexity before {perplexity(model, test):.2f}")

    trainer = tune(
        model,
        options.method,
        train,
        rate=options.lr,
        steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
        output=options.output,
    )
    tuned = trainer.bare_model
    print(f"perplexity after {perplexity(tuned, test):.2f}")
    ids = torch.tensor([tokenizer(beginning)["input_ids"]])
    said = tuned.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)  # type: ignore[operator]
    print(f"{beginning} → {tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)}")
    trainer.delta().save(options.output)
    print(f"delta in {options.output}")


if __name__ == "__main__":
    main()
