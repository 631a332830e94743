"""The files of ChildTrainer's checkpoints: a delta, the child, and compact state, as safetensors and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from childtuning.child import Child, ChildConfig, TaskFree
from childtuning.child.files import read_json
from childtuning.delta import Delta
from childtuning.errors import BaseMismatchError, ConfigError, DeltaError
from childtuning.optim import ChildOptimizer
from childtuning.optim.checkpoint import load, save
from childtuning.training.child_choice import new_parameters, resized_embeddings
from childtuning.training.method import MethodCallback
from childtuning.training.state_files import load_state, random_state, save_state, set_random_state

SHARDS = "optimizer"  # the folder of a sharded optimizer's state
CHILD_FILE, CHOICE_FILE, METHODS_FILE = "child.safetensors", "child.json", "methods.safetensors"


class CheckpointFiles:
    """Save and load ``ChildTrainer``'s checkpoints, without the pickles of ``transformers.Trainer``."""

    child: Child | TaskFree | None
    is_sharded: bool
    child_config: ChildConfig | None
    touched: Child | None  # all entries trained so far, if more than the child
    _base_name: str | None
    _resumed_from: Path | None
    _trained: set[str] | None  # the parameters that required a gradient when the optimizer was built
    draws_new_parameters = False  # whether whoever loads a delta draws them again, from a seed
    _method_callbacks: Sequence[MethodCallback]

    if TYPE_CHECKING:  # of ChildTrainer and Trainer
        args: Any
        model: Any
        state: Any
        accelerator: Any
        optimizer: Any
        lr_scheduler: Any
        processing_class: Any

        @property
        def bare_model(self) -> nn.Module: ...

        @property
        def child_optimizer(self) -> ChildOptimizer: ...

        def select(self) -> Child | TaskFree: ...

    # What is saved

    def delta(self) -> Delta:
        """Return the current values of the trained entries, and of new parameters, which no file of the base holds."""
        child = self.touched or self.select()
        if self.child_config is not None and self.child_config.preset == "official":
            child = TaskFree(1.0)  # its weight decay changes every parameter
        base = self._base_name or self._loaded_from()
        # PEFT keeps a second copy of a head, which is not used.
        new = [name for name in new_parameters(self.bare_model) if ".original_module." not in name]
        also = [*([] if self.draws_new_parameters else new), *resized_embeddings(self.bare_model)]
        return Delta.capture(self.bare_model, child, base=base, also=also, trained=self._trained)

    def _loaded_from(self) -> str | None:
        """The hub name, or the full path of the folder, that the model was loaded from; ``None`` if it was not."""
        name = getattr(self.bare_model, "name_or_path", None) or None
        return str(Path(name).resolve()) if name and Path(name).is_dir() else name

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        delta = self.delta() if self.is_sharded or self.args.should_save else None
        if delta is None or not self.args.should_save:
            return
        delta.save(folder)
        if isinstance(self.child, Child):
            self.child.save(folder / CHILD_FILE)
        (folder / CHOICE_FILE).write_text(json.dumps(self._choice()), encoding="utf-8")
        config = getattr(self.model, "config", None)
        if config is not None and hasattr(config, "save_pretrained"):
            config.architectures = [type(self.bare_model).__name__]  # as the model's own save_pretrained does
            config.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _choice(self) -> dict[str, Any]:
        """Return how the child was chosen, so that a run is not resumed with another child by mistake."""
        if self.child_config is not None:
            return self.child_config.to_dict()
        return {"child": self.select().fingerprint()}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_sharded:
            save(Path(output_dir) / SHARDS, self.bare_model, self.child_optimizer, weights=False)
        if self.args.should_save:
            if not self.is_sharded:
                save_state(Path(output_dir) / "optimizer.safetensors", self.optimizer.state_dict())
            save_state(Path(output_dir) / "scheduler.safetensors", self.lr_scheduler.state_dict())  # type: ignore[union-attr]
            if self._method_callbacks:
                states = {str(i): callback.state_dict() for i, callback in enumerate(self._method_callbacks)}
                save_state(Path(output_dir) / METHODS_FILE, states)

    def _save_scaler(self, output_dir: str) -> None:
        if self.args.should_save and self.accelerator.scaler is not None:
            save_state(Path(output_dir) / "scaler.safetensors", self.accelerator.scaler.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        os.makedirs(output_dir, exist_ok=True)
        save_state(self._random_file(output_dir), random_state())

    def _random_file(self, folder: str) -> Path:
        return Path(folder) / f"random-{self.args.process_index}.safetensors"

    # What is loaded

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = self._resumed_from = Path(resume_from_checkpoint)
        if not (folder / "delta.json").is_file():
            raise DeltaError(
                f"{folder} is not a checkpoint of ChildTrainer: it has no delta. Resume from another folder."
            )
        choice = folder / CHOICE_FILE
        if choice.is_file() and _completed(read_json(choice, "Resume from another one.")) != self._choice():
            raise ConfigError(
                f"{folder} was trained with a child other than this trainer's. Resume with the same one."
            )
        delta = Delta.load(folder)
        try:
            delta.apply_(self.bare_model if model is None else model)
        except BaseMismatchError:
            if self.touched is None:
                raise
            raise ConfigError(
                f"this trainer has trained entries that {folder} does not hold. Resume with a new trainer, built on "
                "the base model."
            ) from None
        if (folder / CHILD_FILE).is_file():
            self.child = Child.load(folder / CHILD_FILE)
        if self._method_callbacks:
            states = load_state(folder / METHODS_FILE)
            for position, callback in enumerate(self._method_callbacks):
                callback.load_state_dict(states[str(position)])

    def find_best_checkpoint(self) -> None:
        """After a resume, look for the best checkpoint beside the one that was loaded: its folder may have moved."""
        if self._resumed_from is None or self.state.best_global_step is None:
            return
        home, output = self._resumed_from.parent, Path(self.args.output_dir)
        if output.is_dir() and output.samefile(home):
            home = output  # as transformers spells it where it removes old checkpoints
        best = home / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        Delta.load(self.state.best_model_checkpoint).apply_(self.bare_model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            if (Path(checkpoint) / SHARDS).is_dir():
                load(Path(checkpoint) / SHARDS, self.bare_model, self.child_optimizer)
            else:
                self.optimizer.load_state_dict(load_state(Path(checkpoint) / "optimizer.safetensors"))
            self.lr_scheduler.load_state_dict(load_state(Path(checkpoint) / "scheduler.safetensors"))  # type: ignore[union-attr]

    def _load_scaler(self, checkpoint: str | None) -> None:
        path = Path(checkpoint or "") / "scaler.safetensors"
        if checkpoint is not None and self.accelerator.scaler is not None and path.is_file():
            self.accelerator.scaler.load_state_dict(load_state(path))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        # With more processes than wrote the checkpoint, the further ones have none; the first one always has.
        if self._random_file(checkpoint).is_file() or self.args.process_index == 0:
            set_random_state(load_state(self._random_file(checkpoint)))


def _completed(choice: dict[str, Any]) -> dict[str, Any]:
    """Give a choice that an earlier version wrote the options that came since."""
    return choice if "child" in choice else ChildConfig().to_dict() | choice
