"""Squares that a compiled kernel adds up, against float64; and the threads that kernels run on."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from childtuning.fast import gradients, library
from childtuning.fast.gradients import Outer
from childtuning.fast.library import PRODUCTS

NATIVE = Path(library.__file__).with_name("native")
COMPILER = shlex.split(os.environ.get("CC") or "cc")
needs_kernel = pytest.mark.skipif(
    library.LIBRARY is None or not library.LIBRARY.ct_adds_squares(),
    reason="no compiled kernel adds squares on this processor",
)
# examples, terms, rows, columns
SHAPES = [(2, 2, 512, 513), (3, 65, 4, 1401), (16, 31, 193, 47), (5, 3000, 9, 24), (7, 100, 401, 49)]


def factors(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return left, right and Σ_b (left_bᵀ right_b)², computed in float64."""
    B, T, rows, columns = shape
    draw = torch.Generator().manual_seed(B * T)
    left, right = torch.randn(B, T, rows, generator=draw), torch.randn(B, T, columns, generator=draw)
    return left, right, (left.double().transpose(1, 2) @ right.double()).square().sum(0)


def assert_added(score: Tensor, wanted: Tensor) -> None:
    """Check that a score that began at 1 has the squares added."""
    assert (score - 1 - wanted).abs().max() <= 1e-5 * wanted.max()


@needs_kernel
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_squares_are_added(shape: tuple[int, int, int, int], num_threads: int, threads: None) -> None:
    torch.set_num_threads(num_threads)
    left, right, wanted = factors(shape)
    score = torch.ones(shape[2:])
    assert gradients._in_registers_(score, left, right)
    assert_added(score, wanted)


@needs_kernel
def test_factors_may_lie_in_any_order() -> None:
    left, right, wanted = factors((6, 50, 120, 130))
    turned = (
        left.transpose(1, 2).contiguous().transpose(1, 2),
        right.transpose(0, 1).contiguous().transpose(0, 1),
    )
    longer = torch.cat([left, left], 2)[..., :120], torch.cat([right, right], 1)[:, :50]
    for pair in (turned, longer):
        score = torch.ones(120, 130)
        assert gradients._in_registers_(score, *pair)
        assert_added(score, wanted)
    score = torch.ones(120, 130)
    Outer(left, right[:1].expand_as(right)).add_squares_(score)
    assert_added(score, (left.double().transpose(1, 2) @ right[0].double()).square().sum(0))


@needs_kernel
def test_what_is_not_finite_stays_where_it_is() -> None:
    left, right, _ = factors((4, 90, 61, 100))
    left[1, 5, 60] = torch.inf
    score = torch.zeros(61, 100)
    assert gradients._in_registers_(score, left, right)
    assert score[:60].isfinite().all() and not score[60].isfinite().any()


@needs_kernel
def test_the_definition_serves_the_rest() -> None:
    left, right, wanted = factors((4, 90, 61, 100))
    for score in (torch.ones(100, 61).t(), torch.ones(61, 100, dtype=torch.float64)):
        pair = left.to(score.dtype), right.to(score.dtype)
        assert not gradients._in_registers_(score, *pair)
        Outer(*pair).add_squares_(score)
        assert_added(score, wanted)
    assert not gradients._in_registers_(torch.ones(61, 100), left.bfloat16(), right.bfloat16())


@needs_kernel
@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="there is no C compiler")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_wide_kernel_is_right_on_a_narrow_processor(
    shape: tuple[int, int, int, int], tmp_path: Path
) -> None:
    """Few processors have sixteen lanes; with pairs of eight the same code is right, if slow."""
    built = tmp_path / "wide.so"
    flags = ["-std=gnu11", "-O2", "-fPIC", "-shared", "-Wno-psabi"]
    narrow = ["-D__builtin_cpu_supports(x)=1", '-Dtarget(x)=target("avx2,fma")']
    subprocess.run([*COMPILER, *flags, *narrow, str(NATIVE / "squares.c"), "-o", str(built)], check=True)
    left, right, wanted = factors(shape)
    B, T, rows, columns = shape
    score, room = torch.ones(rows, columns), torch.empty((B * T + 48) * (rows + 7) + 48 * T)
    where = (tensor.data_ptr() for tensor in (left, right, score, room))
    numbers = (*shape, *left.stride()[:2], *right.stride()[:2])
    task = np.array([(*where, *numbers)], PRODUCTS)
    ctypes.CDLL(str(built)).ct_add_squares(ctypes.c_void_p(task.ctypes.data))
    assert_added(score, wanted)


@needs_kernel
def test_all_threads_give_the_same_bits(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    left, right, _ = factors((8, 100, 400, 100))
    found = []
    for num_threads, are_torchs in ((1, True), (3, True), (3, False)):
        torch.set_num_threads(num_threads)
        if not are_torchs:
            monkeypatch.setattr(library, "_torchs_threads", lambda process: None)
        score = torch.zeros(400, 100)
        assert gradients._in_registers_(score, left, right)
        found.append(score)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch's threads are not found")
def test_kernels_run_on_torchs_threads() -> None:
    assert "OpenMP" in torch.__config__.parallel_info()
    assert library._torchs_threads(os.getpid()) is not None
    assert library._torchs_threads(os.getpid() + 1) is None


@pytest.mark.skipif(library.LIBRARY is None or not hasattr(os, "fork"), reason="needs the kernels and fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    """Torch's threads are not there after a fork, and to wait for them would take forever."""
    script = """
import os, torch
from childtuning.child.task_free import keep_mask
torch.set_num_threads(2)
torch.ones(1 << 20).neg()
wanted = keep_mask(0.5, "seed", numel=1 << 20).numpy().tobytes()
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
else:
    os._exit(keep_mask(0.5, "seed", numel=1 << 20).numpy().tobytes() != wanted)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_kernels_of_another_version_are_refused() -> None:
    """After an update without a new build, one line says what to do."""
    with pytest.raises(ImportError, match="another version .* Run `python hatch_build.py`"):
        library._declare(ctypes.CDLL(None))
