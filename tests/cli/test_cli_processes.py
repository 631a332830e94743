"""Under torchrun, rank 0 alone writes the run and prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

AUDIT = """
import os, sys
rank, folder = os.environ["RANK"], os.environ["AUDITED"]
def hook(event, args):
    if event == "open" and str(args[0]).startswith(folder) and any(c in str(args[1]) for c in "wax+"):
        sys.stderr.write(f"AUDIT {rank} {args[0]}\\n")
    if event in ("os.rename", "os.remove", "shutil.rmtree") and str(args[0]).startswith(folder):
        sys.stderr.write(f"AUDIT {rank} {args[0]}\\n")
sys.addaudithook(hook)
from childtuning.cli import main
main()
"""


@pytest.mark.slow
def test_two_processes_write_one_run(tiny_bert: Path, sentiment: Path, tmp_path: Path) -> None:
    script, output = tmp_path / "audited.py", tmp_path / "run"
    script.write_text(AUDIT)
    words = [
        "train",
        "--model",
        tiny_bert,
        "--train",
        sentiment / "train.jsonl",
        "--eval",
        sentiment / "dev.jsonl",
    ]
    words += ["--method", "child-d", "--density", "0.1", "--epochs", "1", "--output", output, "--json"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            script,
            *words,
        ],
        env={**os.environ, "AUDITED": str(output), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["output"] == str(output)
    assert (output / "metrics.json").is_file() and not (output / "checkpoints").exists()
    wrote = {tuple(line.split()[1:]) for line in done.stderr.splitlines() if line.startswith("AUDIT")}
    assert any(rank == "0" for rank, _ in wrote)
    assert not [path for rank, path in wrote if rank != "0" and "random-1" not in path]
