"""Options that several commands share."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from childtuning.errors import no_file, no_method
from childtuning.options import Option, options_of, own_first
from childtuning.runs.config import SECTIONS, RunConfig, by_field, read_toml

LISTED = Path(__file__).with_name("methods.json")  # the registry's content, so that reading it needs no torch
GROUP = "childtuning.methods"  # the entry points of other packages' methods
_TYPES = {"bool": bool, "int": int, "float": float, "str": str, "list": list[str]}


def _annotation(panel: str, option: Option) -> Any:
    """Return typer's annotation of an option: its type, names and help, with the default in brackets."""
    kind = str if option.words else _TYPES[option.kind]
    default = f"  \\[{option.shown_default}]" if option.shown_default else ""
    declared = typer.Option(
        *option.flags, help=option.help + default, rich_help_panel=panel, show_default=False
    )
    return Annotated[kind | None, declared]


# By section, in the order of the help.
SECTION: dict[str, dict[str, Any]] = {
    panel: {name: _annotation(panel, options_of(section)[name]) for name in own_first(section)}
    for panel, section in SECTIONS.items()
}
SHARED: dict[str, Any] = {name: kind for section in SECTION.values() for name, kind in section.items()}

_Command = TypeVar("_Command", bound=Callable[..., None])
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", help="TOML file of these options, as saved in a run; command-line options override it."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]
RunDir = Annotated[Path, typer.Argument(help="The output folder of `childtuning train`.", show_default=False)]


def takes(names: Iterable[str]) -> Callable[[_Command], _Command]:
    """Add the shared options of these names to a command; their values are in its ``**given``, ``None`` if omitted."""

    def decorate(run: _Command) -> _Command:
        signature = inspect.signature(run, eval_str=True)
        *own, _ = signature.parameters.values()
        keyword = inspect.Parameter.KEYWORD_ONLY
        shared = [inspect.Parameter(name, keyword, default=None, annotation=SHARED[name]) for name in names]
        run.__signature__ = signature.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
        run.__annotations__ |= {option.name: option.annotation for option in shared}
        return run

    return decorate


def explicit(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options given on the command line."""
    return {name: value for name, value in given.items() if value is not None and value != []}


Encoding = Annotated[
    str | None, typer.Option(help="Encoding of the file, if not the training file's.", show_default=False)
]
Sheet = Annotated[
    str | None, typer.Option(help="Sheet of the workbook, if not the training file's.", show_default=False)
]


def check_files(*paths: Any) -> None:
    """Raise a DataError if one of the paths leads nowhere; torch and transformers are not imported for that."""
    for path in paths:
        if isinstance(path, (str, Path)) and not Path(path).expanduser().exists():
            raise no_file(path)


def check_method(text: Any) -> None:
    """Raise a ConfigError for a method that does not exist; torch is not imported for that.

    Where other packages or a program register methods, the registry alone knows.
    """
    if not isinstance(text, str) or GROUP in sys.modules or entry_points(group=GROUP):
        return
    known = [entry["name"] for entry in json.loads(LISTED.read_text(encoding="utf-8"))]
    for name in (word.partition(":")[0].strip() for word in text.split("+")):
        if name and name not in known:
            raise no_method(name, known)


def run_config(config_file: Path | None, given: dict[str, Any]) -> RunConfig:
    """Combine the options of the command line with those of the file, which they override.

    A task on the command line replaces the files named in the file, and vice versa.
    """
    options = by_field(read_toml(config_file)) if config_file else {}
    said = explicit(given)
    if "method" in said and said["method"] != options.get("method"):
        options = {key: value for key, value in options.items() if key not in ("density", "budget")}
    for one, other in (("density", "budget"), ("budget", "density")):
        if one in said:
            options.pop(other, None)
    if "task" in said:
        options = {key: value for key, value in options.items() if key not in ("train", "eval")}
    if "train" in said or "eval" in said:
        options.pop("task", None)
    options |= said
    check_method(options.get("method"))
    check_files(options.get("train"), options.get("eval"))
    return RunConfig.from_options(options)
