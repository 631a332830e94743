"""The decoder example: the conversion against a plain twin, the tokenizer, the instructions, and a whole run."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import childtuning as ct

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("CHILDTUNING_DATA", ROOT.parent / "shared" / "data")) / "weights_stories260K"
SIZES = {
    "dim": 16,
    "hidden_dim": 20,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 4,
    "max_seq_len": 160,
}
MERGES = (
    " t",
    "he",
    " the",
    "er",
    "e",
    " ",
    *"abcdfghijklmnopqrstuvwxyz",
    *"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    *".,?",
)


@pytest.fixture(scope="module")
def decoder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("examples_decoder", ROOT / "examples" / "decoder.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network in llama2.c's names and layout, with a small vocabulary."""
    folder = tmp_path_factory.mktemp("decoder")
    specials = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = [word.encode().decode("latin-1") for word in (*specials, *MERGES, "é")]
    scores = [0.0] * len(specials) + [-float(rank) for rank in range(len(vocab) - len(specials))]
    (folder / "tokenizer.json").write_text(json.dumps({"vocab": vocab, "scores": scores}))
    (folder / "config.json").write_text(json.dumps({**SIZES, "vocab_size": len(vocab)}))
    rng = np.random.default_rng(0)
    dim, hidden, kv = SIZES["dim"], SIZES["hidden_dim"], SIZES["n_kv_heads"] * SIZES["head_dim"]
    shapes = {"tok_embeddings": (len(vocab), dim), "norm": (dim,)}
    for layer in range(SIZES["n_layers"]):
        shapes |= {
            f"layers.{layer}.attention_norm": (dim,),
            f"layers.{layer}.ffn_norm": (dim,),
            **{f"layers.{layer}.attention.w{k}": (kv if k in "kv" else dim, dim) for k in "qkvo"},
            **{
                f"layers.{layer}.feed_forward.w{k}": (dim, hidden) if k == 2 else (hidden, dim)
                for k in (1, 2, 3)
            },
        }
    arrays = {
        f"{name}.weight": rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()
    }
    np.savez(folder / "weights.npz", **arrays)
    return folder


def twin(folder: Path, ids: list[int]) -> Tensor:
    """Logits [T, vocabulary] as llama2.c defines them: one token after the other, pairs of neighbours turned."""
    with np.load(folder / "weights.npz") as file:
        w = {name.removesuffix(".weight"): torch.from_numpy(file[name]).double() for name in file.files}
    heads, kv_heads, size = SIZES["n_heads"], SIZES["n_kv_heads"], SIZES["head_dim"]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean() + 1e-5).sqrt() * weight

    def turned(x: Tensor, position: int) -> Tensor:
        out = x.clone()
        for start in range(0, len(x), 2):
            angle = torch.tensor(position / 10000.0 ** ((start % size) / size)).double()
            a, b = x[start], x[start + 1]
            out[start] = a * angle.cos() - b * angle.sin()
            out[start + 1] = a * angle.sin() + b * angle.cos()
        return out

    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(SIZES["n_layers"])]
    logits = []
    for position, token in enumerate(ids):
        x = w["tok_embeddings"][token]
        for layer, past in enumerate(kept):
            at = f"layers.{layer}."
            h = norm(x, w[at + "attention_norm"])
            q, k = (turned(w[at + f"attention.w{kind}"] @ h, position) for kind in "qk")
            past.append((k, w[at + "attention.wv"] @ h))
            seen = []
            for head in range(heads):
                group = head // (heads // kv_heads)
                mine, theirs = (slice(i * size, (i + 1) * size) for i in (head, group))
                score = torch.stack([q[mine] @ key[theirs] for key, _ in past]) / size**0.5
                values = torch.stack([value[theirs] for _, value in past])
                seen.append(score.softmax(0) @ values)
            x = x + w[at + "attention.wo"] @ torch.cat(seen)
            h = norm(x, w[at + "ffn_norm"])
            gate = torch.nn.functional.silu(w[at + "feed_forward.w1"] @ h)
            x = x + w[at + "feed_forward.w2"] @ (gate * (w[at + "feed_forward.w3"] @ h))
        logits.append(w["tok_embeddings"] @ norm(x, w["norm"]))
    return torch.stack(logits)


def test_the_converted_network_is_the_same_function(decoder: ModuleType, weights: Path) -> None:
    model = decoder.load_decoder(weights).double().eval()
    ids = [1, 259, 260, 7, 261, 300, 262]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, twin(weights, ids), rtol=1e-6, atol=1e-6)


