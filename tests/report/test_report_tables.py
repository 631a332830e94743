"""The ranking as Markdown, LaTeX and JSON."""

from __future__ import annotations

import json
import re

import pytest
from tests.report import synthetic

from childtuning.compare.records import Recorded
from childtuning.report import json_content, latex_tables, markdown_tables


@pytest.fixture(scope="module")
def separate() -> Recorded:
    """Eight seeds of two methods that differ clearly, and of a third that does not, on two tasks."""
    levels = {"full": 0.6, "child-d": 0.7, "r3f": 0.601}
    runs = [
        synthetic.record(task, method, seed, score=level + 0.01 * (seed * (3 if method == "r3f" else 1) % 8))
        for task in ("rte", "cola")
        for method, level in levels.items()
        for seed in range(8)
    ]
    return Recorded(synthetic.comparison(("rte", "cola"), list(levels), 8), runs)


def test_markdown_ranks_and_marks_what_is_significant(separate: Recorded) -> None:
    text = markdown_tables(separate)
    assert re.findall(r"^### (.*)$", text, re.MULTILINE) == ["Across tasks", "rte", "cola"]
    across, rte, _ = (part.splitlines() for part in text.split("### ")[1:])
    assert across[2:5] == [
        "| method | mean | minus full | p | rte (accuracy) | cola (matthews) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| **child-d** | **0.735** | +0.100 ▲ | 0.004 | 0.735 | 0.735 |",
    ]
    assert re.fullmatch(r"\| r3f \| 0.636 \| \+0.001 \| 0.[2-9]\d\d \| 0.636 \| 0.636 \|", across[5])
    assert across[6] == "| full | 0.635 |  |  | 0.635 | 0.635 |"
    assert rte[4].startswith("| **child-d** | **0.735 ± 0.024** | 0.7")
    # 2 / 2⁸ times four comparisons
    assert rte[4].endswith("| 0.735 | 0.770 | 0 of 8 | +0.100 ▲ | 0.031 |")
    assert rte[6].startswith("| full | 0.635 ± 0.024 |") and rte[6].endswith("| 0 of 8 |  |  |")
    assert rte[8].startswith("child-d leads with accuracy 0.735 (0.7")
    assert rte[8].endswith("277 evaluation examples, standard error of a score 0.027.")
    assert text.endswith(f"\n    {synthetic.COMMAND}\n")


def test_nothing_is_bold_that_is_not_significant() -> None:
    levels = {"full": 0.6, "child-d": 0.6, "lora": 0.7}
    runs = [
        synthetic.record(method=m, seed=s, score=level + s / 99)
        for m, level in levels.items()
        for s in range(2)
    ]
    recorded = Recorded(synthetic.comparison(["rte"], list(levels), 2), runs)
    assert "**" not in markdown_tables(recorded) and "textbf" not in latex_tables(recorded)
    two = Recorded(recorded.comparison, [run for run in runs if run.group.method != "lora"])
    assert "full and child-d tie at accuracy 0.605." in markdown_tables(two)
    assert "full and child-d tie at accuracy 0.605." in latex_tables(two)
    (setting,) = json_content(two)["summary"]["standings"]
    assert setting["best"] == ["full", "child-d"] and setting["tie"] and setting["clear"] == []
    assert setting["eval_examples"] == 277 and setting["standard_error"] == pytest.approx(0.02937, abs=1e-5)


def test_latex_says_the_same_in_booktabs(separate: Recorded) -> None:
    text = latex_tables(separate)
    assert text.count(r"\begin{tabular}{lrrrrrrr}") == 2
    for rule in ("toprule", "midrule", "bottomrule"):
        assert text.count(f"\\{rule}") == 3
    assert r"\textbf{child-d} & \textbf{0.735 $\pm$ 0.024}" in text
    assert r"$+$0.100" not in text and r"+0.100 $\blacktriangle$" in text


def test_special_characters_are_escaped() -> None:
    names = ["full", r"a_b&c%d#e${f}~^\|<*`[x]"]
    runs = [synthetic.record(method=name, seed=seed) for name in names for seed in range(2)]
    recorded = Recorded(synthetic.comparison(["rte"], names, 2), runs)
    latex = latex_tables(recorded)
    escaped = r"a\_b\&c\%d\#e\$\{f\}\textasciitilde{}\textasciicircum{}\textbackslash{}|\textless{}*`[x]"
    assert re.search(rf"(^    |textbf{{){re.escape(escaped)}", latex, re.MULTILINE)
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {7}

    rows = [line for line in markdown_tables(recorded).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {9}
    assert r"a\_b&c%d\#e$\{f\}~^\\\|\<\*\`\[x\]" in "".join(rows)


def test_json_is_the_export_and_the_summary() -> None:
    recorded = synthetic.odd()["nan"]
    content = json_content(recorded)
    summary = content.pop("summary")
    assert content == recorded.to_dict()
    assert [row["group"]["method"] for row in summary["rows"]] == ["full", "child-d", "lora"]
    assert summary["rows"][1]["description"]["mean"] == pytest.approx(
        sum(run.score for run in recorded.records if run.group.method == "child-d") / 3
    )
    assert summary["rows"][0]["scores"]["1"] is None
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize("name", synthetic.odd())
def test_odd_comparisons_have_tables(name: str) -> None:
    recorded = synthetic.odd()[name]
    if name == "hundreds of methods":
        recorded = Recorded(recorded.comparison, recorded.records[:40])
    assert f"{sum(run.state == 'done' for run in recorded.records)} run" in markdown_tables(recorded)
    assert latex_tables(recorded).startswith("% needs")
