"""Images and their classes, read from folders of files, npz arrays and idx files."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from glob import iglob
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from childtuning.errors import DataError
from childtuning.tasks.delimited import BadRow
from childtuning.tasks.encodings import content_of
from childtuning.tasks.examples import rows_of
from childtuning.tasks.labels import class_name, convert_label, is_missing
from childtuning.tasks.rows import Source, is_image
from childtuning.tasks.split import Split

Part = Literal["train", "dev"]
PixelRange = tuple[int, int]

_BYTES: PixelRange = (0, 255)
_RANGES: tuple[PixelRange, ...] = ((0, 1), (-1, 1), _BYTES)

_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_IDX = re.compile(r"images[-.]idx3-ubyte(\.gz)?$")
# Names of the image and label arrays in an npz file: first for one of two splits, then for a single split.
_ARRAYS: dict[Part, tuple[tuple[str, str], ...]] = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels"), ("images", "labels"), ("x", "y")),
    "dev": (
        ("x_dev", "y_dev"),
        ("x_test", "y_test"),
        ("test_images", "test_labels"),
        ("images", "labels"),
        ("x", "y"),
    ),
}


@dataclass(frozen=True)
class Images(Split):
    """One split of images.

    Args:
        pixels: for each image its file, its encoded bytes, or a uint8 array [height, width] or [height, width, 3].
        labels: class names, or None for unlabelled images.
    Raises:
        DataError: when the number of labels differs from the number of images.
    """

    pixels: list[Path | bytes | NDArray[np.uint8]]
    labels: list[str] | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != len(self.pixels):
            raise DataError(
                f"labels must have one entry per image, got {len(self.labels)} for {len(self.pixels)} images. "
                f"Pass lists of equal length."
            )

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def is_labelled(self) -> bool:
        """Whether there are labels."""
        return self.labels is not None

    def contents(self) -> list[bytes]:
        """Return a digest of each image: of its file, or of its array."""
        return self._digests

    @cached_property
    def _digests(self) -> list[bytes]:
        return [_digest(image) for image in self.pixels]

    def classes(self) -> set[str]:
        """Return the labels that occur."""
        return set(self.labels or ())

    def strata(self) -> list[str] | None:
        """Return the class names; None for unlabelled images."""
        return self.labels

    def subset(self, indices: Iterable[int]) -> Images:
        """Return the images at `indices`, in that order."""
        rows = [int(index) for index in indices]
        return Images([self.pixels[row] for row in rows], rows_of(self.labels, rows))

    def shown(self, index: int) -> str:
        """Return the file's name, or the image's number counted from 0."""
        image = self.pixels[index]
        return str(image) if isinstance(image, Path) else f"image {index}"

    def array(self, index: int) -> NDArray[np.uint8]:
        """Return the pixels of one image: [height, width] or [height, width, 3]."""
        image = self.pixels[index]
        return image if isinstance(image, np.ndarray) else open_image(image, self.shown(index))


def _digest(image: Path | bytes | NDArray[np.uint8]) -> bytes:
    if isinstance(image, np.ndarray):
        image = repr(image.shape).encode() + image.tobytes()
    return hashlib.sha256(image if isinstance(image, bytes) else content_of(image)).digest()


def open_image(image: Path | bytes, where: str = "") -> NDArray[np.uint8]:
    """Return the pixels of an image file: [height, width] for grey images, [height, width, 3] for others.

    A photograph is turned as its EXIF data say. Of an animation it is the first frame.

    Args:
        image: a file, or its content.
        where: names it in errors; by default the file.
    Raises:
        DataError: when the image cannot be read.
    """
    pillow = _pillow()
    from PIL.ImageOps import exif_transpose

    try:
        with pillow.open(io.BytesIO(image) if isinstance(image, bytes) else image) as image_:
            mode = image_.mode
            if not mode.startswith(("I", "F")):
                turned = exif_transpose(image_)
                return np.asarray(turned.convert("L" if mode in ("1", "L") else "RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, pillow.DecompressionBombError) as fault:
        reason = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        raise DataError(
            f"{where or image!s} is damaged or not an image ({reason[:120]}). Replace or remove it."
        ) from None
    raise DataError(f"{where or image!s} has more than 8 bits a channel (mode {mode}). Save it with 8.")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise DataError(
            "images need the package Pillow, which is not installed. Run pip install pillow."
        ) from None
    return Image


def holds_images(source: Source) -> bool:
    """Return whether a file or folder contains images, judged by name and content."""
    path = source.path
    if path.is_dir():
        return any(_image_files(path))
    if source.is_named(".npz"):
        return array_names(path, "train") is not None
    if source.is_named(".parquet"):
        return _image_column(source) is not None
    return bool(_IDX.search(path.name)) or source.is_named(*_ENDINGS)


def _image_column(source: Source) -> str | None:
    """Return the first column with images as the library datasets stores them: {"bytes": …, "path": …}."""
    first = source.rows[0]
    return next((name for name, cell in first.items() if is_image(cell)), None)


def _from_table(source: Source, label: str, *, labelled: bool) -> Images:
    column = _image_column(source)
    if column is None:
        raise DataError(
            f"{source} has no column of images. Name the kind of task that it is for: --task-kind."
        )

    def read(cell: Any, value: Any) -> tuple[Path | bytes, str | None]:
        content = isinstance(cell, dict) and (cell["bytes"] or cell["path"])
        if not content:
            raise BadRow(f"has no image in column {column!r}", "Drop the row.")
        image = content if isinstance(content, bytes) else Path(content)
        try:
            open_image(image, "It")  # a damaged one is found before training
        except DataError as fault:
            raise BadRow("has an image that cannot be used", str(fault)) from None
        return image, str(convert_label(value, "class", label)) if labelled else None

    found = source.each(read, column, label if labelled else None)
    names = [name for _, name in found if name is not None]
    return Images([image for image, _ in found], names if labelled else None)


def read_images(
    source: Source,
    *,
    part: Part,
    labelled: bool,
    label: str = "label",
    pixel_range: PixelRange | None = None,
) -> Images:
    """Read one split of images.

    Args:
        source: a folder with one subfolder per class; an npz file with arrays x_train/y_train and
            x_test/y_test, or train_images/train_labels and test_images/test_labels (both splits in one
            file), or images/labels, or x/y; or an idx file of images, as MNIST has, with the file of labels
            in the same folder; or a parquet file with a column of images, as the library datasets writes it.
            Without labels, also a folder of images, or one image.
        part: which split to read from a file that holds both.
        labelled: whether to read labels.
        label: the label column of a parquet file.
        pixel_range: of the training images, as ``pixel_range_of`` returned it; ``None``: each npz file has its own.
    Raises:
        DataError: when a file or folder cannot be read.
    """
    _pillow()
    path = source.path
    if path.is_dir():
        return _from_folder(path, labelled=labelled)
    if source.is_named(".npz"):
        return _from_npz(path, part, pixel_range, labelled=labelled)
    if source.is_named(".parquet"):
        return _from_table(source, label, labelled=labelled)
    if _IDX.search(path.name):
        return _from_idx(path, labelled=labelled)
    if source.is_named(*_ENDINGS) and not labelled:
        open_image(path)
        return Images([path])
    raise DataError(
        f"{path} cannot be read as images. Pass a folder with a subfolder per class, an npz file, or an idx file "
        f"(…images-idx3-ubyte, optionally .gz)."
    )


def _image_files(folder: Path) -> Iterator[Path]:
    """Find the images in a folder and those below it, linked ones too, but nothing hidden."""
    for name in iglob("**/*", root_dir=folder, recursive=True):
        if name.lower().endswith(_ENDINGS) and (folder / name).is_file():
            yield folder / name


def _from_folder(folder: Path, *, labelled: bool) -> Images:
    files = sorted(_image_files(folder))
    if labelled:
        loose = [path for path in files if path.parent == folder]
        if loose:
            raise DataError(f"{loose[0]} is not in a class's folder. Put images into {folder}/CLASS/.")
    if not files:
        raise DataError(f"{folder} has no images ({', '.join(_ENDINGS)}). Put them into {folder}/CLASS/.")
    for path in files:
        open_image(path)  # finds a damaged image before training
    names = [class_name(path.relative_to(folder).parts[0]) for path in files] if labelled else None
    return Images([*files], names)


def array_names(path: Path, part: Part) -> tuple[str, str] | None:
    """Return the names of a split's image and label arrays in an npz file; None if there are none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return None
    return next((pair for pair in _ARRAYS[part] if pair[0] in names), None)


