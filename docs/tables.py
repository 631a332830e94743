"""Fill the tables of docs/methods and docs/cli.md from the code, and make the report from recorded comparisons.

With --check, only say whether they are up to date.

python docs/tables.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from childtuning.cli.options import LISTED
from childtuning.methods import all_methods, described
from childtuning.methods.combination import refusal
from childtuning.options import options_of, own_first
from childtuning.report import html_page, joined, read_recorded
from childtuning.runs.config import SECTIONS
from childtuning.training import Method

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "methods"
sys.path.append(str(ROOT / "benchmarks"))  # where tables of results are made and put into pages

from costs import table  # noqa: E402
from report import filled  # noqa: E402

_SHOWN = ("child", "modules", "start", "loss", "update")


def methods() -> list[type[Method]]:
    """Return the package's own methods, by part and name; what else is installed or registered is left out."""
    own = [method for method in all_methods() if method.__module__.startswith("childtuning.")]
    return sorted(own, key=lambda method: (_SHOWN.index(method.part), method.name))


def facts(method: type[Method]) -> str:
    """What a method says of itself, for the head of its page."""
    header = ["trains", "holds beside the model", "part", "density", "source"]
    density = f"{method.density:g}" if method.density != 1.0 else "—"
    cells = [method.trains, method.memory, f"`{method.part}`", density, _linked(method.source)]
    beside = [o.name for o in methods() if o is not method and refusal(method, o) is None]
    joined = f"`+` joins it with {_in_code(beside)}." if beside else "`+` joins it with none."
    return f"{table(header, [cells], text=range(len(header)))}\n\n{joined}"


def listing() -> str:
    """Every method in a row."""
    header = ["method", "what it does", "trains", "part", "holds beside the model", "source"]
    rows = [
        [
            f"[`{method.name}`]({method.name}.md)",
            method.summary,
            method.trains,
            f"`{method.part}`",
            method.memory,
            _linked(method.source),
        ]
        for method in methods()
    ]
    return table(header, rows, text=range(len(header)))


def combinations() -> str:
    """The pairs that are refused, those with one reason together; all others go together."""
    shown = methods()
    found: dict[str, list[tuple[str, str]]] = {}
    for index, first in enumerate(shown):
        for second in shown[index + 1 :]:
            reason = refusal(first, second)
            if reason is not None:
                pair, general = _in_general(reason, first.name, second.name)
                found.setdefault(general, []).append(pair)
    header = ["any of", "beside any of", "is refused, since"]
    rows = [[*sides, reason] for reason, pairs in found.items() for sides in _sides(pairs)]
    return table(header, rows, text=range(len(header)))


def _in_general(reason: str, *names: str) -> tuple[tuple[str, str], str]:
    """A pair in the order in which its reason names the two, and the reason without their names."""
    first, second = sorted(names, key=lambda name: reason.find(f"'{name}'") % len(reason))
    return (first, second), reason.replace(f"'{first}'", "the first").replace(f"'{second}'", "the second")


def _sides(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Cells for pairs: "the others" where any two of some methods are refused, else those on the left by the right."""
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    if len(pairs) == len(names) * (len(names) - 1) // 2 > 1:
        return [(_in_code(names), "the others")]
    beside: dict[str, list[str]] = {}
    for first, second in pairs:
        beside.setdefault(first, []).append(second)
    together: dict[tuple[str, ...], list[str]] = {}
    for first, seconds in beside.items():
        together.setdefault(tuple(seconds), []).append(first)
    return [(_in_code(firsts), _in_code(seconds)) for seconds, firsts in together.items()]


def _in_code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def options(method: type[Method]) -> list[tuple[str, str]]:
    """A method's hyperparameters and their defaults, as a user types them."""
    return [(field.name, _typed(field.default)) for field in fields(method)]  # type: ignore[arg-type]


def run_options() -> str:
    """The options of a run, by section."""
    rows = [
        [
            panel if not position else "",
            " ".join(f"`{flag}`" for flag in own[name].flags) or f"`--{name.replace('_', '-')}`",
            own[name].shown_default or "—",
            own[name].help.replace("|", "\\|"),
        ]
        for panel, section in SECTIONS.items()
        for own in (options_of(section),)
        for position, name in enumerate(own_first(section))
    ]
    return table(["section", "option", "default", "meaning"], rows, text=range(4))


def faults(*, write: bool) -> list[str]:
    """Return what is wrong with the pages; what a script can put right is, if ``write``."""
    contents = {PAGES / "index.md": {"methods": listing(), "combinations": combinations()}}
    contents[ROOT / "docs" / "cli.md"] = {"options": run_options()}
    contents |= {PAGES / f"{method.name}.md": {"facts": facts(method)} for method in methods()}
    found = []
    for path, tables in contents.items():
        shown = path.relative_to(ROOT)
        if not path.is_file():
            found.append(f"{shown} is missing. Write it, and name it in mkdocs.yml.")
            continue
        text = wanted = path.read_text(encoding="utf-8")
        for name, content in tables.items():
            if f"<!-- {name}:start -->" not in text or f"<!-- {name}:end -->" not in text:
                found.append(
                    f"{shown} has no place for its {name}. Put <!-- {name}:start --> and :end there."
                )
            wanted = filled(wanted, name, content)
        if wanted != text and write:
            path.write_text(wanted, encoding="utf-8")
        elif wanted != text:
            found.append(f"{shown} differs from the code. Run: python docs/tables.py")
    return found + _faults_of_list(write=write) + _faults_of_report(write=write)


def _faults_of_list(*, write: bool) -> list[str]:
    """The same, of the list that the command line shows without importing methods."""
    own = {method.name for method in methods()}
    wanted = [entry for entry in described() if entry["name"] in own]
    if json.loads(LISTED.read_text(encoding="utf-8")) == wanted:
        return []
    if write:
        LISTED.write_text(json.dumps(wanted, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return []
    return [f"{LISTED.name} differs from the registry. Run: python docs/tables.py"]


def _faults_of_report(*, write: bool) -> list[str]:
    """The same, of the page that shows the recorded comparisons on GLUE."""
    exports = sorted((ROOT / "benchmarks" / "results").glob("glue-small*.json"))
    if not exports:
        return []
    path = ROOT / "docs" / "glue-small.html"
    wanted = html_page(joined({export.name: read_recorded(export) for export in exports}))
    if path.is_file() and path.read_text(encoding="utf-8") == wanted:
        return []
    if write:
        path.write_text(wanted, encoding="utf-8")
        return []
    return [f"{path.relative_to(ROOT)} differs from benchmarks/results. Run: python docs/tables.py"]


def _linked(source: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)


def _typed(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def main() -> int:
    """Write or check the pages."""
    found = faults(write="--check" not in sys.argv[1:])
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
