"""Tables of recorded comparisons: what `childtuning report STORE --format json` exported into benchmarks/results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from costs import table
from torch.nn import Linear

from childtuning.compare.statistics import compare_stratified, mean_interval
from childtuning.methods import Combination
from childtuning.training import suggested_rate

TASKS = {
    "rte": "RTE",
    "cola": "CoLA",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "sst2": "SST-2",
    "snli": "SNLI",
    "mnli": "MNLI",
    "sick": "SICK",
    "scitail": "SciTail",
    "qqp": "QQP",
}
_FEW = 5  # pairs or seeds, below which neither an interval nor a p is shown
_MINILM = 384  # the width of all-MiniLM-L6-v2
_METRICS = {"f1": "F1", "matthews": "Matthews", "pearson": "Pearson", "accuracy": "accuracy"}
_NAMES = {"learning_rate": "lr"}
_SPLITS = {"dev_matched": "m", "dev_mismatched": "mm"}  # others are the only one of their task
Export = dict[str, Any]


def comparison_tables(folder: Path) -> dict[str, str]:
    """Return the tables by name of the files: NAME.json, and NAME-*.json where one was recorded in several parts."""
    kinds: dict[str, Callable[[Export], str]] = {
        "glue-small": ranking,
        "two-methods": ranking,
        "low-resource": curves,
        "domain-transfer": domains,
        "task-transfer": ranking,
        "ablation": ranking,
        "columns": units,
        "estimators": estimators,
    }
    tables = {name: [make(export) for export in _read(folder, name)] for name, make in kinds.items()}
    tables |= {name: rates(_read(folder, name)) for name in ("rates", "confirmed")}
    tables |= {"base-size": base_size(_read(folder, "base-size"))}
    tables |= {"defaults": defaults(_read(folder, "defaults"))}
    tables |= {"both-rates": [_beside_full_at_two_rates(_read(folder, "rates") + _read(folder, "confirmed"))]}
    return {name: "\n\n".join(parts) or "Not recorded yet." for name, parts in tables.items()}


def units(export: Export) -> str:
    """Return the score by task of children cut into entries, rows and columns, and how far each is from `full`."""

    def name_of(method: str, point: dict[str, Any]) -> str:
        cut = [f"{point['density']:g}, {point['granularity']}"] if "density" in point else []
        return " ".join([f"`{method}`", *cut])

    said = (
        "all-MiniLM-L6-v2, 1,000 examples, 3 epochs; mean, half of its 95 % interval (Student's t), and the seeds in "
        "brackets where they are not five. One rate a method: 1e-4 for `full`, 3e-4 for the others. *− full* is the "
        "mean difference over the tasks, each of equal weight, with its 95 % interval (Student's t); p is of a test "
        "that flips the signs of the pairs of one task and seed."
    )
    return _by_point(export, said, name_of, "method", "`full`")


def estimators(export: Export) -> str:
    """Return the score by task of children chosen by each estimator, and how far it is from that of the default."""

    def name_of(method: str, point: dict[str, Any]) -> str:
        labels = {"data": "the data's", "sampled": "sampled"}[point["fisher_labels"]]
        return f"`{point['estimator']}`, {labels} labels"

    said = (
        "all-MiniLM-L6-v2, `child-d` of a tenth of single entries, 1,000 examples, 3 epochs at 3e-4; mean and half of "
        "its 95 % interval (Student's t) of five seeds. The difference is over both tasks, each of equal weight, with "
        "its 95 % interval (Student's t); p is of a test that flips the signs of the pairs of one task and seed."
    )
    return _by_point(export, said, name_of, "scores", "`per-example`, the data's labels")


def _by_point(
    export: Export, said: str, name_fn: Callable[[str, dict[str, Any]], str], what: str, base: str
) -> str:
    """Return a table with a row for every set of options, by name, a column for every task, and the difference."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for run in export["records"]:
        if run["state"] == "done":
            name, task = name_fn(run["group"]["method"], run["point"]), TASKS[run["group"]["task"]]
            found.setdefault(name, {}).setdefault(task, {})[run["seed"]] = run["result"]["metric"]["value"]
    tasks = list(dict.fromkeys(task for scores in found.values() for task in scores))
    rows = [
        [
            name,
            *(_with_interval(list(scores.get(task, {}).values())) for task in tasks),
            *_from_full(scores, found[base]),
        ]
        for name, scores in found.items()
    ]
    command = export["comparison"]["command"]
    header = [what, *tasks, f"− {base}", "p"]
    return "\n".join([said, "", table(header, rows), "", "```bash", command, "```"])


