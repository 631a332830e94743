"""Files are small, named after what they hold, never pickle, and make no tensor on a device of chance."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MAX_LINES = 500
MIN_LINES = 40  # in the core: a file is a chapter, not an idea
CORE = ("child", "fast", "fisher", "optim", "delta")
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "misc"}
PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FACTORIES = {
    "arange",
    "as_tensor",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
}
FACTORIES |= {"tensor", "zeros"}
TREES = ("src", "tests", "benchmarks", "examples")


def _python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def naming_faults(root: Path) -> list[str]:
    found = set()
    for tree in TREES:
        for path in _python_files(root / tree):
            parts = path.relative_to(root).with_suffix("").parts
            found |= {"/".join(parts[: i + 1]) for i, part in enumerate(parts) if part in BANNED_NAMES}
    return sorted(found)


def pickle_faults(text: str) -> Iterator[str]:
    tree = ast.parse(text)
    torch_names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "torch"
    }
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                bad = [a.name for a in names if a.name.split(".")[0] in PICKLERS]
            case ast.ImportFrom(module=str(module), level=0, names=names):
                bad = [module] if module.split(".")[0] in PICKLERS else []
                if module in ("torch", "torch.serialization"):
                    bad += [f"torch.{a.name}" for a in names if a.name in ("load", "save")]
            case ast.Attribute(ast.Name(owner), "load" | "save" as attr) if owner in torch_names:
                bad = [f"torch.{attr}"]
            case ast.Attribute(attr="read_pickle" | "to_pickle" as attr):
                bad = [attr]
            case ast.keyword(arg="allow_pickle", value=value) if not _is_false(value):
                bad = ["allow_pickle"]
            case _:
                bad = []
        yield from (f"{node.lineno}: {name}" for name in bad)


def device_faults(text: str) -> Iterator[str]:
    """Tensors that are made on torch's default device, which the user may set to a GPU."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Call(ast.Attribute(ast.Name("torch"), str(made)), _, keywords) if made in FACTORIES:
                if not any(keyword.arg == "device" for keyword in keywords):
                    yield f"{node.lineno}: torch.{made}"


def _is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_files_are_small(source: Path) -> None:
    sizes = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in _python_files(source)}
    assert sizes
    long = {str(p.relative_to(source)): n for p, n in sizes.items() if n > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines, split by idea: {long}"


def test_files_of_the_core_are_chapters(source: Path) -> None:
    short = {
        str(path.relative_to(source)): lines
        for room in CORE
        for path in _python_files(source / room)
        if path.name != "__init__.py" and (lines := len(path.read_text().splitlines())) < MIN_LINES
    }
    assert not short, f"under {MIN_LINES} lines, join what is read together: {short}"


def test_names_say_what_a_file_holds(root: Path) -> None:
    assert naming_faults(root) == []


@pytest.mark.parametrize(
    ("find", "rule"),
    [
        (pickle_faults, "files are safetensors and JSON only"),
        (device_faults, "say device=, even of the CPU"),
    ],
)
def test_no_file_breaks_the_rule(source: Path, find: Callable[[str], Iterator[str]], rule: str) -> None:
    faults = [
        f"{path.relative_to(source)}:{fault}"
        for path in _python_files(source)
        for fault in find(path.read_text(encoding="utf-8"))
    ]
    assert not faults, f"{rule}:\n" + "\n".join(faults)


def test_package_is_typed(source: Path) -> None:
    assert (source / "py.typed").is_file()


def test_the_rules_find_faults(tmp_path: Path) -> None:
    bad = """\
import pickle
import torch as t
t.load("x")
from torch import save
f(allow_pickle=True)
from dill import loads
"""
    assert sorted(fault.split(":")[0] for fault in pickle_faults(bad)) == ["1", "3", "4", "5", "6"]
    assert list(device_faults('torch.zeros(3)\ntorch.ones(3, device="cpu")\n')) == ["1: torch.zeros"]
    good = """\
import torch
import safetensors.torch
safetensors.torch.save({})
child.load("x")
f(allow_pickle=False)
"""
    assert list(pickle_faults(good)) == []
    (tmp_path / "src" / "utils").mkdir(parents=True)
    (tmp_path / "src" / "utils" / "x.py").write_text("")
    (tmp_path / "src" / "base.py").write_text("")
    (tmp_path / "src" / "baseline.py").write_text("")
    assert naming_faults(tmp_path) == ["src/base", "src/utils"]
