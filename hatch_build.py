"""Compile the CPU kernels when the package is built or installed; without a compiler the package is pure Python.

`python hatch_build.py` compiles them in place.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).parent / "src" / "childtuning" / "fast"
LIBRARY = KERNELS / "native" / "kernels.so"
# The masks are exact whatever the flags; values may differ in the last bit from one kind of processor to another.
FLAGS = [
    "-std=gnu11",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
]


def compile_kernels() -> bool:
    """Compile into LIBRARY; tell whether it worked, and on standard error why not."""
    sources = sorted(str(path) for path in (KERNELS / "native").glob("*.c"))
    compiler = shlex.split(os.environ.get("CC") or "cc")
    with tempfile.TemporaryDirectory(dir=KERNELS) as scratch:
        built = Path(scratch) / LIBRARY.name
        try:
            done = subprocess.run(
                [*compiler, *FLAGS, *sources, "-o", str(built), "-lm"],
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as fault:
            print(f"childtuning: no C compiler ({fault}); the slower kernels will serve.", file=sys.stderr)
            return False
        if done.returncode:
            print(
                f"childtuning: {compiler[0]} failed; the slower kernels will serve.\n{done.stderr}",
                file=sys.stderr,
            )
            return False
        built.replace(LIBRARY)  # a running process keeps the file it has open
    return True


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script, outside a build
    BuildHookInterface = object


class KernelBuildHook(BuildHookInterface):
    """Put the compiled kernels into the wheel, which is then one for this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the files are collected; leave no older library where that fails."""
        if not compile_kernels():
            LIBRARY.unlink(missing_ok=True)
        else:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


if __name__ == "__main__":
    sys.exit(0 if compile_kernels() else 1)
