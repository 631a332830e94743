"""RunConfig and what is measured around a run."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

from childtuning.errors import ConfigError
from childtuning.runs import RunConfig
from childtuning.runs.config import name_of_data


def test_toml_round_trip() -> None:
    config = RunConfig(task="rte", density=0.2, eligible=("*.layer.*",), seed=3).resolved()
    assert RunConfig.from_options(tomllib.loads(config.to_toml())) == config


def test_every_fault_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig(
            task="rte", train="a.csv", density=2, warmup_ratio=10, precision="fp8", epochs=0, max_grad_norm=-1
        )
    for word in (
        "exclude each other",
        "density must be in (0, 1]",
        "warmup_ratio",
        "precision",
        "epochs",
        "max_grad_norm",
    ):
        assert word in str(caught.value)


def test_defaults_come_from_the_method() -> None:
    assert RunConfig(task="rte").resolved().density == 0.3
    assert RunConfig(task="rte", method="full").resolved().density == 1.0
    assert RunConfig(task="rte", method="child-f").child().variant == "task-free"
    assert RunConfig(task="rte", method="child-lowest").child().lowest


@pytest.mark.slow
def test_peak_memory_sees_what_came_and_went() -> None:
    # In a process of its own: one that has freed much before would serve the block from what it kept.
    script = (
        "import numpy\n"
        "from childtuning.runs.log import peak_memory_bytes, reset_peak_memory\n"
        "reset_peak_memory()\n"
        "before = peak_memory_bytes()\n"
        "block = numpy.ones(60_000_000, dtype=numpy.float32)\n"
        "del block\n"
        "print(peak_memory_bytes() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 150_000_000


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_is_what_the_machine_has(monkeypatch, native: bool, precision: str) -> None:
    monkeypatch.setattr("childtuning.training.has_fast_bf16", lambda: native)
    assert RunConfig(task="rte", precision="auto").resolved().precision == precision
    assert RunConfig(task="rte").resolved().precision == "fp32"
    with pytest.raises(ConfigError, match="one of fp32, bf16, auto"):
        RunConfig(task="rte", precision="fp8")


def test_a_file_may_spell_options_as_the_command_line_does() -> None:
    config = RunConfig.from_options({"task": "rte", "lr": 1e-3, "max-length": 64})
    assert (config.learning_rate, config.max_length) == (1e-3, 64)
    with pytest.raises(ConfigError, match="'learning_rate' is given twice, also as 'lr'"):
        RunConfig.from_options({"task": "rte", "learning_rate": 1e-3, "lr": 1e-4})
    with pytest.raises(ConfigError, match="nothing to train on. Pass --task NAME, or --train FILE"):
        RunConfig(eval="a.csv")
    assert "eval_share = 0.2" in RunConfig(train="a.csv").resolved().to_toml()
    with pytest.raises(ConfigError, match="learning_rate must be a number above 0, got 'fast'"):
        RunConfig(task="rte", learning_rate="fast")  # type: ignore[arg-type]


def test_columns_of_a_named_task_are_its_own() -> None:
    with pytest.raises(ConfigError, match="a named task has its own columns, got text, label_type"):
        RunConfig(task="rte", text="premise", label_type="class")


@pytest.mark.parametrize(
    ("train", "name"),
    [
        ("data/reviews/train.csv", "reviews"),
        ("reviews.train.csv.gz", "reviews"),
        ("pets/train", "pets"),
        ("/train.csv", "train"),
    ],
)
def test_data_is_named_by_its_file_or_the_folder_around_it(train: str, name: str) -> None:
    assert name_of_data(train) == name
