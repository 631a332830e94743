"""The pages of docs/methods say what the registry says, and leave no method out; the report is of what is recorded."""

from __future__ import annotations

import importlib.util
import re
import shutil
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest

from childtuning.errors import ConfigError
from childtuning.methods import Combination

SECTIONS = ("Differences from the reference code", "Options", "Saved and merged", "Cost", "When to use it")


@pytest.fixture(scope="module")
def tables(root: Path) -> ModuleType:
    """The script that fills the pages."""
    spec = importlib.util.spec_from_file_location("docs_tables", root / "docs" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def section_of(page: str, title: str) -> str:
    """The text under a heading of the second level."""
    return page.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def code_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def rows_of(table: str) -> list[list[str]]:
    """The cells of a Markdown table's rows, without its header."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_tables_are_those_of_the_registry(tables: ModuleType) -> None:
    faults = tables.faults(write=False)
    assert not faults, "\n" + "\n".join(faults)


def test_every_method_has_a_page_in_the_navigation(tables: ModuleType, root: Path) -> None:
    navigation = (root / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:", 1)[1].split("\n\n", 1)[0]
    shown = re.findall(r"methods/([\w-]+)\.md", navigation)
    written = {path.stem for path in (root / "docs" / "methods").glob("*.md")}
    assert sorted(shown) == sorted(written)
    assert written >= {method.name for method in tables.methods()}


def test_pages_have_equation_and_sections(tables: ModuleType, root: Path) -> None:
    for method in tables.methods():
        page = (root / "docs" / "methods" / f"{method.name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# `{method.name}`\n")
        titles = tuple(title for title in re.findall(r"^## (.+)$", page, re.MULTILINE) if title in SECTIONS)
        assert titles == SECTIONS, method.name
        assert re.search(r"^\n {4}\S", page.split("\n## ")[0], re.MULTILINE), f"{method.name} has no equation"


def test_options_and_defaults_are_the_fields(tables: ModuleType, root: Path) -> None:
    for method in tables.methods():
        page = (root / "docs" / "methods" / f"{method.name}.md").read_text(encoding="utf-8")
        part = section_of(page, "Options")
        listed = rows_of(part) if "| option |" in part else []
        found = [(*code_in(cells[0]), cells[1]) for cells in listed]
        assert found == tables.options(method), method.name


def test_the_table_refuses_what_the_code_refuses(tables: ModuleType, root: Path) -> None:
    page = (root / "docs" / "methods" / "index.md").read_text(encoding="utf-8")
    shown = set()
    table = page.split("<!-- combinations:start -->")[1].split("<!-- combinations:end -->")[0]
    for first, second, _ in rows_of(table):
        left, right = code_in(first), code_in(second)
        pairs = [(one, two) for one in left for two in right] if right else combinations(left, 2)
        shown |= {frozenset(pair) for pair in pairs}
    refused = set()
    for one, two in combinations(tables.methods(), 2):
        try:
            Combination((one(), two()))
        except ConfigError:
            refused.add(frozenset({one.name, two.name}))
    assert refused
    assert shown == refused


def test_what_is_typed_in_the_pages_can_be_read(tables: ModuleType, root: Path) -> None:
    """Options in examples are real ones; the house's other tests read names of commands and their options."""
    names = {method.name for method in tables.methods()}
    for path in (root / "docs").rglob("*.md"):
        for text in re.findall(r"--method (\S+)", path.read_text(encoding="utf-8")):
            text = text.strip("`.,)")
            if {word.partition(":")[0] for word in text.split("+")} <= names:
                Combination.parse(text)


def test_faults_of_pages_are_found(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGES", tmp_path)
    full = next(method for method in tables.methods() if method.name == "full")
    monkeypatch.setattr(tables, "methods", lambda: [full])
    (tmp_path / "index.md").write_text("<!-- methods:start -->\nold\n<!-- methods:end -->\n")
    words = ("index.md has no place for its combinations", "index.md differs", "full.md is missing")
    found = "\n".join(tables.faults(write=False))
    assert all(word in found for word in words)
    (tmp_path / "index.md").write_text(
        "".join(f"<!-- {name}:start -->\n<!-- {name}:end -->\n" for name in ("methods", "combinations"))
    )
    monkeypatch.setattr(tables, "LISTED", tmp_path / "methods.json")
    (tmp_path / "methods.json").write_text("[]")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "cli.md").write_text("<!-- options:start -->\n<!-- options:end -->\n")
    (tmp_path / "full.md").write_text("<!-- facts:start -->\n<!-- facts:end -->\n")
    assert tables.faults(write=True) == []
    assert tables.faults(write=False) == []
    assert "| everything |" in (tmp_path / "full.md").read_text()


def test_a_report_of_other_results_is_found(
    tables: ModuleType, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "glue-small.json").write_bytes(
        (root / "benchmarks" / "results" / "ablation.json").read_bytes()
    )
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "glue-small.html"
    page.write_bytes((root / "docs" / "glue-small.html").read_bytes())
    shutil.copy(root / "docs" / "cli.md", tmp_path / "docs")
    shutil.copytree(root / "docs" / "methods", tmp_path / "docs" / "methods")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGES", tmp_path / "docs" / "methods")
    assert tables.faults(write=False) == [
        f"{page.relative_to(tmp_path)} differs from benchmarks/results. Run: python docs/tables.py"
    ]
    assert tables.faults(write=True) == []
    assert tables.faults(write=False) == []
    assert "child-lowest" in page.read_text(encoding="utf-8")
