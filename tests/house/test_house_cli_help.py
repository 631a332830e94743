"""Every command explains itself, with an example."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import pytest

EXPECTED = {
    "compare",
    "demo",
    "evaluate",
    "export",
    "inspect",
    "merge",
    "methods",
    "plan",
    "predict",
    "push",
    "report",
    "score",
    "train",
    "verify",
}


def examples_of(name: str, text: str) -> list[str]:
    """The lines of a help text that begin with the command itself (the usage line does not)."""
    command = f"childtuning {name}".strip()
    return [line.strip() for line in re.findall(rf"^[\s│$]*({command}\s+[^\n│]+)", text, re.MULTILINE)]


def help_fault(name: str, exit_code: int, text: str) -> str | None:
    """What is missing from a command's help, or None."""
    if exit_code != 0:
        return f"`childtuning {name} --help` exits {exit_code}"
    if not re.search(r"^[\s│╭─]*Examples?\b", text, re.MULTILINE):
        return f"`childtuning {name} --help` has no Example section"
    if not examples_of(name, text):
        return f"`childtuning {name} --help` shows no line that begins with `childtuning {name}`"
    return None


def test_the_commands_of_the_contract_exist(commands: dict) -> None:
    assert set(commands) >= EXPECTED


def test_help_of_every_command_has_an_example(
    commands: dict, command_line_fault: Callable[[str], str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from childtuning.cli import app

    monkeypatch.setenv("COLUMNS", "400")  # no line is wrapped
    faults = []
    for name in commands:
        result = CliRunner().invoke(app, [*name.split(), "--help"], prog_name="childtuning")
        text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
        faults.append(help_fault(name, result.exit_code, text))
        faults += [command_line_fault(line) for line in examples_of(name, text)]
    faults = [fault for fault in faults if fault]
    assert not faults, "\n" + "\n".join(faults)


def test_the_module_runs_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "childtuning", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_the_rule_finds_faults() -> None:
    good = "Usage: childtuning train [OPTIONS]\n\n  Example:\n    childtuning train --task rte\n"
    assert help_fault("train", 0, good) is None
    assert "exits 2" in (help_fault("train", 2, good) or "")
    assert "no Example" in (help_fault("train", 0, "Usage: childtuning train [OPTIONS]") or "")
    assert "no line" in (help_fault("train", 0, "Usage: childtuning train [OPTIONS]\nExample\n") or "")
    assert examples_of("", "Usage: childtuning [OPTIONS]\n │ childtuning train --seed 1   │\n") == [
        "childtuning train --seed 1"
    ]
