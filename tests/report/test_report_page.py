"""The page as it is written: what stands where, and that nothing in a name becomes markup."""

from __future__ import annotations

import json
import math
import re
import shlex
import tomllib
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.report import synthetic
from tests.report.parsed_page import Element, parse

from childtuning.cli import app
from childtuning.cli.options import run_config
from childtuning.compare.records import Record, Recorded
from childtuning.report import html_page
from childtuning.report.evidence import Evidence
from childtuning.report.train_command import train_words
from childtuning.runs.config import RunConfig

NAMES = ["glue", "low_resource", "domain_transfer", "task_transfer", *synthetic.odd()]
SECTIONS = {
    "glue": ["ranking", "costs", "curves", "places", "tuning", "runs", "reproduce"],
    "low_resource": ["ranking", "costs", "sizes", "curves", "runs", "reproduce"],
    "domain_transfer": ["ranking", "costs", "transfer", "runs", "reproduce"],
    "task_transfer": ["ranking", "costs", "transfer", "runs", "reproduce"],
    "empty": [],
    "nothing finished": ["runs", "reproduce"],
    "failed only": ["runs", "reproduce"],
    "one run": ["ranking", "curves", "runs", "reproduce"],
    "one method": ["ranking", "runs", "reproduce"],
    "one seed": ["ranking", "costs", "runs", "reproduce"],
    "all nan": ["ranking", "curves", "runs", "reproduce"],
}


