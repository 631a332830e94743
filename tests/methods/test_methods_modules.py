"""lora, prefix, prompt and adapter: what is added to a frozen network."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.methods.families import FAMILIES, family_examples
from tests.methods.trainers import check_resume, method_trainer, weights
from tests.reference.fisher_loop import per_example
from torch import nn
from transformers import BertForSequenceClassification, set_seed

from childtuning import fisher_information
from childtuning.errors import ConfigError, ModelError
from childtuning.methods import Adapter, Combination, Lora, Prefix, Prompt
from childtuning.runs import FinishedRun, RunConfig, train_run
from childtuning.training import Prepared, find_layers, task_head
from childtuning.training.bottleneck import find_projections, is_linear

HEAD = ("classifier.weight", "classifier.bias")
_ALBERT: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_T5: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
}
_MORE: dict[str, Callable[[], Any]] = {
    "albert": lambda: transformers.AlbertForSequenceClassification(
        transformers.AlbertConfig(vocab_size=40, embedding_size=8, hidden_size=16, **_ALBERT)
    ),
    "t5-narrow": lambda: transformers.T5ForTokenClassification(
        transformers.T5Config(vocab_size=40, d_model=16, d_kv=6, num_layers=2, num_heads=2, d_ff=24)
    ),
}
_BERT_LIKE = ("attention.output.dense", "output.dense")
_T5_LIKE = ("layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo")
_LLAMA_LIKE = ("self_attn.o_proj", "mlp.down_proj")
# Where in a layer the two adapters stand.
PLACES: dict[str, tuple[str | None, str | None]] = {
    **dict.fromkeys(("bert", "roberta", "electra", "deberta"), _BERT_LIKE),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "albert": ("albert_layers.0.attention.dense", "albert_layers.0.ffn_output"),
    **dict.fromkeys(("t5", "t5-narrow"), _T5_LIKE),
    **dict.fromkeys(("gpt2", "gpt2-lm"), ("attn.c_proj", "mlp.c_proj")),
    **dict.fromkeys(("llama", "llama-lm", "qwen"), _LLAMA_LIKE),
    "vit": ("attention.o_proj", "mlp.fc2"),
    "xlnet": (None, "ff.layer_2"),
    "convnext": (None, "layers.0.pwconv2"),
    "resnet": (None, None),
}
_NOT_TEXT = ("vit", "convnext", "resnet")
REFUSED = {
    "lora": ("resnet",),
    "prefix": ("distilbert", "deberta", "albert", "t5", "t5-narrow", "xlnet", *_NOT_TEXT),
    "prompt": ("gpt2", "llama", "qwen", "t5", "t5-narrow", *_NOT_TEXT),
}


def a_model(family: str) -> Any:
    set_seed(0)
    return _MORE[family]() if family in _MORE else FAMILIES[family].make()


def a_bert(folder: Path) -> BertForSequenceClassification:
    set_seed(0)
    return BertForSequenceClassification.from_pretrained(folder, num_labels=2)


def a_batch(model: Any, count: int = 3) -> dict[str, torch.Tensor]:
    """Inputs of a model, the last text shorter than the others."""
    name = type(model).__name__
    kind = "image" if "Image" in name else "token" if "Token" in name else "class"
    rows = family_examples(kind, count)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    if kind != "image":
        pad = model.config.pad_token_id
        batch["input_ids"][-1, 4:], batch["attention_mask"][-1, 4:] = 0 if pad is None else pad, 0
    return batch if "LM" not in name else {**batch, "labels": batch["input_ids"]}


def stirred(model: nn.Module) -> nn.Module:
    """Take what is trained away from its start, where half of it has no effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


# PEFT


def theirs(model: nn.Module, method: str) -> Any:
    """The model as PEFT alone makes it."""
    config: Any = {
        "lora": peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules="all-linear"),
        "prefix": peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
        "prompt": peft.PromptTuningConfig(
            task_type="SEQ_CLS", num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB"
        ),
    }[method]
    return peft.get_peft_model(model, config)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [Lora(4, 8), Prefix(3), Prompt(3)], ids=lambda method: method.name)
