"""What the house tests share: where things lie, and a reader of command lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def source(root: Path) -> Path:
    """The package's source folder."""
    return root / "src" / "childtuning"


@pytest.fixture(scope="session")
def commands() -> dict[str, object]:
    """Every command of the app by its full name ("" is the app itself), as click sees it."""
    import typer

    from childtuning.cli import app

    found: dict[str, object] = {}

    def walk(command, name: str) -> None:
        found[name] = command
        for key, child in getattr(command, "commands", {}).items():
            walk(child, f"{name} {key}".strip())

    walk(typer.main.get_command(app), "")
    return found


@pytest.fixture(scope="session")
def command_line_fault(commands: dict) -> Callable[[str], str | None]:
    """A function that says what is wrong with a command line's command and options, or None."""
    return lambda line: _fault(line, commands)


def _fault(line: str, commands: dict) -> str | None:
    try:
        split = shlex.split(line, comments=True)
    except ValueError as fault:
        return f"`{line}` cannot be read: {fault}"
    words = []
    for word in split[1:]:
        if re.fullmatch(r"\|\|?|&&?|;|\d?>>?(&\d)?|<", word):
            break  # what follows belongs to the shell
        words.append(word)

    name = ""
    known = {"--help"} | _options(commands[""])
    for word in words:
        if word.startswith("-") and not re.match(r"-\.?\d", word):
            option = word.split("=")[0]
            if option not in known:
                return f"`childtuning {name}` has no option {option}"
            continue
        subcommands = getattr(commands[name], "commands", None)
        if subcommands is None:
            continue  # an argument, or the value of an option
        if word not in subcommands:
            return f"no command {word!r}; there are: {', '.join(sorted(subcommands))}"
        name = f"{name} {word}".strip()
        known = {"--help"} | _options(commands[name])
    return None


def _options(command) -> set[str]:
    return {
        text
        for parameter in command.params
        if parameter.param_type_name == "option"
        for text in (*parameter.opts, *parameter.secondary_opts)
    }
