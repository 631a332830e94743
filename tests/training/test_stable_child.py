"""``fisher_examples="auto"``: the Fisher pass ends when more examples hardly change the child."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from childtuning.child import ChildConfig, select_child
from childtuning.errors import ConfigError
from childtuning.training import ChildTrainer, fisher_sample
from childtuning.training.child_choice import StopWhenStable


def test_auto_takes_all_examples_in_random_order_sorted_within_each_group():
    lengths = torch.randint(5, 90, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    order = fisher_sample(200, "auto", 3, lengths)
    assert sorted(order) == list(range(200)) and order != fisher_sample(200, "auto", 4, lengths)
    for start in range(0, 200, StopWhenStable.EXAMPLES):
        group = [lengths[i] for i in order[start : start + StopWhenStable.EXAMPLES]]
        assert group == sorted(group)
    assert min(order[:64]) < 100 < max(order[:64])  # a sample of all, not the shortest


def test_groups_are_of_whole_batches():
    lengths = list(range(300))
    order = fisher_sample(300, "auto", 0, lengths, 48)
    assert all(order[start : start + 96] == sorted(order[start : start + 96]) for start in (0, 96, 192))


def test_scores_that_are_all_zero_are_not_stable():
    stop = StopWhenStable(partial(select_child, density=0.5))
    assert not any(stop({"w": torch.zeros(10)}, done) for done in range(64, 2000, 64))


def test_a_limit_draws_the_same_examples_as_ever():
    drawn = fisher_sample(100, 10, 0)
    assert drawn == sorted(drawn) and len(set(drawn)) == 10
    assert fisher_sample(10, 100, 0) == fisher_sample(10, None, 0) == list(range(10))


@pytest.mark.parametrize("density", [0.1, "auto"])
def test_it_stops_at_the_first_child_that_is_like_the_one_before(density):
    generator = torch.Generator().manual_seed(0)
    true = torch.rand(4000, generator=generator) ** 4
    stop = StopWhenStable(partial(select_child, density=density))
    sums, overlaps, last = torch.zeros(4000), [], None
    for done in range(16, 100_000, 16):
        sums += true * torch.randn(4000, 16, generator=generator).square().sum(1)
        if stop({"w": sums}, done):
            break
        if done % 64 == 0:
            child = select_child({"w": sums}, density)
            if last is not None:
                overlaps.append(child.overlap(last) * min(child.num_trained, last.num_trained)
                                / max(child.num_trained, last.num_trained))  # fmt: skip
            last = child
    assert 256 <= done < 90_000 and done % 64 == 0
    assert overlaps and max(overlaps[3:], default=0.0) < 0.98


def test_the_trainer_says_how_many_examples_chose_the_child(tiny_bert, tmp_path):
    from transformers import AutoModelForSequenceClassification, TrainingArguments

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    one = {"input_ids": torch.tensor([5, 6, 7]), "attention_mask": torch.ones(3, dtype=torch.long)}
    data = [{**one, "labels": torch.tensor(0)} for _ in range(400)]  # the same example: stable at once
    trainer = ChildTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True),
        train_dataset=data,
        child=ChildConfig(density=0.1, fisher_examples="auto"),
    )
    trainer.select()
    assert trainer.num_scored == 256


def test_the_official_child_takes_no_auto():
    with pytest.raises(ConfigError, match="fisher_examples='auto' needs preset=None"):
        ChildConfig(fisher_examples="auto", preset="official")
    with pytest.raises(ConfigError, match="fisher_examples must be"):
        ChildConfig(fisher_examples="some")
