"""The command line in a process that is killed in the middle of training, always at the same place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import os, signal, sys
from childtuning.cli.app import main
from childtuning.training import ChildTrainer

step, batches_left = ChildTrainer.training_step, [int(sys.argv.pop(1))]

def counted(*args, **kwargs):
    batches_left[0] -= 1
    if batches_left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args, **kwargs)

ChildTrainer.training_step = counted
main()
"""


def killed_at_batch(batch: int, words: list[object], run: Path) -> None:
    """Run ``childtuning`` until that batch, behind its first checkpoint and before the second."""
    command = [sys.executable, "-c", _PROGRAM, str(batch), *map(str, words), "--output", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, env=environment, timeout=200, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert len(list(run.glob("checkpoints/checkpoint-*/trainer_state.json"))) == 1
    assert not (run / "metrics.json").exists()
