"""Damaged and forged folders of deltas, patches and certificates: one clear error, and nothing else happens.

Forged ones have the right hashes, as from somebody who knows the format.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import random
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from childtuning import Child, Delta, random_child, select_child
from childtuning.delta.certificate import Certificate
from childtuning.delta.patch import Patch
from childtuning.errors import ChildTuningError, CorruptFileError

MUTATIONS = 60  # of each kind of folder and of each of three kinds of damage
WILD: list[Any] = [
    -1, 0, 2**31, 2**40, 2**62, 2**70, 1e300, float("nan"), None, True, "", "all", "none", "coded", "recipe", "some",
    "row", "block", "../../../tmp/x", "/etc/passwd", "a\0b", [], {}, [2**40], [2**31, 2**31], [-3, 4], [[1]], "random",
    {"source": "random", "seed": 0, "density": 0.5, "scope": "global", "granularity": "element", "axis": 0,
     "block_shape": [1, 1], "row_axes": {}},
]  # fmt: skip


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40), nn.Linear(40, 3))


def write(noun: str, folder: Path) -> None:
    model = a_model()
    scores = {name: p.detach().abs() for name, p in model.named_parameters()}
    child: Child = select_child(scores, 0.2, always=("2.*",))
    if noun == "delta, drawn":
        child = random_child(model, 0.2, seed=1)
    delta = Delta.capture(model, child, base="a base")
    if noun.startswith("delta"):
        delta.save(folder)
        return
    parts = delta.parts
    patch = Patch(
        {name: part.shape for name, part in parts.items()},
        {n: p.indices().int() for n, p in parts.items() if not (p.is_whole or p.is_empty)},
        dict(delta.values),
        delta.hashes,
    )
    patch.save(folder) if noun == "patch" else Certificate.of(patch, {"base": {}}).save(folder)


KINDS = {
    "delta": Delta.load,
    "delta, drawn": Delta.load,
    "patch": Patch.load,
    "certificate": Certificate.load,
}


def use(found: Any) -> None:
    """Do what a reader does with a folder that was read."""
    model = a_model()
    if isinstance(found, Delta):
        found.apply_(model)
    elif isinstance(found, Patch):
        for name, parameter in model.named_parameters():
            found.apply_(name, parameter.detach())
    else:
        for name, parameter in model.named_parameters():
            if name in found.parts:
                found.is_base(name, parameter.detach())


def paths_in(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    return [path] * bool(path) + [p for key, value in inner for p in paths_in(value, (*path, key))]


def forge(draw: random.Random, about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Change a field, a name or a tensor."""
    what = draw.randrange(4)
    if what == 0:
        path = draw.choice([p for p in paths_in(about) if p[0] not in ("sha256", "values_sha256")])
        place = about
        for key in path[:-1]:
            place = place[key]
        if draw.random() < 0.2 and isinstance(place, dict):
            del place[path[-1]]
        elif draw.random() < 0.2 and isinstance(place, dict):
            place[str(draw.choice(WILD))] = place.pop(path[-1])
        else:
            place[path[-1]] = copy.deepcopy(draw.choice(WILD))
    elif what == 1 and len(tensors) > 1:
        one, two = draw.sample(sorted(tensors), 2)
        tensors[one], tensors[two] = tensors[two], tensors[one]
    elif what == 2 and tensors:
        name = draw.choice(sorted(tensors))
        tensors[draw.choice(["../x", "/x", name + "x", ""])] = tensors.pop(name)
    elif tensors:
        name = draw.choice(sorted(tensors))
        tensor = tensors[name].reshape(-1)
        changes = [
            tensor[:-1],
            tensor.repeat(2),
            tensor.flip(0),
            tensor.double(),
            torch.zeros(0),
            tensor.clone().fill_(255),
        ]
        tensors[name] = draw.choice(changes).clone().contiguous()


def signed(folder: Path, noun: str, about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / f"{noun}.safetensors")
    body = {key: value for key, value in about.items() if key != "sha256"}
    body["values_sha256"] = hashlib.sha256((folder / f"{noun}.safetensors").read_bytes()).hexdigest()
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / f"{noun}.json").write_text(json.dumps(body))


@pytest.mark.parametrize("kind", list(KINDS))
def test_damage_is_told_and_does_nothing(kind: str, tmp_path: Path) -> None:
    noun, draw = kind.split(",")[0], random.Random(kind)
    whole = tmp_path / "whole"
    write(kind, whole)
    use(KINDS[kind](whole))
    about = json.loads((whole / f"{noun}.json").read_text())
    tensors = load_file(whole / f"{noun}.safetensors")
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    place = tmp_path / "place"
    place.mkdir()
    before = sorted(path for path in tmp_path.rglob("*"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(3 * MUTATIONS):
        for name, content in files.items():
            (place / name).write_bytes(content)
        if i % 3 == 0:
            changed, parts = copy.deepcopy(about), {name: tensor.clone() for name, tensor in tensors.items()}
            forge(draw, changed, parts)
            signed(place, noun, changed, parts)
        else:
            name = draw.choice(sorted(files))
            content = bytearray(files[name])
            if i % 3 == 1:
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            else:
                del content[draw.randrange(len(content)) :]
            (place / name).write_bytes(content)
        if i % 3:
            with pytest.raises(CorruptFileError):
                KINDS[kind](place)
        else:
            with contextlib.suppress(ChildTuningError):  # what is only another name or value is read
                use(KINDS[kind](place))
        assert sorted(path for path in tmp_path.rglob("*") if path.parent != place) == [
            path for path in before if path.parent != place
        ]
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000
    )  # kB; a forged size would be more


@pytest.mark.parametrize("shape", [[2**40], [2**20, 2**20], [0, 2**62]])
@pytest.mark.parametrize("record", [{"trained": "recipe"}, {"trained": "all"}, {"trained": "none"},
    {"trained": "coded", "count": 2**40, "low_bits": 3}, {"trained": "coded", "count": 3, "low_bits": 2**40},
    {"trained": "coded", "count": 1, "low_bits": 0, "granularity": "row"}])  # fmt: skip
@pytest.mark.parametrize("density", [0.2, 1e-12])
def test_a_forged_size_takes_no_memory(
    shape: list[int], record: dict, density: float, tmp_path: Path
) -> None:
    write("delta, drawn", tmp_path)
    about = json.loads((tmp_path / "delta.json").read_text())
    about["parameters"]["0.weight"] |= {"shape": shape, **record}
    about["recipe"]["density"] = density
    tensors = load_file(tmp_path / "delta.safetensors") | {
        "0.weight::index": torch.tensor([128, 0], dtype=torch.uint8)
    }
    signed(tmp_path, "delta", about, tensors)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ChildTuningError):
        use(Delta.load(tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50_000
