"""A finished run on its way to production: a model folder, a patch of the base's checkpoint, or PEFT's own files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from childtuning.child import Child
from childtuning.child.eligible import named
from childtuning.delta import Delta
from childtuning.delta.delta import persistent_buffers
from childtuning.delta.files import bits
from childtuning.delta.patch import Patch
from childtuning.errors import BaseMismatchError, ConfigError, ModelError, did_you_mean
from childtuning.runs.folder import METHOD_FILES, START
from childtuning.training import make_patch, write_model
from childtuning.training.export import check_empty
from childtuning.training.on_disk import Checkpoint

Form = Literal["model", "patch", "peft", "hub"]  # hub: written by ``hub.publish``


def export_run(run: Any, folder: str | Path, to: Form = "model") -> Path:
    """Write a run's model in a form that others read.

    Args:
        run: a ``FinishedRun``.
        folder: new or empty.
        to: ``model``: an ordinary folder for transformers, with the tokenizer or image processor; written tensor by
            tensor where the run changed the base model's parameters alone. ``patch``: see ``Patch``. ``peft``: the
            adapter as PEFT reads it, where it is all that the run changed.
    Raises:
        ConfigError: the folder is not empty, or the run has no such form.
        BaseMismatchError: the base model has changed.
        ModelError: the modules added by a method cannot be merged.
    """
    if to not in get_args(Form):
        raise ConfigError(f"a run is exported to {', '.join(get_args(Form))}, got {to!r}. "
                          + did_you_mean(str(to), get_args(Form)))  # fmt: skip
    folder = Path(folder).expanduser()
    check_empty(folder)
    run.check_sound()
    if to == "peft":
        _export_adapter(run, folder)
    elif to == "patch":
        checked_patch(run)[0].save(folder)
    else:
        _export_model(run, folder)
    return folder


def _export_adapter(run: Any, folder: Path) -> None:
    if (run.path / START).is_dir():
        raise ConfigError(
            f"the run in {str(run.path)!r} started from another run, whose changes PEFT's files do not hold. "
            "Export to model or patch."
        )
    files = run.path / METHOD_FILES
    if not (files / "adapter_config.json").is_file():
        raise ConfigError(
            f"the run in {str(run.path)!r} is of method {run.method!r}, which is not PEFT's. Export to model or patch."
        )
    before = persistent_buffers(run.untuned(run.base())) if run.delta.buffers else {}
    for name, buffer in run.delta.buffers.items():
        if not torch.equal(before[name], buffer):
            raise ConfigError(
                f"the run in {str(run.path)!r} changed {name!r}, which PEFT's files do not hold. Export to model or "
                "patch."
            )
    shutil.copytree(files, folder, dirs_exist_ok=True)


def _streamed(run: Any) -> tuple[Patch, Any, Checkpoint]:
    """Return the run's patch with the bare model and the checkpoint that it is for.

    Raises:
        BaseMismatchError, ModelError: the run changed more than values of its base model, or is of another one.
    """
    bare = run.bare_model()
    added = set(run.delta.parts).difference(named(bare))
    if added:
        raise ModelError(
            f"method {run.method!r} adds modules ({min(added)!r}), which are merged into the weights."
        )
    if all(part.is_whole for part in run.delta.parts.values()):
        run.base()  # no frozen entry is left to compare: the base is told by its hash as it is loaded
    checkpoint = Checkpoint(run.base_folder())
    return make_patch(run.changes(), bare, checkpoint), bare, checkpoint


def checked_patch(run: Any) -> tuple[Patch, Checkpoint]:
    """Return the patch of what a run changed, and the base's checkpoint, which was compared with it.

    Where a method added modules, the merged weights are written whole.
    """
    try:
        patch, _, checkpoint = _streamed(run)
        _check(patch, checkpoint)
    except (BaseMismatchError, ModelError):
        base = {name: parameter.detach() for name, parameter in run.base_parameters()}
        merged, checkpoint = run.merged(), Checkpoint(run.base_folder())
        patch = make_patch(_whole_changes(base, merged), merged, checkpoint)
        _check(patch, checkpoint)
    return patch, checkpoint


def _check(patch: Patch, checkpoint: Checkpoint) -> None:
    """Read the checkpoint once, one tensor at a time, and compare it with the patch's base."""
    for name in patch.hashes:
        patch.apply_(name, checkpoint.tensors[name].read())


def _whole_changes(base: Mapping[str, Tensor], merged: Any) -> Delta:
    """Return the parameters in which a merged model differs from its base, whole."""
    shapes = {}
    for name, parameter in named(merged).items():
        old = base.get(name)
        if old is None or old.shape != parameter.shape or bool((bits(old) != bits(parameter)).any()):
            shapes[name] = tuple(parameter.shape)
    return Delta.capture(merged, Child.whole(shapes))


def _export_model(run: Any, folder: Path) -> None:
    processor = run.processor()  # if there is none, nothing is written
    try:
        patch, bare, checkpoint = _streamed(run)
        write_model(patch, bare, checkpoint, folder)
    except (BaseMismatchError, ModelError) as reason:
        model = run.merged()  # says whether it is the right base
        run.tell(f"the model is put together in memory: {reason}")
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