def test_what_peft_makes_trains_and_saves(tiny_bert: Path, tmp_path: Path, method: Any) -> None:
    set_seed(1)
    base = a_bert(tiny_bert)
    prepared = method.prepare(Prepared(base, HEAD))
    set_seed(1)
    reference = theirs(a_bert(tiny_bert), method.name)
    ours = {name: p for name, p in prepared.model.named_parameters() if p.requires_grad}
    wanted = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    assert set(ours) == set(wanted) == {*prepared.always, *prepared.eligible}
    assert all(torch.equal(ours[name], wanted[name]) for name in ours)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in prepared.always} == {"default"}
    assert [name.rpartition(".")[2] for name in prepared.always] == ["weight", "bias"]

    aside = [p for name, p in prepared.model.named_parameters() if ".original_module." in name]
    assert len(aside) == 2 and not any(p.any() for p in aside)  # the same on every machine

    for model in (prepared.model, reference):
        stirred(model)
    method.save(prepared.model, tmp_path / "ours")
    reference.save_pretrained(str(tmp_path / "theirs"))
    found = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    expected = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)
    texts = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for text in texts:
        text["target_modules"] = sorted(text.get("target_modules") or ())
    assert texts[0] == texts[1]

    batch = a_batch(base)
    again = peft.PeftModel.from_pretrained(a_bert(tiny_bert), str(tmp_path / "ours"))
    with torch.no_grad():
        logits = prepared.model.eval()(**batch).logits
        assert torch.allclose(again.eval()(**batch).logits, logits, atol=1e-6)
        if method.name == "lora":
            merged = method.merge(prepared.model)
            assert type(merged) is BertForSequenceClassification
            assert set(merged.state_dict()) == set(a_bert(tiny_bert).state_dict())
            torch.testing.assert_close(merged.eval()(**batch).logits, logits, rtol=1e-4, atol=1e-5)
        else:
            with pytest.raises(ModelError, match="cannot be merged"):
                method.merge(prepared.model)


@pytest.mark.parametrize("family", [name for name in PLACES if name not in ("qwen", "llama-lm", "t5-narrow")])
@pytest.mark.parametrize("method", [Lora(2), Prefix(3), Prompt(3)], ids=lambda method: method.name)
def test_every_family_is_wrapped_or_told_why_not(family: str, method: Any) -> None:
    model = a_model(family)
    batch, head = a_batch(model), task_head(model)
    prepared_head = {name: dict(model.named_parameters())[name].detach().clone() for name in head}
    if family in REFUSED[method.name]:
        with pytest.raises(
            ModelError, match=rf"method '{method.name}' does not apply to {type(model).__name__}"
        ):
            method.prepare(Prepared(model, head))
        return
    prepared = method.prepare(Prepared(model, head))
    copies = {name: p for name, p in prepared.model.named_parameters() if name in prepared.always}
    assert len(copies) == len(head)
    assert all(any(torch.equal(p, old) for old in prepared_head.values()) for p in copies.values())
    stirred(prepared.model)
    prepared.model.train()(**batch).loss.backward()
    reached = [n for n, p in prepared.model.named_parameters() if p.grad is not None and p.grad.any()]
    assert set(reached) == {*prepared.always, *prepared.eligible}  # type: ignore[misc]

    prepared.model.eval()
    short = {key: value[2:] for key, value in batch.items()}
    if family != "xlnet" and "input_ids" in batch and batch["labels"].ndim == 1:  # XLNet pads on the left
        with torch.no_grad():
            logits = prepared.model(**batch).logits[2:]
            cut = {key: value[:, :4] if value.ndim > 1 else value for key, value in short.items()}
            torch.testing.assert_close(prepared.model(**cut).logits, logits, rtol=1e-3, atol=1e-4)


