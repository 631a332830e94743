"""Images: folders, npz and idx files, channels, processors, and what is refused."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny_kinds import color_images, save_tiny_vision, write_image_folders

from childtuning.errors import DataError, ModelError
from childtuning.tasks import Columns, Source, load_task, task_from_files
from childtuning.tasks.image_classification import ImageClassification
from childtuning.tasks.images import Images, open_image, read_images

image_files = pytest.importorskip("PIL.Image", reason="images need Pillow")
REAL = Path(os.environ.get("CHILDTUNING_DATA", Path(__file__).parents[3] / "shared" / "data"))
KIND = ImageClassification()


def idx(path: Path, array: np.ndarray) -> Path:
    head = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    content = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def processor(channels: int = 3):
    from transformers import ViTConfig

    return KIND.default_processor(ViTConfig(image_size=8, num_channels=channels))


def test_folders_of_classes(tmp_path):
    train, dev = write_image_folders(tmp_path)
    task = task_from_files(train, dev)
    assert (task.kind, task.label_names, task.metrics) == (
        "image-classification",
        ("blue", "green", "red"),
        ("accuracy",),
    )
    assert (len(task.train), len(task.dev)) == (48, 12)
    pixels, labels = color_images(12, seed=12)
    split = read_images(Source(dev), part="dev", labelled=True)
    assert split.labels == ["blue"] * 4 + ["green"] * 4 + ["red"] * 4
    last_blue = np.flatnonzero(labels == 2)[-1]  # "11.png", which sorts before "2.png"
    np.testing.assert_array_equal(split.array(0), pixels[last_blue])
    assert load_task(tmp_path.name, data_dir=tmp_path.parent).kind == "image-classification"


def test_equal_images_stay_on_one_side(tmp_path):
    write_image_folders(tmp_path)
    files = read_images(Source(tmp_path / "train"), part="train", labelled=True)
    for name in ("blue", "green", "red"):
        (tmp_path / "train" / name / "copy.png").write_bytes(
            next((tmp_path / "train" / name).glob("*.png")).read_bytes()
        )
    arrays = Images([np.full((4, 4), i % 6, dtype=np.uint8) for i in range(24)], ["a", "b", "c"] * 8)
    copied = read_images(Source(tmp_path / "train"), part="train", labelled=True)
    assert len({*copied.contents()}) == len(files) == len(copied) - 3
    for images in (copied, arrays):
        for seed in range(5):
            rest, aside = images.hold_out(0.2, seed=seed)
            assert not {*rest.contents()} & {*aside.contents()}


def test_linked_class_folders(tmp_path):
    train, dev = write_image_folders(tmp_path)
    (train / "red").rename(tmp_path / "elsewhere")
    (train / "red").symlink_to(tmp_path / "elsewhere")
    (train / ".cache").symlink_to(tmp_path / "elsewhere")
    task = task_from_files(train, dev)
    assert task.label_names == ("blue", "green", "red") and len(task.train) == 48


def test_arrays_of_both_splits(tmp_path):
    pixels, labels = color_images(6)
    path = tmp_path / "a.npz"
    np.savez(path, x_train=pixels[:4], y_train=labels[:4], x_test=pixels[4:], y_test=labels[4:, None])
    task = task_from_files(path, path)
    assert task.train.labels == ["0", "1", "2", "0"] and task.dev.labels == ["1", "2"]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(task.dev.array(1), pixels[5])  # type: ignore[attr-defined]
    alone = task_from_files(path)
    assert alone.dev.labels == ["1", "2"] and alone.notes == ()  # type: ignore[attr-defined]


@pytest.mark.parametrize("scale", ["bytes", "unit", "signed", "channels first", "one channel"])
def test_every_way_to_store_pixels(tmp_path, scale):
    pixels, labels = color_images(4)
    grey = pixels[..., 0]
    pixels[0, 0, 0], pixels[0, 0, 1] = 0, 255
    stored = {
        "bytes": pixels.astype(np.int64),
        "unit": (pixels / 255).astype(np.float32),
        "signed": (pixels / 127.5 - 1).astype(np.float32),
        "channels first": pixels.transpose(0, 3, 1, 2),
        "one channel": grey[..., None],
    }[scale]
    np.savez(tmp_path / "a.npz", images=stored, labels=labels)
    source = Source(tmp_path / "a.npz")
    columns = KIND.settle(source, Columns())
    split = KIND.read(source, columns, part="train")
    expected = grey if scale == "one channel" else pixels
    np.testing.assert_array_equal(np.stack([split.array(i) for i in range(4)]), expected)


def test_the_training_images_decide_what_floats_mean(tmp_path):
    """A bright image alone lies in [0, 1], and so does a dark one from 0 to 255."""
    pixels, labels = color_images(4)
    pixels[0, 0, 0], pixels[0, 0, 1] = 0, 255
    bright = np.maximum(pixels[1:2], 128)
    np.savez(tmp_path / "train.npz", images=pixels / 127.5 - 1, labels=labels)
    np.savez(tmp_path / "one.npz", images=bright / 127.5 - 1, labels=labels[:1])
    task = task_from_files(tmp_path / "train.npz", tmp_path / "one.npz")
    np.testing.assert_array_equal(task.dev.array(0), bright[0])  # type: ignore[attr-defined]
    np.savez(tmp_path / "train.npz", images=pixels * 1.0, labels=labels)
    np.savez(tmp_path / "one.npz", images=pixels / 127.5 - 1, labels=labels)
    with pytest.raises(DataError, match=r"must lie in \[0, 255\] as the training images do, got \[-1, 1\]"):
        task_from_files(tmp_path / "train.npz", tmp_path / "one.npz")


PIXELS = color_images(4)[0] // 2 * 2 + np.eye(12, dtype=np.uint8)[:, :, None]  # from 0 or 1 to 255


@pytest.mark.parametrize(
    ("trained", "later", "found"),
    [
        (PIXELS, PIXELS * 1.0, PIXELS),
        (PIXELS, PIXELS.astype(np.int16), PIXELS),
        (PIXELS * 1.0, PIXELS, PIXELS),
        (PIXELS / 255, PIXELS, PIXELS),
        (PIXELS / 127.5 - 1, PIXELS, PIXELS),
        (PIXELS / 127.5 - 1, PIXELS * 0, PIXELS * 0),
        (PIXELS, PIXELS * 0.0, PIXELS * 0),
        (PIXELS % 2, PIXELS % 2, PIXELS % 2 * 255),  # masks
        (PIXELS.astype(np.int64) % 2, PIXELS % 2, PIXELS % 2 * 255),
        (PIXELS.astype(np.int64) % 2, PIXELS % 2 * 1.0, PIXELS % 2 * 255),
        (PIXELS % 2 * 2.0 - 1, PIXELS.astype(np.int8) % 2 * 2 - 1, PIXELS % 2 * 255),
        (
            PIXELS,
            PIXELS / 255,
            "floats up to 0.93\\d*, and the training images are from 0 to 255. Multiply it by 255",
        ),
        (PIXELS * 1.0, PIXELS / 255, "floats up to 0.93\\d*, and the training images are from 0 to 255"),
        (PIXELS / 255, PIXELS * 1.0, r"must lie in \[0, 1\] as the training images do"),
        (PIXELS, PIXELS.astype(np.int16) * 2, r"must lie in \[0, 255\] as the training images do"),
    ],
)
def test_later_images_are_read_as_the_training_images_are(tmp_path, trained, later, found):
    for name, images in (("train", trained), ("later", later)):
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(4) % 2)
    if isinstance(found, str):
        with pytest.raises(DataError, match=found):
            task_from_files(tmp_path / "train.npz", tmp_path / "later.npz")
        return
    dev = task_from_files(tmp_path / "train.npz", tmp_path / "later.npz").dev
    np.testing.assert_array_equal(np.stack([dev.array(i) for i in range(4)]), found)  # type: ignore[attr-defined]


def test_runs_that_recorded_no_range_read_each_file_on_its_own(tmp_path):
    for images, found in (
        (PIXELS % 2, PIXELS % 2),
        (PIXELS.astype(np.int64) % 2, PIXELS % 2 * 255),
        (PIXELS / 255, PIXELS),
    ):
        np.savez(tmp_path / "a.npz", images=images, labels=np.arange(4))
        split = KIND.read(Source(tmp_path / "a.npz"), Columns(), part="dev")
        np.testing.assert_array_equal(np.stack([split.array(i) for i in range(4)]), found)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files(tmp_path, ending):
    grey = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    for part in ("train", "t10k"):
        idx(tmp_path / f"{part}-images-idx3-ubyte{ending}", grey)
        idx(tmp_path / f"{part}-labels-idx1-ubyte{ending}", np.array([7, 3]))
    task = load_task(tmp_path.name, data_dir=tmp_path.parent)
    assert task.label_names == ("3", "7") and task.train.labels == ["7", "3"]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(task.dev.array(1), grey[1])  # type: ignore[attr-defined]


def test_grey_becomes_colour_and_the_reverse():
    grey = np.full((12, 12), 200, np.uint8)
    colour = np.zeros((12, 12, 3), np.uint8)
    colour[..., 0] = 200
    split = Images([grey, colour], ["a", "b"])
    encoded = KIND.encode(processor(), split, max_length=128, label_names=("a", "b"))
    first = encoded[0]["pixel_values"]
    assert first.shape == (3, 8, 8) and encoded[1]["labels"] == 1
    torch.testing.assert_close(first, torch.full((3, 8, 8), 200 / 127.5 - 1))
    torch.testing.assert_close(
        encoded[1]["pixel_values"][:, 0, 0], torch.tensor([200 / 127.5 - 1, -1.0, -1.0])
    )
    one = KIND.encode(processor(1), split, max_length=128, label_names=("a", "b"))
    torch.testing.assert_close(one[0]["pixel_values"], torch.full((1, 8, 8), 200 / 127.5 - 1))
    torch.testing.assert_close(one[1]["pixel_values"], torch.full((1, 8, 8), 60 / 127.5 - 1))
    batch = KIND.collator(processor())([encoded[0], encoded[1]])
    assert batch["pixel_values"].shape == (2, 3, 8, 8) and batch["labels"].tolist() == [0, 1]


def test_images_of_several_shapes_need_one_size():
    rows = [{"pixel_values": torch.zeros(3, size, size)} for size in (8, 9)]
    with pytest.raises(DataError, match=r"different shapes, got \[\(3, 8, 8\), \(3, 9, 9\)\]"):
        KIND.collator(processor())(rows)


def test_files_of_any_mode_are_read(tmp_path):
    colour = np.zeros((2, 2, 3), np.uint8)
    colour[..., 1] = 90
    for mode, shape in (("L", (2, 2)), ("1", (2, 2)), ("P", (2, 2, 3)), ("RGBA", (2, 2, 3))):
        image_files.fromarray(colour).convert(mode).save(tmp_path / f"{mode}.png")
        assert open_image(tmp_path / f"{mode}.png").shape == shape
    np.testing.assert_array_equal(open_image(tmp_path / "RGBA.png"), colour)


def test_a_photograph_is_turned_as_it_says(tmp_path):
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    image = image_files.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned to the right
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(open_image(tmp_path / "a.png"), np.rot90(pixels, -1))


def test_sixteen_bits_a_channel_are_refused(tmp_path):
    image_files.fromarray(np.full((2, 2), 3000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(
        DataError, match=r"a.png has more than 8 bits a channel \(mode I;16\). Save it with 8"
    ):
        open_image(tmp_path / "a.png")


def test_what_cannot_be_read_is_named(tmp_path):
    train, dev = write_image_folders(tmp_path)
    (train / "red" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(DataError, match=r"red/bad.png is damaged or not an image"):
        task_from_files(train, dev)
    (train / "red" / "bad.png").unlink()
    whole = (train / "red" / "0.png").read_bytes()
    (train / "red" / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"red/0.png is damaged or not an image"):
        task_from_files(train, dev)
    (train / "red" / "0.png").rename(train / "0.png")
    with pytest.raises(DataError, match=r"train/0.png is not in a class's folder"):
        task_from_files(train, dev)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="has no images"):
        task_from_files(tmp_path / "none", dev, kind="image-classification")


def test_bad_arrays(tmp_path):
    pixels, labels = color_images(3)
    path = tmp_path / "a.npz"
    for arrays, message in (
        ({"pictures": pixels}, "has none of the arrays"),
        ({"images": pixels}, "has 'images' but no 'labels'"),
        ({"images": pixels, "labels": labels[:2]}, "one entry per image, got 2 for 3"),
        ({"images": pixels[0], "labels": labels}, "one entry per image"),
        ({"images": pixels[:, 0, 0], "labels": labels}, "must have shape"),
        ({"images": pixels * 2.5, "labels": labels}, r"must lie in \[0, 1\], \[-1, 1\] or \[0, 255\], got"),
        ({"images": pixels.astype(np.int64) * 2, "labels": labels}, r"or \[0, 255\], got \[\d+, \d+\]"),
        ({"images": np.full((3, 2, 2), np.nan), "labels": labels}, "finite numbers"),
        ({"images": pixels, "labels": labels * 0}, "at least two classes"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=message):
            task_from_files(path, path, kind="image-classification")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="damaged"):
        task_from_files(path, path, kind="image-classification")


def test_bad_idx_files(tmp_path):
    images = idx(tmp_path / "train-images-idx3-ubyte", np.zeros((2, 3, 3)))
    with pytest.raises(DataError, match="no file .*train-labels-idx1-ubyte"):
        task_from_files(images, images)
    idx(tmp_path / "train-labels-idx1-ubyte", np.array([0, 1]))
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(DataError, match="truncated, or not an idx file of bytes with 3 axes"):
        task_from_files(images, images)


def test_models_without_an_image_processor(tmp_path):
    from childtuning.training import load_model

    names = ("a", "b")
    how = {
        "auto_model": KIND.auto_model,
        "auto_processor": KIND.auto_processor,
        "options": KIND.model_options(names),
        "default_processor": KIND.default_processor,
    }
    loaded = load_model(str(save_tiny_vision(tmp_path / "vit", processor=False)), **how)
    assert dict(loaded.processor.size) == {"height": 8, "width": 8}
    assert loaded.new_parameters == ("classifier.bias", "classifier.weight")  # five classes became two
    with pytest.raises(
        ModelError, match="no preprocessor_config.json and its config.json names no image size"
    ):
        load_model(str(save_tiny_vision(tmp_path / "resnet", "resnet", processor=False)), **how)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real data: set CHILDTUNING_DATA to a folder of tasks")
@pytest.mark.parametrize(
    ("name", "sizes", "mean"),
    [
        ("mnist", (60000, 10000), 0.1307),
        ("usps", (7291, 2007), None),
        ("cifar100_subset", (5000, 1000), None),
    ],
)
def test_real_images(name, sizes, mean):
    task = load_task(name, data_dir=REAL)
    assert (task.kind, (len(task.train), len(task.dev))) == ("image-classification", sizes)
    assert len(task.label_names) == (100 if name.startswith("cifar") else 10)
    if mean is not None:
        assert np.mean([image.mean() for image in task.train.pixels]) / 255 == pytest.approx(mean, abs=1e-4)  # type: ignore[attr-defined]


def test_a_column_of_images(tmp_path):
    """As the library datasets writes it."""
    datasets = pytest.importorskip("datasets")
    train, dev = write_image_folders(tmp_path)
    for folder in (train, dev):
        files = sorted(folder.rglob("*.png"))
        columns = {"image": [str(file) for file in files], "label": [file.parent.name for file in files]}
        table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        table.to_parquet(tmp_path / f"{folder.name}.parquet")
    paths = [tmp_path / f"{folder.name}.parquet" for folder in (train, dev)]
    task = task_from_files(*paths)
    assert (task.kind, task.label_names) == ("image-classification", ("blue", "green", "red"))
    plain = read_images(Source(train), part="train", labelled=True)
    table = read_images(Source(paths[0]), part="train", labelled=True)
    assert table.labels == plain.labels
    for index in range(len(plain)):
        np.testing.assert_array_equal(table.array(index), plain.array(index))
    rows = [{"image": {"bytes": b"no image", "path": None}, "label": "x"}] * 2
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "bad.parquet")
    with pytest.raises(
        DataError,
        match=r"bad.parquet row 1 has an image that cannot be used .* It is damaged or not an image",
    ):
        task_from_files(tmp_path / "bad.parquet", paths[1])
