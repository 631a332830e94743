"""Image classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from childtuning.errors import DataError
from childtuning.tasks.classification import (
    class_ids,
    class_line,
    class_predictions,
    class_shares,
    likeliest,
)
from childtuning.tasks.images import Images, holds_both_splits, holds_images, pixel_range_of, read_images
from childtuning.tasks.kind import Collate, Columns, Kind, Part, register
from childtuning.tasks.metrics import WeightedFn, default_metrics, metric_fn, metrics_of, probabilities
from childtuning.tasks.rows import Source
from childtuning.tasks.text import logits_by_example


class EncodedImages(Dataset[dict[str, Any]]):
    """Images as model inputs, processed on access: row i has pixel_values and, optionally, labels.

    Args:
        processor: a Hugging Face image processor.
        images: the images.
        labels: class ids, or None.
    """

    num_cut = 0

    def __init__(self, processor: Any, images: Images, labels: list[int] | None) -> None:
        self._processor = processor
        self._images = images
        self._labels = labels
        self._num_channels = _num_channels(processor)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = _with_channels(self._images.array(index), self._num_channels)
        done = self._processor(images=pixels, input_data_format="channels_last", return_tensors="pt")
        row: dict[str, Any] = {"pixel_values": done["pixel_values"][0]}
        if self._labels is not None:
            row["labels"] = self._labels[index]
        return row

    @property
    def lengths(self) -> list[int]:
        """1 for every image: all have the same size."""
        return [1] * len(self)


@register
class ImageClassification(Kind):
    """One class per image, trained with cross entropy."""

    name = "image-classification"
    summary = "one class per image: a folder per class, npz arrays, or idx files"
    auto_model = "AutoModelForImageClassification"
    auto_processor = "AutoImageProcessor"
    processor_folder = "image_processor"
    takes_packaged = False
    problem_type = "single_label_classification"
    metric_names = metrics_of("classification")

    def claims(self, source: Source, columns: Columns) -> bool:
        """Accept folders, arrays and idx files of images."""
        return holds_images(source)

    def settle(self, source: Source, columns: Columns) -> Columns:
        """Find the range of the pixels: every later file is read as the training file was."""
        return replace(columns, pixel_range=pixel_range_of(source))

    def read(self, source: Source, columns: Columns, *, part: Part = "dev", labelled: bool = True) -> Images:
        """Read images."""
        low_high = columns.pixel_range  # runs of earlier versions have none
        return read_images(
            source,
            part=part,
            labelled=labelled,
            label=columns.label or "label",
            pixel_range=None if low_high is None else (low_high[0], low_high[1]),
        )

    def holds_both(self, source: Source) -> bool:
        """Return whether an npz file has arrays of two splits."""
        return source.is_named(".npz") and holds_both_splits(source.path)

    def metrics(self, label_names: Sequence[str]) -> tuple[str, ...]:
        """Return accuracy."""
        return default_metrics("classification")

    def default_processor(self, config: Any) -> Any:
        """Return a processor that resizes to the model's size and scales to [−1, 1]; None if the size is unknown."""
        size = getattr(config, "image_size", None)
        if size is None:
            return None
        from transformers import ViTImageProcessor

        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        half = [0.5] * getattr(config, "num_channels", 3)
        return ViTImageProcessor(size={"height": height, "width": width}, image_mean=half, image_std=half)

    def encode(
        self, processor: Any, split: Images, *, max_length: int, label_names: Sequence[str] = ()
    ) -> EncodedImages:
        """Return a dataset that processes images on access."""
        ids = {name: index for index, name in enumerate(label_names)}
        labels = None if split.labels is None else [ids[label] for label in split.labels]
        return EncodedImages(processor, split, labels)

    def collator(self, processor: Any, *, exact: bool = False) -> Collate:
        """Stack images."""
        return _stack

    def outputs(self, model: Any, batch: Mapping[str, Tensor]) -> list[Any]:
        """Return the logits of each image."""
        return logits_by_example(model, batch)

    def truth(self, split: Images, label_names: Sequence[str]) -> list[int]:
        """Return the class id of each example."""
        return class_ids(split.labels or (), label_names)

    def weighted(
        self, metric: str, outputs: Sequence[Any], encoded: Any, split: Images, label_names: Sequence[str]
    ) -> WeightedFn:
        """Compare the logits with the label."""
        return metric_fn(metric, likeliest(outputs), self.truth(split, label_names), logits=np.stack(outputs))

    def constant_output(self, train: Images, label_names: Sequence[str]) -> np.ndarray:
        """Return logits of the most frequent class."""
        return class_shares(train.labels or (), label_names)

    def predictions(
        self, answers: Sequence[Any], encoded: Any, split: Images, label_names: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return the class, its softmax probability, the logits and the image's name."""
        rows = class_predictions(answers, label_names)
        return [{**row, "image": split.shown(index)} for index, row in enumerate(rows)]

    def chances(self, logits: np.ndarray) -> np.ndarray:
        """Return the softmax of each row."""
        return probabilities(logits)

    def line(self, prediction: Mapping[str, Any], shown: str) -> str:
        """Return the class, its probability and the image's name."""
        return class_line(prediction, shown)


def _num_channels(processor: Any) -> int:
    """The number of channels that a processor's constants are for."""
    mean = getattr(processor, "image_mean", None)
    return len(mean) if isinstance(mean, (list, tuple)) else 3


def _with_channels(pixels: NDArray[np.uint8], num_channels: int) -> NDArray[np.uint8]:
    """Repeat grey, or convert colours to grey by luma [ITU-R BT.601]: [height, width, num_channels]."""
    if pixels.ndim == 2:
        return np.repeat(pixels[:, :, None], num_channels, axis=2)
    if num_channels == 1:
        luma = pixels @ np.array([0.299, 0.587, 0.114])
        return luma.round().astype(np.uint8)[:, :, None]
    return pixels


def _stack(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    shapes = {tuple(row["pixel_values"].shape) for row in rows}
    if len(shapes) > 1:
        raise DataError(
            f"the model's image processor returned images of different shapes, got {sorted(shapes)}. "
            f"Set one size in the processor, or pass images of one size."
        )
    batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
    if "labels" in rows[0]:
        batch["labels"] = torch.tensor([row["labels"] for row in rows], dtype=torch.int64, device="cpu")
    return batch
