"""Child, its parts and its file; granularities; configuration."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from childtuning import Child, ChildConfig, TaskFree, random_child, select_child
from childtuning.child import Part
from childtuning.child.eligible import named
from childtuning.child.files import read_parts, write_parts
from childtuning.child.pieces import Piece
from childtuning.child.units import KINDS, Granularity
from childtuning.errors import ConfigError, CorruptFileError, ParameterError

shapes = st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple)


def naive_units(
    kind: str, shape: tuple[int, ...], axes: tuple[int, ...], block: tuple[int, int]
) -> torch.Tensor:
    """The unit that each entry belongs to, entry by entry; of blocks the first axes number matrices."""
    numel = math.prod(shape)
    units = torch.zeros(numel, dtype=torch.long)
    for flat in range(numel):
        coordinates, rest = [], flat
        for size in reversed(shape):
            coordinates.insert(0, rest % size)
            rest //= size
        if kind == "element":
            units[flat] = flat
        elif kind in ("row", "column"):
            for axis in axes if len(shape) > 1 else range(len(shape)):
                units[flat] = units[flat] * shape[axis] + coordinates[axis]
        elif kind == "block":
            matrix = shape[len(axes) :]
            height = matrix[0] if len(matrix) > 1 else 1
            width = math.prod(matrix) // height
            which, inside = divmod(flat, height * width)
            y, x = divmod(inside, width)
            down, across = -(-height // block[0]), -(-width // block[1])
            units[flat] = (which * down + y // block[0]) * across + x // block[1]
    return units.view(shape)


@given(
    shapes,
    st.sampled_from(KINDS),
    st.sets(st.integers(0, 3), min_size=1),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.data(),
)
@settings(max_examples=250, deadline=None)
def test_granularity_against_the_naive_twin(shape, kind, some, block, data) -> None:
    axes = tuple(sorted({axis % len(shape) for axis in some})) if shape else ()
    if kind == "block":
        axes = tuple(range(len(some) % (len(shape) + 1)))
    is_one = len(axes) == 1 and kind != "block"
    unit = Granularity(kind, axes[0] if is_one else axes or 0, block)
    membership = naive_units(kind, shape, axes, block)
    num_units = unit.num_units(shape)
    assert num_units == int(membership.max()) + 1
    values = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = torch.zeros(num_units, dtype=torch.float64).index_add(0, membership.view(-1), values.view(-1))
    torch.testing.assert_close(unit.sums(values), wanted)
    assert torch.equal(unit.sizes(shape), membership.view(-1).bincount(minlength=num_units))
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num_units, max_size=num_units)))
    part = Part(shape, chosen.nonzero().squeeze(1), unit)
    mask = chosen[membership]
    if shape:  # as shards of the first axis hold it
        start = data.draw(st.integers(0, shape[0] - 1))
        piece = Piece(shape, start, data.draw(st.integers(1, shape[0] - start)))
        assert torch.equal(piece.part(part).mask(), piece.slice(mask))
    assert torch.equal(part.mask(), mask)
    assert torch.equal(part.indices(), mask.view(-1).nonzero().squeeze(1))
    assert part.num_trained == int(mask.sum())
    assert torch.equal(unit.spread(chosen, shape), mask)
    records, streams = write_parts({"w": part})
    assert torch.equal(read_parts(json.loads(json.dumps(records)), streams, None)["w"].mask(), mask)
    runs = part.runs()
    assert torch.equal(runs.gather(values), values.view(-1)[part.indices()])
    written = values.clone()
    runs.scatter_(written, torch.zeros(len(runs)))
    assert torch.equal(written, values.masked_fill(mask, 0))


def test_units_along_axes_with_others_between() -> None:
    shape = (2, 3, 2, 4)
    for axes in ((0, 2), (1, 3), (0, 3), (0, 1, 3), (2, 3), (0, 2, 3)):
        unit = Granularity("row", axes)
        part = Part(shape, torch.tensor([0, 2, 3]), unit)
        mask = torch.isin(naive_units("row", shape, axes, (1, 1)), torch.tensor([0, 2, 3]))
        values = torch.rand(shape)
        assert torch.equal(part.mask(), mask) and torch.equal(part.runs().gather(values), values[mask])


def test_empty_parameters_have_nothing_to_train() -> None:
    for kind in KINDS:
        for shape in ((0,), (5, 0), (0, 5)):
            part = Part.none(shape)
            assert part.num_trained == 0 and part.mask().shape == shape
            child = select_child({"e": torch.zeros(shape), "w": torch.rand(4, 4)}, 0.5, granularity=kind)
            assert child.parts["e"].num_trained == 0
            assert TaskFree(0.5, granularity=kind).mask("e", shape, 0).shape == shape


def test_task_free_is_hashable() -> None:
    assert len({TaskFree(0.3), TaskFree(0.3), TaskFree(0.4)}) == 2


def test_scalar_parameters_are_one_unit() -> None:
    for kind in KINDS:
        assert Part((), torch.tensor([0]), Granularity(kind)).is_whole


@pytest.mark.parametrize("make", ["scores", "random", "masks"])
def test_save_and_load(tmp_path, make: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 3))
    if make == "random":
        child = random_child(model, 0.1, seed=4, granularity="row", always=("1.*",))
    else:
        child = select_child({n: p.abs() for n, p in model.named_parameters()}, 0.3, always="1.bias")
        if make == "masks":
            child = Child.from_masks({name: child.mask(name) for name in child.parts})
    path = tmp_path / "folder" / "child.safetensors"
    child.save(path)
    loaded = Child.load(path)
    assert loaded.fingerprint() == child.fingerprint()
    assert all(torch.equal(loaded.mask(name), child.mask(name)) for name in child.parts)
    assert (loaded.always, loaded.recipe, loaded.density) == (child.always, child.recipe, child.density)


def test_random_child_file_holds_a_seed(tmp_path) -> None:
    model = torch.nn.Linear(1000, 300)
    random_child(model, 0.5).save(tmp_path / "seed")
    select_child({n: p.abs() for n, p in model.named_parameters()}, 0.5).save(tmp_path / "indices")
    assert (tmp_path / "seed").stat().st_size < 1500 < 30_000 < (tmp_path / "indices").stat().st_size


def test_damaged_files(tmp_path) -> None:
    path = tmp_path / "child.safetensors"
    child = select_child({"w": torch.rand(100)}, 0.3)
    child.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(CorruptFileError):
        Child.load(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 255]))
    with pytest.raises(CorruptFileError):
        Child.load(path)
    path.write_bytes(b"not a file of ours")
    with pytest.raises(CorruptFileError):
        Child.load(path)


def test_overlap() -> None:
    scores = {"a": torch.arange(10.0), "b": torch.arange(10.0) + 100}
    top, bottom = select_child(scores, 0.5), select_child(scores, 0.5, lowest=True)
    assert top.overlap(top) == 1.0
    assert top.overlap(bottom) == 0.0
    assert top.overlap(select_child(scores, 0.25)) == 1.0
    big = {"a": torch.empty(40_000)}
    model = torch.nn.ParameterDict(big)
    drawn = random_child(model, 0.3, seed=0).overlap(random_child(model, 0.3, seed=1))
    assert abs(drawn - 0.3) < 0.03
    with pytest.raises(ParameterError, match="different parameters"):
        top.overlap(select_child({"a": torch.arange(10.0)}, 0.5))


def test_masks_of_unknown_names() -> None:
    child = select_child({"encoder.weight": torch.rand(3)}, 1.0, always=("head.*",))
    with pytest.raises(ParameterError, match=r"Did you mean 'encoder.weight'"):
        child.mask("encoder.weigth")
    with pytest.raises(ParameterError, match="always trained whole"):
        child.mask("head.weight")


def test_config_reports_every_fault_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ChildConfig(variant="f", density=30, granularity="rows", estimator="batch")  # type: ignore[arg-type]
    message = str(caught.value)
    for part in (
        "variant",
        "density must be in (0, 1], got 30. Pass a share: density=0.3.",
        "'row'",
        "estimator",
    ):
        assert part in message
    assert "\n" not in message


def test_official_preset_takes_no_ablation() -> None:
    with pytest.raises(ConfigError, match="preset='official' sets lowest itself, got True"):
        ChildConfig(preset="official", lowest=True)


def test_config_round_trip() -> None:
    config = ChildConfig(density=0.1, eligible=("encoder.*",), always="head.*", granularity="row")  # type: ignore[arg-type]
    assert ChildConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="Did you mean 'density'"):
        ChildConfig.from_dict({"densty": 0.1})


@pytest.mark.parametrize("density", [0, 1.5, 30, float("nan"), float("inf"), -0.1, "0.3", True, None])
def test_densities_outside_the_range(density) -> None:
    for call in (
        lambda: select_child({"w": torch.rand(3)}, density),
        lambda: TaskFree(density),
        lambda: ChildConfig(density=density),
    ):
        with pytest.raises(ConfigError, match=r"density must be .*\(0, 1\], got .*density="):
            call()


def test_task_free_masks_name_their_step_and_rows() -> None:
    free = TaskFree(0.5, seed=3)
    assert torch.equal(free.mask("w", (6, 7), 4), free.mask("w", (6, 7), 4))
    assert not torch.equal(free.mask("w", (6, 7), 4), free.mask("w", (6, 7), 5))
    rows = TaskFree(0.5, granularity="row").mask("w", (200, 3), 0)
    assert bool((rows.any(1) == rows.all(1)).all()) and 60 < int(rows.all(1).sum()) < 140
    assert TaskFree(**free.to_dict()) == free


def test_config_checks_types_and_reports_all_faults_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ChildConfig(
            mass="much",  # type: ignore[arg-type]
            lowest="no",  # type: ignore[arg-type]
            fisher_examples=2.5,  # type: ignore[arg-type]
            eligible=[1, "encoder.*"],  # type: ignore[arg-type]
            rescale=1,  # type: ignore[arg-type]
            seed="0",  # type: ignore[arg-type]
            granularity=["row"],  # type: ignore[arg-type]
        )
    for word in (
        "mass must",
        "lowest must",
        "fisher_examples",
        "eligible must",
        "rescale",
        "seed",
        "granularity",
    ):
        assert word in str(caught.value)
    with pytest.raises(ConfigError, match="fisher_examples must be a whole number from 1 up, got True"):
        ChildConfig(fisher_examples=True)
    with pytest.raises(ConfigError, match="seed must be a whole number, got True"):
        TaskFree(0.5, seed=True)


@pytest.mark.parametrize("granularity", ["element", "row", "block"])
def test_random_units_are_uniform_whatever_their_size(granularity: str) -> None:
    model = torch.nn.ModuleDict({"wide": torch.nn.Linear(1024, 1000), "narrow": torch.nn.Linear(16, 1000)})
    child = random_child(model, 0.1, seed=1, granularity=granularity)
    for part in child.parts.values():
        units = part.granularity.num_units(part.shape)
        share = (units if part.units is None else len(part.units)) / units
        assert abs(share - 0.1) < 5 * (0.1 * 0.9 / units) ** 0.5 + 0.02


def test_names_do_not_depend_on_what_else_is_trained() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)

    net = Net()
    assert list(named(net)) == ["module.weight", "module.bias", "head.weight", "head.bias"]
    del net.head
    assert list(named(net)) == ["module.weight", "module.bias"]
    assert list(named(torch.nn.DataParallel(net))) == list(named(net))
