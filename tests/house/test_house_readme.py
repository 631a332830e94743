"""What README and the documentation show, works: Python blocks run, command lines name real options."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    str(p.relative_to(ROOT))
    for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    if p.exists()
)
SHELLS = {"bash", "sh", "shell", "console"}
COMMAND = re.compile(r"^(?:\$ )?(?:\S*/)?(?:python3? -m )?(childtuning(?: .*)?)$")


class Block(NamedTuple):
    line: int  # of its first line of content, from 1
    language: str
    note: str  # of a comment right above it: <!-- no-run -->
    text: str


def blocks_of(markdown: str) -> Iterator[Block]:
    """The fenced blocks of a page, also those that stand indented in a list or a tab."""
    lines = iter(enumerate(markdown.splitlines(), start=1))
    note = ""
    for number, line in lines:
        opening = re.match(r"^(\s*)(`{3,}|~{3,})\s*([\w+-]*)\s*$", line)
        if not opening:
            assert not re.match(r"\s*(`{3,}|~{3,})", line), f"line {number}: no site shows this fence"
            comment = re.fullmatch(r"\s*<!-- (.*) -->\s*", line)
            note = comment[1] if comment else note if not line.strip() else ""
            continue
        indent, fence, language = opening.groups()
        content = []
        for _, inner in lines:
            if re.fullmatch(rf"\s*{re.escape(fence[0])}{{{len(fence)},}}\s*", inner):
                break
            content.append(inner.removeprefix(indent))
        else:
            raise AssertionError(f"line {number}: this block is never closed")
        yield Block(number + 1, language, note, "\n".join(content))
        note = ""


def command_lines_of(block: Block) -> Iterator[tuple[int, str]]:
    """(line number, `childtuning …`) of a shell block, continued lines joined."""
    joined, start = "", block.line
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        start = start if joined else number
        joined += line.strip()
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        if match := COMMAND.match(joined):
            yield start, match[1]
        joined = ""


def run_python_blocks(markdown: str, name: str, namespace: dict) -> int:
    """Run a page's Python blocks in order in one namespace; those marked `no-run` are compiled only."""
    ran = 0
    for block in blocks_of(markdown):
        if block.language != "python":
            continue
        code = compile("\n" * (block.line - 1) + block.text, name, "exec", dont_inherit=True)
        if block.note != "no-run":
            exec(code, namespace)
            ran += 1
    return ran


def test_there_is_a_readme_with_python() -> None:
    assert "README.md" in PAGES
    assert any(b.language == "python" for b in blocks_of((ROOT / "README.md").read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("page_of_the_documentation")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    monkeypatch.chdir(tmp_path)
    run_python_blocks((ROOT / page).read_text(encoding="utf-8"), page, vars(module))


@pytest.mark.parametrize("page", PAGES)
def test_command_lines_name_real_options(page: str, request: pytest.FixtureRequest) -> None:
    lines = [
        (number, line)
        for block in blocks_of((ROOT / page).read_text(encoding="utf-8"))
        if block.language in SHELLS
        for number, line in command_lines_of(block)
    ]
    if not lines:
        return
    fault_of: Callable[[str], str | None] = request.getfixturevalue("command_line_fault")
    faults = [f"{page}:{number}: {fault}" for number, line in lines if (fault := fault_of(line))]
    assert not faults, "\n" + "\n".join(faults)


def test_the_reader_of_pages() -> None:
    page = (
        "# T\n```python\nx = 1\n```\ntext\n\n    ```python\n    y = x + 1\n    ```\n"
        "<!-- no-run -->\n\n```python\nraise SystemExit\n```\n"
        "```bash\npip install x\nchildtuning train \\\n  --density 0.3\n"
        ".venv/bin/childtuning demo | tail\n```\n"
        "```console\n$ childtuning --help\nchildtuningly printed\n```\n"
    )
    namespace: dict = {}
    assert run_python_blocks(page, "page", namespace) == 2
    assert namespace["y"] == 2
    shells = [block for block in blocks_of(page) if block.language in SHELLS]
    assert [line for block in shells for line in command_lines_of(block)] == [
        (17, "childtuning train --density 0.3"),
        (19, "childtuning demo | tail"),
        (22, "childtuning --help"),
    ]
    with pytest.raises(ZeroDivisionError):
        run_python_blocks("```python\n1 / 0\n```", "page", {})
    with pytest.raises(SyntaxError):
        run_python_blocks("<!-- no-run -->\n```python\n1 +\n```", "page", {})
    with pytest.raises(AssertionError, match="never closed"):
        list(blocks_of("```python\nx = 1"))


def test_the_reader_of_command_lines(command_line_fault: Callable[[str], str | None]) -> None:
    assert command_line_fault("childtuning --help") is None
    assert command_line_fault("childtuning train --help  # a comment") is None
    assert command_line_fault("childtuning train --help | grep --colour x") is None
    assert "no command 'tarin'" in (command_line_fault("childtuning tarin") or "")
    assert "no option --no-such-thing" in (command_line_fault("childtuning train --no-such-thing=1") or "")
