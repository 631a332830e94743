"""States as data files."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from childtuning.errors import CorruptFileError
from childtuning.training.state_files import load_state, random_state, save_state, set_random_state


def test_nested_states_round_trip(tmp_path) -> None:
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.rand(3)}, 1: {}},
        "groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1], "name": None, "on": True}],
        "array": np.arange(4, dtype=np.uint32),
    }
    save_state(tmp_path / "state.safetensors", state)
    loaded = load_state(tmp_path / "state.safetensors")
    assert loaded["groups"] == state["groups"] and list(loaded["state"]) == [0, 1]
    assert torch.equal(loaded["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    assert loaded["array"].dtype == np.uint32 and loaded["array"].tolist() == [0, 1, 2, 3]


def test_random_streams_go_on(tmp_path) -> None:
    save_state(tmp_path / "random.safetensors", random_state())
    first = (random.random(), np.random.rand(), torch.rand(2).tolist())
    set_random_state(load_state(tmp_path / "random.safetensors"))
    assert first == (random.random(), np.random.rand(), torch.rand(2).tolist())


def test_a_changed_byte_is_told(tmp_path) -> None:
    save_state(path := tmp_path / "random.safetensors", random_state())
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match="its content was changed"):
        load_state(path)


def test_what_is_not_data_is_refused(tmp_path) -> None:
    with pytest.raises(TypeError, match="cannot hold"):
        save_state(tmp_path / "x", {"f": print})
    (tmp_path / "x").write_bytes(b"nonsense")
    with pytest.raises(CorruptFileError, match="cannot be read"):
        load_state(tmp_path / "x")


def test_one_expanded_entry_is_kept(tmp_path) -> None:
    save_state(path := tmp_path / "state.safetensors", {"step": torch.ones(()).expand(1)})
    assert load_state(path)["step"].tolist() == [1.0]