def test_lora_of_chosen_layers_and_of_any_network(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = Lora(2, targets="*.query").prepare(Prepared(a_bert(tiny_bert), HEAD))
    assert len(prepared.eligible or ()) == 4 and all(".query." in name for name in prepared.eligible or ())
    plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2))
    prepared = Lora(2).prepare(Prepared(plain, ("3.weight", "3.bias")))
    assert len(prepared.eligible or ()) == 4 and len(prepared.always) == 2
    merged = Lora(2).merge(stirred(prepared.model))
    assert [type(module) for module in merged] == [nn.Linear, nn.Tanh, nn.Linear, nn.Linear]  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"targets '\*.quary' matches none of its layers such as 'bert\."):
        Lora(targets="*.quary").prepare(Prepared(a_bert(tiny_bert), HEAD))
    with pytest.raises(ModelError, match="already wrapped"):
        Lora().prepare(Prepared(Lora().prepare(Prepared(a_bert(tiny_bert), HEAD)).model, ()))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="needs peft. Install it: pip install peft"):
        Lora().prepare(Prepared(a_bert(tiny_bert), HEAD))
    monkeypatch.undo()
    with pytest.raises(ModelError, match="its module is not"):
        Lora().prepare(Prepared(a_bert(tiny_bert), ("classifier.bias",)))


class ScaledLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, 2 * self.weight, self.bias)


class NamedLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)


def test_lora_refuses_layers_into_which_it_cannot_merge() -> None:
    """Merged, the update would count otherwise than in training, or not at all."""
    computed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    with pytest.warns(FutureWarning, match="deprecated"):
        hooked = nn.utils.weight_norm(nn.Linear(8, 8))  # of the same class as its neighbours
    for layer, name in (
        (ScaledLinear(8, 8), "ScaledLinear"),
        (computed, "ParametrizedLinear"),
        (hooked, "Linear"),
    ):
        with pytest.raises(ModelError, match=rf"'1' \({name}\) computes other than W x \+ b.* targets="):
            Lora(2).prepare(Prepared(nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 2)), ()))
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(4, 8), NamedLinear(8, 8), nn.Linear(8, 2)).to(dtype)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        prepared = Lora(2).prepare(Prepared(model, ()))
        assert torch.equal(model.get_submodule("1.base_layer").weight, before["1.weight"])  # type: ignore[arg-type]
        x = torch.randn(3, 4, dtype=dtype)
        trained = stirred(prepared.model)
        wanted = trained(x)
        torch.testing.assert_close(Lora(2).merge(trained)(x), wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("start", ["vocabulary", "random"])
def test_prompts_are_as_wide_as_embeddings(start: str) -> None:
    model = a_model("electra")
    prepared = Prompt(3, start).prepare(Prepared(model, task_head(model)))
    eligible = [
        p.detach() for name, p in prepared.model.named_parameters() if name in (prepared.eligible or ())
    ]
    assert len(eligible) == 1
    prompt = eligible[0]
    words = model.get_input_embeddings().weight
    assert prompt.shape == (3, 8) and prepared.model.active_peft_config.token_dim == 8  # type: ignore[union-attr]
    assert all(any(torch.equal(row, word) for word in words) for row in prompt) == (start == "vocabulary")


def test_prefix_refuses_gradient_checkpointing(tiny_bert: Path, tmp_path: Path) -> None:
    """Layers that recompute their activations drop what stands in the cache, with no more than a log line."""
    model = a_bert(tiny_bert)
    model.activation_checkpointing_enable()
    with pytest.raises(ModelError, match="does not work with gradient checkpointing"):
        Prefix(3).prepare(Prepared(model, HEAD))
    trainer = method_trainer(tiny_bert, tmp_path, "prefix:3", max_steps=2, save_strategy="no")
    trainer.bare_model.activation_checkpointing_enable()  # type: ignore[operator]
    with pytest.raises(ModelError, match="ignore the prefix"):
        trainer.train()


def test_options_outside_their_range_are_refused() -> None:
    for text in (
        "lora:0",
        "lora:alpha=0",
        "lora:dropout=1",
        "lora:targets=",
        "prefix:0",
        "prompt:start=zero",
        "adapter:0",
        "adapter:placement=sideways",
        "adapter:activation=step",
        "adapter:norms=perhaps",
    ):
        with pytest.raises(ConfigError):
            Combination.parse(text)
    assert Combination.parse("adapter:norms=no").methods == (Adapter(norms=False),)
    for text in ("lora+adapter", "lora+mixout", "adapter+reinit", "prefix+bitfit", "prompt+l2-sp"):
        with pytest.raises(ConfigError, match="cannot be combined"):
            Combination.parse(text)


# Adapters


@pytest.mark.parametrize("family", list(PLACES))
def test_adapters_stand_behind_attention_and_feed_forward(family: str) -> None:
    places = PLACES[family]
    for method, wanted in ((Adapter(4), places), (Adapter(4, "pfeiffer"), places[1:])):
        model = a_model(family)
        batch, head = a_batch(model), task_head(model)
        if None in wanted:
            with pytest.raises(ModelError, match="placement=pfeiffer" if places[1] else "no.* linear layers"):
                method.prepare(Prepared(model, head))
            continue
        names = [name for name, _ in model.named_parameters()]
        with torch.no_grad():
            plain = model.eval()(**batch).logits
        prepared = method.prepare(Prepared(model, head))
        blocks = find_layers(model).blocks
        assert len(blocks) == (1 if family == "albert" else 2)
        for block in blocks:
            found = [name for name, module in block.named_modules() if hasattr(module, "bottleneck")]
            assert found == list(wanted)
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, plain)
        stirred(model)
        assert [name for name, _ in model.named_parameters() if "bottleneck" not in name] == names
        norms = [name for name in prepared.eligible or () if "bottleneck" not in name]
        assert bool(norms) == (method.placement == "houlsby")
        assert all("norm" in name.lower() or ".ln_" in name for name in norms)
        model.train()(**batch).loss.backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == {*prepared.always, *prepared.eligible}  # type: ignore[misc]