def test_the_model_folder_loads(decoder: ModuleType, weights: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = decoder.load_decoder(weights).eval()
    tokenizer = decoder.load_tokenizer(weights / "tokenizer.json")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor([tokenizer("The other cat.")["input_ids"]])
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path)("The other cat.")["input_ids"] == ids[0].tolist()


def test_the_tokenizer_joins_by_score_and_falls_back_to_bytes(decoder: ModuleType, weights: Path) -> None:
    tokenizer = decoder.load_tokenizer(weights / "tokenizer.json")
    words = tokenizer.convert_ids_to_tokens(tokenizer("the cat\né☃")["input_ids"])
    snowman = [f"<0x{byte:02X}>" for byte in "☃".encode()]
    assert words == ["<s>", " the", " ", "c", "a", "t", "<0x0A>", "é", *snowman]
    # " t" ranks before "he", which ranks before "er": "ther" is never t-h-er
    assert tokenizer.convert_ids_to_tokens(tokenizer("ther")["input_ids"]) == ["<s>", " the", "r"]
    text = "A bear, ☃ and the cat?\nYes."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_instructions_are_the_same_and_only_responses_are_learned(decoder: ModuleType, weights: Path) -> None:
    rows = decoder.make_instructions(500, seed=0)
    assert rows == decoder.make_instructions(500, seed=0) != decoder.make_instructions(500, seed=1)
    assert len({row["prompt"] for row in rows}) == 500
    tokenizer = decoder.load_tokenizer(weights / "tokenizer.json")
    for row, example in zip(rows[:20], decoder.encode_instructions(tokenizer, rows[:20]), strict=True):
        learned = [label for label in example["labels"] if label != -100]
        assert learned == example["input_ids"][-len(learned) :]
        assert learned[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(learned, skip_special_tokens=True) == row["response"]
        asked = example["input_ids"][: -len(learned)]
        assert tokenizer.decode(asked, skip_special_tokens=True) == row["prompt"]


def test_perplexity_counts_labelled_tokens_alone(decoder: ModuleType, weights: Path) -> None:
    model = decoder.load_decoder(weights).eval()
    rows = [([1, 5, 9, 260, 2], 2), ([1, 7, 261], 1)]  # ids, and how many of them are the prompt
    examples = [{"input_ids": ids, "labels": [-100] * start + ids[start:]} for ids, start in rows]
    terms = []
    for ids, start in rows:
        logp = twin(weights, ids).log_softmax(-1)
        terms += [-float(logp[t - 1, ids[t]]) for t in range(start, len(ids))]
    expected = np.exp(np.mean(terms))
    assert decoder.perplexity(model, examples) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("of_text", [False, True], ids=["instructions", "text"])
def test_a_run_leaves_a_model_folder_and_a_delta(
    of_text: bool, decoder: ModuleType, weights: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    words = ["--weights", weights, "--steps", 2, "--batch-size", 4, "--output", tmp_path, "--lr", 0.01]
    if of_text:
        (tmp_path / "text.txt").write_text("the bear and the other bear. " * 120)
        words += ["--text", tmp_path / "text.txt", "--method", "last-k:1"]
    monkeypatch.setattr(sys, "argv", ["decoder.py", *map(str, words)])
    decoder.main()
    assert "perplexity after" in capsys.readouterr().out
    assert (tmp_path / "instructions.jsonl").exists() is not of_text

    base = decoder.load_decoder(weights)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    delta = ct.Delta.load(tmp_path)
    delta.apply_(base)
    moved = {name for name, p in base.named_parameters() if not torch.equal(p, before[name])}
    if of_text:
        assert moved == {n for n in before if n.startswith(("model.layers.1.", "model.norm"))}
    else:
        assert delta.num_trained == round(0.3 * sum(p.numel() for p in before.values()))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real weights are not here")
def test_the_real_weights_tell_a_story(decoder: ModuleType) -> None:
    model = decoder.load_decoder(REAL).eval()
    tokenizer = decoder.load_tokenizer(REAL / "tokenizer.json")
    ids = torch.tensor([[tokenizer.bos_token_id]])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert tokenizer.decode(said[0], skip_special_tokens=True).startswith(story[:60])
    text = story + " One day, she saw a big dog. The dog wanted to play with her."
    ids = tokenizer(text)["input_ids"]
    assert decoder.perplexity(model, [{"input_ids": ids, "labels": ids}]) < 3
