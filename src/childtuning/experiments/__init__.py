"""Layer 4: runs: configured, executed, recorded, resumed, and opened again."""

from childtuning.experiments.run_config import RunConfig
from childtuning.experiments.run_folder import RunFolder
from childtuning.experiments.run_scores import score_run
from childtuning.experiments.run_training import train_run

__all__ = ["RunConfig", "RunFolder", "score_run", "train_run"]
