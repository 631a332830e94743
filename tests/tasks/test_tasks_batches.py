"""Tokenising, padding and batching: properties with hypothesis, and a tiny tokenizer made here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from childtuning.errors import ConfigError, DataError
from childtuning.tasks.batches import EncodedExamples, LengthBucketBatches, PaddingCollator, encode
from childtuning.tasks.examples import Examples

torch.set_num_threads(1)


def make_tokenizer(*, special: bool = True, pad: bool = True, side: str = "right"):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghij"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="[UNK]",
        pad_token="[PAD]" if pad else None,
        padding_side=side,
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_encode_pairs_truncates_the_longer_first(tokenizer):
    rows = Examples(["a b c d e f", "a"], ["g", "h"], ["y", "x"])
    encoded = encode(tokenizer, rows, max_length=7, label_ids={"x": 0, "y": 1})
    assert encoded.lengths == [7, 5] and len(encoded) == 2
    assert encoded[0] == {
        "input_ids": [1, 4, 5, 6, 2, 10, 2],
        "attention_mask": [1] * 7,
        "token_type_ids": [0] * 5 + [1] * 2,
        "labels": 1,
    }


def test_encode_numbers_and_unlabelled(tokenizer):
    assert encode(tokenizer, Examples(["a"], None, [0.5]), max_length=8)[0]["labels"] == 0.5
    assert "labels" not in encode(tokenizer, Examples(["a"]), max_length=8)[0]
    assert len(encode(tokenizer, Examples([]), max_length=8)) == 0


def test_encode_gives_an_empty_text_a_token():
    encoded = encode(make_tokenizer(special=False), Examples(["", "a b"]), max_length=8)
    assert encoded.lengths == [1, 2]
    assert encoded[0] == {"input_ids": [3], "attention_mask": [1], "token_type_ids": [0]}


def test_encode_errors(tokenizer):
    with pytest.raises(ConfigError, match="above the 3 special tokens of a row, got 3"):
        encode(tokenizer, Examples(["a"], ["b"]), max_length=3)
    with pytest.raises(DataError, match=r"never saw in the examples: 'z'\. Known: 'x'"):
        encode(tokenizer, Examples(["a"], None, ["z"]), max_length=8, label_ids={"x": 0})
    with pytest.raises(DataError, match="Row 1 has the class label 'z', but no label ids"):
        encode(tokenizer, Examples(["a"], None, ["z"]), max_length=8)


def test_collator_pads_to_the_longest(tokenizer):
    encoded = encode(tokenizer, Examples(["a", "a b c"], None, [1.5, 2.0]), max_length=8)
    batch = PaddingCollator(tokenizer, None)([encoded[0], encoded[1]])
    assert batch["input_ids"].tolist() == [[1, 4, 2, 0, 0], [1, 4, 5, 6, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [1.5, 2.0]
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}


def test_collator_rounds_up_within_the_limit(tokenizer):
    encoded = encode(tokenizer, Examples(["a b c"], None, ["x"]), max_length=8, label_ids={"x": 0})
    assert PaddingCollator(tokenizer)([encoded[0]])["input_ids"].shape == (1, 8)
    assert PaddingCollator(tokenizer, 8, max_length=6)([encoded[0]])["input_ids"].shape == (1, 6)
    assert PaddingCollator(tokenizer, 64)([encoded[0]])["input_ids"].shape == (1, 32)
    assert PaddingCollator(tokenizer)([encoded[0]])["labels"].dtype == torch.int64


def test_collator_pads_left_and_makes_a_mask():
    collate = PaddingCollator(make_tokenizer(side="left"), None)
    batch = collate([{"input_ids": [4]}, {"input_ids": [4, 5]}])
    assert batch["input_ids"].tolist() == [[0, 4], [4, 5]]
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 1]]
    assert "labels" not in batch


def test_collator_errors(tokenizer):
    with pytest.raises(ConfigError, match="no padding token"):
        PaddingCollator(make_tokenizer(pad=False))
    with pytest.raises(ConfigError, match="pad_to_multiple_of"):
        PaddingCollator(tokenizer, 0)


LENGTHS = st.lists(st.integers(1, 40), max_size=300)


@given(LENGTHS, st.integers(1, 9), st.integers(-3, 10), st.integers(0, 5), st.booleans())
@settings(max_examples=50, deadline=None)
def test_every_row_once_and_a_pure_function_of_seed_and_epoch(lengths, batch_size, seed, epoch, shuffle):
    sampler = LengthBucketBatches(lengths, batch_size, seed=seed, shuffle=shuffle)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == len(sampler)
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    again = LengthBucketBatches(lengths, batch_size, seed=seed, shuffle=shuffle)
    list(again)  # an epoch before leaves nothing behind
    again.set_epoch(epoch)
    assert list(again) == batches
    if not shuffle:
        assert [row for batch in batches for row in batch] == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 9), st.booleans())
@settings(max_examples=30, deadline=None)
def test_drop_last_keeps_full_batches(lengths, batch_size, shuffle):
    sampler = LengthBucketBatches(lengths, batch_size, seed=0, shuffle=shuffle, drop_last=True)
    batches = list(sampler)
    assert len(batches) == len(sampler) == len(lengths) // batch_size
    assert all(len(batch) == batch_size for batch in batches)
    assert len({row for batch in batches for row in batch}) == len(batches) * batch_size


def test_epochs_and_seeds_differ():
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = LengthBucketBatches(list(range(64)), 4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(orders[i] != orders[j] for i in range(9) for j in range(i))


def test_batches_are_of_similar_length():
    lengths = torch.randint(5, 120, (800,), generator=torch.Generator().manual_seed(0)).tolist()

    def padded(sampler: LengthBucketBatches) -> int:
        return sum(max(lengths[row] for row in batch) * len(batch) for batch in sampler)

    bucketed = padded(LengthBucketBatches(lengths, 16, seed=0))
    assert bucketed < 1.05 * sum(lengths)
    assert padded(LengthBucketBatches(lengths, 16, seed=0, shuffle=False)) > 1.5 * sum(lengths)


def test_global_random_streams_are_left_alone():
    before = torch.get_rng_state()
    list(LengthBucketBatches(list(range(100)), 8, seed=0))
    assert torch.equal(before, torch.get_rng_state())


def test_works_as_a_batch_sampler(tokenizer):
    rows = Examples([" ".join("abcde"[: 1 + i % 5]) for i in range(20)], None, [float(i) for i in range(20)])
    encoded = encode(tokenizer, rows, max_length=16)
    assert isinstance(encoded, EncodedExamples)
    sampler = LengthBucketBatches(encoded.lengths, 4, seed=0)
    loader = DataLoader(encoded, batch_sampler=sampler, collate_fn=PaddingCollator(tokenizer))
    seen = torch.cat([batch["labels"] for batch in loader])
    assert sorted(seen.tolist()) == [float(i) for i in range(20)]


def test_batch_size_error():
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        LengthBucketBatches([1], 0, seed=0)
