"""Intermediate-task training: a run that starts where another one ended. [Phang et al. 2018, arXiv 1811.01088]"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from childtuning.child import Child
from childtuning.delta import Delta
from childtuning.errors import ModelError
from childtuning.experiments.run_config import RunConfig
from childtuning.experiments.run_files import CONFIG, START
from childtuning.training import LoadedModel


def apply_start(config: RunConfig, loaded: LoadedModel, folder: Path | None = None) -> Delta | None:
    """Bring a loaded model to where the run starts; the new head is left as it is.

    Args:
        config: names what to start from; a model folder was loaded as the model itself.
        loaded: the base model with a head for the task.
        folder: of a run that was begun: what it started from is there, whatever has become of the other run.
    Returns:
        what was changed in the base model, to be kept with the run; ``None`` where it starts from the base model.
    Raises:
        ConfigError: there is no such run, or it is not finished.
        ModelError: its model is another one than the run's.
    """
    if config.init_from is None:
        return None
    if folder is not None and (folder / START).is_dir():
        delta = Delta.load(folder / START)
        delta.apply_(loaded.model)
        return delta
    if is_model_folder(config.init_from):
        return None
    from childtuning.experiments.run_folder import RunFolder

    other = RunFolder(config.init_from).merged()
    values: dict[str, Tensor] = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    new = set(loaded.new_parameters)
    masks: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if name in new:
                continue
            value = values.get(name)
            if value is None or value.shape != parameter.shape:
                raise ModelError(
                    f"the run in {config.init_from!r} has no {name!r} of shape {list(parameter.shape)}. "
                    "Start from a run of the same base model."
                )
            masks[name] = (bits(parameter) != bits(value)).any(1).view(parameter.shape)
            parameter.copy_(value)
        for name, buffer in loaded.model.named_buffers():
            if name in values and values[name].shape == buffer.shape:
                buffer.copy_(values[name])
    return Delta.capture(loaded.model, Child.from_masks(masks), base=loaded.name)


def is_model_folder(path: str) -> bool:
    """Tell a model folder from a run's, or from nothing."""
    folder = Path(path).expanduser()
    return (folder / "config.json").is_file() and not (folder / CONFIG).is_file()


def bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes by entry, uint8 [entries, bytes]: what bitwise equality compares."""
    return tensor.detach().contiguous().view(-1, 1).view(torch.uint8)
