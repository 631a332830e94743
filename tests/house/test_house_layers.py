"""Imports point to a lower layer or stay in their own room; the low layers have few needs."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "childtuning"
FACADE = "__init__"

# A room is a folder or a top-level module of the package. Top-level modules are all in layer 0.
LAYERS = {
    "fast": 0,
    "child": 1,
    "fisher": 1,
    "optim": 1,
    "delta": 1,
    "distributed": 2,
    "tasks": 2,
    "training": 2,
    "methods": 3,
    "runs": 4,
    "compare": 5,
    "report": 6,
    "cli": 7,
    "__main__": 8,
}
FACADE_LOADS = "runs"  # besides layers 0 and 1: ``load``, in a module that imports nothing until it is called
BELOW_ITS_NEIGHBOURS = "child"  # the other rooms of layer 1 speak of children
CORE_LAYERS = (0, 1)
CORE_PACKAGES = {"torch", "numpy", "safetensors"}
ROOM_PACKAGES = {"fast": {"triton"}}  # comes with torch where there is a GPU


class Import(NamedTuple):
    line: int
    module: str  # absolute and dotted


def _imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[Import]:
    """Every import of a file wherever it stands: top level, functions, TYPE_CHECKING, import_module("…")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            start = _absolute(node.module or "", node.level, module, is_package)
            for alias in node.names:
                yield Import(node.lineno, f"{start}.{alias.name}")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                target = node.args[0].value
                level = len(target) - len(target.lstrip("."))
                yield Import(node.lineno, _absolute(target.lstrip("."), level, module, is_package))


def _absolute(target: str, level: int, module: str, is_package: bool) -> str:
    if level == 0:
        return target
    parts = module.split(".")
    base = parts[: len(parts) - level + (1 if is_package else 0)]
    return ".".join([*base, target] if target else base)


