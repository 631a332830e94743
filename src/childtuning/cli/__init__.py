"""Layer 6: the command line; one file a command: parse, call one function, print."""

from childtuning.cli.app import app, main

__all__ = ["app", "main"]
