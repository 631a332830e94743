"""The GPU kernels against the CPU's, float64 and torch.

They run on a CUDA device where there is one, and on the CPU under Triton's interpreter: in a process of their own,
because Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tests.kernels.adamw_twin import STEPS, assert_near, twin
from torch import Tensor

from childtuning.kernels import (
    AdamWStep,
    ChildTable,
    MaskDraw,
    Places,
    WholeTensors,
    adamw_masked_,
    adamw_rows_,
    child_table,
    fits_gpu_kernels,
    keep_mask,
    mask_scale_,
)
from childtuning.kernels.gpu import adamw_masked_gpu_, adamw_rows_gpu_, keep_mask_gpu, mask_scale_gpu_
from childtuning.kernels.gpu_child import GpuChildTable

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
    "masks keep_kernel": {},
    "masks scale_kernel": {"G": "bfloat16"},
    "adamw masked_kernel": {"W": "float32", "G": "float32", "M": "float32", "ALIGNED": True},
    "adamw rows_kernel": {"W": "bfloat16", "G": "bfloat16", "M": "bfloat16", "ALIGNED": False},
    "child child_kernel": {"W": "float16", "G": "float32", "MASTER": True},
    "child gather_kernel": {"G": "bfloat16", "OUT": "float32", "ADD": True},
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
    import importlib

    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = kernel.split()
    function = getattr(importlib.import_module(f"childtuning.kernels.triton_kernels.{module}"), name)
    constants = {
        key: getattr(tl, value) if isinstance(value, str) else value for key, value in KERNELS[kernel].items()
    }
    constants["ENTRIES"] = 1024
    signature = {"table": "*i64", "owners": "*i32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    ptx = compiled.asm["ptx"]
    assert ("ld.global.v4" in ptx) == bool(KERNELS[kernel].get("ALIGNED"))
    assert ("cvt.rn.bf16" in ptx) == (kernel in ("masks scale_kernel", "adamw rows_kernel"))  # to nearest
    assert compiled.asm["cubin"]


def draws(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 numbers; to bfloat16 the interpreter truncates, where compiled kernels round to nearest."""
    if INTERPRETED and dtype == torch.bfloat16:
        values = (values.view(torch.int32) & -0x10000).view(torch.float32)
    return values.to(dtype)


class TestMasks:
    @pytest.mark.parametrize("density", [1e-12, 1 / 256, 0.3, 0.5, 0.7331, 0.999])
    def test_bits_are_the_cpus(self, density: float, device: str) -> None:
        draw = MaskDraw.of(density, "seed", 7)
        assert draw is not None
        for start, numel in [(0, 0), (0, 1), (0, 2048), (31, 2), (77, 1000), (1023, 1500), (2**40 + 5, 99)]:
            drawn = keep_mask_gpu(draw, numel, start, device)
            assert torch.equal(drawn.cpu(), keep_mask(density, "seed", 7, numel=numel, start=start))

    def test_ties_are_decided(self, device: str) -> None:
        """Many keys, and a threshold at which one entry in 256 needs the further bits."""
        for key in range(10):
            draw = MaskDraw.of(0.4 / 256, key)
            assert draw is not None
            drawn = keep_mask_gpu(draw, 2000, 0, device)
            assert torch.equal(drawn.cpu(), keep_mask(0.4 / 256, key, numel=2000))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_masking_a_gradient(self, dtype: torch.dtype, device: str) -> None:
        draw = MaskDraw.of(0.3, "g")
        assert draw is not None
        gradient = draws(37, 55, dtype=dtype)
        gradient[0] = torch.inf  # where it is dropped it leaves 0, not NaN
        kept = keep_mask(0.3, "g", numel=gradient.numel()).view_as(gradient)
        expected = rounded(torch.where(kept, gradient.float() * 2.5, 0.0), dtype)
        gradient = gradient.to(device)
        mask_scale_gpu_(gradient, draw, 2.5)
        assert torch.equal(gradient.cpu(), expected)


def whole(
    *shape: int, step: AdamWStep, seed: int, device: str, dtypes: tuple[torch.dtype, ...]
) -> WholeTensors:
    weight, gradient, moments = dtypes
    return WholeTensors(
        draws(*shape, seed=seed, dtype=weight).to(device),
        draws(*shape, seed=seed + 1, dtype=gradient).to(device),
        draws(*shape, seed=seed + 2, dtype=moments).to(device),
        (draws(*shape, seed=seed + 3) ** 2).to(moments).to(device),
        step,
    )


