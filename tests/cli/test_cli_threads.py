"""How the threads of the command line wait."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from childtuning.cli.app import SPINS


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_threads_soon_sleep_unless_the_environment_says_otherwise(given: dict[str, str], spins: str) -> None:
    """The library itself says, when it is loaded, what it has understood."""
    bare = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-m", "childtuning", "inspect", "no-such-run"],
        capture_output=True,
        text=True,
        check=False,
        env={**bare, **given, "OMP_DISPLAY_ENV": "verbose"},
    )
    assert done.returncode == 2
    told = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if told is None:
        pytest.skip("this torch has another OpenMP library than GNU's")
    assert told[1] == spins