def holds_both_splits(path: Path) -> bool:
    """Return whether an npz file has arrays of two splits; a single one would serve for both."""
    train, dev = array_names(path, "train"), array_names(path, "dev")
    return train is not None and dev is not None and train != dev


def pixel_range_of(source: Source) -> tuple[int, int]:
    """Return the range of the training images: (0, 1), (−1, 1) or (0, 255), which all but npz files have.

    Raises:
        DataError: they fit into none.
    """
    is_npz = source.is_named(".npz")
    pair = (array_names(source.path, "train") or array_names(source.path, "dev")) if is_npz else None
    if pair is None:
        return _BYTES
    pixels = _arrays(source.path, pair[:1])[0]
    return _range_of(pixels, f"{source.path} array {pair[0]!r}") if _is_sound(pixels) else _BYTES


def _is_sound(pixels: NDArray[Any]) -> bool:
    return pixels.size > 0 and pixels.dtype.kind in "fiu" and bool(np.isfinite(pixels).all())


def _range_of(pixels: NDArray[Any], where: str) -> PixelRange:
    lowest, highest = pixels.min(), pixels.max()
    found = next((one for one in _RANGES if one[0] <= lowest and highest <= one[1]), None)
    if found is None:
        raise DataError(
            f"{where} must lie in [0, 1], [-1, 1] or [0, 255], got [{lowest:g}, {highest:g}]. Rescale it."
        )
    return found