def base_size(exports: Iterable[Export]) -> list[str]:
    """Return the score by task of every method at the rate that it chose, and how far each is from `full`.

    The density and granularity of a child are options of all runs of its export.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    chosen: dict[str, list[str]] = {}
    commands = []
    for export in exports:
        options = export["comparison"]["options"]
        setting = (
            options["model"],
            options["precision"],
            options["epochs"],
            *export["comparison"]["train_sizes"],
        )
        assert setting == ("MPNET", "bf16", "3", 1000), f"what is said above the table is not so: {setting}"
        cut = [f"{options['density']}, {options['granularity']}"] if "density" in options else []
        commands.append(export["comparison"]["command"])
        for row in export["summary"]["rows"]:
            name = " ".join([f"`{row['group']['method']}`", *cut])
            scores = {int(seed): score for seed, score in row["scores"].items()}
            found.setdefault(name, {})[TASKS[row["group"]["task"]]] = scores
            chosen.setdefault(name, []).append(f"{row['point']['learning_rate']:g}")
    if "`full`" not in found:
        return []
    tasks = list(found["`full`"])
    rows = [
        [
            name,
            *(_with_interval(list(scores.get(task, {}).values())) for task in tasks),
            " / ".join(chosen[name]),
            *_from_full(_of_enough(scores), _of_enough(found["`full`"])),
        ]
        for name, scores in sorted(found.items(), key=lambda item: item[0] != "`full`")
    ]
    said = (
        "all-mpnet-base-v2 (109 M parameters, in bf16 autocast), 1,000 examples, 3 epochs; mean, half of its 95 % "
        "interval (Student's t), or the seeds in brackets where they are fewer than five. Each method chose the better "
        "of two rates by held-out examples, with one seed. *− full* is the mean difference over the tasks of which "
        "both have five seeds, with its 95 % interval (Student's t) and the p of a test that flips the signs of the "
        "pairs of one task and seed."
    )
    header = ["method", *tasks, "chosen rate", "− `full`", "p"]
    return ["\n".join([said, "", table(header, rows), "", "```bash", *commands, "```"])]


def _of_enough(scores: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """Return the tasks with as many seeds as a claim needs."""
    return {task: of_task for task, of_task in scores.items() if len(of_task) >= _FEW}


def _from_full(scores: dict[str, dict[int, float]], full: dict[str, dict[int, float]]) -> list[str]:
    """Return the difference and its p over the tasks of ``scores``."""
    if scores == full:
        return ["", ""]
    pairs = [(of_task, full[task]) for task, of_task in scores.items() if task in full]
    if not pairs:
        return ["—", "—"]
    found = compare_stratified(pairs)
    if found.num < _FEW:
        return ["—" if found.difference is None else f"{found.difference:+.3f}", "—"]
    assert found.difference is not None and found.interval is not None and found.p_permutation is not None
    low, high = found.interval
    return [f"{found.difference:+.3f} ({low:+.3f} … {high:+.3f})", f"{found.p_permutation:.2g}"]


def _with_interval(values: list[float]) -> str:
    if not values:
        return "—"
    if len(values) < _FEW:
        return f"{mean(values):.3f} ({len(values)})"
    ends = mean_interval([values])
    assert ends is not None
    return f"{mean(values):.3f} ± {(ends[1] - ends[0]) / 2:.3f}" + (
        f" ({len(values)})" if len(values) != 5 else ""
    )


def rates(exports: Iterable[Export]) -> list[str]:
    """Return a table of the default learning rate beside the best of those tried, and the mean shortfall.

    The standard error is that of a row's best mean over its seeds, its variances averaged over the rows. Chosen by
    other seeds, a rate's score is not favoured by the noise of the seed that it was chosen with.
    """
    cells, lost, behind, variances, num_collapsed = [], [], [], [], 0
    exports = list(exports)
    commands = [export["comparison"]["command"] for export in exports]
    for row in _rated(exports):
        means = {
            rate: mean(scores[seed] for seed in row.seeds) for rate, scores in sorted(row.by_rate.items())
        }
        best = max(means, key=means.__getitem__)
        lost.append(means[best] - means[row.default])
        if len(row.seeds) > 1:
            usual, tuned = row.usual(), row.tuned()
            behind.append(mean(tuned[seed] - usual[seed] for seed in row.seeds))
            variances.append(stdev(row.by_rate[best][seed] for seed in row.seeds) ** 2 / len(row.seeds))
        num_collapsed += sum(
            row.by_rate[row.default][seed] <= row.constant < row.by_rate[best][seed] for seed in row.seeds
        )
        cells.append(
            [
                TASKS.get(row.task, row.task),
                f"{row.size}",
                str(len(row.seeds)),
                f"`{row.method}`",
                f"{row.default:g}",
                f"{means[row.default]:.3f}",
                f"{means[best]:.3f} at {best:g}",
                f"{' / '.join(f'{value:.3f}' for value in means.values())} at {', '.join(f'{r:g}' for r in means)}",
            ]
        )
    if not cells:
        return []
    header = ["task", "examples", "seeds", "method", "default", "its score", "best of four", "all four"]
    said = (
        "all-MiniLM-L6-v2; means over the seeds; 400 evaluation examples at most. The best is chosen by the same "
        "scores, which favours it. Mean shortfall of the default: "
        f"{100 * mean(lost):.1f} points over {len(lost)} rows, at most {100 * max(lost):.1f}"
        + (
            f"; the standard error of a best mean is {100 * mean(variances) ** 0.5:.1f}."
            if len(variances) == len(lost)
            else "."
        )
        + f" Runs at the default that are no better than a constant answer where the best rate's is: {num_collapsed}."
    )
    if len(behind) > 1:
        said += (
            f" Against the rate that the other seeds choose, it is behind by {100 * mean(behind):z.1f} ± "
            f"{100 * stdev(behind) / len(behind) ** 0.5:.1f} points (standard error over {len(behind)} rows)."
        )
    said += f" {_beside_full_at_two_rates(exports)}"
    return ["\n".join([said, "", table(header, cells, text=(0, 3, 6, 7)), "", "```bash", *commands, "```"])]


@dataclass(frozen=True)
class _Rated:
    """The scores of a method on a task of a size, by rate and seed; ``seeds`` are those that every rate has."""

    task: str
    size: int
    method: str
    by_rate: dict[float, dict[int, float]]
    constant: float

    @property
    def seeds(self) -> list[int]:
        return sorted(set.intersection(*(set(scores) for scores in self.by_rate.values())))

    @property
    def default(self) -> float:
        return suggested_rate(Linear(_MINILM, _MINILM), Combination.parse(self.method).rate)

    def usual(self) -> dict[int, float]:
        """By seed, the score at the default rate."""
        return {seed: self.by_rate[self.default][seed] for seed in self.seeds}

    def tuned(self) -> dict[int, float]:
        """By seed, the score at the rate that is best on average over the other seeds."""
        found = {}
        for seed in self.seeds:
            others = [other for other in self.seeds if other != seed]
            best = max(sorted(self.by_rate), key=lambda rate: mean(self.by_rate[rate][s] for s in others))
            found[seed] = self.by_rate[best][seed]
        return found


def _rated(exports: Iterable[Export]) -> Iterator[_Rated]:
    """Yield the rows of which the default and at least three other rates are there."""
    for export in exports:
        found: dict[tuple[str, int, str], dict[float, dict[int, float]]] = {}
        constants: dict[tuple[str, int, str], float] = {}
        for run in export["records"]:
            if run["state"] == "done":
                group = (run["group"]["task"], run["group"]["train_size"], run["group"]["method"])
                metric = run["result"]["metric"]
                by_seed = found.setdefault(group, {}).setdefault(run["point"]["learning_rate"], {})
                by_seed[run["seed"]] = metric["value"]
                constants[group] = run["result"]["constant"][metric["name"]]
        for group, by_rate in found.items():
            row = _Rated(*group, by_rate, constants[group])
            if row.default in by_rate and len(by_rate) >= 4 and row.seeds:
                yield row


def _beside_full_at_two_rates(exports: Iterable[Export]) -> str:
    """Say how far each method is from `full`, over the tasks and sizes of two seeds or more that all of them have."""
    rows = [row for row in _rated(exports) if len(row.seeds) > 1]
    told = []
    for at, scores_fn in (
        ("At the defaults", _Rated.usual),
        ("At the rates that the other seeds choose", _Rated.tuned),
    ):
        scores: dict[str, dict[str, dict[int, float]]] = {}
        for row in rows:
            scores.setdefault(f"`{row.method}`", {})[f"{row.task} {row.size}"] = scores_fn(row)
        shared = set.intersection(*(set(of_task) for of_task in scores.values())) if scores else set()
        if not shared or "`full`" not in scores:
            continue
        paired = {name: {where: by[where] for where in by if where in shared} for name, by in scores.items()}
        full = paired.pop("`full`")
        apart = [[name, *_from_full(by, full)] for name, by in paired.items()]
        listed = "; ".join(f"{name} − `full` {difference}, p = {p}" for name, difference, p in apart)
        pairs = sum(map(len, full.values()))
        told.append(f"{at}, over {len(full)} tasks and sizes: {listed}, of {pairs} pairs each.")
    return " ".join(told)


def defaults(exports: Iterable[Export]) -> list[str]:
    """Return the scores at the default rate and epochs by task and size, and how far each method is from `full`."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    commands = []
    for export in exports:
        commands.append(export["comparison"]["command"])
        for row in export["summary"]["rows"]:
            task, size = row["group"]["task"], row["group"]["train_size"]
            scores = {int(seed): score for seed, score in row["scores"].items()}
            found.setdefault(f"`{row['group']['method']}`", {})[f"{TASKS.get(task, task)}, {size}"] = scores
    if "`full`" not in found:
        return []
    full = found.pop("`full`")
    rows = [
        [
            where,
            _with_interval(list(full[where].values())),
            *(_with_interval(list(scores.get(where, {}).values())) for scores in found.values()),
        ]
        for where in full
    ]
    apart = []
    for name, scores in found.items():
        pairs = sum(len(of_cell.keys() & full[where].keys()) for where, of_cell in scores.items())
        difference, p = _from_full(scores, full)
        apart.append(f"{name} − `full` {difference}, p = {p}, of {pairs} pairs")
    said = (
        "all-MiniLM-L6-v2 at the default rate and epochs, 400 evaluation examples at most; mean and half of its 95 % "
        "interval (Student's t) with five seeds, or the seeds in brackets. Over all "
        f"{len(full)} tasks and sizes: {'; '.join(apart)}."
    )
    header = ["task, examples", "`full`", *found]
    return ["\n".join([said, "", table(header, rows), "", "```bash", *commands, "```"])]