def on_cpu(t: WholeTensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return t.weight.cpu().clone(), t.gradient.cpu().clone(), t.first.cpu().clone(), t.second.cpu().clone()


def assert_updated(got: WholeTensors, expected: tuple[Tensor, Tensor, Tensor]) -> None:
    for tensor, wanted in zip((got.weight, got.first, got.second), expected, strict=True):
        assert_near(tensor, wanted)


MIXED = [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float32, torch.float16),
]


class TestTaskFree:
    @pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
    @pytest.mark.parametrize("density", [1e-12, 0.3, 0.999])
    def test_entries_are_the_twins(self, density: float, step: AdamWStep, device: str) -> None:
        """Parameters of several sizes and dtypes in one call, one of them at an odd address."""
        shapes = [(1,), (33, 31), (1024,), (2, 1025), (0, 4)]
        members = [
            whole(*shape, step=step, seed=10 * i, device=device, dtypes=MIXED[i % 3])
            for i, shape in enumerate(shapes)
        ]
        shifted = whole(1500, step=step, seed=70, device=device, dtypes=MIXED[0])
        odd = (shifted.weight[1:], shifted.gradient[1:], shifted.first[1:], shifted.second[1:])
        members.append(WholeTensors(*odd, step))
        before = [on_cpu(tensors) for tensors in members]
        named = [MaskDraw.of(density, "mask", i) for i in range(len(members))]
        adamw_masked_gpu_([(t, draw) for t, draw in zip(members, named, strict=True) if draw is not None])
        for i, ((w, g, m, v), after) in enumerate(zip(before, members, strict=True)):
            keep = keep_mask(density, "mask", i, numel=w.numel()).view(w.shape)
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
            place = torch.where(keep, keep.cumsum(0) - 1 if compact else torch.arange(shape[0]), -1)
            spread = keep.view(-1, *[1] * (len(shape) - 1)).expand(shape)
            w, g, m, v = on_cpu(t)
            expected.append(twin(w, g, m, v, step, spread))
            if compact:
                t = WholeTensors(t.weight, g[keep].to(device), t.first, t.second, step)
            members.append((t, place.to(torch.int32).to("cpu" if travels else device)))
        adamw_rows_gpu_(members)
        for (after, _), wanted in zip(members, expected, strict=True):
            assert_updated(after, wanted)

    def test_nothing_to_do(self, device: str) -> None:
        adamw_masked_gpu_([])
        adamw_rows_gpu_([])


def child_of(numel: int, width: int, seed: int) -> Places:
    units = torch.randperm(numel // width, generator=torch.Generator().manual_seed(seed))[
        : numel // width // 3
    ]
    return Places(units.sort().values.to(torch.int32), width)


KEPT = [
    child_of(1000, 1, 0),
    child_of(3960, 132, 1),
    child_of(64, 2, 2),
    child_of(4000, 1, 3),
    child_of(2, 1, 0),
]
SHAPES = [(1000,), (30, 132), (8, 8), (40, 100), (2,)]  # the last has no entry in the child
SIZE = sum(len(place) for place in KEPT)


