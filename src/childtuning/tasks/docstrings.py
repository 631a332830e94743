"""The embedded task: docstrings of Python's standard library, labelled by the topic of their module.

It needs no download, so that the demo and a first run work on every machine. All docstrings of a module
are in one split, so that a model has to learn the topic and not the module. A docstring is left out of
dev if its first sentence also occurs in training. Sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from childtuning.errors import ConfigError, DataError
from childtuning.tasks.examples import Examples
from childtuning.tasks.kind import Task

DEFAULT_TRAIN_LIMIT = 400
_DEV_LIMIT_AN_AREA = 22
_MIN_WORDS = 10  # shorter ones ("Return True if it is set.") rarely reveal their topic
_MAX_WORDS = 60

# area -> (modules for train, modules for dev). A name is a file or a whole package. Modules that a
# Python version lacks are skipped; modules that Python 3.13 removed are not listed.
AREAS: Mapping[str, tuple[str, str]] = {
    "archives": ("tarfile gzip zipapp", "zipfile bz2 lzma"),
    "collections": (
        "collections enum weakref types",
        "_collections_abc heapq graphlib bisect copy dataclasses shelve",
    ),
    "concurrency": (
        "asyncio/locks asyncio/events asyncio/tasks asyncio/queues asyncio/futures threading",
        "multiprocessing/pool multiprocessing/process multiprocessing/connection multiprocessing/managers "
        "multiprocessing/shared_memory concurrent queue sched",
    ),
    "config": (
        "logging/__init__ logging/config configparser optparse",
        "logging/handlers argparse getopt cmd warnings",
    ),
    "dates": ("datetime _pydatetime _strptime", "calendar zoneinfo"),
    "files": (
        "shutil os pathlib tempfile",
        "posixpath ntpath genericpath glob fnmatch fileinput filecmp stat linecache",
    ),
    "imports": (
        "importlib/abc importlib/util importlib/_bootstrap importlib/_bootstrap_external "
        "importlib/metadata/__init__",
        "pkgutil zipimport runpy pyclbr site py_compile compileall modulefinder",
    ),
    "mail": (
        "email/message email/_policybase email/policy email/generator email/header email/charset email/utils "
        "email/parser email/headerregistry email/_parseaddr email/quoprimime",
        "mailbox mimetypes smtplib imaplib poplib",
    ),
    "markup": ("xml/etree xml/sax", "xml/dom html/__init__ html/parser plistlib"),
    "network": (
        "urllib http/client http/server http/cookies ftplib ipaddress",
        "socket socketserver ssl xmlrpc wsgiref webbrowser",
    ),
    "numbers": ("_pydecimal random", "statistics fractions numbers"),
    "testing": ("unittest doctest timeit", "bdb pdb trace traceback tracemalloc pstats profile"),
}

_SIGNATURE = re.compile(r"^[\w.]+\(.*\)|^[\w.]+\s*=|^[A-Z]\.\w+\(|->")
_SENTENCE_END = re.compile(r"[.!?:;](?:\s|$)")


def load_docstring_task(*, seed: int = 0, train_limit: int | None = DEFAULT_TRAIN_LIMIT) -> Task:
    """Build the task "docstrings": predict the topic area of a standard-library docstring; metric accuracy.

    A pure function of (Python's own source files, seed, train_limit). The seed draws only the training
    rows: dev is the same for every seed, so that all runs are measured on the same rows.

    Args:
        seed: any integer.
        train_limit: the maximum number of training rows, spread over the areas as evenly as possible;
            None keeps all.
    Raises:
        ConfigError: when train_limit is below the number of areas.
        DataError: when this Python lacks the sources of its standard library.
    """
    train_pool, dev_pool = _pools(sysconfig.get_paths()["stdlib"])
    areas = sorted(train_pool)
    if train_limit is not None and train_limit < len(areas):
        raise ConfigError(
            f"train_limit must be at least {len(areas)}, one row per area, got {train_limit}. "
            f"Pass train_limit={DEFAULT_TRAIN_LIMIT}, for example."
        )
    return Task(
        name="docstrings",
        kind="classification",
        label_names=tuple(areas),
        metrics=("accuracy",),
        train=_draw(train_pool, f"train {seed}", limit=train_limit),
        dev=_draw(dev_pool, "dev", limit_an_area=_DEV_LIMIT_AN_AREA),
    )


def _draw(
    pool: Mapping[str, list[str]], seed: str, *, limit: int | None = None, limit_an_area: int | None = None
) -> Examples:
    """Shuffle each area and take rows from the areas in turn; a smaller draw is a prefix of a larger one."""
    shuffled: dict[str, list[str]] = {}
    for area in sorted(pool):
        shuffled[area] = random.Random(f"{seed} {area}").sample(pool[area], len(pool[area]))[:limit_an_area]
    rounds = max(len(texts) for texts in shuffled.values())
    rows = [
        (texts[turn], area) for turn in range(rounds) for area, texts in shuffled.items() if turn < len(texts)
    ]
    rows = rows[:limit]
    return Examples([text for text, _ in rows], None, [area for _, area in rows])


@lru_cache(maxsize=1)
def _pools(stdlib: str) -> tuple[Mapping[str, list[str]], Mapping[str, list[str]]]:
    """Return area -> texts for train and for dev, for the areas that have both."""
    seen: set[str] = set()
    train = {area: _fresh_texts(Path(stdlib), modules, seen) for area, (modules, _) in AREAS.items()}
    # After all training areas: no text that training may draw under any seed gets into dev.
    dev = {area: _fresh_texts(Path(stdlib), modules, seen) for area, (_, modules) in AREAS.items()}
    both = [area for area in AREAS if train[area] and dev[area]]
    if len(both) < 2:
        raise DataError(
            f"The task 'docstrings' needs the sources of Python's standard library, got none in {stdlib}. "
            f"Use a Python that has them, or pass files of your own."
        )
    return {area: train[area] for area in both}, {area: dev[area] for area in both}


def _fresh_texts(stdlib: Path, modules: str, seen: set[str]) -> list[str]:
    """Return the docstrings whose first sentence is not in `seen`; add their first sentences to it."""
    texts: list[str] = []
    for module in modules.split():
        for file in _files_of(stdlib, module):
            for docstring in _docstrings(file):
                text = _clean(docstring)
                key = "" if text is None else _first_sentence(text)
                if text is not None and key not in seen:
                    seen.add(key)
                    texts.append(text)
    return texts


def _files_of(stdlib: Path, module: str) -> list[Path]:
    file = stdlib / f"{module}.py"
    if file.is_file():
        return [file]
    return sorted((stdlib / module).rglob("*.py"))


def _docstrings(file: Path) -> list[str]:
    """Return the docstrings of a file's functions, classes and methods, in order of appearance."""
    try:
        with warnings.catch_warnings():  # old files may contain escapes that newer Pythons warn about
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    found = (ast.get_docstring(node) for node in _definitions(tree.body))
    return [docstring for docstring in found if docstring]


def _definitions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield node
            yield from _definitions(node.body)
        elif isinstance(node, (ast.If, ast.Try)):
            yield from _definitions(node.body)
            yield from _definitions(node.orelse)


def _clean(docstring: str) -> str | None:
    """Return a docstring as one line of prose, or None if it is too short, code or a signature."""
    prose = docstring.split(">>>")[0].strip()
    first_line, _, rest = prose.partition("\n")
    if _SIGNATURE.search(first_line):
        prose = rest
    words = prose.split()
    return " ".join(words[:_MAX_WORDS]) if len(words) >= _MIN_WORDS else None


def _first_sentence(text: str) -> str:
    """Return the first sentence as lower-case words without punctuation, to detect near-duplicates."""
    sentence = _SENTENCE_END.split(text, maxsplit=1)[0]
    return " ".join(re.findall(r"[a-z]+", sentence.lower()))
