"""Layer 6: the command line, one file per command: parse, call one function, print."""

from childtuning.cli.app import app, main

__all__ = ["app", "main"]