class TestFixedChild:
    @pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", ["dense", "compact", "some of each"])
    def test_step_is_the_twins(self, layout: str, dtype: torch.dtype, step: AdamWStep, device: str) -> None:
        """Compact gradients are float32 as a flat buffer is; weights of 16 bits have master values."""
        before = [draws(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]
        weights = [weight.to(device, copy=True) for weight in before]
        dense = [draws(*shape, seed=40 + i, dtype=dtype) for i, shape in enumerate(SHAPES)]
        compacted = [place.gather(g, torch.empty(len(place))) for place, g in zip(KEPT, dense, strict=True)]
        chosen = {"dense": [], "compact": list(range(5)), "some of each": [0, 3]}[layout]
        gradients = [(compacted if i in chosen else dense)[i].to(device) for i in range(len(SHAPES))]
        m0, v0, masters = draws(SIZE, seed=5), draws(SIZE, seed=6) ** 2, draws(SIZE, seed=7)
        first, second, values = (t.to(device, copy=True) for t in (m0, v0, masters))
        has_masters = dtype != torch.float32

        table = GpuChildTable([place.to(torch.device(device)) for place in KEPT])
        table.adamw_(weights, gradients, first, second, step, values if has_masters else None)

        start = 0
        for weight, old, place, gradient in zip(weights, before, KEPT, compacted, strict=True):
            flat = slice(start, start := start + len(place))
            inside = place.gather(old, torch.empty(len(place), dtype=dtype))
            w, m, v = twin(masters[flat] if has_masters else inside, gradient, m0[flat], v0[flat], step)
            updated = place.gather(weight.cpu(), torch.empty(len(place), dtype=dtype))
            if has_masters:
                assert_near(values[flat], w)
                assert torch.equal(updated, rounded(values[flat].cpu(), dtype))
            else:
                assert_near(updated, w)
            assert_near(first[flat], m)
            assert_near(second[flat], v)
            restored = weight.cpu().clone()
            place.scatter_(restored, inside)
            assert torch.equal(restored, old)  # frozen entries, bitwise

    def test_parameters_without_a_gradient_stay(self, device: str) -> None:
        weights = [draws(*shape, seed=i).to(device) for i, shape in enumerate(SHAPES)]
        before = [weight.clone() for weight in weights]
        gradients = [None if i == 1 else draws(*shape).to(device) for i, shape in enumerate(SHAPES)]
        first, second = draws(SIZE).to(device), draws(SIZE).to(device) ** 2
        m0, v0 = first.clone(), second.clone()
        table = GpuChildTable([place.to(torch.device(device)) for place in KEPT])
        table.adamw_(weights, gradients, first, second, STEPS["adamw"])
        still = slice(len(KEPT[0]), len(KEPT[0]) + len(KEPT[1]))
        assert torch.equal(weights[1], before[1])
        assert torch.equal(first[still], m0[still]) and torch.equal(second[still], v0[still])
        assert not torch.equal(first[still.stop :], m0[still.stop :])
        table.adamw_(weights, [None] * len(SHAPES), first, second, STEPS["adamw"])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("add", [False, True])
    def test_gathering(self, add: bool, dtype: torch.dtype, device: str) -> None:
        gradients = [draws(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]
        before = draws(SIZE, seed=9)
        expected, start, starts = before.clone(), 0, [0]
        for place, gradient in zip(KEPT, gradients, strict=True):
            place.gather(gradient.float(), expected[start : start + len(place)], add=add)
            starts.append(start := start + len(place))
        table = GpuChildTable([place.to(torch.device(device)) for place in KEPT])
        there = [gradient.to(device) for gradient in gradients]
        out = before.to(device, copy=True)
        table.gather(there, out, add=add)
        assert torch.equal(out.cpu(), expected)

        one = before.to(device, copy=True)
        table.gather_one(1, there[1], one, add=add)
        mine = slice(starts[1], starts[2])
        assert torch.equal(one[mine].cpu(), expected[mine])
        assert torch.equal(one[mine.stop :].cpu(), before[mine.stop :])

    def test_ten_steps_are_torchs(self, device: str) -> None:
        place, weight = child_of(600, 1, 0), draws(20, 30).to(device)
        flat = torch.nn.Parameter(place.gather(weight.cpu(), torch.empty(len(place))))
        inner = torch.optim.AdamW([flat], lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
        table = GpuChildTable([place.to(torch.device(device))])
        first, second = (torch.zeros(len(place), device=device) for _ in range(2))
        for step in range(1, 11):
            gradient = draws(20, 30, seed=step)
            flat.grad = place.gather(gradient, torch.empty(len(place)))
            inner.step()
            numbers = AdamWStep(0.01, 0.9, 0.99, 1e-8, 0.1, step)
            table.adamw_([weight], [gradient.to(device)], first, second, numbers)
        updated = place.gather(weight.cpu(), torch.empty(len(place)))
        torch.testing.assert_close(updated, flat.detach(), rtol=1e-5, atol=1e-6)


def test_a_cpu_tensor_goes_to_the_compiled_kernels() -> None:
    assert isinstance(child_table([child_of(100, 1, 0)]), ChildTable)
    assert not fits_gpu_kernels(draws(10))


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_tensor_goes_to_triton() -> None:
    """The same calls as on the CPU; one parameter on each device in one call."""
    step, draw = STEPS["adamw"], MaskDraw.of(0.3, "both")
    assert draw is not None and fits_gpu_kernels(draws(10).cuda())
    assert isinstance(child_table([child_of(100, 1, 0).to(torch.device("cuda"))]), GpuChildTable)
    here, there = (whole(5, 70, step=step, seed=1, device=d, dtypes=MIXED[0]) for d in ("cpu", "cuda"))
    adamw_masked_([(here, draw), (there, draw)])
    place = torch.tensor([-1, 1, -1, 3, -1], dtype=torch.int32)
    adamw_rows_([(here, place), (there, place)])
    torch.testing.assert_close(there.weight.cpu(), here.weight)
    mask_scale_(here.gradient, draw, 2.0)
    mask_scale_(there.gradient, draw, 2.0)
    assert torch.equal(there.gradient.cpu(), here.gradient)
