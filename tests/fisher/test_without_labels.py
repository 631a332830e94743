"""Examples without any label have no loss, and add nothing to the scores, which is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny_kinds import save_tiny_lm
from transformers import AutoModelForCausalLM

from childtuning import fisher_information
from childtuning.errors import DataError


@pytest.mark.parametrize("training", [False, True], ids=["together", "alone"])
def test_an_example_without_labels_adds_nothing(tmp_path: Path, training: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny_lm(tmp_path))
    ids = torch.randint(5, 20, (4, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[2] = -100
    keep = torch.tensor([0, 1, 3])
    with pytest.warns(UserWarning, match="examples without any label.* add nothing to the scores") as told:
        found = fisher_information(model, [{"input_ids": ids, "labels": labels}] * 2, training=training)
    assert len(told) == 1
    wanted = fisher_information(model, [{"input_ids": ids[keep], "labels": labels[keep]}], training=training)
    for name, score in wanted.items():
        torch.testing.assert_close(found[name] * 4, score * 3, rtol=1e-4, atol=1e-9)


def test_a_loss_that_is_not_finite_is_told(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny_lm(tmp_path))
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    ids = torch.full((2, 6), 7)
    with pytest.raises(DataError, match="the loss is nan"):
        fisher_information(model, [{"input_ids": ids, "labels": ids}])
