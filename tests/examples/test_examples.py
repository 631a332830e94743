"""The examples run, save a delta that loads, and leave everything outside the child as it was."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import childtuning as ct
from childtuning.delta import frozen_hash

torch.set_num_threads(1)  # tiny matrices: a second thread only waits

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = ("plain_pytorch.py", "accelerate_loop.py", "trainer.py")


def run_example(script: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script as `python script arguments` would; a SystemExit other than 0 fails the test."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.mark.parametrize("flags", [(), ("--task-free",)], ids=["child-d", "child-f"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_example(
    script: str,
    flags: tuple[str, ...],
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from childtuning.tasks import load_task
    from childtuning.training import load_classifier

    run_example(
        script, "--model", tiny_bert, "--max-steps", 3, "--output", tmp_path, *flags, monkeypatch=monkeypatch
    )
    assert "accuracy" in capsys.readouterr().out

    delta = ct.Delta.load(tmp_path)
    task = load_task("docstrings")
    base = load_classifier(
        str(tiny_bert), num_labels=task.num_labels, label_names=task.label_names, seed=0
    ).model
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    for name, parameter in before.items():  # these hashes were taken of the trained model
        part = delta.parts[name]
        if not part.is_whole:
            assert frozen_hash(parameter, part.indices()) == delta.hashes[name]

    displaced = delta.apply_(base)
    changed = {name: (p.detach() != before[name]) for name, p in base.named_parameters()}
    assert any(bool(entries.any()) for entries in changed.values())
    for name, entries in changed.items():
        assert not bool(entries[~delta.parts[name].mask()].any())
    displaced.apply_(base)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())

    about = json.loads((tmp_path / "delta.json").read_text())
    assert about["base"] == {"name": str(tiny_bert)}
    body = {name: part for name, part in delta.parts.items() if not name.startswith("classifier")}
    share = sum(part.num_trained for part in body.values()) / sum(part.numel for part in body.values())
    assert share == (1.0 if flags else pytest.approx(0.3, abs=1e-4))


def test_what_the_loops_show() -> None:
    plain = (EXAMPLES / "plain_pytorch.py").read_text(encoding="utf-8")
    assert "opt.clip_grad_norm_(" in plain
    accelerated = (EXAMPLES / "accelerate_loop.py").read_text(encoding="utf-8")
    assert "accelerator.prepare(model, child_opt, batches)" in accelerated
