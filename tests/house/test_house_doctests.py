"""The examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import childtuning

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
OPTIONAL = {"triton"}  # only there with a GPU


def test_docstring_examples(capsys) -> None:
    failed = []
    for found in pkgutil.walk_packages(childtuning.__path__, "childtuning."):
        if found.name.endswith("__main__"):
            continue
        try:
            module = importlib.import_module(found.name)
        except ModuleNotFoundError as fault:
            if fault.name in OPTIONAL:
                continue
            raise
        if doctest.testmod(module, optionflags=FLAGS).failed:
            failed.append(found.name)
    assert not failed, f"in {failed}:\n{capsys.readouterr().out}"
