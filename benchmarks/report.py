"""Put the recorded results into the tables of README and docs; with --check, only say whether they are up to date.

python benchmarks/report.py [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import comparison_tables
import front
import method_tables
import scale
import transfer_tables
from comparison_tables import TASKS
from costs import costs, floors, table

ROOT = Path(__file__).resolve().parent.parent


def results(name: str) -> Any:
    """Read recorded results, or an empty list where there are none yet."""
    path = ROOT / "benchmarks" / "results" / name
    return json.loads(path.read_text()) if path.is_file() else []


def serving() -> str:
    """What travels to a server: a model, patches and deltas of it, an adapter."""
    facts = (results("serving.json") or {"facts": {}})["facts"]
    rows = []
    for shape, found in facts.items():
        sizes = {f"{shape}, {found['parameters'] / 1e9:.2f} billion weights in bf16": found["model_bytes"]}
        for density in found["patch_bytes"]:
            sizes[f"patch, single entries, {float(density):.1%}"] = found["patch_bytes"][density]
            sizes[f"delta, single entries, {float(density):.1%}"] = found["delta_bytes"][density]
        sizes["LoRA r=16 of all linear layers"] = found["lora_16_bytes"]
        rows += [
            [what, f"{size / 1e6:,.1f} MB", f"{size / found['model_bytes']:.2%}"]
            for what, size in sizes.items()
        ]
    return table(["file", "size", "of the model"], rows)


def merges() -> str:
    """Each task's score alone and after each kind of merge: means over the seeds."""
    runs = (results("merging.json") or {"runs": []})["runs"]
    parts = []
    for model, tasks in dict.fromkeys((run["key"]["model"], run["key"]["tasks"]) for run in runs):
        names, rows = tasks.split(","), []
        found: dict[str, list[dict[str, Any]]] = {}
        for run in runs:
            if (run["key"]["model"], run["key"]["tasks"]) == (model, tasks):
                found.setdefault(run["key"]["method"], []).append(run["result"])
        for method, of_seeds in found.items():
            alone = [result["alone"] for result in of_seeds]
            rows.append([f"`{method}`", "alone", str(len(alone)), *_means(names, alone), ""])
            for how in (key for key in of_seeds[0] if key != "alone"):
                merged = [result[how]["scores"] for result in of_seeds]
                kept = mean(sum(m.values()) / sum(a.values()) for m, a in zip(merged, alone, strict=True))
                rows.append(["", how, str(len(merged)), *_means(names, merged), f"{kept:.0%}"])
        header = ["method", "merge", "seeds", *(TASKS[name] for name in names), "kept"]
        title = {"default": "all-MiniLM-L6-v2", "mpnet": "all-mpnet-base-v2"}.get(model, model)
        parts.append(f"{title}, 500 examples a task:\n\n{table(header, rows, text=(0, 1))}")
    return "\n\n".join(parts) or "Not recorded yet."


def _means(names: list[str], scores: list[dict[str, float]]) -> list[str]:
    return [f"{mean(score[name] for score in scores):.3f}" for name in names]


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
                    f"{TASKS[task]} ({last['metric']['name']}) {method}",
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
    """Return README's results."""
    folder = ROOT / "benchmarks" / "results"
    compared = comparison_tables.comparison_tables(folder)
    return "\n".join(
        [
            compared["two-methods"],
            "",
            comparison_tables.overview(folder),
            "",
            "`lora` has not begun to learn STS-B after these 189 steps; with more steps it does ([learning "
            "rates](docs/learning-rates.md)). [Evidence](docs/evidence.md) has intervals, other sizes, transfer and "
            "ablations.",
            "",
            "A saved delta (fp32 values, indices and JSON), beside the entropy bound for entries chosen independently "
            "and beside another sparse method's file. `python benchmarks/delta_size.py`:",
            "",
            sizes(),
        ]
    )


def filled(text: str, name: str, content: str) -> str:
    """Return a page with the content between its markers of that name; a page without them as it is."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    if start not in text or end not in text:
        return text
    before, rest = text.split(start, 1)
    after = rest.split(end, 1)[1]
    return f"{before}{start}\n{content}\n{end}{after}"


def main() -> int:
    """Write or check the pages."""
    folder = ROOT / "benchmarks" / "results"
    compared = comparison_tables.comparison_tables(folder)
    pages = {
        ROOT / "README.md": {"results": section(), "costs": costs(folder, short=True)},
        ROOT / "docs" / "performance.md": {
            "costs": costs(folder),
            "floors": floors(folder),
            "quality": method_tables.quality(folder),
        },
        ROOT / "docs" / "evidence.md": {**compared, "scores": scores()},
        ROOT / "docs" / "forgetting.md": {
            "front": front.front(folder, front.DECODER),
            "similarity": front.front(folder, front.ENCODER),
        },
        ROOT / "docs" / "forgetting.svg": {"front": front.chart(folder, front.DECODER)},
        ROOT / "docs" / "similarity.svg": {"front": front.chart(folder, front.ENCODER)},
        ROOT / "docs" / "scale.md": scale.tables(folder),
        ROOT / "docs" / "learning-rates.md": {
            name: compared[name] for name in ("rates", "confirmed", "both-rates", "defaults")
        },
        ROOT / "docs" / "serving.md": {"serving": serving(), "merges": merges()},
        ROOT / "docs" / "methods" / "index.md": {"measured": method_tables.methods(folder)},
        ROOT / "docs" / "transfer.md": {
            "cnn": transfer_tables.cnn(folder),
            "decoder": transfer_tables.decoder(folder),
        },
    }
    outdated = []
    for path, contents in pages.items():
        if not path.is_file():
            continue
        text = wanted = path.read_text(encoding="utf-8")
        for name, content in contents.items():
            wanted = filled(wanted, name, content)
        if wanted == text:
            continue
        outdated.append(path.relative_to(ROOT))
        if "--check" not in sys.argv[1:]:
            path.write_text(wanted, encoding="utf-8")
    if outdated and "--check" in sys.argv[1:]:
        names = ", ".join(str(path) for path in outdated)
        print(
            f"{names}: tables differ from benchmarks/results. Run: python benchmarks/report.py",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