def test_adapters_are_refused_where_layers_cannot_be_told_apart() -> None:
    square = nn.ModuleList([nn.Linear(4, 4) for _ in range(6)])
    assert (found := find_projections(square)) and found.attention is None and found.feed_forward is square[5]
    mixture = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)])  # a gate; experts are bare
    assert find_projections(mixture) is None
    assert not is_linear(nn.MultiheadAttention(4, 2).out_proj)  # its forward is never called
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    with pytest.raises(ModelError, match="Linear does not end in a feed-forward"):
        Adapter(2, "pfeiffer").prepare(Prepared(model, ("2.weight", "2.bias")))


def test_adapters_alone_move(tiny_bert: Path, tmp_path: Path) -> None:
    base = {name: p.detach().clone() for name, p in a_bert(tiny_bert).named_parameters()}
    trainer = method_trainer(
        tiny_bert, tmp_path, "adapter:4,placement=pfeiffer", max_steps=6, save_strategy="no"
    )
    trainer.train()
    after = weights(trainer)
    assert all(torch.equal(after[name], value) for name, value in base.items() if name not in HEAD)
    added = [name for name in after if name not in base]
    assert len(added) == 8 and all(after[name].any() for name in added)
    assert not torch.equal(after[HEAD[0]], base[HEAD[0]])


def test_adapters_survive_copies_checkpointing_and_autocast(tiny_bert: Path) -> None:
    prepared = Adapter(4).prepare(Prepared(a_bert(tiny_bert), HEAD))
    with pytest.raises(ModelError, match="already has adapters"):
        Adapter(4).prepare(prepared)
    model: Any = stirred(prepared.model).eval()
    batch = a_batch(model)
    loss = model(**batch).loss
    loss.backward()
    twin = copy.deepcopy(model)
    fresh = Adapter(4).prepare(Prepared(a_bert(tiny_bert), HEAD)).model
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        for other in (twin, fresh.eval()):
            assert torch.equal(other(**batch).logits, model(**batch).logits)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch).logits
        assert torch.allclose(logits.float(), model(**batch).logits, atol=0.05)
    stirred(twin)
    assert not torch.equal(twin(**batch).logits, model(**batch).logits)

    fresh.activation_checkpointing_enable()  # type: ignore[operator]
    fresh.train()
    for module in fresh.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fresh(**batch).loss.backward()
    for (name, ours), wanted in zip(fresh.named_parameters(), model.parameters(), strict=True):
        assert (ours.grad is None) == (wanted.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-5, atol=1e-8)


# All of them


