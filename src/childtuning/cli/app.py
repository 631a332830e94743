"""The application: its commands and its error handling."""

from __future__ import annotations

import io
import os
import platform
import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from childtuning.cli import (
    compare,
    demo,
    evaluate,
    export,
    inspect,
    merge,
    methods,
    plan,
    predict,
    push,
    report,
    score,
    train,
    verify,
)
from childtuning.cli.printing import is_first
from childtuning.errors import ChildTuningError, LostProcessError, as_os_error

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "numpy")


def _tell_version(asked: bool) -> None:
    """Print the facts for a bug report: versions, and whether the kernels were compiled."""
    if not asked:
        return
    print(f"childtuning {metadata.version('childtuning')}")
    print(f"python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for package in _PACKAGES:
        try:
            print(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package} not installed")
    native = Path(__file__).parents[1] / "fast" / "native" / "kernels.so"
    print(f"kernels {'compiled' if native.is_file() else 'not compiled: plain torch is used'}")
    raise typer.Exit


app = typer.Typer(
    name="childtuning",
    rich_markup_mode="markdown",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (
    train,
    compare,
    report,
    predict,
    evaluate,
    score,
    inspect,
    verify,
    merge,
    export,
    push,
    methods,
    plan,
    demo,
):
    app.command(command.NAME)(command.run)


@app.callback()
def _about(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_tell_version, help="Show versions and stop."),
    ] = False,
) -> None:
    """Fine-tune a pretrained network on little data by training only a child network.

    Example:

        childtuning demo

        childtuning train --train train.csv --eval dev.csv --output runs/mine
    """


# How often a thread that waits looks again before it sleeps: a fraction of a millisecond. The OpenMP library: 300,000.
SPINS = "10000"
_STOPPED = "stopped. Continue a training run with --resume, and a comparison with the same command."


def main() -> None:
    """Run the command line. Exit codes: 0 success; 2 wrong use or input, reported in one line; 1 anything else.

    With several processes (torchrun), only rank 0 writes to standard output. Threads that wait for each other soon
    sleep, unless the environment says otherwise: beside a program that keeps a core busy, threads that spin through
    their share of the time make training many times slower (``benchmarks/run.py waiting``).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read once, when torch is imported
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console of few characters must not cost a result
            stream.reconfigure(errors="backslashreplace")
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if "RANK" in os.environ:  # torchrun ends the others by SIGTERM when one has died
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = app(standalone_mode=False, prog_name="childtuning")
    except ChildTuningError as error:
        _fail(str(error), 2)
    except LostProcessError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail(_STOPPED, 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if (of_disk := as_os_error(error)) is not None:
            where = f" {str(of_disk.filename)!r}" if of_disk.filename else ""
            _fail(
                f"cannot read or write{where}: {of_disk.strerror or of_disk}. Check the path and the disk.", 2
            )
        if hasattr(error, "format_message"):  # the parser's own errors: an unknown option, a missing argument
            message = error.format_message().rstrip()  # type: ignore[attr-defined]
            if not message:  # no arguments: the help has been shown
                sys.exit(2)
            context = getattr(error, "ctx", None)
            command = "childtuning" if context is None else context.command_path
            if not is_first():  # every process says the same
                sys.exit(2)
            _fail(f"{message}{'' if message.endswith(('.', '?')) else '.'} See `{command} --help`.", 2)
        if os.environ.get("CHILDTUNING_DEBUG"):
            raise
        _fail(f"{type(error).__name__}: {error}. Set CHILDTUNING_DEBUG=1 for a traceback.", 1)
    else:
        if code == 130:  # the parser's exit code for Ctrl-C
            _fail(_STOPPED, 1)
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    line = " ".join(message.split())
    who = "childtuning" if is_first() else f"childtuning, rank {os.environ['RANK']}"
    sys.stderr.write(f"{who}: {line}\n")  # in one piece: several processes may say it
    sys.exit(code)
