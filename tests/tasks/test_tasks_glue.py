"""GLUE and other named tasks, from a made-up folder, a stand-in hub, and real data where there is some."""

from __future__ import annotations

import gzip
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from childtuning.errors import ConfigError, DataError
from childtuning.tasks.glue import GLUE, load_task

REAL = Path(os.environ.get("CHILDTUNING_DATA", Path(__file__).parents[3] / "shared" / "data"))


def write(path: Path, labels: list[Any], *, pair: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"text1": f"one {i}", **({"text2": f"two {i}"} if pair else {}), "label": y}
        for i, y in enumerate(labels)
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    for name, glue in GLUE.items():
        labels = list(glue.label_names) or [0.0, 2.5, 5.0]
        dev = "dev_matched" if name == "mnli" else "dev"
        write(tmp_path / name / "train.jsonl.gz", labels * 4, pair=glue.columns[1] is not None)
        write(tmp_path / name / f"{dev}.jsonl", labels, pair=glue.columns[1] is not None)
    (tmp_path / "qnli" / "train.jsonl.gz").unlink()
    write(tmp_path / "sick" / "train.jsonl.gz", ["neutral", "entailment", "contradiction"])
    write(tmp_path / "sick" / "dev.jsonl.gz", ["neutral"])
    write(tmp_path / "scale" / "train.jsonl", [0.5, 1.5])
    write(tmp_path / "scale" / "dev.jsonl", [1.0])
    (tmp_path / "images").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", [name for name in GLUE if name != "qnli"])
def test_local_glue(data_dir, name):
    task = load_task(name, data_dir=data_dir)
    assert (task.name, task.label_names, task.metrics) == (name, GLUE[name].label_names, GLUE[name].metrics)
    assert (task.train.text_pair is None) == (name in ("cola", "sst2"))
    assert task.kind == ("regression" if name == "stsb" else "classification")


def test_other_folders_load_with_inferred_labels(data_dir):
    sick = load_task("sick", data_dir=data_dir)
    assert (sick.label_names, sick.metrics) == (("contradiction", "entailment", "neutral"), ("accuracy",))
    scale = load_task("scale", data_dir=data_dir)
    assert (scale.kind, scale.metrics) == ("regression", ("pearson", "spearman"))


def test_official_ids_are_accepted(data_dir):
    write(data_dir / "rte" / "train.jsonl.gz", [0, 1, 1])
    assert load_task("rte", data_dir=data_dir).train.labels == [
        "entailment",
        "not_entailment",
        "not_entailment",
    ]


def test_foreign_labels_are_refused(data_dir):
    write(data_dir / "rte" / "train.jsonl.gz", ["entailment", "maybe"])
    with pytest.raises(
        DataError, match=r"train split of 'rte': 'maybe'. Known: 'entailment', 'not_entailment'"
    ):
        load_task("rte", data_dir=data_dir)


def test_missing_split_names_the_files_looked_for(data_dir):
    with pytest.raises(
        DataError, match=r"'qnli' has no train split: .* contains none of train.jsonl.gz, train.jsonl"
    ):
        load_task("qnli", data_dir=data_dir)
    (data_dir / "mnli" / "dev_matched.jsonl").unlink()
    with pytest.raises(
        DataError, match=r"no dev split: .* contains none of dev.jsonl.gz, .*dev_matched.jsonl"
    ):
        load_task("mnli", data_dir=data_dir)


@pytest.mark.parametrize("name", ["mrcp", "images", "../rte", "", "."])
def test_unknown_task(data_dir, name):
    with pytest.raises(DataError, match="Unknown task") as caught:
        load_task(name, data_dir=data_dir)
    assert "sick" in str(caught.value) and "docstrings" in str(caught.value)
    if name == "mrcp":
        assert "Did you mean 'mrpc'?" in str(caught.value)


def test_data_dir_must_be_a_folder(tmp_path):
    with pytest.raises(DataError, match="data_dir must be a folder, got"):
        load_task("rte", data_dir=tmp_path / "none")


def test_train_limit_is_a_function_of_the_seed(data_dir):
    def texts(seed: int) -> list[str]:
        return load_task("cola", data_dir=data_dir, train_limit=6, seed=seed).train.text

    assert texts(0) == texts(0) and len(texts(0)) == 6
    assert len({tuple(texts(seed)) for seed in range(8)}) > 1
    with pytest.raises(ConfigError, match="limit of examples must be at least 1"):
        load_task("cola", data_dir=data_dir, train_limit=0)


def test_embedded_task_by_name():
    assert load_task("docstrings", train_limit=24).name == "docstrings"


def stand_in(monkeypatch: pytest.MonkeyPatch, load_dataset: Any) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub_without_network_is_one_line(monkeypatch, tmp_path):
    def unreachable(*_: Any) -> None:
        raise ConnectionError("no route\nto host")

    stand_in(monkeypatch, unreachable)
    with pytest.raises(
        DataError, match=r"no network .* no local copy .*ConnectionError: no route.*--data-dir"
    ) as caught:
        load_task("rte")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no folder rte in"):
        load_task("rte", data_dir=tmp_path)


def test_hub_rows_become_examples(monkeypatch):
    asked: list[tuple[str, ...]] = []

    def load_dataset(*names: str) -> dict[str, dict[str, list[Any]]]:
        asked.append(names)
        columns = GLUE[names[1]].columns
        split = {column: ["a", "b", "c"] for column in columns if column} | {"label": [0, 1, 2]}
        return {"train": split, GLUE[names[1]].dev_split: split}

    stand_in(monkeypatch, load_dataset)
    assert load_task("mnli").train.labels == ["entailment", "neutral", "contradiction"]
    assert load_task("stsb").dev.labels == [0.0, 1.0, 2.0]
    assert asked == [("nyu-mll/glue", "mnli"), ("nyu-mll/glue", "stsb")]


@pytest.mark.skipif(not REAL.is_dir(), reason="no real data: set CHILDTUNING_DATA to a folder of tasks")
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("cola", (8551, 1043)),
        ("rte", (2490, 277)),
        ("mrpc", (3668, 408)),
        ("stsb", (5749, 1500)),
        ("wnli", (635, 71)),
        ("qqp", (2000, 7600)),
        ("mnli", (3000, 9815)),
        ("sick", (4500, 500)),
    ],
)
def test_real_data(name, sizes):
    if not (REAL / name).is_dir():
        pytest.skip(f"no folder {name} in {REAL}")
    task = load_task(name, data_dir=REAL)
    assert (len(task.train), len(task.dev)) == sizes
    assert task.num_empty == 0