def _range_in(pixels: NDArray[Any], where: str, of_training: PixelRange | None) -> PixelRange:
    """Return the range that a file's pixels are meant in.

    Args:
        pixels: of the file.
        where: names it in errors.
        of_training: the range of the training images; ``None``, in runs of earlier versions: the file's own.
    """
    lowest, highest = pixels.min(), pixels.max()
    is_byte, is_whole = pixels.dtype == np.uint8, pixels.dtype.kind in "iu"
    if of_training is None:
        return _BYTES if is_byte else _range_of(pixels, where)
    if is_whole and lowest >= 0 and (1 < highest <= 255 or (is_byte and of_training == (-1, 1))):
        return _BYTES  # whatever the training images were
    if not is_whole and of_training == _BYTES and lowest >= 0 and 0 < highest <= 1:
        raise DataError(
            f"{where} holds floats up to {highest:g}, and the training images are from 0 to 255. Multiply it by 255, "
            "or save it as uint8."
        )
    if lowest < of_training[0] or highest > of_training[1]:
        raise DataError(
            f"{where} must lie in [{of_training[0]}, {of_training[1]}] as the training images do, "
            f"got [{lowest:g}, {highest:g}]. Rescale it."
        )
    return of_training


def _from_npz(path: Path, part: Part, pixel_range: PixelRange | None, *, labelled: bool) -> Images:
    pair = array_names(path, part)
    if pair is None:
        known = ", ".join("/".join(names) for names in _ARRAYS[part])
        raise DataError(
            f"{path} is damaged, or has none of the arrays {known}. Save images and labels under these names."
        )
    pixels, *labels = _arrays(path, pair if labelled else pair[:1])
    images = _pixels(pixels, f"{path} array {pair[0]!r}", pixel_range)
    return Images(images, _labels(labels[0], f"{path} array {pair[1]!r}") if labels else None)


def _arrays(path: Path, names: tuple[str, ...]) -> list[NDArray[Any]]:
    content = content_of(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except KeyError:
        raise DataError(
            f"{path} has {names[0]!r} but no {names[1]!r}. Save the labels in the same file."
        ) from None
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as fault:
        raise DataError(f"{path} is damaged ({str(fault)[:120]}). Save it again.") from None


def _labels(values: NDArray[Any], where: str) -> list[str]:
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise DataError(
            f"{where} must hold one label per image, got shape {list(values.shape)}. Save class numbers."
        )
    plain = [
        value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values.tolist()
    ]
    missing = next((row for row, value in enumerate(plain) if is_missing(value)), None)
    if missing is not None:
        raise DataError(f"{where} has no label at index {missing}. Fill it in, or drop the image.")
    return [class_name(value) for value in plain]


def _pixels(
    values: NDArray[Any], where: str, pixel_range: PixelRange | None
) -> list[Path | bytes | NDArray[np.uint8]]:
    """Convert an array of images to a list of uint8 arrays [height, width(, 3)]."""
    if not values.size:
        raise DataError(f"{where} has no pixels, shape {list(values.shape)}. Save images.")
    if values.ndim == 4 and values.shape[1] in (1, 3) and values.shape[3] not in (1, 3):
        values = values.transpose(0, 2, 3, 1)
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if not len(values):
        raise DataError(f"{where} has no images. Pass at least one.")
    if values.ndim not in (3, 4) or (values.ndim == 4 and values.shape[3] != 3):
        raise DataError(
            f"{where} must have shape [images, height, width], with 1 or 3 channels before or after height and width, "
            f"got {list(values.shape)}. Reshape it."
        )
    if not _is_sound(values):
        raise DataError(f"{where} must hold finite numbers, got {values.dtype}. Save pixels as uint8.")
    low, high = _range_in(values, where, pixel_range)
    if values.dtype != np.uint8 or (low, high) != _BYTES:
        values = ((values.astype(np.float64) - low) * (255 / (high - low))).round().astype(np.uint8)
    return list(values)


def _from_idx(path: Path, *, labelled: bool) -> Images:
    pixels = _idx_array(path, axes=3)
    labels = None
    if labelled:
        beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
        labels = _labels(_idx_array(beside, axes=1), str(beside))
    return Images(_pixels(pixels, str(path), _BYTES), labels)


def _idx_array(path: Path, *, axes: int) -> NDArray[np.uint8]:
    """Read an idx file of bytes: 0, 0, 8, the number of axes, the length of each axis in 4 bytes, the entries."""
    content = content_of(path)
    shape = np.frombuffer(content[4 : 4 + 4 * axes], dtype=">u4").astype(np.int64)
    if (
        content[:4] != bytes((0, 0, 8, axes))
        or len(shape) != axes
        or len(content) != 4 + 4 * axes + shape.prod()
    ):
        raise DataError(f"{path} is truncated, or not an idx file of bytes with {axes} axes. Copy it again.")
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)
