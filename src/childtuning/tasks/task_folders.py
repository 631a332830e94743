"""Find the two splits in a task's folder."""

from __future__ import annotations

from pathlib import Path

from childtuning.errors import DataError
from childtuning.tasks.images import holds_both_splits
from childtuning.tasks.rows import FORMATS

_TEXT_ENDINGS = (*FORMATS, ".conll", ".txt")
_STEMS = {"train": ("train",), "dev": ("dev", "eval", "dev_matched")}  # dev_matched is MNLI's
_IMAGE_FOLDERS = {"train": ("train",), "dev": ("dev", "eval", "test")}
_IDX = {"train": "train-images-idx3-ubyte", "dev": "t10k-images-idx3-ubyte"}


def is_task_folder(folder: Path) -> bool:
    """Return whether a folder has a split, or a jsonl file of any name."""
    return any(_find(folder, split) for split in _STEMS) or any(folder.glob("*.jsonl*"))


def splits_of(name: str, folder: Path) -> tuple[Path, Path]:
    """Return the paths of the training and the evaluation examples; one file may hold both.

    A split is a table or text file named after it, a folder of image folders, MNIST's idx file, or arrays
    in the folder's only npz file.

    Raises:
        DataError: when a split is missing.
    """
    found: list[Path] = []
    for split, stems in _STEMS.items():
        path = _find(folder, split)
        if path is None:
            listing = ", ".join(f"{stem}{ending}" for stem in stems for ending in (".jsonl.gz", ".jsonl"))
            raise DataError(
                f"Task {name!r} has no {split} split: {folder} contains none of {listing}, nor another type. "
                f"Add one, or pass files of your own."
            )
        found.append(path)
    return found[0], found[1]


def file_of(folder: Path, split: str) -> Path | None:
    """Return the table or text file of a split: train, dev, or a file's name without its type."""
    stems = _STEMS.get(split, (split,))
    names = (
        f"{stem}{ending}{packed}"
        for stem in stems
        for ending in (".jsonl", *_TEXT_ENDINGS)
        for packed in (".gz", "")
    )
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _find(folder: Path, split: str) -> Path | None:
    found = file_of(folder, split)
    if found is not None:
        return found
    for packed in (".gz", ""):
        if (folder / f"{_IDX[split]}{packed}").is_file():
            return folder / f"{_IDX[split]}{packed}"
    for name in _IMAGE_FOLDERS[split]:
        if (folder / name).is_dir():
            return folder / name
    arrays = list(folder.glob("*.npz"))
    return arrays[0] if len(arrays) == 1 and holds_both_splits(arrays[0]) else None
