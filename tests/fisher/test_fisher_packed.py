"""Packed rows: each sequence is an example of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
)

import childtuning as ct
from childtuning.fisher.batches import packed_sequences, unpacked

LENGTHS = (5, 9, 2, 7, 3, 12, 4, 6)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(1, 64, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


@pytest.mark.parametrize("marks", ["positions", "ends", "both"])
@pytest.mark.parametrize("fast", [True, False])
def test_scores_are_those_of_the_sequences(
    llama: LlamaForCausalLM, marks: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fast:
        monkeypatch.setenv("CHILDTUNING_FAST", "0")
    alone = [{key: torch.tensor([value]) for key, value in row.items()} for row in rows()]
    wanted = ct.fisher_information(llama, alone)
    collate = DataCollatorWithFlattening(
        return_position_ids=marks != "ends",
        return_flash_attn_kwargs=marks != "positions",
        return_seq_idx=marks == "both",
    )
    found = ct.fisher_information(llama, [collate(rows()[:5]), collate(rows()[5:])])
    assert found.num_examples == len(LENGTHS)
    for name, score in wanted.items():
        torch.testing.assert_close(found[name], score, rtol=1e-4, atol=1e-6 * float(score.max()))


def test_no_batch_is_larger_than_the_row() -> None:
    batch = DataCollatorWithFlattening()(rows())
    parts = unpacked(batch)
    assert sum(len(part["labels"]) for part in parts) == len(LENGTHS)
    assert max(part["labels"].numel() for part in parts) <= batch["labels"].numel()
    for part in parts:
        assert (part["attention_mask"].sum(1) >= 2).all()
        assert (part["labels"][part["attention_mask"] == 0] == -100).all()


def tokens(**more: Any) -> dict[str, Any]:
    ids = torch.arange(1, 7)[None]
    return {"input_ids": ids, "labels": ids, **more}


@pytest.mark.parametrize(
    "batch",
    [
        tokens(),
        tokens(position_ids=torch.arange(6)[None]),
        tokens(
            position_ids=torch.tensor([[1, 1, 1, 0, 1, 2]]),
            labels=torch.tensor([[-100, -100, -100, 1, 2, 3]]),
        ),
        tokens(position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), pixel_values=torch.zeros(1, 3, 4, 4)),
        tokens(position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), attention_mask=torch.ones(1, 6)),
        {"input_ids": torch.ones(2, 6).long(), "labels": torch.tensor([0, 1])},
        [torch.zeros(2, 3)],
    ],
    ids=["no positions", "one sequence", "left padding", "else beside", "a mask", "classes", "no dict"],
)
def test_what_is_no_packed_row_stays_as_it_is(batch: Any) -> None:
    assert packed_sequences(batch) == [] and unpacked(batch)[0] is batch


def test_a_row_without_labels_is_no_example() -> None:
    positions = torch.tensor([[0, 1, 0, 1, 0, 1]])
    labels = torch.tensor([[-100, 2, 3, -100, -100, 5]])  # the first token's is never read
    batch = tokens(position_ids=positions, labels=labels, num_items_in_batch=torch.tensor(3))
    assert packed_sequences(batch) == [slice(0, 2), slice(4, 6)]
    assert [len(part["labels"]) for part in unpacked(batch)] == [2]


def test_a_batch_of_the_official_estimator_is_the_row(llama: LlamaForCausalLM) -> None:
    batch = DataCollatorWithFlattening()(rows()[:3])
    found = ct.fisher_information(llama, [batch], estimator="per-batch")
    llama.eval()(**batch).loss.backward()
    for name, p in llama.named_parameters():
        wanted = p.grad * (1.0 / (p.grad.norm() + 1e-6)).clamp(max=1.0)
        torch.testing.assert_close(found[name], wanted.square(), rtol=1e-4, atol=1e-8)


def test_a_model_that_shifts_no_labels_is_given_rows_as_they_are() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForTokenClassification(BertConfig(vocab_size=16, **sizes))
    one = tokens(position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), labels=torch.tensor([[0, 1, 0, 1, 1, 0]]))
    assert ct.fisher_information(model, [one]).num_examples == 1
