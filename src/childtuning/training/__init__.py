"""Layer 2: child-tuning in the Hugging Face Trainer, and the interface of methods."""

from childtuning.child.layers import Layers, find_layers
from childtuning.training.adapters import adapter_delta, shira_mask
from childtuning.training.child_choice import (
    ScoreFn,
    choose_child,
    fisher_sample,
    fisher_scores,
    in_model_order,
    saves_computation,
    task_head,
)
from childtuning.training.export import make_patch, write_model
from childtuning.training.factory import ChildOptimizerFactory
from childtuning.training.further_pass import IGNORED, predicted_labels
from childtuning.training.method import (
    PARTS,
    ChildTraining,
    LossStep,
    Method,
    MethodCallback,
    Prepared,
    logits_of,
)
from childtuning.training.models import (
    LoadedModel,
    bare_architecture,
    has_fast_bf16,
    load_classifier,
    load_model,
    model_folder,
    num_positions,
    packaged_model,
)
from childtuning.training.rates import layer_width, suggested_epochs, suggested_rate
from childtuning.training.reference import ReferenceModel
from childtuning.training.trainer import ChildTrainer

__all__ = [
    "ChildOptimizerFactory",
    "ChildTrainer",
    "ChildTraining",
    "IGNORED",
    "Layers",
    "LoadedModel",
    "LossStep",
    "Method",
    "MethodCallback",
    "PARTS",
    "Prepared",
    "ReferenceModel",
    "ScoreFn",
    "adapter_delta",
    "bare_architecture",
    "choose_child",
    "find_layers",
    "fisher_sample",
    "fisher_scores",
    "has_fast_bf16",
    "in_model_order",
    "layer_width",
    "load_classifier",
    "load_model",
    "logits_of",
    "make_patch",
    "model_folder",
    "num_positions",
    "packaged_model",
    "predicted_labels",
    "saves_computation",
    "shira_mask",
    "suggested_epochs",
    "suggested_rate",
    "task_head",
    "write_model",
]
