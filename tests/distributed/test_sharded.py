"""A model sharded by FSDP2 trains, is scored, selected, saved and resumed as in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.ranks import WORLD, on_ranks
from torch import Tensor, nn
from torch.distributed import barrier

import childtuning as ct
import childtuning.child
from childtuning.child.pieces import local_of
from childtuning.distributed import load, save
from childtuning.errors import BaseMismatchError, ConfigError, CorruptFileError, DataError, ParameterError

STEPS = 6


class Net(nn.Module):
    """Uneven on two ranks: 7 tokens, 5 features out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x).mean(1))


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def data(number: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(7, (4, 3), generator=generator), torch.randint(5, (4,), generator=generator))
        for _ in range(number)
    ]


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def sharded(model: Net) -> Net:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def child_of(kind: str) -> ct.Child | ct.TaskFree:
    variant, granularity = kind.split()
    if variant == "F":
        return ct.TaskFree(0.4, seed=3, granularity=granularity, always=("head.*",))
    if granularity == "first":  # all rows that rank 0 holds of one matrix, and none of the others
        return ct.Child(
            {"blocks.0.0.weight": ct.child.Part((9, 6), torch.arange(5), ct.child.Granularity("row"))}
        )
    generator = torch.Generator().manual_seed(5)
    scores = {name: torch.rand(p.shape, generator=generator) for name, p in net().named_parameters()}
    return ct.select_child(
        scores,
        0.3,
        granularity=ct.child.Granularity("block", block_shape=(4, 2))
        if granularity == "block"
        else granularity,
        always=("head.*",),
        row_axes=ct.unit_axes(net(), granularity),
    )


def optimizer(net_: Net, kind: str, inner=torch.optim.AdamW, **options) -> ct.ChildOptimizer:
    return ct.ChildOptimizer(
        net_.named_parameters(), child_of(kind), inner, lr=1e-2, weight_decay=0.01, **options
    )


def train(model: nn.Module, opt: ct.ChildOptimizer, batches, share=slice(None)) -> None:
    for ids, labels in batches:
        losses(model, (ids[share], labels[share])).mean().backward()
        opt.clip_grad_norm_(0.5)
        opt.step()
        opt.zero_grad()


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for n, p in model.named_parameters()
    }


def alone(kind: str, dtype: torch.dtype = torch.float64, inner=torch.optim.AdamW) -> dict[str, Tensor]:
    model = net(dtype)
    train(model, optimizer(model, kind, inner), data(STEPS))
    return whole(model)


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance)


def reshard_(model: Net) -> Net:
    model.reshard()  # type: ignore[operator]
    return model


KINDS = [
    "D element",
    "D row",
    "D column",
    "D block",
    "D parameter",
    "F element",
    "F row",
    "F column",
    "F block",
]


def _train(rank: int, folder: Path) -> None:
    mine = slice(rank, None, WORLD)
    for kind in KINDS:
        model = sharded(net())
        before = whole(model)
        train(model, optimizer(model, kind), data(STEPS), mine)
        after = whole(model)
        assert_close(after, alone(kind))
        child = child_of(kind)
        if isinstance(child, ct.Child):
            for name, part in child.resolve({n: p.shape for n, p in before.items()}).items():
                assert torch.equal(after[name][~part.mask()], before[name][~part.mask()]), (kind, name)
    for kind in ("D element", "D row", "F element", "F row"):  # the kernels are for float32
        model = sharded(net(torch.float32))
        train(model, optimizer(model, kind), data(STEPS), mine)
        assert_close(whole(model), alone(kind, torch.float32), 2e-5)
    model = sharded(net())
    with torch.no_grad():
        model(data(1)[0][0])  # leaves the root's parameters gathered
    with pytest.raises(ParameterError, match=r"call reshard\(\)"):
        optimizer(model, "D row")
    train(model, optimizer(reshard_(model), "D row", torch.optim.RMSprop), data(STEPS), mine)
    assert_close(whole(model), alone("D row", inner=torch.optim.RMSprop))


def _layers(rank: int, folder: Path) -> None:
    mine = slice(rank, None, WORLD)
    for kind in ("D row", "D column", "D block", "D element", "D first"):
        for make in (sharded, lambda model: model):
            model = make(net())
            opt = optimizer(model, kind, model=model)
            assert bool(opt.structured) == (kind != "D element"), (kind, make, opt.structured)
            train(model, opt, data(STEPS), mine)
            assert_close(whole(model), alone(kind))
            opt.remove()
    model = net()
    opt = optimizer(model, "D element", release_gradients=True)
    train(model, opt, data(STEPS), mine)
    assert_close(whole(model), alone("D element"))
    with pytest.raises(ParameterError, match="Leave the model unwrapped"):
        train(nn.parallel.DistributedDataParallel(model), opt, data(STEPS), mine)