def overview(folder: Path) -> str:
    """Return one row a method and one column a task: README's table of `glue-small`; empty where it is not there."""
    exports = _read(folder, "glue-small")
    columns: dict[str, dict[str, str]] = {}
    for export in exports:
        for row in export["summary"]["rows"]:
            column = columns.setdefault(f"{_where(row)}, {row['group']['train_size']:,} examples", {})
            known, p = row["description"], row["p_corrected"]
            column[row["group"]["method"]] = _described(known) + ("\\*" if p is not None and p < 0.05 else "")
    if not exports:
        return ""
    methods = dict.fromkeys(method for column in columns.values() for method in column)
    cells = [[f"`{method}`", *(column.get(method, "—") for column in columns.values())] for method in methods]
    seeds = "–".join(str(n) for n in sorted({export["comparison"]["num_seeds"] for export in exports}))
    commands = [export["comparison"]["command"] for export in exports]
    paired = [row["paired"] for export in exports for row in export["summary"]["rows"] if row["paired"]]
    least = min(one["smallest_p"] for one in paired) * min(
        sum(row["paired"] is not None for row in export["summary"]["rows"]) for export in exports
    )
    said = (
        f"More methods, {seeds} seeds; mean ± sd on the dev set. With so few seeds no corrected p can be below "
        f"{least:.2g}: no difference in this table is significant. `DATA` is a folder with one subfolder a task:"
        if least >= 0.05
        else f"More methods, {seeds} seeds; mean ± sd on the dev set, \\* marks a significant difference from `full`. "
        "`DATA` is a folder with one subfolder a task:"
    )
    parts = [said, "", table(["method", *columns], cells, text=(0,)), "", "```bash", *commands, "```"]
    return "\n".join(parts)


