"""What is asked for, and the runs that this comes to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from childtuning.compare import Comparison, num_runs, read_comparison, set_up
from childtuning.compare.design import read_grid, read_methods, read_sizes
from childtuning.compare.plan import choose, needed
from childtuning.compare.protocols import PROTOCOLS, inference_splits
from childtuning.compare.records import Record
from childtuning.errors import ConfigError


def asked(**words: Any) -> Comparison:
    settings = {"threads": 1, **words.pop("settings", {})}
    return read_comparison(None, **{"tasks": ["rte"], **words}, settings=settings)


def finish(run: Record, held_out: float) -> Record:
    result = {"metric": {"name": "accuracy", "value": 0.5}, "held_out": {"accuracy": held_out}}
    return Record.from_dict({**run.to_dict(), "state": "done", "result": result})


@pytest.mark.parametrize(
    ("texts", "methods"),
    [
        (["full,child-d"], ("full", "child-d")),
        (["full", "child-d+r3f:0.7,eps=1e-5,lora"], ("full", "child-d+r3f:0.7,eps=1e-5", "lora")),
        (["smart:weight=0.5,step=1e-4,full"], ("smart:weight=0.5,step=1e-4", "full")),
        (
            ["child-d,child-d@a.1,smart:weight=0.5,step=1e-4@b"],
            ("child-d", "child-d@a.1", "smart:weight=0.5,step=1e-4@b"),
        ),
    ],
)
def test_commas_part_methods_and_their_options(texts: list[str], methods: tuple[str, ...]) -> None:
    assert read_methods(texts) == methods


def test_grids_are_of_all_methods_or_of_one() -> None:
    grid, of = read_grid(
        ["lr=2e-5,4e-5", "density=0.1,auto", "lora:r=8:lr=1e-3", "batch-size=8"], ["lora:r=8", "full"]
    )
    assert grid == {"learning_rate": [2e-5, 4e-5], "density": [0.1, "auto"], "batch_size": [8]}
    assert of == {"lora:r=8": {"learning_rate": [1e-3]}}


def test_a_grid_belongs_to_the_longest_name_that_it_begins_with() -> None:
    _, of = read_grid(["lora:r=8:lr=1e-3", "lora:lr=1e-4"], ["lora", "lora:r=8"])
    assert of == {"lora:r=8": {"learning_rate": [1e-3]}, "lora": {"learning_rate": [1e-4]}}


def test_a_label_makes_a_second_entry_of_a_method() -> None:
    found = asked(
        methods=["child-d,child-d@columns,child-d@both"],
        grid=[
            "child-d:density=0.3",
            "child-d@columns:density=0.1",
            "child-d@columns:granularity=column",
            "child-d@both:density=0.1,0.3",
        ],
    )
    runs = [
        (run.group.method, run.config["method"], run.config["density"], run.config["granularity"])
        for run in found.first_runs
    ]
    assert runs == [
        ("child-d", "child-d", 0.3, "element"),
        ("child-d@columns", "child-d", 0.1, "column"),
        ("child-d@both", "child-d", 0.1, "element"),
        ("child-d@both", "child-d", 0.3, "element"),
    ]
    assert len({run.id for run in found.first_runs}) == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr", "the grid takes NAME=VALUE"),
        ("lr=", "the grid takes NAME=VALUE"),
        ("lr=fast", "learning_rate must be a number, or auto, got 'fast'"),
        ("epochz=3", "Did you mean 'epochs'"),
        ("batch_size=1.5", "batch_size must be a whole number"),
        ("seed=1,2", "the grid cannot hold 'seed'. Pass --seeds"),
        ("method=full", "Pass --methods"),
        ("lr=1e-3,-1", "learning_rate must be above 0"),
    ],
)
def test_wrong_grids_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        asked(methods=["full"], grid=[text])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"methods": ["full,full"]}, "methods has 'full' twice"),
        ({"methods": ["child_d"]}, "Did you mean 'child-d'"),
        ({"methods": ["child_d@fine"]}, "Did you mean 'child-d'"),
        ({"methods": ["full,child-d@"]}, "a label is letters, digits and '-', got 'child-d@'"),
        ({"methods": ["full,child-d@a b"]}, "a label is letters, digits and '-', got 'child-d@a b'"),
        ({"methods": ["child-d,child-d@fine"]}, "same runs. Pass --grid child-d@fine:NAME=VALUE"),
        (
            {"methods": ["child-d"], "grid": ["child-d@fine:lr=1e-4"]},
            "grid names 'child-d@fine', which is not",
        ),
        ({"settings": {"num_seeds": 2, "tune_seeds": 3}}, "tune_seeds must be between 1 and the 2 seeds"),
        ({"settings": {"baseline": "lora"}}, "baseline 'lora' is not among the methods"),
        ({"train_sizes": "100,few"}, "train sizes are numbers above 0, or all, got 'few'"),
        ({"protocol": "glue"}, "Did you mean 'glue-small'"),
        ({"tasks": None}, "there is nothing to compare"),
        ({"tasks": None, "protocol": "paper"}, "protocol 'paper' names no tasks of its own"),
        ({"tasks": None, "protocol": "domain-transfer"}, "Pass --data-dir"),
    ],
)
def test_what_makes_no_run_is_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asked(**words)


def test_what_only_children_have_is_left_out_for_others() -> None:
    found = asked(methods=["full,child-d,lora,child-f+r3f"], grid=["lr=1e-5,2e-5", "density=0.1,0.3"])
    assert [len(found.points(method)) for method in found.methods] == [2, 4, 2, 4]
    fixed = asked(methods=["full,child-d"], options={"density": 0.2, "granularity": "row"})
    densities = [(run.group.method, run.config.get("density")) for run in fixed.first_runs]
    assert densities == [("full", None), ("child-d", 0.2)]


def test_examples_are_set_aside_where_there_is_something_to_choose() -> None:
    one = asked(methods=["full,head"])
    several = asked(methods=["full,head"], grid=["full:lr=1e-5,2e-5"])
    paper = asked(methods=["full,head"], grid=["lr=1e-5,2e-5"], protocol="paper")
    shares = [{run.config["held_out"] for run in found.first_runs} for found in (one, several, paper)]
    assert shares == [{0.0}, {0.1}, {0.0}]
    assert paper.selection == "reported"


def test_the_best_of_those_tried_gets_the_other_seeds() -> None:
    found = asked(methods=["full,head"], grid=["lr=1e-5,2e-5"], settings={"num_seeds": 3, "tune_seeds": 2})
    assert num_runs(found) == 2 * (2 * 2 + 1)
    first = list(needed(found, {}, Path))
    assert len(first) == 8 and [run.seed for run in first] == [0] * 4 + [1] * 4
    known = {run.id: finish(run, run.point["learning_rate"]) for run in first if run.group.method == "full"}
    then = list(needed(found, known, Path))
    assert [(run.group.method, run.seed, run.point) for run in then[8:]] == [
        ("full", 2, {"learning_rate": 2e-5})
    ]
    known |= {run.id: finish(run, -run.point["learning_rate"]) for run in first if run.group.method == "head"}
    last = list(needed(found, known, Path))[-1]
    assert (last.group.method, last.seed, last.point) == ("head", 2, {"learning_rate": 1e-5})
    failed = [replace(run, state="failed") for run in first if run.group.method == "head"]
    assert num_runs(found, failed) == 2 * 2 + 1 + 2 * 2 and num_runs(found, failed[1:] + first) == num_runs(
        found
    )


def test_runs_are_known_again_by_what_decides_them() -> None:
    found = asked(methods=["full"], options={"data_dir": "/data"})
    moved = asked(methods=["full"], options={"data_dir": "/elsewhere/data", "save_steps": 7})
    others = [
        asked(methods=["full"], options={"epochs": 4.0}),
        asked(methods=["full"], settings={"threads": 2}),
        asked(methods=["full"], options={"model": "bert-large-uncased"}),
        asked(methods=["full"], train_sizes="100"),
    ]
    ids = [run.first_runs[0].id for run in (found, moved, *others)]
    assert ids[0] == ids[1] and len(set(ids)) == 1 + len(others)


def test_it_survives_json() -> None:
    found = asked(
        methods=["full,child-d"], grid=["lr=1e-5", "child-d:density=0.1,0.2"], train_sizes="100,all"
    )
    assert Comparison.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    run = finish(found.first_runs[0], 0.5)
    assert Record.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_a_stored_comparison_is_widened() -> None:
    before = asked(methods=["full,head"], grid=["lr=1e-5,2e-5"], settings={"num_seeds": 2, "threads": 3})
    assert read_comparison(before) is before
    wider = read_comparison(before, settings={"num_seeds": 5}, grid=["lr=1e-5"], options={"epochs": 1.0})
    assert (wider.num_seeds, wider.tasks, wider.threads) == (5, before.tasks, 3)
    assert wider.grid == {"learning_rate": [1e-5]} and wider.options["epochs"] == 1.0


def test_files_of_the_users_are_one_task() -> None:
    found = asked(tasks=None, methods=["full"], options={"train": "a/mine.csv.gz", "eval": "a/dev.csv"})
    assert found.tasks == ("mine",)
    config = found.first_runs[0].config
    assert "task" not in config and Path(config["train"]).is_absolute()


def test_sizes() -> None:
    assert read_sizes("100, 1_000,all") == (100, 1000, None)


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name not in ("paper", "domain-transfer")])
def test_every_protocol_makes_runs(name: str) -> None:
    found = read_comparison(None, protocol=name)
    assert num_runs(found) >= 4 and found.protocol == name


def test_domain_transfer_scores_on_what_is_there(tmp_path: Path) -> None:
    for path in (
        "mnli/dev_matched.jsonl",
        "snli/dev.jsonl",
        "snli/test.jsonl.gz",
        "sick/test.jsonl",
        "rte/dev.jsonl",
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    assert inference_splits(tmp_path) == ("mnli/dev_matched", "snli/test", "sick/test")
    found = read_comparison(None, protocol="domain-transfer", options={"data_dir": str(tmp_path)})
    assert all(run.config["elsewhere"] == inference_splits(tmp_path) for run in found.first_runs)
    assert {(run.group.task, run.group.train_size) for run in found.first_runs} == {
        ("snli", 5000),
        ("mnli", 5000),
    }
    with pytest.raises(ConfigError, match="contains none of mnli"):
        inference_splits(tmp_path / "rte")


def test_earlier_comparisons_keep_the_rate_that_they_had() -> None:
    now = asked(methods=["full"])
    assert {run.config["learning_rate"] for run in now.first_runs} == {"auto"}
    before = {name: value for name, value in now.to_dict().items() if name != "defaults"}
    old = Comparison.from_dict(before)
    assert {(run.config["learning_rate"], run.config["epochs"]) for run in old.first_runs} == {(2e-5, 3.0)}
    assert Comparison.from_dict(now.to_dict()) == now
    assert not {run.id for run in old.first_runs} & {run.id for run in now.first_runs}
    named = asked(methods=["full"], options={"learning_rate": 2e-5, "epochs": 3.0})
    assert [run.id for run in named.first_runs] == [run.id for run in old.first_runs]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocols_keep_the_numbers_of_the_paper(name: str) -> None:
    assert PROTOCOLS[name].options == {"learning_rate": 2e-5, "epochs": 3.0}


def test_a_store_refuses_a_file_that_has_changed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,1\n")
    found = asked(tasks=None, methods=["full"], options={"train": str(tmp_path / "a.csv")})
    set_up(tmp_path / "s.db", found)
    set_up(tmp_path / "s.db", found)
    (tmp_path / "a.csv").write_text("text,label\ny,1\n")
    with pytest.raises(
        ConfigError, match="a.csv has changed since it was trained on. Restore it, or pass another"
    ):
        set_up(tmp_path / "s.db", found)


@pytest.mark.parametrize("changed", ["photos/train/red/0.png", "other/dev.jsonl"])
def test_a_store_refuses_other_images_and_other_examples_elsewhere(tmp_path: Path, changed: str) -> None:
    for name in ("photos/train/red/0.png", "photos/dev/red/0.png", "other/dev.jsonl"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    options = {"data_dir": str(tmp_path / "data"), "elsewhere": ("other",)}
    found = asked(tasks=["photos"], methods=["full"], options=options)
    set_up(tmp_path / "s.db", found)
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = asked(
        tasks=["photos"], methods=["full"], options={**options, "data_dir": str(tmp_path / "moved")}
    )
    set_up(tmp_path / "s.db", moved)
    (tmp_path / "moved" / changed).write_text("after")
    with pytest.raises(ConfigError, match=f"{'/'.join(changed.split('/')[:2])} has changed since"):
        set_up(tmp_path / "s.db", moved)


def test_what_chooses_is_what_was_asked_for() -> None:
    """By held-out examples, which there must be; or by the reported ones, even where some are held out."""
    words: dict[str, Any] = {"methods": ["full"], "grid": ["lr=1e-3,1e-4"]}
    with pytest.raises(ConfigError, match="got held_out=0. Leave it out, or pass --selection reported"):
        asked(**words, options={"held_out": 0.0})
    assert asked(methods=["full"], options={"held_out": 0.0}).options == {"held_out": 0.0}
    wanted = {"held-out": 1e-4, "reported": 1e-3}
    for selection, rate in wanted.items():
        comparison = asked(
            **words, options={"held_out": 0.3}, settings={"selection": selection, "num_seeds": 1}
        )
        runs = []
        for run, held_out in zip(comparison.first_runs, (0.5, 0.7), strict=True):
            result = {
                "metric": {"name": "accuracy", "value": 1 - held_out},
                "held_out": {"accuracy": held_out},
            }
            runs.append(Record.from_dict({**run.to_dict(), "state": "done", "result": result}))
        (choice,) = choose(runs, comparison.seeds_to_tune, comparison.selection)
        assert choice.point == {"learning_rate": rate}


def test_a_stored_grid_that_is_refused_now_still_works() -> None:
    before = asked(methods=["full,child-d"], grid=["lr=1e-5"]).to_dict()
    stored = Comparison.from_dict(
        {**before, "grid_of": {"full": {"density": [0.1]}}, "grid": {"eval_limit": [5]}}
    )
    assert read_comparison(stored, settings={"num_seeds": 2}).num_seeds == 2


@pytest.mark.parametrize(
    ("grid", "options", "words"),
    [
        (["eval_limit=5,20"], {}, "cannot hold 'eval_limit'. Pass it as an option of all runs"),
        (["folds=2,3"], {}, "cannot hold 'folds'"),
        (["full:density=0.1,0.3"], {}, "'full' chooses no child, got density in its grid"),
        (["lr=1e-3,1e-4"], {"learning_rate": 1e-5}, "the grid and an option both say 'learning_rate'"),
    ],
)
def test_grids_that_mean_nothing_or_compare_other_examples_are_refused(
    grid: list[str], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        asked(methods=["full,child-d"], grid=grid, options=options)


def test_the_steps_at_which_a_checkpoint_is_chosen_make_another_run() -> None:
    def ids(**options: Any) -> list[str]:
        return [run.id for run in asked(methods=["full"], options=options).first_runs]

    assert ids(save_steps=9) == ids() != ids(best_checkpoint=True)
    assert ids(save_steps=9, best_checkpoint=True) != ids(save_steps=1, best_checkpoint=True)


def test_a_store_is_of_one_content_of_a_task(tmp_path: Path) -> None:
    """Wherever it lies: a copy is the same, and another folder's examples are not."""
    for folder, label in (("a", 0), ("copy", 0), ("b", 1)):
        (tmp_path / folder / "mine").mkdir(parents=True)
        (tmp_path / folder / "mine" / "train.jsonl").write_text(json.dumps({"text": "x", "label": label}))
    for folder in ("a", "copy"):
        options = {"data_dir": str(tmp_path / folder)}
        set_up(tmp_path / "s.db", asked(tasks=["mine"], methods=["full"], options=options))
    other = asked(tasks=["mine"], methods=["full"], options={"data_dir": str(tmp_path / "b")})
    with pytest.raises(ConfigError, match="mine/train.jsonl has changed since it was trained on. Restore it"):
        set_up(tmp_path / "s.db", other)
