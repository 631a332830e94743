"""The GPU kernels against the CPU's, float64 and torch.

They run on a CUDA device where there is one, and on the CPU under Triton's interpreter: in a process of their own,
because Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

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
from childtuning.fast import adamw, gpu, library
from childtuning.fast.library import AdamWStep, Member

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: pip install triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Name the device: the CPU under the interpreter, CUDA without it."""
    if not HAS_TRITON:
        pytest.skip("Triton is not installed: pip install triton")
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("runs under Triton's interpreter, which another test starts")
    if request.param == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("needs a CUDA device")
    return request.param


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the process that the test starts")
def test_under_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu", __file__],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


CAPABILITIES = [80, 90]
KERNELS = {
    "keep_kernel": {},
    "masked_kernel": {"W": "float32", "G": "float32", "M": "float32", "ALIGNED": True, "SHARD": False},
    "masked_kernel, shard": {"W": "float32", "G": "float32", "M": "float32", "ALIGNED": True, "SHARD": True},
    "rows_kernel": {"W": "bfloat16", "G": "bfloat16", "M": "bfloat16", "ALIGNED": False},
    "child_kernel": {"W": "float16", "G": "float32", "MASTER": True},
    "child_kernel, bf16": {"W": "bfloat16", "G": "bfloat16", "MASTER": False},
}


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_for_a_gpu(
    kernel: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler is stricter than the interpreter, and needs no GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from childtuning.fast import triton_kernels

    function = getattr(triton_kernels, kernel.split(",")[0])
    constants = {
        key: getattr(tl, value) if isinstance(value, str) else value for key, value in KERNELS[kernel].items()
    }
    constants["ENTRIES"] = 1024
    signature = {"table": "*i64", "owners": "*i32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=gpu.COMPILED)
    ptx = compiled.asm["ptx"]
    assert ("ld.global.v4" in ptx) == (
        KERNELS[kernel].get("ALIGNED", False) and not KERNELS[kernel].get("SHARD")
    )
    assert ("cvt.rn.bf16" in ptx) == (KERNELS[kernel].get("W") == "bfloat16")  # to nearest
    assert compiled.asm["cubin"]


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 numbers; to bfloat16 the interpreter truncates, where compiled kernels round to nearest."""
    if INTERPRETED and dtype == torch.bfloat16:
        values = (values.view(torch.int32) & -0x10000).view(torch.float32)
    return values.to(dtype)


class TestMasks:
    @pytest.mark.parametrize("density", [1e-12, 1 / 256, 0.3, 0.5, 0.7331, 0.999])
    def test_bits_are_the_cpus(self, density: float, device: str) -> None:
        draw = mask_draw(density, "seed", 7)
        assert draw is not None
        for start, numel in [(0, 0), (0, 1), (0, 2048), (31, 2), (77, 1000), (1023, 1500), (2**40 + 5, 99)]:
            drawn = gpu.keep_mask(draw, numel, start, device)
            assert torch.equal(drawn.cpu(), keep_mask(density, "seed", 7, numel=numel, start=start))

    def test_ties_are_decided(self, device: str) -> None:
        """Many keys, and a threshold at which one entry in 256 needs the further bits."""
        for key in range(10):
            draw = mask_draw(0.4 / 256, key)
            assert draw is not None
            drawn = gpu.keep_mask(draw, 2000, 0, device)
            assert torch.equal(drawn.cpu(), keep_mask(0.4 / 256, key, numel=2000))


def whole(*shape: int, step: AdamWStep, seed: int, device: str, dtypes: tuple[torch.dtype, ...]) -> Member:
    weight, gradient, moments = dtypes
    return Member(
        draws(*shape, seed=seed, dtype=weight).to(device),
        draws(*shape, seed=seed + 1, dtype=gradient).to(device),
        draws(*shape, seed=seed + 2, dtype=moments).to(device),
        (draws(*shape, seed=seed + 3) ** 2).to(moments).to(device),
        step,
    )


def on_cpu(t: Member) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return t.weight.cpu().clone(), t.gradient.cpu().clone(), t.first.cpu().clone(), t.second.cpu().clone()


MIXED = [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float32, torch.float16),
]


class TestTaskFree:
    @pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
    @pytest.mark.parametrize("density", [1e-12, 0.3, 0.999])
    def test_entries_are_the_twins(self, density: float, step: AdamWStep, device: str) -> None:
        """Parameters of several sizes and dtypes in one call, one of them at an odd address.

        What is dropped counts as 0, whatever it is.
        """
        shapes = [(1,), (33, 31), (1024,), (2, 1025), (0, 4)]
        members = [
            whole(*shape, step=step, seed=10 * i, device=device, dtypes=MIXED[i % 3])
            for i, shape in enumerate(shapes)
        ]
        shifted = whole(1500, step=step, seed=70, device=device, dtypes=MIXED[0])
        odd = (shifted.weight[1:], shifted.gradient[1:], shifted.first[1:], shifted.second[1:])
        members.append(Member(*odd, step))
        kept = []
        for i, t in enumerate(members):
            kept.append(keep_mask(density, "mask", i, numel=t.weight.numel()).view(t.weight.shape))
            t.gradient[~kept[i].to(device)] = torch.inf
        before = [on_cpu(tensors) for tensors in members]
        named = [mask_draw(density, "mask", i) for i in range(len(members))]
        gpu.masked_([(t, draw) for t, draw in zip(members, named, strict=True) if draw is not None])
        for (w, g, m, v), after, keep in zip(before, members, kept, strict=True):
            assert_updated(after, twin(w, g, m, v, step, keep))
            assert torch.equal(after.gradient.cpu(), g)

    @pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
    @pytest.mark.parametrize("compact", [False, True])
    @pytest.mark.parametrize("travels", [False, True])
    def test_rows_are_the_twins(self, travels: bool, compact: bool, step: AdamWStep, device: str) -> None:
        shapes, members, expected = [(9,), (5, 1), (40, 33), (3, 2, 500), (2, 2048)], [], []
        for i, shape in enumerate(shapes):
            t = whole(*shape, step=step, seed=10 * i, device=device, dtypes=MIXED[i % 3])
            keep = torch.arange(shape[0]) % 3 == 1
            t.gradient[~keep.to(device)] = torch.inf
            place = torch.where(keep, keep.cumsum(0) - 1 if compact else torch.arange(shape[0]), -1)
            spread = keep.view(-1, *[1] * (len(shape) - 1)).expand(shape)
            w, g, m, v = on_cpu(t)
            expected.append(twin(w, g, m, v, step, spread))
            if compact:
                t = Member(t.weight, g[keep].to(device), t.first, t.second, step)
            members.append((t, place.to(torch.int32).to("cpu" if travels else device)))
        gpu.rows_(members)
        for (after, _), wanted in zip(members, expected, strict=True):
            assert_updated(after, wanted)

    @pytest.mark.parametrize("start", [0, 1, 31, 1024, 1500, 2**33 + 7])
    def test_the_masks_of_shards_start_within(self, start: int, device: str) -> None:
        step, draw = STEPS["adamw"], mask_draw(0.3, "shard")
        assert draw is not None
        members, expected = [], []
        for size in (1, 700, 2048, 3000):
            t = whole(size, step=step, seed=size, device=device, dtypes=MIXED[0])
            expected.append(twin(*on_cpu(t), step, keep_mask(0.3, "shard", numel=size, start=start)))
            members.append((t, draw._replace(start=start)))
        gpu.masked_(members)
        for (after, _), wanted in zip(members, expected, strict=True):
            assert_updated(after, wanted)

    def test_nothing_to_do(self, device: str) -> None:
        gpu.masked_([])
        gpu.rows_([])


KEPT = [
    child_of(1000, 1, 0),
    child_of(3960, 132, 1),
    columns_of((9, 7, 2)).once(),
    child_of(4000, 1, 3),
    child_of(2, 1, 0),
]
SHAPES = [(1000,), (30, 132), (9, 7, 2), (40, 100), (2,)]  # the last has no entry in the child


def members_of(dtype: torch.dtype, steps: Sequence[AdamWStep], compact: Sequence[int] = ()) -> list[Member]:
    return child_members(KEPT, SHAPES, steps, compact=compact, dtype=dtype)


def child_step_(members: Sequence[Member | None], device: str) -> None:
    gpu.child_([runs.to(torch.device(device)) for runs in KEPT], members)


class TestFixedChild:
    @pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("compact", [(), range(5), (0, 3)], ids=["dense", "compact", "some of each"])
    def test_step_is_the_twins(
        self, compact: Sequence[int], dtype: torch.dtype, step: AdamWStep, device: str
    ) -> None:
        before = members_of(dtype, [step] * 5, compact)
        after = [copied(member, device) for member in before]
        child_step_(after, device)
        for old, new, runs in zip(before, after, KEPT, strict=True):
            assert_stepped(old, new, runs, rounded)

    def test_dtypes_and_steps_may_differ_by_parameter(self, device: str) -> None:
        """Two of a dtype, which one launch updates, differ in their steps."""
        steps = [*STEPS.values(), STEPS["adamw"]._replace(step=9, lr=0.3), *reversed(STEPS.values())]
        by_dtype = [members_of(dtype, steps, (1, 2)) for dtype in DTYPES]
        before = [by_dtype[i % 3][i] for i in range(5)]
        after = [copied(member, device) for member in before]
        child_step_(after, device)
        for old, new, runs in zip(before, after, KEPT, strict=True):
            assert_stepped(old, new, runs, rounded)

    def test_parameters_without_a_gradient_stay(self, device: str) -> None:
        before = members_of(torch.float32, [STEPS["adamw"]] * 5)
        after = [copied(member, device) for member in before]
        child_step_([None if i == 1 else member for i, member in enumerate(after)], device)
        child_step_([None] * 5, device)
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            if i != 1:
                assert_stepped(old, new, KEPT[i], rounded)
        assert_same(before[1], after[1])

    def test_ten_steps_are_torchs(self, device: str) -> None:
        runs, weight = child_of(600, 1, 0), draws(20, 30).to(device)
        flat = torch.nn.Parameter(runs.gather(weight.cpu()))
        inner = torch.optim.AdamW([flat], lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
        first, second = (torch.zeros(len(runs), device=device) for _ in range(2))
        for step in range(1, 11):
            gradient = draws(20, 30, seed=step)
            flat.grad = runs.gather(gradient)
            inner.step()
            numbers = AdamWStep(0.01, 0.9, 0.99, 1e-8, 0.1, step)
            member = Member(weight, gradient.to(device), first, second, numbers)
            gpu.child_([runs.to(torch.device(device))], [member])
        torch.testing.assert_close(runs.gather(weight.cpu()), flat.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(library.LIBRARY is None, reason="the CPU kernels are not compiled: python hatch_build.py")
def test_a_cpu_tensor_goes_to_the_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert adamw.fits(draws(10)) and not gpu.fits(draws(10))
    monkeypatch.delattr(gpu, "child_")
    before = members_of(torch.float32, [STEPS["adamw"]] * 5)
    after = [copied(member, "cpu") for member in before]
    table_of(KEPT).step_(after)
    for old, new, runs in zip(before, after, KEPT, strict=True):
        assert_stepped(old, new, runs, rounded)


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_tensor_goes_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same calls as on the CPU; one parameter on each device in one call."""
    step, draw = STEPS["adamw"], mask_draw(0.3, "both")
    assert draw is not None and adamw.fits(draws(10).cuda()) and adamw.fits(draws(10).cuda().bfloat16())
    here, there = (whole(5, 70, step=step, seed=1, device=d, dtypes=MIXED[0]) for d in ("cpu", "cuda"))
    adamw.masked_([(here, draw), (there, draw)])
    place = torch.tensor([-1, 1, -1, 3, -1], dtype=torch.int32)
    adamw.rows_([(here, place), (there, place)])
    torch.testing.assert_close(there.weight.cpu(), here.weight)
    before = members_of(torch.bfloat16, [step] * 5)
    after = [copied(member, "cuda") for member in before]
    table_of(KEPT, "cuda").step_(after)
    for old, new, runs in zip(before, after, KEPT, strict=True):
        assert_stepped(old, new, runs, rounded)