def ranking(export: Export) -> str:
    """Return a row for every method on every task, in full."""
    rows = []
    for row in export["summary"]["rows"]:
        known, costs, start = row["description"], row["costs"], row["group"]["start"]
        rows.append(
            [
                _where(row) + ("" if start is None else f" after {TASKS.get(start, start)}"),
                f"`{row['group']['method']}`",
                _described(known),
                "—" if known["interval"] is None else " … ".join(f"{end:.3f}" for end in known["interval"]),
                *_beside(row),
                f"{known['num_collapsed']}/{known['num']}",
                _point(row["point"]),
                f"{costs['trained_parameters'] / 1e6:.2f} M",
                f"{costs['state_bytes'] / 1e6:.0f} MB",
                f"{costs['delta_bytes'] / 1e6:.1f} MB",
            ]
        )
    header = ["task", "method", "mean ± sd", "95 % interval", "− baseline", "p"]
    header += ["collapsed", "chosen", "trained", "optimizer", "delta"]
    return _with_setting(export, table(header, rows, text=(0, 1, 7)))


def curves(export: Export) -> str:
    """Return a row for every method on every task, and a column for every number of training examples."""
    rows = export["summary"]["rows"]
    sizes = sorted({row["group"]["train_size"] for row in rows})
    cells = []
    for task, method in dict.fromkeys((row["group"]["task"], row["group"]["method"]) for row in rows):
        mine = {
            row["group"]["train_size"]: row
            for row in rows
            if (row["group"]["task"], row["group"]["method"]) == (task, method)
        }
        cells.append([_where(next(iter(mine.values()))), f"`{method}`"])
        for size in sizes:
            known = mine[size]["description"] if size in mine else None
            cells[-1].append("—" if known is None else _described(known))
    header = ["task", "method", *(f"{size:,} examples" for size in sizes)]
    return _with_setting(export, table(header, cells, text=(0, 1)))


