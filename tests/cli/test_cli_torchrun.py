"""`torchrun -m childtuning train`: what one process trains, written once, and resumed after a process was lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.tiny import WORDS, save_tiny_bert

from childtuning import Child, Delta

LINE = ["train", "--model", "tiny", "--train", "train.csv", "--eval", "dev.csv", "--method", "child-d"]
LINE += ["--density", "0.1", "--batch-size", "16", "--json"]
AUDIT = """
import os, sys

def hook(event, args):  # os.open, which this writes with, has no mode
    path = args[0] if event == "open" and isinstance(args[0], str) and set(args[1] or "") & set("wax+") else None
    path = args[1] if event == "os.rename" else path
    if path is not None:
        file = os.open("written-1.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{path}\\n".encode())
        os.close(file)

if os.environ.get("RANK") == "1":
    sys.addaudithook(hook)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    config = save_tiny_bert(tmp_path / "tiny") / "config.json"
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | plain))
    generator = torch.Generator().manual_seed(0)
    for name, size in (("train", 81), ("dev", 20)):  # the last batch is one example: a process has none of it
        rows = ["text,label"]
        for _ in range(size):
            words = [WORDS[i] for i in torch.randint(len(WORDS), (8,), generator=generator)]
            rows.append(f"{' '.join(words)},{'up' if sum(map(len, words)) % 2 else 'down'}")
        (tmp_path / f"{name}.csv").write_text("\n".join(rows))
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "sitecustomize.py").write_text(AUDIT)
    return tmp_path


def environment(place: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(place / "audit"), *(path for path in sys.path if path)])
    lo = "lo0" if sys.platform == "darwin" else "lo"
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": lo}


def torchrun(*arguments: str) -> list[str]:
    how = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "childtuning"]
    return [sys.executable, *how, *arguments]


def run(place: Path, *arguments: str, alone: bool = False) -> dict:
    command = [sys.executable, "-m", "childtuning", *arguments] if alone else torchrun(*arguments)
    done = subprocess.run(
        command, cwd=place, env=environment(place), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # one object, whatever the number of processes


def differ(first: Path, second: Path) -> float:
    one, two = Delta.load(first), Delta.load(second)
    assert one.hashes == two.hashes
    return max(float((one.values[name] - two.values[name]).abs().max()) for name in one.values)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["element", pytest.param("row", marks=pytest.mark.nightly)])
def test_two_processes_train_what_one_does(granularity: str, place: Path) -> None:
    line = [*LINE, "--granularity", granularity, "--epochs", "2"]
    run(place, *line, "--output", "one", alone=True)
    child = Child.load(place / "one" / "child.safetensors")
    for output, more in (("two", ()), ("shards", ("--shard",))):
        (place / "written-1.txt").unlink(missing_ok=True)
        assert run(place, *line, *more, "--output", output)["output"] == output
        assert Child.load(place / output / "child.safetensors").fingerprint() == child.fingerprint()
        assert differ(place / output, place / "one") < 1e-6
        written = (place / "written-1.txt").read_text().splitlines()
        ours = {Path(path).name for path in written if output in Path(path).parts}
        assert ours and all(name.startswith(("random-1.", "step-")) for name in ours), ours


@pytest.mark.slow
@pytest.mark.nightly
def test_a_lost_process_ends_the_run_which_goes_on(place: Path) -> None:
    line = [*LINE, "--epochs", "40", "--save-steps", "20"]
    run(place, *line, "--output", "whole")
    training = subprocess.Popen(
        torchrun(*line, "--output", "cut"),
        cwd=place,
        env=environment(place),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(place.glob("cut/checkpoints/checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline and training.poll() is None
        time.sleep(0.05)
    os.kill(_second(training.pid), signal.SIGKILL)
    _, said = training.communicate(timeout=15)
    assert training.returncode == 1
    (told,) = [line for line in said.splitlines() if line.startswith("childtuning: rank")]
    assert "checkpoint-" in told and "--resume" in told
    run(place, *line, "--output", "cut", "--resume")
    assert differ(place / "cut", place / "whole") == 0


def _second(parent: int) -> int:
    """The process of rank 1."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"PPid:\t{parent}\n" in status and b"RANK=1" in variables:
            return int(folder.name)
    pytest.skip("no /proc to find the process in")
