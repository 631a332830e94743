"""Which columns hold texts and labels, where nobody says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from childtuning.errors import DataError
from childtuning.tasks import Examples, Source, Task, task_from_files
from childtuning.tasks.columns import find_label, find_text
from childtuning.tasks.labels import infer_label_kind
from childtuning.tasks.rows import read_rows

REVIEWS = [f"The number {i} of these films was far too long, and its plot very dull." for i in range(12)]


def written(path: Path, columns: dict[str, Any], num_rows: int = 12) -> Path:
    """Write rows; a column is a list, or one value for all."""
    rows = [
        {
            name: values[i % len(values)] if isinstance(values, list) else values
            for name, values in columns.items()
        }
        for i in range(num_rows)
    ]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [list(columns), *(list(map(str, row.values())) for row in rows)]
        path.write_text("".join(";".join(f'"{cell}"' for cell in line) + "\n" for line in lines))
    return path


def task_of(path: Path, **options: Any) -> tuple[Task, list[str]]:
    """The task of one file, and what was told besides the share that is set aside."""
    task = task_from_files(path, **options)
    return task, [note.partition(": ")[2] for note in task.notes if "set aside" not in note]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["label", "text2", "text1"], ("text1", "text2")),
        (["text1", "label"], ("text1", None)),
        (["sentence1", "sentence2"], ("sentence1", "sentence2")),
        (["question", "sentence"], ("question", "sentence")),
        (["question1", "question2"], ("question1", "question2")),
        (["sentence", "idx"], ("sentence", None)),
        (["Premise", "Hypothesis"], ("Premise", "Hypothesis")),
        (["TEXT"], ("TEXT", None)),
    ],
)
def test_usual_names_of_texts(tmp_path: Path, columns: list[str], expected: Any) -> None:
    assert find_text(Source(written(tmp_path / "a.jsonl", dict.fromkeys(columns, "x")))) == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["text", "Label", "class"], "Label"),
        (["text", "Category"], "Category"),
        (["text", "id", "stars"], "stars"),
        (["text", "verdict"], "verdict"),
        (["text", "class", "category"], None),
        (["text", "id", "verdict"], None),
        (["text"], None),
    ],
)
def test_usual_names_of_labels(tmp_path: Path, columns: list[str], expected: str | None) -> None:
    assert find_label(Source(written(tmp_path / "a.jsonl", dict.fromkeys(columns, "x"))), "text") == expected


def test_named_columns_need_not_have_the_right_case(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"review": REVIEWS, "Stars": [1, 5]})
    dev = written(tmp_path / "dev.jsonl", {"REVIEW": REVIEWS, "stars": [1, 5]})
    task = task_from_files(path, dev, text="Review", label="STARS")
    assert len(task.dev) == 12 and task.label_names == ("1", "5") and task.notes == ()
    twice = written(tmp_path / "b.jsonl", {"Review": "a", "review": "b", "label": ["x", "y"]})
    with pytest.raises(DataError, match=r"no column 'REVIEW'. Known: Review, review"):
        task_from_files(twice, text="REVIEW")


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"id": [f"{i:032x}" for i in range(12)], "date": "2024-05-01 10:00:00"},
        {"language": ["English", "German"], "author": [f"Jane Doe {i}" for i in range(12)]},
        {"title": [f"Film {i}" for i in range(12)], "votes": list(range(12))},
    ],
)
def test_the_only_long_texts_are_the_text(tmp_path: Path, others: dict[str, Any]) -> None:
    task, told = task_of(
        written(tmp_path / "a.jsonl", {**others, "comment": REVIEWS, "sentiment": ["bad", "good"]})
    )
    assert task.columns.text == "comment" and task.label_names == ("bad", "good")
    assert told == [
        "the text is column 'comment' (--text names another)",
        "the label is column 'sentiment' (--label names another)",
    ]


@pytest.mark.parametrize(
    "columns",
    [
        {"comment": REVIEWS, "answer": REVIEWS[::-1]},
        {"comment": REVIEWS[:2]},
        {"code": ["a", "b", "c"]},
        {"when": [f"2024-05-{i:02} 10:00:00" for i in range(1, 13)]},
    ],
)
def test_texts_that_are_not_clear_are_asked_for(tmp_path: Path, columns: dict[str, Any]) -> None:
    path = written(tmp_path / "a.jsonl", {**columns, "label": ["x", "y"]})
    with pytest.raises(
        DataError, match=f"got {', '.join(columns)}, label. Name the text column: --text NAME"
    ):
        task_from_files(path)


def test_labels_that_are_not_clear_are_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"text": REVIEWS, "topic": ["a", "b"], "stars": [1, 2]})
    with pytest.raises(DataError, match="got text, topic, stars. Name the label column: --label NAME"):
        task_from_files(path)
    assert task_of(path, label="topic")[1] == []


@pytest.mark.parametrize(
    "header",
    [
        {"What a wonderful film": REVIEWS, "good": ["good", "bad"]},  # its label occurs again
        {REVIEWS[0]: REVIEWS[1:], "fine": ["good", "bad"]},  # a long text
        {"Wonderful": REVIEWS, "1": ["2", "3"]},  # a number
    ],
)
def test_a_missing_header_is_told(tmp_path: Path, header: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        task_from_files(written(tmp_path / "a.csv", header))
    first = next(iter(header))[:60]
    assert f"seems to have no header: its first row is {first!r}, " in str(caught.value)
    assert str(caught.value).endswith("If it has one, name its columns: --text, --label.")
    assert "\n" not in str(caught.value)


def test_columns_within_objects(tmp_path: Path) -> None:
    rows = {
        "review": [{"body": text, "title": "A film"} for text in REVIEWS],
        "meta": [{"stars": 1}, {"stars": 2}],
    }
    path = written(tmp_path / "a.jsonl", rows)
    task, _ = task_of(path, text="review.body", label="Meta.Stars")
    assert task.label_names == ("1", "2") and task.train.text[0] in REVIEWS  # type: ignore[attr-defined]
    with pytest.raises(
        DataError, match=r"no column 'review.text'. .*Known: review.body, review.title, meta.stars"
    ):
        task_from_files(path, text="review.text")


def test_guessed_numbers_make_a_regression(tmp_path: Path) -> None:
    task, told = task_of(written(tmp_path / "a.jsonl", {"essay": REVIEWS, "score": [0.5, 1.5]}))
    assert task.kind == "regression" and told[1] == "the label is column 'score' (--label names another)"


def test_a_fifth_is_set_aside_where_there_is_no_evaluation_file(tmp_path: Path) -> None:
    labels = ["x"] * 30 + ["y"] * 18 + ["rare"]
    path = written(tmp_path / "a.jsonl", {"text": [str(i) for i in range(49)], "label": labels}, 49)
    task = task_from_files(path, seed=2)
    assert (len(task.train), len(task.dev)) == (39, 10)
    assert task.dev.classes() == {"x", "y"} and task.label_names == ("rare", "x", "y")
    assert task.notes == (
        "a.jsonl: no --eval, so 10 of the 49 examples are set aside for evaluation, drawn by class; "
        "it has none of the rare 'rare'",
    )
    small = task_from_files(path, seed=2, train_limit=7)
    assert small.dev == task.dev and len(small.train) == 7
    assert task_from_files(path, seed=3).dev != task.dev
    assert len(task_from_files(path, eval_share=0.5).dev) == 24
    assert task_from_files(path, path).notes == ()


def test_a_stray_quote_swallows_no_rows(tmp_path: Path) -> None:
    lines = [f"text {i} here,{'yes' if i % 2 else 'no'}" for i in range(30)]
    good = ['"said, he\nwho, knows\nnothing",yes', *lines]
    (tmp_path / "good.csv").write_text("text,label\n" + "\n".join(good) + "\n")
    assert len(read_rows(tmp_path / "good.csv")) == 31
    lines[5], lines[20] = '"' + lines[5], lines[20].replace(",", '",')
    (tmp_path / "bad.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    with pytest.raises(DataError, match="line 7 has a quote that closes 15 lines further down"):
        Source(tmp_path / "bad.csv").rows  # noqa: B018


def test_one_odd_label_among_numbers_is_a_bad_row(tmp_path: Path) -> None:
    rows = [f"text {i},{'7O' if i == 77 else i % 50}" for i in range(200)]
    (tmp_path / "a.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    task = task_from_files(tmp_path / "a.csv", tmp_path / "a.csv")
    assert task.kind == "regression" and len(task.train) == 199
    assert "line 79" in " ".join(task.notes)
    assert infer_label_kind([*range(30), *["other"] * 3]) == "class"


@pytest.mark.parametrize("seed", range(5))
def test_equal_examples_stay_on_one_side(seed: int) -> None:
    texts = [f"text {i // 3}" for i in range(90)]
    rows = Examples(texts, None, ["yes" if i // 3 % 2 else "no" for i in range(90)])
    train, dev = rows.hold_out(0.2, seed=seed)
    assert not {*train.text} & {*dev.text} and len(train) + len(dev) == 90 and 18 <= len(dev) <= 20
    same = Examples(["a"] * 10, None, ["yes", "no"] * 5)
    assert [len(side) for side in same.hold_out(0.2, seed=seed)] == [8, 2]


@pytest.mark.parametrize("number", [30, 60, 120])
def test_one_text_does_not_take_over_what_is_held_out(number: int) -> None:
    """A share of a fifth; what one text may make of it is a quarter."""
    for seed in range(10):
        labels = ["yes" if i % 2 else "no" for i in range(300)]
        rows = Examples([*["n/a"] * number, *(f"text {i}" for i in range(300 - number))], None, labels)
        train, dev = rows.hold_out(0.2, seed=seed)
        assert len(dev) == 60 and "n/a" not in dev.text and len(train) == 240
        sizes = [len(part) for part in rows.folds(3, seed=seed)]
        assert sum(sizes) == 300 and max(sizes) <= max(100, number) + 3


@pytest.mark.parametrize("seed", range(5))
def test_where_most_texts_are_equal_others_stay_in_training(seed: int) -> None:
    texts = ["none"] * 160 + [f"text {i}" for i in range(40)]
    train, dev = Examples(texts, None, ["yes", "no"] * 100).hold_out(0.2, seed=seed)
    assert len(dev) == len({*dev.text}) == 20 and len({*train.text}) == 21
    train, dev = Examples(["a"] * 80 + ["b"] * 20, None, ["yes", "no"] * 50).hold_out(0.1, seed=seed)
    assert (len(train), len(dev)) == (80, 20), "the smaller one is held out"


@pytest.mark.parametrize("seed", range(5))
def test_every_fold_has_its_share_of_every_class(seed: int) -> None:
    texts = [f"answer {i}" for i, times in enumerate((9, 9, 9, 9, 4)) for _ in range(times)]
    rows = Examples([*texts, *(f"complaint {i}" for i in range(5))], None, ["a"] * 40 + ["c"] * 5)
    assert [rows.subset(part).classes() for part in rows.folds(5, seed=seed)] == [{"a", "c"}] * 5
    labels = [name for name in "abc" for _ in range(35)]
    rows = Examples([*["same"] * 30, *(f"text {i}" for i in range(75))], None, labels)
    for part in rows.folds(5, seed=seed):
        found = Counter(labels[row] for row in part)
        assert found["b"] == found["c"] == 7 and found["a"] in (1, 2, 30)


@pytest.mark.parametrize("seed", range(5))
def test_repeated_texts_are_held_out_as_often_as_others(seed: int) -> None:
    texts = [f"twice {i // 2}" for i in range(400)] + [f"once {i}" for i in range(1600)]
    _, dev = Examples(texts, None, ["yes", "no"] * 1000).hold_out(0.2, seed=seed)
    assert len(dev) == 400 and 50 <= sum(text.startswith("twice") for text in dev.text) <= 110


@pytest.mark.parametrize("share", [0.1, 0.2])
@pytest.mark.parametrize("seed", range(5))
def test_a_class_of_equal_examples_stays_in_training(seed: int, share: float) -> None:
    for texts in (["win"] * 3, ["win"] * 8, ["win", "prize"] * 6):
        rows = Examples(
            [f"text {i}" for i in range(80)] + texts, None, ["a", "b"] * 40 + ["spam"] * len(texts)
        )
        train, dev = rows.hold_out(share, seed=seed)
        assert train.classes() == {"a", "b", "spam"} and not {*train.text} & {*dev.text}
        assert dev.classes() >= {"a", "b"} and len(train) + len(dev) == len(rows)


def test_a_ranking_needs_two_classes_in_what_is_held_out(tmp_path: Path) -> None:
    rows = [f"text {i},{'yes' if i < 1 else 'no'}" for i in range(60)]
    (tmp_path / "a.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (tmp_path / "b.csv").write_text("text,label\none,yes\ntwo,no\n")
    task = task_from_files(tmp_path / "a.csv", tmp_path / "b.csv").measured_by("auroc")
    with pytest.raises(DataError, match="auroc needs held-out examples of two classes, got only 'no'"):
        task.hold_out(0.2, None)
    assert task.measured_by("accuracy").hold_out(0.2, None)[1] is not None
