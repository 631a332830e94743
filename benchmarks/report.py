"""Put the recorded results into README's table; with --check, only say whether it is up to date.

python benchmarks/report.py [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- results:start -->", "<!-- results:end -->"


_NAMES = {"rte": "RTE", "cola": "CoLA", "mrpc": "MRPC", "stsb": "STS-B"}


def results(name: str) -> Any:
    """Read recorded results, or an empty list where there are none yet."""
    path = ROOT / "benchmarks" / "results" / name
    return json.loads(path.read_text()) if path.is_file() else []


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def scores() -> str:
    """Mean over seeds of each method on each task, at the learning rate that is best on seed 0."""
    runs = results("scores.json")
    rows = []
    for task in dict.fromkeys(run["key"][0] for run in runs):
        for method in dict.fromkeys(run["key"][1] for run in runs):
            mine = [run for run in runs if run["key"][:2] == [task, method]]
            first = [run for run in mine if run["key"][3] == "0"]
            if not first:
                continue
            best = max(first, key=lambda run: run["result"]["metric"]["value"])["key"][2]
            chosen = [run["result"] for run in mine if run["key"][2] == best]
            values = [result["metric"]["value"] for result in chosen]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            last = chosen[0]
            rows.append(
                [
                    f"{_NAMES.get(task, task)} ({last['metric']['name']}) {method}",
                    f"{mean(values):.3f}{spread}",
                    ", ".join(f"{value:.3f}" for value in values),
                    f"{best} of {', '.join(sorted({run['key'][2] for run in first}, key=float))}",
                    f"{last['trained_parameters'] / 1e6:.1f} M",
                    f"{last['state_bytes'] / 1e6:.0f} MB",
                    f"{last['delta_bytes'] / 1e6:.0f} MB",
                    f"{last['peak_memory_bytes'] / 1e9:.1f} GB",
                    f"{mean(r['fisher_seconds'] + r['train_seconds'] for r in chosen) / 60:.0f} min",
                ]
            )
    header = ["task, method", "mean", "seeds", "lr", "trained", "optimizer", "delta", "peak", "time"]
    return table(header, rows)


def demo() -> str:
    """The demo's runs by method."""
    runs = [run["result"] for run in results("demo.json")]
    rows = []
    for method in ("full", "child-f", "child-d"):
        mine = [run for run in runs if run["method"] == method]
        values = [run["metric"]["value"] for run in mine]
        if mine:
            rows.append(
                [
                    method,
                    f"{mean(values):.3f} ± {stdev(values):.3f}",
                    f"{mine[0]['trained_parameters'] / 1e6:.1f} M",
                    f"{mine[0]['state_bytes'] / 1e6:.0f} MB",
                    f"{mine[0]['delta_bytes'] / 1e6:.0f} MB",
                ]
            )
    return table(["method", "accuracy", "trained", "optimizer", "delta"], rows)


def sizes() -> str:
    """Bytes per trained entry of a delta."""
    rows = []
    for row in results("delta-size.json"):
        bound = f"{row['bound_bytes_per_entry']:.2f}" if "bound_bytes_per_entry" in row else "—"
        ratio = f"{row['index_ratio_to_bound']:.2f}" if "index_ratio_to_bound" in row else "—"
        kind = f"{row['kind']} child, density {row['density']:.2g}" if "density" in row else row["kind"]
        rows.append([kind, f"{row['trained']:,}", f"{row['bytes_per_entry']:.2f}", bound, ratio])
    return table(["delta", "entries", "bytes an entry", "entropy bound", "indices ÷ bound"], rows)


def section() -> str:
    """Return everything that stands between the markers."""
    return "\n".join(
        [
            START,
            "`make demo`: topic of a docstring of Python's standard library, 12 areas, 400 training and 264 evaluation "
            "examples from other modules, all-MiniLM-L6-v2, two seeds:",
            "",
            demo(),
            "",
            "GLUE tasks: all-MiniLM-L6-v2 (22.7 M parameters), full training sets, 3 epochs, batch 16, 10 % warm-up, "
            "density 0.3, evaluated on the dev set at the last step. Two CPU cores that other work shared: times are "
            "rough. The rate is the best on seed 0 of those listed. With so few seeds this does not rank the methods. "
            "`python benchmarks/scores.py --data-dir DATA`:",
            "",
            scores(),
            "",
            "A saved delta (fp32 values, indices and JSON), beside the entropy bound for entries chosen independently "
            "and beside another sparse method's file. `python benchmarks/delta_size.py`:",
            "",
            sizes(),
            END,
        ]
    )


def main() -> int:
    """Write or check README."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    wanted = before + section() + after
    if "--check" in sys.argv[1:]:
        if wanted != text:
            print(
                "README's results differ from benchmarks/results. Run: python benchmarks/report.py",
                file=sys.stderr,
            )
            return 1
        return 0
    path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