class Twice(nn.Module):
    """A weight that its layer uses, and another call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(4, 4, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.line(x), self.line.weight)


def _norms(rank: int, folder: Path) -> None:
    """Looking at the norm between backward passes changes nothing, for shards as for replicas."""
    from torch.distributed.fsdp import fully_shard

    children = {
        "rows": ct.Child(
            {"line.weight": ct.child.Part((4, 4), torch.tensor([0, 2]), ct.child.Granularity("row"))}
        ),
        "whole": ct.Child({"line.weight": ct.child.Part((4, 4))}),
    }
    for child in children.values():
        found = []
        for shards in (False, True):
            for looks in (False, True):
                model = Twice()
                if shards:
                    fully_shard(model)
                opt = ct.ChildOptimizer(model.named_parameters(), child, torch.optim.SGD, lr=0.1, model=model)
                for factor in (1.0, 2.0):
                    (model(torch.full((1, 4), factor + rank, dtype=torch.float64)).square().sum()).backward()
                    if looks:
                        opt.clip_grad_norm_(float("inf"))
                found.append(float(opt.clip_grad_norm_(float("inf"))))
                opt.step()
                found.append(float(whole(model)["line.weight"].sum()))
        assert found[:2] * 4 == pytest.approx(found, rel=1e-12)


def _score(rank: int, folder: Path) -> None:
    for number in (5, 1):
        wanted = ct.fisher_information(net(), data(number), losses)
        model = sharded(net())
        for _ in range(2):
            found = ct.fisher_information(model, data(number), losses)
            full = {name: score.full_tensor() for name, score in found.items()}  # type: ignore[attr-defined]
            assert_close(full, wanted, 1e-12)
            assert found.num_examples == wanted.num_examples
            assert all(hasattr(p, "placements") for p in model.parameters())
            with torch.no_grad():
                model(data(1)[0][0])
        train(model, optimizer(reshard_(model), "D row"), data(STEPS), slice(rank, None, WORLD))
        assert_close(whole(model), alone("D row"))
        wrapped = nn.parallel.DistributedDataParallel(net())
        assert_close(ct.fisher_information(wrapped, data(number), losses), wanted, 1e-12)
    for estimator, labels in (("per-batch", "data"),):
        wanted = ct.fisher_information(net(), data(5), losses, estimator=estimator, labels=labels)
        found = ct.fisher_information(sharded(net()), data(5), losses, estimator=estimator, labels=labels)
        assert_close({n: s.full_tensor() for n, s in found.items()}, wanted, 1e-12)  # type: ignore[attr-defined]
    low = ct.fisher_information(sharded(net(torch.float32)), data(5), losses, scores_dtype=torch.bfloat16)
    assert all(local_of(score).dtype == torch.bfloat16 for score in low.values())
    with pytest.raises(ConfigError, match="several share this pass"):
        ct.fisher_information(sharded(net()), data(2), losses, stop_fn=lambda sums, done: True)

    def bad(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return losses(model, batch) * (float("nan") if rank else 1.0)

    with pytest.raises(DataError, match="the loss is nan"):
        ct.fisher_information(sharded(net()), data(2), bad)

    class LocalError(Exception):
        """One that does not travel."""

    def worse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        raise LocalError("mine") if rank else RuntimeError("another")

    with pytest.raises((LocalError, RuntimeError), match="mine|another"):
        ct.fisher_information(sharded(net()), data(2), worse)


def _delta(rank: int, folder: Path) -> None:
    for kind in ("D element", "D column", "F element"):
        child = child_of(kind)
        model, one = sharded(net()), net()
        start = whole(one)
        train(model, optimizer(model, kind), data(2), slice(rank, None, WORLD))
        end = whole(model)
        one.load_state_dict(end)
        found, wanted = ct.Delta.capture(model, child), ct.Delta.capture(one, child)
        assert found.hashes == wanted.hashes and found.parts.keys() == wanted.parts.keys()
        assert all(torch.equal(found.values[name], value) for name, value in wanted.values.items())
        base = sharded(net())
        displaced = found.apply_(base)
        assert all(torch.equal(value, end[name]) for name, value in whole(base).items())
        displaced.apply_(base)
        assert all(torch.equal(value, start[name]) for name, value in whole(base).items())
        with pytest.raises(BaseMismatchError) if kind[0] == "D" else nullcontext():
            found.apply_(sharded(Net().double()))


def _select(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    generator = torch.Generator().manual_seed(7)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        scores = {  # many ties, both zeros, negative ones
            name: (torch.randn(p.shape, generator=generator) * 4).round().to(dtype)
            for name, p in net().named_parameters()
        }
        laid = {n: distribute_tensor(s, mesh, [Shard(0)]) for n, s in scores.items()}
        for granularity in ("element", "row", "column", "block", "parameter"):
            for scope in ("global", "parameter")[: 2 - (granularity == "parameter")]:
                for lowest in (False, True):
                    how = {
                        "granularity": granularity,
                        "scope": scope,
                        "lowest": lowest,
                        "always": ("head.*",),
                    }
                    wanted = ct.select_child(scores, 0.3, **how)
                    assert ct.select_child(laid, 0.3, **how).fingerprint() == wanted.fingerprint(), how
    scores["norm.weight"] = torch.full((6,), float("nan"), dtype=torch.bfloat16)
    laid["norm.weight"] = distribute_tensor(scores["norm.weight"], mesh, [Shard(0)])
    for granularity in ("element", "row"):
        with pytest.raises(ParameterError, match="'norm.weight' hold NaN"):
            ct.select_child(laid, 0.3, granularity=granularity)
    assert ct.random_child(sharded(net()), 0.2).fingerprint() == ct.random_child(net(), 0.2).fingerprint()


def _save(rank: int, folder: Path) -> None:
    mine = slice(rank, None, WORLD)
    for kind in ("D element", "D row", "F row", "D column"):
        for dtype in (torch.float64, torch.bfloat16):
            model = sharded(net(dtype))
            opt = optimizer(model, kind)
            train(model, opt, data(STEPS)[:3], mine)
            save(folder / f"{kind} {dtype}", model, opt)
            again = sharded(net(dtype))
            resumed = optimizer(again, kind)
            load(folder / f"{kind} {dtype}", again, resumed)
            train(again, resumed, data(STEPS)[3:], mine)
            train(model, opt, data(STEPS)[3:], mine)
            for name, value in whole(model).items():
                assert torch.equal(whole(again)[name], value), (kind, dtype, name)
            end = whole(model)
            if rank == 0:
                save_file(end, folder / f"{kind} {dtype}.safetensors")


def _from_one(rank: int, folder: Path) -> None:
    """Go on in pieces from the state of a whole model."""
    mine = slice(rank, None, WORLD)
    for kind in ("D element", "D row", "D column", "D block", "D first", "F row", "F element"):
        for dtype in (torch.float64, torch.bfloat16):
            model, start = net(dtype), net(dtype)
            opt = optimizer(model, kind)
            train(model, opt, data(STEPS)[:3])
            start.load_state_dict(model.state_dict())
            pieces = sharded(start)
            resumed = optimizer(pieces, kind)
            resumed.load_state_dict(opt.state_dict())
            sizes = [
                sum(fields["exp_avg"].numel() for fields in one.state_dict()["state"].values())
                for one in (resumed, opt)
            ]
            assert sizes[0] < sizes[1] or (kind == "D first" and rank == 0), (kind, dtype, sizes)
            if dtype == torch.float64:
                train(model, opt, data(STEPS)[3:])
                train(pieces, resumed, data(STEPS)[3:], mine)
                assert_close(whole(pieces), whole(model))
            else:  # before rounding makes them differ: masters of more precision came along
                masters, ours = opt.state_dict()["masters"], resumed.state_dict()["masters"]
                assert masters and set(ours) <= set(masters)
                for name, master in ours.items():
                    assert set(master.flatten().tolist()) <= set(masters[name].flatten().tolist()), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "work",
    [_train, _layers, _norms, _score, _delta, _select, _from_one],
    ids=lambda work: work.__name__.strip("_"),
)
def test_two_ranks_do_as_one(work, tmp_path: Path) -> None:
    on_ranks(work, tmp_path)


@pytest.mark.slow
def test_a_checkpoint_of_two_goes_on_at_two_bitwise_and_at_one(tmp_path: Path) -> None:
    on_ranks(_save, tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files if path.parent != tmp_path} == {".safetensors", ".json"}
    for kind in ("D element", "D row", "F row", "D column"):
        folder = tmp_path / f"{kind} {torch.float64}"
        model = net()
        opt = optimizer(model, kind)
        load(folder, model, opt)
        train(model, opt, data(STEPS)[3:])
        assert_close(whole(model), load_file(f"{folder}.safetensors"))
    other = optimizer(model, "D block")
    with pytest.raises(ParameterError, match="another child"):
        load(folder, model, other)
    (folder / "checkpoint.json").unlink()
    with pytest.raises(CorruptFileError, match="no whole checkpoint"):
        load(folder, model, opt)


def _save_early(rank: int, folder: Path) -> None:
    """Before the first step, in bf16, with a child that one rank holds; twice, the second time cut short."""
    import childtuning.optim.checkpoint as module

    child = ct.Child({"norm.weight": ct.child.Part((6,), torch.tensor([5]))})
    model = sharded(net(torch.bfloat16))
    opt = ct.ChildOptimizer(model.named_parameters(), child)
    save(folder / "early", model, opt)
    start = whole(model)
    with torch.no_grad():
        for parameter in model.parameters():
            local_of(parameter).add_(1.0)
    opt.accept_weights()
    write = module.write_atomically

    def full(path: Path, write_fn) -> None:
        if path.suffix == ".json":
            raise OSError("no space left")
        write(path, write_fn)

    module.write_atomically = full
    with pytest.raises((OSError, RuntimeError), match="no space left"):
        save(folder / "early", model, opt)
    module.write_atomically = write
    load(folder / "early", model, opt)
    for name, value in whole(model).items():
        assert torch.equal(value, start[name]), name
    other = sharded(net())
    others = ct.ChildOptimizer(other.named_parameters(), child)
    with pytest.raises(ParameterError, match=r"torch.float64 .* in the checkpoint"):
        load(folder / "early", other, others)
    file = folder / "early" / json.loads((folder / "early" / "checkpoint.json").read_text())["files"][1]
    barrier()
    if rank:
        file.write_bytes(file.read_bytes()[:100])
    barrier()
    with pytest.raises(CorruptFileError, match="cannot be read"):  # on both
        load(folder / "early", model, opt)


@pytest.mark.slow
def test_a_save_that_is_cut_short_leaves_the_one_before(tmp_path: Path) -> None:
    on_ranks(_save_early, tmp_path)


def test_damaged_indices_are_told(tmp_path: Path) -> None:
    model = net(torch.float32)
    opt = optimizer(model, "D element")
    train(model, opt, data(2))
    save(tmp_path, model, opt)
    index = json.loads((tmp_path / "checkpoint.json").read_text())
    child, pieces = index["optimizer"]["child"], index["pieces"]
    damaged = [
        {"version": "x"},
        {"pieces": []},
        {"pieces": {**pieces, "state/zzz/exp_avg": [3]}},
        {"pieces": {key: [*counts, 1] for key, counts in pieces.items()}},
        {"pieces": {key: [10**12] for key in pieces}},
        {"files": ["../../elsewhere.safetensors"]},
        {"optimizer": {"child": child}},
        {"optimizer": {"child": {}, "param_groups": []}},
        {"weights": None},
    ]
    start = whole(model)
    for change in damaged:
        (tmp_path / "checkpoint.json").write_text(json.dumps(index | change))
        with pytest.raises((CorruptFileError, ParameterError)):
            load(tmp_path, model, opt)
        assert all(torch.equal(value, start[name]) for name, value in whole(model).items()), change
    (tmp_path / "checkpoint.json").write_text("[]")
    with pytest.raises(CorruptFileError):
        load(tmp_path, model, opt)


def test_a_changed_file_is_told(tmp_path: Path) -> None:
    model = net(torch.float32)
    opt = optimizer(model, "D element")
    train(model, opt, data(2))
    save(tmp_path, model, opt)
    (file,) = tmp_path.glob("step-*.safetensors")
    whole_file = file.read_bytes()
    for place in (-1, len(whole_file) // 2):
        changed = bytearray(whole_file)
        changed[place] ^= 64
        file.write_bytes(changed)
        with pytest.raises(CorruptFileError, match="cannot be read"):
            load(tmp_path, model, opt)
    file.write_bytes(whole_file)
    load(tmp_path, model, opt)


def test_one_process_saves_and_resumes_bitwise(tmp_path: Path) -> None:
    ends = []
    for stop in (False, True):
        model = net(torch.float32)
        opt = optimizer(model, "D element")
        train(model, opt, data(STEPS)[:3])
        if stop:
            save(tmp_path, model, opt)
            model = net(torch.float32)
            opt = optimizer(model, "D element")
            load(tmp_path, model, opt)
        train(model, opt, data(STEPS)[3:])
        ends.append(whole(model))
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value)


ACCEPT = Path(os.environ.get("CHILDTUNING_CASES", Path(__file__).parents[3] / "shared" / "cases"))
ACCEPT = ACCEPT / "scale" / "accept.py"


@pytest.mark.nightly
@pytest.mark.skipif(not ACCEPT.is_file(), reason="no acceptance program: set CHILDTUNING_CASES to its folder")
@pytest.mark.parametrize("what", ["refuse", "train", "fisher", "select", "resume"])
def test_the_acceptance_program_passes(what: str) -> None:
    ran = subprocess.run(
        [sys.executable, ACCEPT.name, what],
        cwd=ACCEPT.parent,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ran.returncode == 0 and "PASS" in ran.stdout, ran.stdout + ran.stderr[-2000:]
