"""The compiled CPU kernels against numpy, torch and float64."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.fast.adamw_twin import (
    STEPS,
    assert_same,
    assert_stepped,
    assert_updated,
    child_members,
    child_of,
    columns_of,
    copied,
    draws,
    table_of,
    twin,
)
from torch import Tensor

from childtuning.child.task_free import keep_mask, mask_draw
from childtuning.fast import adamw, library
from childtuning.fast.library import AdamWStep, Member
from childtuning.fast.runs import Runs

pytestmark = pytest.mark.skipif(
    library.LIBRARY is None, reason="the CPU kernels are not compiled: python hatch_build.py"
)

DENSITIES = [1e-12, 1 / 256, 0.3, 0.5, 0.7331, 0.999, 1 - 1e-9]


class TestMasks:
    @pytest.mark.parametrize("density", DENSITIES)
    @pytest.mark.parametrize(
        ("start", "numel"), [(0, 0), (0, 1), (0, 4096), (31, 2), (77, 1000), (2**40 + 5, 999)]
    )
    def test_bits_are_numpys(
        self, density: float, start: int, numel: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        native = keep_mask(density, "seed", 7, numel=numel, start=start)
        monkeypatch.setenv("CHILDTUNING_FAST", "0")
        assert torch.equal(native, keep_mask(density, "seed", 7, numel=numel, start=start))

    def test_several_tasks_and_threads_draw_one_stream(
        self, monkeypatch: pytest.MonkeyPatch, threads: None
    ) -> None:
        numel = 2 * library._ENTRIES_A_TASK + 321
        torch.set_num_threads(3)
        native = keep_mask(0.37, "many", numel=numel, start=9)
        monkeypatch.setenv("CHILDTUNING_FAST", "0")
        assert torch.equal(native, keep_mask(0.37, "many", numel=numel, start=9))

    def test_the_native_path_is_the_one_in_use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The cases above are no comparison of numpy with itself."""
        draw = mask_draw(0.3, "seed")
        assert draw is not None
        drawn = library.keep_mask(draw, 100, 3)
        assert drawn is not None and torch.equal(drawn, keep_mask(0.3, "seed", numel=100, start=3))
        monkeypatch.setenv("CHILDTUNING_FAST", "0")
        assert library.keep_mask(draw, 100, 3) is None


class TestWhatIsServed:
    def test_tensors(self) -> None:
        tensor = draws(6, 4)
        assert adamw.fits(tensor, tensor[1:])
        for other in (tensor.double(), tensor.bfloat16(), tensor.t(), tensor.to_sparse()):
            assert not adamw.fits(tensor, other)

    def test_optimizers(self) -> None:
        class Own(torch.optim.AdamW):
            pass

        assert adamw.supports(torch.optim.Adam, {"maximize": True})
        assert adamw.supports(torch.optim.AdamW, {"amsgrad": False, "fused": True})
        assert not adamw.supports(torch.optim.SGD, {})
        assert not adamw.supports(Own, {})
        for option in ("amsgrad", "capturable", "differentiable"):
            assert not adamw.supports(torch.optim.AdamW, {option: True})


KEPT = [child_of(1000, 1, 0), child_of(990, 33, 1), columns_of((9, 7, 2)), child_of(70_000 * 3, 1, 3)]
SHAPES = [(1000,), (30, 33), (9, 7, 2), (70_000, 3)]


