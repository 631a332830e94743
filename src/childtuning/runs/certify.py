"""Certificates of runs, and the check of any two checkpoints against one."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from childtuning.child.eligible import match_names
from childtuning.child.files import file_hash
from childtuning.child.units import Granularity, Part
from childtuning.delta.certificate import Certificate, first_moved
from childtuning.errors import ConfigError, DeltaError
from childtuning.runs.export import checked_patch
from childtuning.runs.folder import CONFIG, DATA
from childtuning.training.on_disk import Checkpoint

_RANGE = re.compile(r"(.+?)\[(\d*):(\d*)\]")


def certify(run: Any, folder: Path | None = None, base: str | None = None) -> Certificate:
    """Return a run's certificate, after a check of its base model.

    Args:
        run: a ``FinishedRun``.
        folder: whose files are hashed, if they are not the run's own.
        base: what the base model is called there.
    Raises:
        BaseMismatchError: the base model has changed.
    """
    patch, checkpoint = checked_patch(run)
    place: Path = run.path if folder is None else folder
    files = {"delta": place / "delta.safetensors", "config": place / CONFIG, "data": place / DATA}
    about = {
        "base": {
            "name": base or run.about["base_name"],
            "sha256": {f.name: file_hash(f) for f in checkpoint.files},
        },
        "method": run.method,
        "sha256": {name: file_hash(path) for name, path in files.items() if path.is_file()},
        "versions": {
            "childtuning": version("childtuning"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
    }
    return Certificate.of(patch, about)


@dataclass(frozen=True)
class Verdict:
    """Whether a model is its base model but for what was to be trained.

    Attributes:
        holds: whether it is.
        reason: the first thing that is not as it should be; empty if all is well.
        tensors, entries: how many were compared.
        trained: entries that may have moved.
        moved: entries that have moved, of tensors that were compared.
        root: the certificate's.
    """

    holds: bool
    reason: str
    tensors: int
    entries: int
    trained: int
    moved: int
    root: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return asdict(self)


def verify(
    base: str | Path,
    model: str | Path,
    certificate: str | Path | Certificate | None = None,
    trained: Sequence[str] = (),
) -> Verdict:
    """Compare two checkpoints, one tensor at a time, bit by bit, up to the first entry that moved and should not have.

    Args:
        base, model: model folders with safetensors.
        certificate: says what may have moved; a folder or its JSON file.
        trained: without a certificate, patterns over the base's names for what may have moved; ``name[a:b]`` means rows
            a … b − 1 alone. A tensor that the base lacks may be there if a pattern matches it.
    Raises:
        ConfigError: both are given, or a pattern matches nothing.
        CorruptFileError: a file is damaged.
    """
    if (Path(model) / DATA).is_file():
        raise ConfigError(
            f"{model} is a run, not a model. Write one: childtuning export {model} --to model --output FOLDER"
        )
    before, after = Checkpoint(base), Checkpoint(model)
    if certificate is not None and trained:
        raise ConfigError("a certificate says what was trained, got trained as well. Pass one of them.")
    told = None
    if certificate is not None and not isinstance(certificate, Certificate):
        path = Path(certificate)
        if (path / DATA).is_file():
            raise ConfigError(
                f"{path} is a run, not a certificate. Write one: childtuning inspect {path} --certificate FOLDER"
            )
        told = Certificate.load(path.parent if path.name.endswith(".json") else path)
    elif certificate is not None:
        told = certificate
    names = _aligned(before, after)
    parts = _told(told, before, after, names) if told is not None else _claimed(before, after, names, trained)
    added = set(told.added) if told is not None else set(parts).difference(before.tensors)
    unknown = sorted(set(after.tensors).difference({names.get(n, n) for n in parts}))
    entries = moved = compared = 0
    reason = f"{unknown[0]!r} is in the model and neither in the base nor trained" if unknown else ""
    if reason and told is None:
        reason += ". Name with --trained what may differ, or give a certificate."
    if (after.folder / "adapter_config.json").is_file():
        reason = "an adapter lies beside the model (adapter_config.json), which transformers applies as it loads it"
    for name, part in parts.items():
        if reason:
            break
        there = names.get(name, name)
        if there not in after.tensors:
            reason = f"{there!r} is missing in the model"
            continue
        compared, entries = compared + 1, entries + part.numel
        if name in added:
            if name in before.tensors:
                reason = f"{name!r} is in the base, and the certificate says that it was added"
            elif after.tensors[there].shape != part.shape:
                reason = f"{name!r} has shape {list(after.tensors[there].shape)}, and was added as {list(part.shape)}"
            continue
        if name not in before.tensors:
            reason = f"{name!r} is missing in the base"
            continue
        old = before.tensors[name].read()
        if told is not None and name in told.parts and not told.is_base(name, old):
            reason = f"{name!r} is not that of the certificate's base model"
            continue
        try:
            first, count = first_moved(part, old, after.tensors[there].read())
        except DeltaError as fault:
            reason = f"{name!r} differs: {fault}"
            continue
        moved += count
        if first >= 0:
            place = torch.unravel_index(torch.tensor(first, device="cpu"), part.shape)
            reason = f"{name}{[int(i) for i in place]} moved, and was not to be trained"
    root = None if told is None else told.root
    num_trained = sum(part.num_trained for part in parts.values())
    return Verdict(not reason, reason, compared, entries, num_trained, moved, root)


def _aligned(before: Checkpoint, after: Checkpoint) -> dict[str, str]:
    """Return the model's name for each of the base's where the base is a bare body, and the model has a head.

    Then all of them have the prefix that transformers gives this architecture's body.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(after.folder)
        architecture = getattr(transformers, (config.architectures or ["none"])[0])
        prefix = f"{architecture.base_model_prefix}."
    except (OSError, ValueError, KeyError, AttributeError):
        return {}
    has_own = any(name in after.tensors for name in before.tensors)
    return {} if has_own or prefix == "." else {name: prefix + name for name in before.tensors}


def _told(
    certificate: Certificate, before: Checkpoint, after: Checkpoint, names: dict[str, str]
) -> dict[str, Part]:
    """Return what a certificate says was trained; tensors that its model did not take may not have moved."""
    others = [n for n in before.tensors if n not in certificate.parts and names.get(n, n) in after.tensors]
    return {**certificate.parts, **{name: Part.none(before.tensors[name].shape) for name in others}}


def _claimed(
    before: Checkpoint, after: Checkpoint, names: dict[str, str], trained: Sequence[str]
) -> dict[str, Part]:
    """Return what patterns say was trained; what is trained whole may be missing in the model."""
    known = {name: stored.shape for name, stored in before.tensors.items()}
    own = {names.get(name, name) for name in known}
    new = [name for name in after.tensors if name not in own]
    parts = {name: Part.none(shape) for name, shape in known.items()}
    for pattern in trained:
        found = _RANGE.fullmatch(pattern)
        for name in sorted(match_names((found[1] if found else pattern,), [*known, *new])):
            if name not in known:
                parts[name] = Part(after.tensors[name].shape)
                continue
            part = Part(known[name])
            if found:
                size = known[name][0] if known[name] else 0
                rows = range(int(found[2] or 0), int(found[3] or size))
                if not rows or rows.stop > size:
                    raise ConfigError(
                        f"{pattern!r} means rows {rows.start} to {rows.stop} of {name!r}, which has {size}. "
                        "Name rows that it has."
                    )
                part = Part(
                    known[name], torch.arange(rows.start, rows.stop, device="cpu"), Granularity("row")
                )
            parts[name] = parts[name] | part
    return {n: part for n, part in parts.items() if not part.is_whole or names.get(n, n) in after.tensors}
