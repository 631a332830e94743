"""Layer 1: how much each parameter matters to a task, by its Fisher information."""

from childtuning.fisher.gradients import Dense, ExampleGradients, Outer, Rows
from childtuning.fisher.information import fisher_information
from childtuning.fisher.rules import register_rule

__all__ = ["Dense", "ExampleGradients", "Outer", "Rows", "fisher_information", "register_rule"]