def _room(module: str, rooms: set[str]) -> str:
    """The room of an absolute childtuning module; a name that is no room belongs to the facade."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in rooms else FACADE


def rooms_of(source: Path) -> set[str]:
    folders = {p.name for p in source.iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    return folders | {p.stem for p in source.glob("*.py")} - {FACADE}


def layering_faults(source: Path) -> list[str]:
    """All imports that break the rule, one line each."""
    layers = {path.stem: 0 for path in source.glob("*.py") if path.stem != FACADE} | LAYERS
    rooms = rooms_of(source) | set(layers)
    faults = [
        f"{room}: no layer is known for this folder. Give it one in LAYERS of {Path(__file__).name}."
        for room in sorted(rooms - set(layers))
    ]
    for path in sorted(source.rglob("*.py")):
        relative = path.relative_to(source.parent).with_suffix("")
        is_package = relative.name == "__init__"
        module = ".".join(relative.parts[:-1] if is_package else relative.parts)
        room = _room(module, rooms)
        for found in _imports(ast.parse(path.read_text(encoding="utf-8")), module, is_package):
            fault = _fault(room, found.module, rooms, layers)
            if fault:
                faults.append(f"{path.relative_to(source.parent)}:{found.line}: {fault}")
    return faults


def _fault(room: str, imported: str, rooms: set[str], layers: dict[str, int]) -> str | None:
    top = imported.split(".")[0]
    if room != FACADE and room not in layers:
        return None  # already reported as unknown
    layer = 1 if room == FACADE else layers[room]
    if top != PACKAGE:
        allowed = CORE_PACKAGES | ROOM_PACKAGES.get(room, set()) | sys.stdlib_module_names
        if layer in CORE_LAYERS and top not in allowed:
            return f"{room} (layer {layer}) imports {top}. Layers 0 and 1 need only {sorted(CORE_PACKAGES)}."
        return None
    target = _room(imported, rooms)
    if target == room:
        return None
    if target == FACADE:  # it gathers layers 0 and 1, so it stands between layers 1 and 2
        return None if layer >= 2 else f"{room} (layer {layer}) imports the facade. Import the room itself."
    if target not in layers:
        return None
    there = layers[target]
    if room == FACADE:
        is_allowed = there <= 1 or target == FACADE_LOADS
        return (
            None if is_allowed else f"the facade imports {target} (layer {there}). It gathers layers 0 and 1."
        )
    if there < layer or there == layer == 0 or (there == layer == 1 and target == BELOW_ITS_NEIGHBOURS):
        return None
    return f"{room} (layer {layer}) imports {target} (layer {there}). Imports point to a lower layer."


def test_imports_point_to_lower_layers(source: Path) -> None:
    faults = layering_faults(source)
    assert not faults, "\n" + "\n".join(faults)


def circles(source: Path) -> list[list[str]]:
    """Groups of modules that import each other, wherever the imports stand."""
    files = {}
    for path in source.rglob("*.py"):
        name = ".".join(path.relative_to(source.parent).with_suffix("").parts).removesuffix(".__init__")
        files[name] = path
    needs: dict[str, set[str]] = {}
    for name, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {one.module for one in _imports(tree, name, path.name == "__init__.py")}
        needs[name] = {m if m in files else m.rpartition(".")[0] for m in found} & files.keys() - {name}
    reached = {name: set(there) for name, there in needs.items()}
    for middle in files:
        for name in files:
            if middle in reached[name]:
                reached[name] |= reached[middle]
    together = {tuple(sorted(n for n in reached[m] if m in reached[n])) for m in files}
    return [list(group) for group in sorted(together) if group]


def test_no_files_import_in_a_circle(source: Path, tmp_path: Path) -> None:
    assert not circles(source)
    house = tmp_path / PACKAGE
    house.mkdir()
    for name, other in (("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")):
        (house / f"{name}.py").write_text(f"def f():\n    from childtuning.{other} import f\n")
    assert circles(house) == [[f"{PACKAGE}.a", f"{PACKAGE}.b", f"{PACKAGE}.c"]]


def test_there_is_something_to_check(source: Path) -> None:
    assert {"child", "errors", "fast"} <= rooms_of(source)


def test_every_kind_of_fault_is_found(tmp_path: Path) -> None:
    """The rule itself, tried on a small house with one fault a file."""
    house = tmp_path / PACKAGE
    files = {
        "__init__.py": "from childtuning.child import Child\nfrom .training import x\nimport transformers",
        "errors.py": "import difflib",
        "child/child.py": "from childtuning import errors\nimport torch, numpy, safetensors.torch, json",
        "child/select.py": "from childtuning.fast import ranking\nfrom childtuning.optim import groups",
        "fast/bits.py": "import triton\nfrom childtuning import delta\nfrom childtuning.errors import E",
        "delta/__init__.py": "from . import codec\nfrom .codec import encode\nfrom ..child import Child",
        "delta/codec.py": "def f():\n    import scipy.stats",
        "optim/compact.py": "from ..delta import codec",
        "fisher/linear.py": "import importlib\n\nimportlib.import_module('childtuning.tasks')",
        "fisher/loop.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import childtuning",
        "tasks/glue.py": "import datasets\nfrom childtuning.training.trainer import T",
        "training/trainer.py": "import childtuning as ct\nfrom childtuning.optim.compact import C",
        "cli/__init__.py": "from childtuning.methods import m\nfrom .train import app",
        "cli/train.py": "from childtuning.report import page",
        "report/page.py": "from childtuning.compare import records\nfrom childtuning.cli import printing",
        "__main__.py": "from childtuning.cli import main",
        "attic/x.py": "",
        "part.py": "from .errors import E\nfrom .fisher import f",
    }
    for name, text in files.items():
        (house / name).parent.mkdir(parents=True, exist_ok=True)
        (house / name).write_text(text)

    faults = {fault.split(": ")[0] for fault in layering_faults(house)}
    assert faults == {
        "attic",
        f"{PACKAGE}/__init__.py:2",
        f"{PACKAGE}/__init__.py:3",
        f"{PACKAGE}/child/select.py:2",
        f"{PACKAGE}/fast/bits.py:2",
        f"{PACKAGE}/delta/codec.py:2",
        f"{PACKAGE}/optim/compact.py:1",
        f"{PACKAGE}/fisher/linear.py:3",
        f"{PACKAGE}/fisher/loop.py:3",
        f"{PACKAGE}/tasks/glue.py:2",
        f"{PACKAGE}/report/page.py:2",
        f"{PACKAGE}/part.py:2",
    }