def domains(export: Export) -> str:
    """Return a row for every method and task that was trained on, and a column for every task that was not."""
    done = [record for record in export["records"] if record["state"] == "done"]
    names = list(dict.fromkeys(name for record in done for name in record["result"]["elsewhere"]))
    cells = []
    for task, method in dict.fromkeys((r["group"]["task"], r["group"]["method"]) for r in done):
        mine = [r["result"] for r in done if (r["group"]["task"], r["group"]["method"]) == (task, method)]
        cells.append([TASKS.get(task, task), f"`{method}`", _of(r["metric"]["value"] for r in mine)])
        for name in names:
            cells[-1].append(_of(r["elsewhere"][name]["accuracy"] for r in mine if name in r["elsewhere"]))
    header = ["trained on", "method", "own dev", *map(_elsewhere, names)]
    return _with_setting(export, table(header, cells, text=(0, 1)))


def _elsewhere(name: str) -> str:
    """A split of another task as papers name it: ``mnli/dev_matched`` is MNLI-m."""
    task, _, split = name.partition("/")
    which = next((short for start, short in _SPLITS.items() if split.startswith(start)), None)
    return TASKS.get(task, task) + (f"-{which}" if which else "")


def _with_setting(export: Export, content: str) -> str:
    """What was run stands above the table, the command below it."""
    asked = export["comparison"]
    sizes = ", ".join("all" if size is None else f"{size:,}" for size in asked["train_sizes"] or [None])
    options = {name: value for name, value in asked["options"].items() if name in ("epochs", "learning_rate")}
    said = [f"all-MiniLM-L6-v2, {sizes} training examples, {asked['num_seeds']} seeds"]
    said += [f"{_NAMES.get(name, name)} {value:g}" for name, value in options.items()]
    states = [record["state"] for record in export["records"]]
    missing = len(states) - states.count("done")
    said += [f"{missing} of {len(states)} runs not finished"] if missing else []
    return "\n".join([", ".join(said) + ":", "", content, "", "```bash", asked["command"], "```"])


def _read(folder: Path, name: str) -> list[Export]:
    paths = [folder / f"{name}.json", *sorted(folder.glob(f"{name}-*.json"))]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def _where(row: dict[str, Any]) -> str:
    task = row["group"]["task"]
    return f"{TASKS.get(task, task)} ({_METRICS.get(row['metric'], row['metric'])})"


def _beside(row: dict[str, Any]) -> list[str]:
    paired = row["paired"]
    if paired is None or paired["difference"] is None:
        return ["", ""]
    p = row["p_corrected"]
    return [f"{paired['difference']:+.3f}", "—" if p is None else f"{p:.2f}"]


def _point(point: dict[str, Any]) -> str:
    return ", ".join(f"{_NAMES.get(name, name)} {value}" for name, value in sorted(point.items()))


def _described(known: dict[str, Any]) -> str:
    return _spread(known["mean"], known["sd"] if known["num"] > 1 else None)


def _of(values: Iterable[float]) -> str:
    known = list(values)
    if not known:
        return "—"
    return _spread(mean(known), stdev(known) if len(known) > 1 else None)


def _spread(middle: float | None, spread: float | None) -> str:
    if middle is None:
        return "—"
    return f"{middle:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
