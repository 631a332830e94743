"""Training a compiled model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.methods.trainers import method_trainer, weights
from tests.tiny import without_dropout
from torch import nn

from childtuning.child import Granularity, random_child
from childtuning.optim import ChildOptimizer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo's own
@pytest.mark.parametrize(
    ("method", "child"),
    [
        pytest.param("child-d", {"granularity": "row"}, id="child-d rows"),
        pytest.param("child-d", {"granularity": "column"}, id="child-d columns"),
        pytest.param("child-d", {}, id="child-d", marks=pytest.mark.nightly),
        pytest.param("child-f", {}, id="child-f", marks=pytest.mark.nightly),
        pytest.param("child-d+r3f", {}, id="child-d+r3f", marks=pytest.mark.nightly),
    ],
)
def test_it_trains_as_the_plain_model_does(
    tiny_bert: Path, tmp_path: Path, method: str, child: dict[str, str]
) -> None:
    trained = []
    for compiled in (False, True):
        trainer = method_trainer(
            tiny_bert,
            tmp_path / str(compiled),
            method,
            child=child,
            max_steps=4,
            save_strategy="no",
            torch_compile=compiled,
            torch_compile_backend="aot_eager" if compiled else None,
        )
        without_dropout(trainer.bare_model)
        trainer.train()
        trained.append(weights(trainer))
    assert all(torch.allclose(trained[0][name], trained[1][name], atol=1e-6) for name in trained[0])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo's own
@pytest.mark.parametrize("granularity", ["row", "column", "block"])
def test_structured_layers_break_no_graph(granularity: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(20, 12), nn.Linear(12, 16), nn.Dropout(0.2), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8)
    )
    child = random_child(model, 0.4, granularity=Granularity(granularity, block_shape=(4, 4)))
    optimizer = ChildOptimizer(model.named_parameters(), child, torch.optim.AdamW, model=model)
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(torch.arange(15).view(3, 5))
    optimizer.remove()
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
