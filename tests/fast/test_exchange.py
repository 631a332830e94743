"""The exchange of entries: the compiled kernel does what torch does, for all widths, dtypes and ways to lie."""

import pytest
import torch

from childtuning import fast
from childtuning.child.units import Granularity, Part
from childtuning.fast.exchange import exchange_

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.complex64)


def parts(shape: tuple[int, ...]) -> dict[str, Part]:
    """Return a part of each kind."""
    draw = torch.Generator().manual_seed(0)
    rows, columns = (torch.randperm(shape[i], generator=draw)[: shape[i] // 3].sort()[0] for i in (0, 1))
    return {
        "element": Part.from_mask(torch.rand(shape, generator=draw) < 0.3),
        "row": Part(shape, rows, Granularity("row")),
        "column": Part(shape, columns, Granularity("column")),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["element", "row", "column"])
@pytest.mark.parametrize("shape", [(700, 300), (9, 5), (40, 6, 3, 3)], ids=str)
def test_entries_are_exchanged_bit_for_bit(shape, kind, dtype, monkeypatch):
    part = parts(shape)[kind]
    base = torch.randn(shape).mul(50).abs().to(dtype)
    values = torch.randn(part.num_trained).mul(50).abs().to(dtype)
    wanted = base.clone()
    wanted.view(-1)[part.indices()] = values
    tensor, given = base.clone(), values.clone()
    version = tensor._version
    (before,) = exchange_([(part.runs(), tensor, values)])
    assert torch.equal(tensor, wanted)
    assert torch.equal(before, base.view(-1)[part.indices()])
    assert torch.equal(values, given)
    assert tensor._version > version
    monkeypatch.setattr(fast, "enabled", lambda: False)
    (again,) = exchange_([(part.runs(), tensor, before)])
    assert torch.equal(tensor, base)
    assert torch.equal(again, given)
    monkeypatch.undo()
    for enabled in (True, False):
        monkeypatch.setattr(fast, "enabled", lambda enabled=enabled: enabled)
        swapped, other = base.clone(), values.clone()
        (same,) = exchange_([(part.runs(), swapped, other)], in_place=True)
        assert same is other and torch.equal(swapped, wanted)
        assert torch.equal(other, base.view(-1)[part.indices()])


def test_many_tensors_some_whole_some_strided():
    part = Part((6, 4), torch.tensor([1, 4]), Granularity("row"))
    strided = torch.arange(24.0).view(4, 6).T
    plain, whole = torch.zeros(6, 4), torch.ones(3)
    new = torch.arange(8.0)
    before = exchange_(
        [(part.runs(), strided, new), (None, whole, torch.full((3,), 7.0)), (part.runs(), plain, new + 1)]
    )
    assert strided[[1, 4]].flatten().tolist() == new.tolist()
    assert whole.tolist() == [7.0] * 3
    assert plain[[1, 4]].flatten().tolist() == (new + 1).tolist()
    assert before[0].tolist() == [1.0, 7.0, 13.0, 19.0, 4.0, 10.0, 16.0, 22.0]
    assert before[2].tolist() == [0.0] * 8