@pytest.mark.parametrize("name", NAMES)
def test_every_page_is_whole(page, name: str) -> None:
    root = parse(page(name))
    ids = [element.attributes["id"] for element in root.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    targets = {a.attributes["href"] for a in root.all() if (a.attributes.get("href") or "").startswith("#")}
    assert targets <= {f"#{id}" for id in ids}
    for element in root.all():
        assert "NaN" not in " ".join(map(str, element.attributes.values())), element
        assert element.attributes.get("role") != "img" or element.attributes["aria-label"]
    for figure in root.all("figure"):
        assert figure.one("figcaption").text
        assert [*figure.all("table"), *(s for s in figure.all("svg") if s.attributes.get("role") == "img")]
    for table in root.all("table"):
        assert table.attributes["aria-label"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_fetched(page, name: str) -> None:
    root = parse(page(name))
    for element in root.all():
        for attribute in ("src", "href", "action", "srcset", "data", "poster"):
            value = element.attributes.get(attribute)
            assert value is None or value.startswith("#") or value == "data:,", (element.tag, value)
    assert not re.search(r"url\(|@import|https?:", " ".join(e.text for e in root.all("style")))
    policy = next(e for e in root.all("meta") if e.attributes.get("http-equiv"))
    assert (policy.attributes["content"] or "").startswith("default-src 'none'")


@pytest.mark.parametrize(("name", "expected"), SECTIONS.items())
def test_sections_with_nothing_to_show_are_left_out(page, name: str, expected: list[str]) -> None:
    root = parse(page(name))
    assert [section.attributes["id"] for section in root.all("section")] == expected
    links = [a.attributes["href"] for nav in root.all("nav") for a in nav.all("a")]
    assert links == [f"#{id}" for id in expected]


def test_names_and_errors_never_become_markup(page) -> None:
    for name in ("markup", "failed only"):
        root = parse(page(name))
        assert not [b for b in root.all("b") if not b.text], "a <b> of a name was opened"
        assert len(list(root.all("script"))) == 2
    text = parse(page("markup")).text
    assert text.count("</script><b>&\"'`\\ {x} é") > 10


def test_the_headline_says_what_was_compared(page) -> None:
    header = parse(page("glue")).one("header")
    assert header.one("h1").text == "5 methods on rte, mrpc and cola"
    facts = {e.one("dt").text: e.one("dd").text for e in header.one("dl").all("div")}
    assert facts["runs"] == "150 of 152" and facts["failed"] == "2" and facts["collapsed"] == "1"
    findings = [li.text for li in header.one("ul", "findings").all("li")]
    assert len(findings) == 4
    assert re.fullmatch(
        r"Across tasks child-d leads with a mean of 0\.\d{3}, 0\.0\d\d above full: significant, p\s[=<]\s0\.0\d+\.",
        findings[0],
    )
    assert re.fullmatch(
        r"rte child-d (leads with|has the best) accuracy,? 0\.5\d\d \(0\.5\d\d … 0\.\d{3}\), 0\.0\d\d above full: "
        r"(no clear difference|significant), p\s[=<]\s0\.\d+\.",
        findings[1],
    )


def test_the_headline_claims_no_more_than_the_runs_show() -> None:
    def findings(levels: dict[str, Any], num_seeds: int) -> list[str]:
        runs = [
            synthetic.record(
                method=method, seed=seed, score=(level(seed) if callable(level) else level) + 0.001 * seed
            )
            for (method, level), seed in product(levels.items(), range(num_seeds))
        ]
        root = parse(html_page(Recorded(synthetic.comparison(["rte"], list(levels), num_seeds), runs)))
        return [li.text.replace("\xa0", " ") for li in root.one("ul", "findings").all("li")]

    clear = "child-d leads with accuracy 0.704 (0.701 … 0.706), 0.100 above full: significant, p = 0.008."
    assert findings({"full": 0.6, "child-d": 0.7}, 8) == [f"rte {clear}"]
    (few,) = findings({"full": 0.6, "child-d": 0.7}, 3)
    assert few.startswith("rte child-d has the best accuracy, 0.701 (")
    assert few.endswith("0.100 above full: no clear difference, p = 0.250.")
    (single,) = findings({"full": 0.6, "child-d": 0.7}, 1)
    assert single.endswith("0.100 above full: one common seed is not enough for a test.")
    (best,) = findings({"full": 0.7, "child-d": 0.6}, 8)
    assert best.endswith(", the baseline; every other method is significantly worse.")
    (near,) = findings({"full": 0.7, "child-d": 0.6}, 3)
    assert near.endswith(", the baseline; none is significantly better.")
    assert findings({"full": 0.7, "child-d": 0.7}, 8) == ["rte full and child-d tie at accuracy 0.704."]
    (third,) = findings({"full": 0.6, "child-d": 0.7, "lora": 0.7002}, 8)
    assert third == "rte lora and child-d tie at accuracy 0.704, 0.100 above full: significant, p = 0.016."
    (part,) = findings({"full": 0.6, "child-d": 0.7, "lora": lambda seed: 0.7005 + 0.15 * (-1) ** seed}, 8)
    assert (
        part
        == "rte lora and child-d tie at accuracy 0.704; of these child-d is significantly better than full."
    )
    (collapsed,) = findings({"full": 0.5, "child-d": 0.4}, 3)
    assert (
        collapsed
        == "rte every run collapsed: none is better than always predicting the most frequent answer."
    )


@pytest.mark.parametrize(("score", "num_seeds"), [(131 / 277, 5), (131 / 277, 10), (0.7, 3), (41 / 60, 3)])
def test_equal_scores_whose_mean_is_rounded_are_drawn(score: float, num_seeds: int) -> None:
    runs = [
        synthetic.record(method=method, seed=seed, score=score, curve=4)
        for method, seed in product(("full", "child-d"), range(num_seeds))
    ]
    page = html_page(Recorded(synthetic.comparison(["rte"], ["full", "child-d"], num_seeds), runs))
    assert f"{score:.3f}" in page and "<svg" in page


def test_a_lost_run_leaves_no_claim_about_its_method_across_tasks() -> None:
    def runs(lost: bool) -> list[Record]:
        return [
            synthetic.record(
                task, method, seed, score=math.nan if lost and (task, method, seed) == last else score
            )
            for (task, base), (method, gain), seed in product(
                (("rte", 0.6), ("mnli", 0.7)), (("full", 0.1), ("child-d", 0.0), ("lora", 0.2)), range(8)
            )
            for score in [base + gain + 0.001 * seed]
        ]

    last = ("mnli", "lora", 7)
    asked = synthetic.comparison(["rte", "mnli"], ["full", "child-d", "lora"], 8)
    whole, part = (Evidence(Recorded(asked, runs(lost))).across[0] for lost in (False, True))
    assert whole.standing.clear == {"lora"}
    assert [average.method for average in part.averages] == ["full", "child-d"] and not part.standing.clear


def test_a_choice_at_the_end_of_what_was_tried_is_marked() -> None:
    def chosen(best: float) -> tuple[str, str]:
        runs = [
            synthetic.record(method="full", seed=0, score=0.7 if rate == best else 0.6, point={"lr": rate})
            for rate in (1e-5, 2e-5, 3e-5)
        ]
        root = parse(html_page(Recorded(synthetic.comparison(["rte"], ["full"], 1), runs)))
        tuning = root.one("section", id="tuning")
        (table,) = [e for e in tuning.all("table") if "Chosen" in (e.attributes.get("aria-label") or "")]
        return table.table()[1][1], tuning.text

    cell, text = chosen(3e-5)
    assert cell == "lr 3e-5†" and "† the lowest or the highest" in text
    cell, text = chosen(2e-5)
    assert cell == "lr 2e-5" and "†" not in text


def test_the_ranking_is_in_order_with_every_seed() -> None:
    levels = {"full": 0.60, "lora": 0.50, "child-d": 0.70}
    runs = [
        synthetic.record(method=method, seed=seed, score=level + 0.01 * seed)
        for (method, level), seed in product(levels.items(), range(8))
    ]
    root = parse(html_page(Recorded(synthetic.comparison(["rte"], list(levels), 8), runs)))
    forest = root.one("table", "forest")
    head, _, *rows = forest.table()
    assert [row[0] for row in rows] == ["child-d", "full", "lora4 of 8 collapsed"]
    assert head[2:] == ["mean", "95 % interval", "minus full", "p (Holm)", ""]
    assert [row[2] for row in rows] == ["0.735", "0.635", "0.535"]
    assert [row[4:] for row in rows] == [
        ["+0.100", "0.016", "better"],
        ["", "", "baseline"],
        ["−0.100", "0.016", "worse"],
    ]
    assert [row.attributes.get("class") for row in forest.one("tbody").all("tr")] == ["best", None, None]
    note = root.one("section", id="ranking").one("figcaption").text
    assert note.endswith(
        "accuracy, 2,490 training examples, 277 evaluation examples, standard error of a score 0.027"
    )
    for row, (method, level) in zip(
        forest.one("tbody").all("tr"), sorted(levels.items(), key=lambda i: -i[1]), strict=True
    ):
        dots = list(row.all("circle"))
        assert [dot.attributes["data-tip"] for dot in dots] == [
            f"{method}, seed {seed}: {level + 0.01 * seed:.4f}" for seed in range(8)
        ]
        places = [float((dot.attributes["cx"] or "").rstrip("%")) for dot in dots]
        assert places == sorted(places) and places[0] >= 0 and places[-1] <= 100
        assert f"mean {level + 0.035:.3f}" in _words(row)


def _words(row: Element) -> str:
    return next(
        svg.attributes["aria-label"] or "" for svg in row.all("svg") if svg.attributes.get("role") == "img"
    )


def test_a_loss_is_ranked_from_below(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(synthetic.METRICS, "news", "perplexity")
    monkeypatch.setitem(synthetic.FLOORS, "perplexity", None)
    levels = {"full": 20.0, "lora": 25.0, "child-d": 15.0}
    runs = [
        synthetic.record("news", method, seed, score=level + seed)
        for (method, level), seed in product(levels.items(), range(8))
    ]
    root = parse(html_page(Recorded(synthetic.comparison(["news"], list(levels), 8), runs)))
    rows = root.one("table", "forest").table()[2:]
    assert [(row[0], row[6]) for row in rows] == [
        ("child-d", "better"),
        ("full", "baseline"),
        ("lora", "worse"),
    ]


def test_scores_by_training_size_and_from_other_tasks(page) -> None:
    sizes = parse(page("low_resource")).one("section", id="sizes")
    table = next(sizes.all("table")).table()
    assert table[0] == ["method", "100", "300", "1,000", "2,490"]
    assert [row[0] for row in table[1:]] == ["full", "child-f", "child-d"]
    assert all(re.fullmatch(r"0\.\d{3}", cell) for row in table[1:] for cell in row[1:])

    domains = [t.table() for t in parse(page("domain_transfer")).one("section", id="transfer").all("table")]
    assert len(domains) == 3
    assert domains[0][0][1:] == ["mnli", "snli", "sick", "scitail", "rte"]
    assert [row[0] for row in domains[0][1:]] == ["mnli", "snli"]

    tasks = [t.table() for t in parse(page("task_transfer")).one("section", id="transfer").all("table")]
    assert len(tasks) == 2
    assert [row[0] for row in tasks[0][1:]] == ["mrpc", "rte"]
    rows = {row[0]: dict(zip(tasks[0][0][1:], row[1:], strict=True)) for row in tasks[0][1:]}
    assert rows["mrpc"]["mrpc"] == "" and rows["mrpc"]["rte"] != "" and rows["rte"]["cola"] != ""


def test_curves_are_downsampled_whatever_was_logged() -> None:
    runs = [synthetic.record(method=m, seed=s, curve=3000) for m in ("full", "child-d") for s in range(3)]
    root = parse(html_page(Recorded(synthetic.comparison(["rte"], ["full", "child-d"], 3), runs)))
    paths = [p.attributes["d"] or "" for p in root.one("section", id="curves").all("path")]
    assert len(paths) == 2 * (3 + 1)
    assert {path.count("L") for path in paths} == {59}


def test_two_thousand_runs_stay_small() -> None:
    methods = [f"child-d:{density / 20:.2f}" for density in range(1, 11)]
    runs = [
        synthetic.record(task, method, seed, point={"learning_rate": rate / 1e6}, curve=300)
        for task, method, rate, seed in product(("rte", "cola"), methods, range(10, 110, 5), range(5))
    ]
    assert len(runs) == 2000
    made = html_page(Recorded(synthetic.comparison(("rte", "cola"), methods, 5, tune_seeds=5), runs))
    rows = list(parse(made).one("table", id="runs-table").one("tbody").all("tr"))
    assert len(rows) == 2000
    assert sum("hidden" not in row.attributes for row in rows) == 40
    assert len(made) < 3_000_000


def _data(root: Element) -> dict:
    return json.loads(root.one("script", id="runs-data").text)


def _every_option() -> list[dict]:
    """Configurations that together have every option at a value that is not its default."""
    one: dict = {"task": "rte", "method": "child-d+r3f:0.7", "density": 0.25, "data_dir": "/data/it's here"}
    other: dict = {
        "train": "-a b.csv",
        "eval": "$x.xlsx",
        "method": "child-d",
        "density": "auto",
        "label_type": "class",
        "encoding": "cp1251",
        "sheet": "a sheet",
        "class_weights": "balanced",
    }
    special = {
        "granularity": "row",
        "scope": "parameter",
        "estimator": "per-batch",
        "fisher_labels": "sampled",
    }
    special |= {"precision": "bf16", "preset": None, "fisher_device": "cpu", "fisher_dtype": "bfloat16"}
    special |= {
        "budget": "step=0.5",
        "report_to": "tensorboard",
        "mass": 0.5,
        "warmup_ratio": 0.25,
        "held_out": 0.125,
    }
    for field in fields(RunConfig):
        if field.name in {*one, *other, "text", "text_pair", "label"}:
            continue
        kind = str(field.type)
        value: Any = special.get(field.name, ["a b", "*.c"] if "tuple" in kind else not field.default if "bool" in kind
            else 7 if "int" in kind else 0.75 if "float" in kind else "some where")  # fmt: skip
        one[field.name] = value
    other |= dict.fromkeys(("text", "text_pair", "label"), "a column")
    other |= {"rescale": False, "release_gradients": False, "seed": 8}
    folded = {"train": "a.csv", "folds": one.pop("folds"), "fold": one.pop("fold"), "seed": 9}
    folded["budget"] = one.pop("budget")
    other["shard"] = one.pop("shard")
    assert {*one, *other, *folded} == {field.name for field in fields(RunConfig)}
    return [one, other, folded]


def test_every_run_can_be_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    configs = [
        {name: value for name, value in config.items() if value is not None} for config in _every_option()
    ]
    runs = [synthetic.record(seed=config["seed"], config=config) for config in configs]
    data = _data(parse(html_page(Recorded(synthetic.comparison(["rte"], ["full"], 4), runs))))
    train = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    for name in {config[key] for config in configs for key in ("train", "eval") if key in config}:
        Path(name).touch()
    for run, config in zip(runs, configs, strict=True):
        detail = data["runs"][run.id]
        wanted = RunConfig.from_options(config)
        assert RunConfig.from_options(tomllib.loads(detail["toml"] + data["shared"]["toml"])) == wanted
        words = shlex.split(f"{detail['words']} {data['shared']['words']}")
        given = train.make_context("train", words).params
        options = {name: value for name, value in given.items() if name in RunConfig.__dataclass_fields__}
        options = {
            name: list(value) if isinstance(value, tuple) else value for name, value in options.items()
        }
        assert run_config(None, options) == wanted


def test_the_command_leaves_defaults_out() -> None:
    given = {"task": "rte", "epochs": 3.0, "mass": 0.9, "compile": False, "seed": 0, "learning_rate": "auto"}
    assert train_words(given) == "--task rte --epochs 3.0"


def test_what_all_runs_share_stands_once(page) -> None:
    data = _data(parse(page("glue")))
    assert "data_dir" in data["shared"]["toml"]
    assert len(data["runs"]) == 152
    assert not any("data_dir" in run["toml"] for run in data["runs"].values())
    failed = [run for run in data["runs"].values() if run.get("error")]
    assert [run["error"] for run in failed] == ["out of memory: 1.9 GB wanted"] * 2


def test_the_exact_command_and_the_environment_stand_at_the_end(page) -> None:
    section = list(parse(page("glue")).all("section"))[-1]
    assert section.one("pre").text == synthetic.COMMAND
    tables = {table.attributes["aria-label"]: dict(table.table()) for table in section.all("table")}
    assert tables["Environment"]["packages.torch"] == "2.13.0"
    assert tables["Settings"]["grid.learning_rate"] == "2e-5, 4e-5, 0.0001"


def answered(method: str, seed: int, answers: list[str]) -> Any:
    """Return a run with its answers to four examples of two classes."""
    per_class = {
        label: {"precision": 0.5, "recall": 0.5, "f1": 0.25 + seed / 2, "support": 2}
        for label in ("no", "yes")
    }
    run = synthetic.record("rte", method, seed)
    return replace(
        run, result={**(run.result or {}), "per_class": per_class, "answers": answers, "examples": "4f"}
    )


def disagreeing(examples: dict[str, Any] | None) -> Recorded:
    """Return two methods that agree on two of four examples."""
    runs = [
        answered("full", 0, ["yes", "no", "yes", "no"]),
        answered("full", 1, ["yes", "no", "yes", "no"]),
        answered("child-d", 0, ["yes", "no", "no", "no"]),
        answered("child-d", 1, ["yes", "no", "no", "yes"]),
    ]
    asked = synthetic.comparison(["rte"], ["full", "child-d"], 2)
    return Recorded(asked, runs, {} if examples is None else {"examples 4f": examples}, {})


def test_examples_on_which_methods_disagree_come_first() -> None:
    examples = {"labels": ["yes", "no", "no", "no"], "shown": ["one", "two", "<b>three", "four"]}
    part = next(
        s for s in parse(html_page(disagreeing(examples))).all("section") if s.attributes["id"] == "examples"
    )
    classes, disagreements = part.all("table")
    assert [row.text for row in classes.all("tr")][1:] == ["no20.5000.500", "yes20.5000.500"]
    rows = [[cell.text for cell in [*row.all("th"), *row.all("td")]] for row in disagreements.all("tr")]
    columns = dict(zip(*rows[:2], strict=True))
    assert columns["example"] == "<b>three" and columns["label"] == "no"
    assert columns["child-d"] == "no 2/2 ✓" and columns["full"] == "yes 2/2"
    assert [row[0] for row in rows[1:]] == ["<b>three", "four"]
    assert "differ on 2 of 4 examples; on 1 of them" in part.text


def test_without_the_examples_there_are_only_classes() -> None:
    page = parse(html_page(disagreeing(None)))
    part = next(s for s in page.all("section") if s.attributes["id"] == "examples")
    assert len([*part.all("table")]) == 1


def test_answers_to_other_examples_are_left_out() -> None:
    recorded = disagreeing({"labels": ["yes", "no", "no", "no"], "shown": ["one", "two", "three", "four"]})
    drawn_anew = replace(recorded.records[3], result={**(recorded.records[3].result or {}), "examples": "5a"})
    text = html_page(replace(recorded, records=[*recorded.records[:3], drawn_anew]))
    part = next(s for s in parse(text).all("section") if s.attributes["id"] == "examples")
    assert "no ✓" in part.text and "no 2/2 ✓" not in part.text
