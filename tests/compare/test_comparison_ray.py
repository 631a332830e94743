"""A comparison on a Ray cluster of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.compare.tiny_comparisons import a_comparison, outcomes, write_tasks

from childtuning.compare import compare, set_up
from childtuning.errors import ConfigError

ray: Any = pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
_EVEN = {
    "worker_niceness": 0
}  # Ray gives its workers what other processes leave, which may be next to nothing


@pytest.fixture
def cluster() -> Iterator[None]:
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(num_cpus=2, _system_config=_EVEN, **quiet)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_a_cluster_does_the_same_runs(cluster: None, tiny_bert: Path, tmp_path: Path) -> None:
    data = write_tasks(tmp_path / "data", "alpha")
    asked = a_comparison(tiny_bert, data, methods=["full,child-d,last-k:7"], settings={"num_seeds": 2})
    for name in ("here", "there"):
        set_up(tmp_path / f"{name}.db", asked)
    here = compare(tmp_path / "here.db", asked)
    there = compare(tmp_path / "there.db", asked, executor="ray")
    states = [run.state for run in there.records]
    assert states.count("done") == 6 and states.count("failed") == 2
    assert outcomes(there) == outcomes(here)


def test_without_a_cluster_it_says_so(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    data = write_tasks(tmp_path / "data", "alpha")
    asked = a_comparison(tiny_bert, data)
    set_up(tmp_path / "runs.db", asked)
    with pytest.raises(ConfigError, match="no Ray cluster was found"):
        compare(tmp_path / "runs.db", asked, executor="ray")