@pytest.mark.parametrize(
    "method", [Lora(2), Prefix(3), Prompt(3), Adapter(4)], ids=lambda method: method.name
)
def test_fisher_information_is_exact(tiny_bert: Path, method: Any) -> None:
    prepared = method.prepare(Prepared(a_bert(tiny_bert), HEAD))
    model: Any = stirred(prepared.model)
    batches = [a_batch(model), {key: value[:2] for key, value in a_batch(model, 4).items()}]
    options = {"eligible": prepared.eligible, "always": prepared.always}
    scores = fisher_information(model, batches, **options)  # type: ignore[arg-type]
    wanted = per_example(model, batches)
    assert set(scores) == set(prepared.eligible)
    for name, score in scores.items():
        assert score.any()
        torch.testing.assert_close(score, wanted[name], rtol=1e-4, atol=1e-9 * float(wanted[name].max()))


@pytest.mark.parametrize(
    "method",
    ["prefix:3", "child-f+lora:2", "child-d+lora:2,dropout=0.2", "child-d+adapter:4"],
)
def test_resume_in_mid_epoch_is_bitwise(tiny_bert: Path, tmp_path: Path, method: str) -> None:
    check_resume(tiny_bert, tmp_path, method, max_steps=9)


def test_rows_of_what_was_added(tiny_bert: Path, tmp_path: Path) -> None:
    for method in ("child-d+lora:4", "child-d+adapter:4"):
        options: dict[str, Any] = {"child": {"granularity": "row"}, "max_steps": 2, "save_strategy": "no"}
        trainer = method_trainer(tiny_bert, tmp_path, method, **options)
        before = weights(trainer)
        trainer.train()
        after, moved = weights(trainer), 0
        for name, part in trainer.select().parts.items():  # type: ignore[union-attr]
            assert torch.equal(before[name][~part.mask()], after[name][~part.mask()])
            moved += int((before[name] != after[name]).sum())
        assert moved > 20


@pytest.mark.parametrize(
    "method",
    [
        "child-d+lora:2",
        "prefix:3",
        "prompt:3",
        "child-d+adapter:4",
        "child-d+mixout+reinit:1",
    ],
)
def test_a_run_from_training_to_merging(
    tiny_bert: Path, sentiment: Path, tmp_path: Path, method: str
) -> None:
    config = RunConfig(
        train=str(sentiment / "train.jsonl"),
        eval=str(sentiment / "dev.jsonl"),
        model=str(tiny_bert),
        method=method,
        epochs=1,
        train_limit=16,
        batch_size=8,
        learning_rate=1e-2,
    )
    result = train_run(config, tmp_path / "run")
    opened = FinishedRun(tmp_path / "run")
    dev = opened.read_input(sentiment / "dev.jsonl", labelled=True)
    assert opened.evaluate(dev) == result.metrics
    answers = [answer["prediction"] for answer in opened.predict(dev)]
    assert len(answers) == 24 and set(answers) <= {"good", "bad"}
    counts = opened.verify()
    assert counts["changed_outside"] == 0 and counts["parameters"] == 39
    inside = {"child-d+lora:2": 0, "prefix:3": 0, "prompt:3": 0, "child-d+adapter:4": 128}
    assert counts["entries_in_delta"] == inside.get(method, result.trained_parameters - counts["new_entries"])
    files = (
        {path.name for path in opened.path.glob("method/*")} if (opened.path / "method").is_dir() else set()
    )
    from_peft = any(word in method for word in ("lora", "prefix", "prompt"))
    assert files == (
        {"README.md", "adapter_config.json", "adapter_model.safetensors"} if from_peft else set()
    )
    if any(word in method for word in ("prefix", "prompt", "adapter")):
        with pytest.raises(ModelError, match="cannot be merged"):
            opened.merged()
        return
    merged = opened.merged()
    assert type(merged) is BertForSequenceClassification
    merged.save_pretrained(tmp_path / "merged")
    plain = BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    batch = a_batch(plain, 8)
    with torch.no_grad():
        wanted = opened.model()(**batch).logits
        torch.testing.assert_close(plain(**batch).logits, wanted, rtol=1e-4, atol=1e-5)
