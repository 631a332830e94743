"""Layer 1: how much each parameter matters to a task, by its Fisher information."""

from childtuning.fisher.costs import training_costs
from childtuning.fisher.information import fisher_information
from childtuning.fisher.losses import losses_by_slices

__all__ = ["fisher_information", "losses_by_slices", "training_costs"]
