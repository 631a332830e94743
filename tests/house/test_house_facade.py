"""The public names are exactly the listed ones, documented, and cheap to import."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import childtuning

HEAVY = ("accelerate", "datasets", "peft", "sklearn", "transformers", "typer")


def test_all_is_sorted_and_complete() -> None:
    listed = childtuning.__all__
    assert list(listed) == sorted(set(listed))
    assert dir(childtuning) == listed


def test_every_public_name_resolves_and_is_documented() -> None:
    faults = []
    for name in childtuning.__all__:
        if not hasattr(childtuning, name):
            faults.append(f"{name}: listed, but there is no such name")
            continue
        value = getattr(childtuning, name)
        documentable = inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)
        if documentable and not (value.__doc__ or "").strip():
            faults.append(f"{name}: no docstring of its own")
        elif inspect.isclass(value):
            faults += [
                f"{name}.{member}: no docstring"
                for member, attribute in vars(value).items()
                if not member.startswith("_")
                and (inspect.isroutine(attribute) or isinstance(attribute, property))
                and not (inspect.getdoc(getattr(value, member)) or "").strip()
            ]
    assert not faults, "\n" + "\n".join(faults)


def test_import_does_not_pull_in_heavy_packages() -> None:
    code = f"import sys; from childtuning import *; print(*[n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["--version"], ["methods"], ["train", "--densty", "1"]]
)
def test_the_command_line_explains_itself_without_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom childtuning.cli import main\n"
        "try:\n    main()\nfinally:\n    print(*[n for n in ('torch', 'numpy') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == ""


def test_all_of_every_subpackage_is_sorted_and_resolves(source: Path) -> None:
    faults = []
    for path in sorted(source.rglob("__init__.py")):
        module = importlib.import_module(".".join(path.parent.relative_to(source.parent).parts))
        listed = getattr(module, "__all__", [])
        if list(listed) != sorted(set(listed)):
            faults.append(f"{module.__name__}: __all__ is not sorted or repeats a name")
        faults += [f"{module.__name__}.{name}: no such name" for name in listed if not hasattr(module, name)]
    assert not faults, "\n" + "\n".join(faults)


def test_what_is_tested_is_the_installed_package(source: Path) -> None:
    assert childtuning.__file__ is not None
    assert (Path(childtuning.__file__).parent / "py.typed").is_file()