class TestFixedChild:
    @pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
    @pytest.mark.parametrize("compact", [(), (0, 1, 2, 3), (1, 3)], ids=["dense", "compact", "some of each"])
    def test_step_is_the_twins(self, step: AdamWStep, compact: tuple[int, ...]) -> None:
        before = child_members(KEPT, SHAPES, [step] * 4, compact=compact)
        after = [copied(member) for member in before]
        table_of(KEPT).step_(after)
        for old, new, runs in zip(before, after, KEPT, strict=True):
            assert_stepped(old, new, runs)

    def test_steps_may_differ_by_parameter(self) -> None:
        steps = [*STEPS.values(), STEPS["adamw"]._replace(step=9, lr=0.3), STEPS["adamw"]]
        before = child_members(KEPT, SHAPES, steps)
        after = [copied(member) for member in before]
        table_of(KEPT).step_(after)
        for old, new, runs in zip(before, after, KEPT, strict=True):
            assert_stepped(old, new, runs)

    def test_parameters_without_a_gradient_stay(self) -> None:
        before = child_members(KEPT, SHAPES, [STEPS["adamw"]] * 4)
        after = [copied(member) for member in before]
        table = table_of(KEPT)
        table.step_([None, after[1], None, after[3]])
        for i in (1, 3):
            assert_stepped(before[i], after[i], KEPT[i])
        for i in (0, 2):
            assert_same(before[i], after[i])
        table.step_([None] * 4)
        for i in (1, 3):
            assert_stepped(before[i], after[i], KEPT[i])

    def test_a_parameter_without_entries(self) -> None:
        kept = [Runs(torch.zeros(0, dtype=torch.int32), 1), child_of(100, 1, 0)]
        for compact in ((), (0,)):
            before = child_members(kept, [(4,), (100,)], [STEPS["adamw"]] * 2, compact=compact)
            after = [copied(member) for member in before]
            table_of(kept).step_(after)
            assert_same(before[0], after[0])
            assert_stepped(before[1], after[1], kept[1])

    def test_a_table_without_entries(self) -> None:
        none = Runs(torch.zeros(0, dtype=torch.int32), 1)
        (member,) = child_members([none], [(4,)], [STEPS["adamw"]])
        after = copied(member)
        table_of([none]).step_([after])
        assert_same(member, after)
        table_of([]).step_([])

    def test_a_copied_table_stands_alone(self) -> None:
        """Its tasks hold addresses, so that it needs its own starts."""
        before = child_members(KEPT, SHAPES, [STEPS["adamw"]] * 4)
        after = [copied(member) for member in before]
        owned = [replace(runs, starts=runs.starts.clone()) for runs in KEPT]
        table = table_of(owned)
        other = copy.deepcopy(table)
        del table
        for runs in owned:
            runs.starts.zero_()
        other.step_(after)
        for old, new, runs in zip(before, after, KEPT, strict=True):
            assert_stepped(old, new, runs)

    def test_ten_steps_are_torchs(self) -> None:
        runs, weight = child_of(600, 1, 0), draws(20, 30)
        flat = torch.nn.Parameter(runs.gather(weight))
        inner = torch.optim.AdamW([flat], lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
        table, first, second = table_of([runs]), torch.zeros(len(runs)), torch.zeros(len(runs))
        for step in range(1, 11):
            gradient = draws(20, 30, seed=step)
            flat.grad = runs.gather(gradient)
            inner.step()
            numbers = AdamWStep(0.01, 0.9, 0.99, 1e-8, 0.1, step)
            table.step_([Member(weight, gradient, first, second, numbers)])
        torch.testing.assert_close(runs.gather(weight), flat.detach(), rtol=1e-5, atol=1e-6)


def whole(*shape: int, step: AdamWStep, seed: int, gradient: Tensor | None = None) -> Member:
    return Member(
        draws(*shape, seed=seed),
        draws(*shape, seed=seed + 1) if gradient is None else gradient,
        draws(*shape, seed=seed + 2),
        draws(*shape, seed=seed + 3) ** 2,
        step,
    )


class TestTaskFree:
    @pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
    @pytest.mark.parametrize("density", [1e-12, 0.3, 0.5, 0.999])
    def test_entries_are_the_twins(self, density: float, step: AdamWStep) -> None:
        """What is dropped counts as 0, whatever it is."""
        shapes = [(1,), (255,), (7, 77), (70_000,)]
        before = [whole(*shape, step=step, seed=10 * i) for i, shape in enumerate(shapes)]
        named, kept = [], []
        for i, member in enumerate(before):
            keep = keep_mask(density, "mask", i, numel=member.weight.numel()).view(member.weight.shape)
            member.gradient[~keep] = torch.inf
            kept.append(keep)
            named.append(mask_draw(density, "mask", i))
        after = [copied(member) for member in before]
        adamw.masked_([(t, draw) for t, draw in zip(after, named, strict=True) if draw is not None])
        for old, new, keep in zip(before, after, kept, strict=True):
            assert_updated(new, twin(old.weight, old.gradient, old.first, old.second, step, keep))
            assert torch.equal(old.gradient, new.gradient)

    @pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
    @pytest.mark.parametrize("shape", [(9,), (5, 1), (40, 33), (6, 3, 500)])
    @pytest.mark.parametrize("compact", [False, True])
    def test_rows_are_the_twins(self, shape: tuple[int, ...], step: AdamWStep, compact: bool) -> None:
        keep = torch.arange(shape[0]) % 3 == 1
        dense = draws(*shape, seed=3)
        dense[~keep] = torch.inf
        place = torch.where(keep, torch.arange(shape[0]), -1)
        if compact:
            place = torch.where(keep, keep.cumsum(0) - 1, -1)
        before = whole(*shape, step=step, seed=20, gradient=dense[keep] if compact else dense)
        after = copied(before)
        adamw.rows_([(after, place.to(torch.int32))])
        spread = keep.view(-1, *[1] * (len(shape) - 1)).expand(shape)
        assert_updated(after, twin(before.weight, dense, before.first, before.second, step, spread))

    def test_steps_may_differ_by_parameter(self) -> None:
        draw, all_rows = mask_draw(0.5, "mask"), torch.arange(30, dtype=torch.int32)
        assert draw is not None
        before = [whole(30, 20, step=step, seed=10 * i) for i, step in enumerate(STEPS.values())]
        keep = keep_mask(0.5, "mask", numel=600).view(30, 20)
        masked, rows = [copied(t) for t in before], [copied(t) for t in before]
        adamw.masked_([(t, draw) for t in masked])
        adamw.rows_([(t, all_rows) for t in rows])
        for old, by_entry, by_row in zip(before, masked, rows, strict=True):
            tensors = old.weight, old.gradient, old.first, old.second
            assert_updated(by_entry, twin(*tensors, old.step, keep))
            assert_updated(by_row, twin(*tensors, old.step))

    def test_nothing_to_do(self) -> None:
        adamw.masked_([])
        adamw.rows_([])


def test_autograd_is_told_which_weights_were_written() -> None:
    step, draw, runs = STEPS["adamw"], mask_draw(0.5, "mask"), child_of(60, 1, 0)
    assert draw is not None
    members = child_members([runs, runs], [(60,), (60,)], [step] * 2)
    entries, rows = whole(20, 3, step=step, seed=1), whole(20, 3, step=step, seed=2)
    written = [members[0].weight, entries.weight, rows.weight]
    before = [weight._version for weight in written]
    table_of([runs, runs]).step_([members[0], None])
    adamw.masked_([(entries, draw)])
    adamw.rows_([(rows, torch.arange(20, dtype=torch.int32))])
    assert all(weight._version > version for weight, version in zip(written, before, strict=True))
    assert members[1].weight._version == 0


def test_threads_do_not_show_in_the_bits(threads: None) -> None:
    step, draw, results = STEPS["adamw"], mask_draw(0.3, "threads"), []
    assert draw is not None
    shapes = [(400_000,), (4000, 50), (9000, 31)]  # each is cut into several tasks
    kept = [child_of(400_000, 1, 0), child_of(200_000, 50, 1), columns_of(shapes[2])]
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        masked, rows = whole(300_001, step=step, seed=1), whole(3000, 70, step=step, seed=2)
        adamw.masked_([(masked, draw), (whole(100, step=step, seed=9), draw)])
        adamw.rows_([(rows, torch.arange(3000, dtype=torch.int32))])
        members = child_members(kept, shapes, [step] * 3)
        table_of(kept).step_(members)
        child = [tensor for m in members for tensor in (m.weight, m.first, m.second)]
        results.append([masked.weight, masked.second, rows.weight, rows.first, *child])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
