"""`childtuning plan` against what optimizers really hold."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from childtuning import ChildConfig, ChildOptimizer
from childtuning.errors import DataError, ModelError
from childtuning.methods import Combination
from childtuning.runs.plan import plan_memory
from childtuning.training import choose_child, load_classifier


@pytest.mark.parametrize("granularity", ["element", "row"])
@pytest.mark.parametrize("method", ["full", "child-f", "child-random", "last-k:1", "bitfit", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_optimizer_holds_what_was_planned(
    tiny_bert: Path, method: str, granularity: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    if dtype is torch.bfloat16:
        shutil.copytree(tiny_bert, tmp_path / "bf16")
        tiny_bert = tmp_path / "bf16"
        transformers.AutoModel.from_pretrained(tiny_bert, dtype=dtype).save_pretrained(tiny_bert)
    methods = Combination.parse(method)
    density = 0.25 if methods.takes_density else 1.0
    options: dict[str, Any] = {"density": density, "granularity": granularity}
    (plan,) = plan_memory(str(tiny_bert), [method], ChildConfig(**options), num_labels=3)
    loaded = load_classifier(str(tiny_bert), num_labels=3)
    prepared = methods.prepare(loaded.model, loaded.new_parameters)
    config = replace(methods.child(ChildConfig(**options)), eligible=prepared.eligible)
    child = choose_child(config, prepared.model, list, always=prepared.always)
    optimizer = ChildOptimizer(prepared.model.named_parameters(), child, torch.optim.AdamW, lr=1e-3)
    prepared.model(input_ids=torch.tensor([[2, 5, 3]]), labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    trained = sum(len(runs) if runs is not None else p.numel() for p, runs in optimizer.trained())
    assert plan.trained_parameters == pytest.approx(trained, rel=0.02)
    assert plan.optimizer == pytest.approx(optimizer.num_state_bytes, rel=0.1)
    assert plan.weights == sum(p.nbytes for p in prepared.model.parameters())
    assert next(prepared.model.parameters()).dtype is dtype


@pytest.mark.parametrize(
    ("method", "granularity"),
    [
        ("full", "element"),
        ("child-random", "column"),
        ("child-random", "row"),
        ("lora", "element"),
        ("last-k:1", "element"),
    ],
)
def test_the_forward_pass_keeps_what_was_planned(tiny_bert: Path, method: str, granularity: str) -> None:
    methods = Combination.parse(method)
    options: dict[str, Any] = {"density": 0.25 if methods.takes_density else 1.0, "granularity": granularity}
    size = {"batch_size": 8, "max_length": 48}
    (plan,) = plan_memory(str(tiny_bert), [method], ChildConfig(**options), num_labels=3, **size)
    loaded = load_classifier(str(tiny_bert), num_labels=3)
    prepared = methods.prepare(loaded.model.train(), loaded.new_parameters)
    child = choose_child(
        replace(methods.child(ChildConfig(**options)), eligible=prepared.eligible),
        prepared.model,
        list,
        always=prepared.always,
    )
    net = prepared.model
    optimizer = ChildOptimizer(
        net.named_parameters(), child, torch.optim.AdamW, model=net if granularity != "element" else None
    )
    outside = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(5, 40, (8, 48))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = net(
            input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.zeros(8, dtype=torch.long)
        ).loss
    assert plan.activations is not None
    assert sum(kept.values()) <= plan.activations <= 2 * sum(kept.values())  # what is at work is beside it
    assert plan.peak == plan.weights + plan.optimizer + max(plan.activations, plan.gradients)
    del loss
    optimizer.remove()


SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("task_kind", "kind"),
    [
        ("token-classification", "Bert"),
        ("causal-lm", "Llama"),
        ("image-classification", "ViT"),
    ],
)
def test_other_kinds_of_task(task_kind: str, kind: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"ViT": {"image_size": 32, "patch_size": 8}, "Llama": {"vocab_size": 64}}
    getattr(transformers, f"{kind}Config")(**SIZES, **more.get(kind, {})).save_pretrained(tmp_path)
    small, large = (
        plan_memory(str(tmp_path), ["full"], task_kind=task_kind, batch_size=size)[0] for size in (4, 8)
    )
    assert small.activations is not None and large.activations is not None
    assert 1.8 < large.activations / small.activations < 2.1
    assert small.weights == large.weights and small.scoring == 0


def test_what_cannot_be_run_without_values_is_planned_without_activations(
    tiny_bert: Path, tmp_path: Path
) -> None:
    twice, sparse = (
        plan_memory(str(tiny_bert), ["child-d+r3f"])[0],
        plan_memory(str(moe(tmp_path)), ["full"])[0],
    )
    assert twice.activations is None and sparse.activations is None
    assert "in a way of its own" in twice.note and "without values" in sparse.note
    assert twice.peak == twice.weights + twice.optimizer + twice.gradients
    assert twice.scoring > twice.weights


def moe(folder: Path) -> Path:
    from transformers import MixtralConfig

    config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=2, pad_token_id=0, **SIZES)
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["l2-sp", "recadam"])
def test_what_a_method_pulls_towards_is_counted(tiny_bert: Path, method: str) -> None:
    plain, pulled = plan_memory(str(tiny_bert), ["full", method])
    always = sum(4 * size for size in (16 * 2, 2))  # the head, which is not pulled
    assert pulled.optimizer - plain.optimizer == plain.weights - always


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("child-pruned", "plan cannot count 'child-pruned'"),
        ("reinit", "plan cannot count 'reinit'"),
        ("prompt", "plan cannot count 'prompt'"),
        ("last-k:9", "last-k:9 needs 9 layers, but the model has 2"),
    ],
)
def test_what_cannot_be_counted_is_told(tiny_bert: Path, method: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        plan_memory(str(tiny_bert), [method])


def test_what_the_model_cannot_take_is_told(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the model has 64 positions, got 65"):
        plan_memory(str(tiny_bert), ["full"], max_length=65)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": "x"}')
    with pytest.raises(ModelError, match="cannot be read"):
        plan_memory(str(tmp_path), ["full"])
    with pytest.raises(DataError, match="[Uu]nknown kind of task"):
        plan_memory(str(tiny_bert), ["full"], task_kind="nonsense")


def test_a_small_batch_needs_little(tiny_bert: Path) -> None:
    """What is counted beside the kept activations does not hold gradients of what is frozen."""
    one, head = plan_memory(str(tiny_bert), ["child-random", "head"], ROWS, batch_size=1, max_length=4)
    assert one.activations is not None and head.activations is not None
    assert head.activations < one.activations < one.weights


def test_the_fisher_pass_is_planned_without_dropout(tmp_path: Path) -> None:
    scoring, peaks = [], []
    for p in (0.0, 0.1):
        config = transformers.BertConfig(**SIZES, hidden_dropout_prob=p, attention_probs_dropout_prob=p)
        config.save_pretrained(tmp_path)
        fisher, full = plan_memory(str(tmp_path), ["child-d", "full"])
        scoring.append(fisher.scoring)
        peaks.append(full.peak)
    assert scoring[1] < 1.1 * scoring[0] and peaks[1] > 1.1 * peaks[0]


ROWS = ChildConfig(density=0.1, granularity="row")
