"""Options: declared once, checked, parsed and shown from the declaration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest

from childtuning.errors import ConfigError
from childtuning.options import option, options_of, own_first, settle


@dataclass(frozen=True, kw_only=True)
class Base:
    patterns: tuple[str, ...] | None = option(None, "Patterns.", unset="all")


@dataclass(frozen=True, kw_only=True)
class Config(Base):
    kind: Literal["row", "column"] = option("row", "Which.")
    share: float | Literal["auto"] = option(0.5, "How much.", within="(0, 1]")
    count: int | None = option(None, "How many.", within="[1, inf)")
    is_on: bool | None = option(None, "Whether.", flags=("--on/--off",), unset="yes")
    name: str = option("x", "What.")


def faults(**values: Any) -> list[str]:
    return settle(Config(**values))


def test_what_is_declared_is_known() -> None:
    declared = options_of(Config)
    assert own_first(Config) == ["kind", "share", "count", "is_on", "name", "patterns"]
    assert declared["kind"].words == ("row", "column") and declared["kind"].kind == "str"
    assert declared["share"].words == ("auto",) and declared["share"].kind == "float"
    assert declared["count"].optional and not declared["share"].optional
    assert declared["patterns"].kind == "list" and declared["patterns"].shown_default == "all"
    assert declared["share"].shown_default == "0.5" and declared["is_on"].flags == ("--on/--off",)


def test_values_are_brought_to_their_types() -> None:
    config = Config(share=1, count=np.int64(3), patterns="a.*", kind="column")  # type: ignore[arg-type]
    assert settle(config) == []
    assert (config.share, config.count, config.patterns) == (1.0, 3, ("a.*",))
    assert type(config.share) is float and type(config.count) is int
    config = Config(share=np.float32(0.25), patterns=["a", "b"])  # type: ignore[arg-type]
    assert settle(config) == [] and type(config.share) is float and config.patterns == ("a", "b")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "rows"}, "kind must be one of row, column, got 'rows'. Did you mean 'row'?"),
        ({"kind": None}, "kind must be one of row, column, got None"),
        ({"share": "half"}, "share must be a number in (0, 1], got 'half'. Pass share=0.5."),
        ({"share": True}, "share must be a number in (0, 1], got True"),
        ({"share": float("nan")}, "share must be in (0, 1], got nan"),
        ({"share": 0}, "share must be in (0, 1], got 0.0"),
        ({"count": 0}, "count must be a whole number from 1 up, got 0. Leave it out for the default."),
        ({"count": 1.5}, "count must be a whole number from 1 up, got 1.5"),
        ({"count": True}, "count must be a whole number from 1 up, got True"),
        ({"is_on": 1}, "is_on must be True or False, got 1"),
        ({"name": 3}, "name must be text, got 3. Pass name=x."),
        ({"patterns": [1]}, "patterns must be a list of texts, got (1,)"),
    ],
)
def test_what_is_wrong_is_one_line(values: dict[str, Any], words: str) -> None:
    (fault,) = faults(**values)
    assert fault.startswith(words) and "\n" not in fault


def test_all_faults_at_once() -> None:
    assert len(faults(kind="rows", share=2, count=0)) == 3


def test_text_is_parsed() -> None:
    declared = options_of(Config)
    assert declared["share"].parse("auto") == "auto" and declared["share"].parse("2e-1") == 0.2
    assert declared["count"].parse("12") == 12 and declared["is_on"].parse("False") is False
    assert declared["kind"].parse("row") == "row" and declared["patterns"].parse("a.*") == ("a.*",)
    for name, text, words in (
        ("count", "1.5", "count must be a whole number, got '1.5'"),
        ("share", "half", "share must be a number, or auto, got 'half'"),
        ("is_on", "on", "is_on must be True or False, got 'on'"),
    ):
        with pytest.raises(ConfigError, match=words):
            declared[name].parse(text)
