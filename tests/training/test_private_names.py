"""What of transformers' private names is used: one clear line where a release moves one."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import transformers
from transformers import AutoModel, BertConfig, BertModel, Trainer

import childtuning.training

FOLDER = Path(childtuning.training.__file__).parent
OVERRIDDEN = {
    "_save",
    "_save_optimizer_and_scheduler",
    "_save_scaler",
    "_save_rng_state",
    "_load_from_checkpoint",
    "_load_best_model",
    "_load_optimizer_and_scheduler",
    "_load_scaler",
    "_load_rng_state",
    "_clip_grad_norm",
    "_get_grad_norm",
    "_wrap_model",
}
CALLED = {"_remove_unused_columns", "_get_collator_with_removed_columns", "_prepare_inputs"}


def ours(name: str) -> str:
    return next(path.name for path in sorted(FOLDER.glob("*.py")) if name in path.read_text())


@pytest.mark.parametrize("name", sorted(OVERRIDDEN | CALLED))
def test_trainer_has(name: str) -> None:
    moved = (
        f"transformers {transformers.__version__} has no Trainer.{name}, which training/{ours(name)} needs"
    )
    assert hasattr(Trainer, name), moved
    if name in OVERRIDDEN:
        source = inspect.getsource(inspect.getmodule(Trainer))  # type: ignore[arg-type]
        assert f"self.{name}(" in source, f"{moved}: it is there, and no longer called"


def test_no_other_is_used() -> None:
    """A private name of the Trainer's that comes in stands in the lists above."""
    private = {name for name in vars(Trainer) if re.match("_[a-z]", name)}
    found = set()
    for path in FOLDER.glob("*.py"):
        found |= set(re.findall(r"(?:self\.|trainer\.|def )(_[a-z_]+)\(", path.read_text()))
    assert found & private == OVERRIDDEN | CALLED


def test_a_model_can_be_sharded_after_it_is_loaded() -> None:
    for name in (
        "prepare_distribute_model",
        "maybe_distribute_model",
        "is_distributed_loading_by_transformers",
    ):
        assert hasattr(BertModel, name), (
            f"transformers {transformers.__version__} has no PreTrainedModel.{name}, which training/sharing.py needs"
        )


def test_a_loaded_parameter_is_marked(tmp_path: Path) -> None:
    from childtuning.training.child_choice import new_parameters

    assert AutoModel._model_mapping.get(BertConfig, None) is BertModel, "AutoModel._model_mapping has moved"
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=8, **sizes)).save_pretrained(tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    wanted = ("classifier.weight", "classifier.bias")
    assert new_parameters(loaded) == wanted, (
        "transformers marks loaded parameters no longer: _is_hf_initialized"
    )
