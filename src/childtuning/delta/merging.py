"""Several deltas of one base model as one: disjoint children add exactly, others are averaged or elected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from childtuning.child.eligible import as_patterns, match_names, matches, named
from childtuning.child.units import Part
from childtuning.delta.delta import Delta, read, write
from childtuning.delta.files import frozen_hash
from childtuning.errors import ConfigError, DeltaError, did_you_mean

How = Literal["exact", "mean", "ties"]


def merge_deltas(
    deltas: Sequence[Delta],
    how: How = "exact",
    *,
    base: nn.Module | None = None,
    own: Iterable[str] = (),
    kept: float = 0.2,
    weight: float = 1.0,
) -> list[Delta]:
    """Merge deltas of one base model into one model that has what each of them trained.

    Args:
        deltas: of tasks; their parameters have the same names and, but for ``own``, shapes.
        how: ``exact``: each entry that one of them trained takes its value; entries that several trained must have one
            value. ``mean``: the base value and the mean of the changes, 0 where a delta trained nothing. ``ties``: of
            each delta the share ``kept`` of the largest changes stays, the sign of an entry is that of the sum of them,
            and the changes of that sign are averaged [Yadav et al. 2023].
        base: the base model, which every delta is checked to be of; changes are measured from its values.
        own: names or patterns of what each task keeps for itself, such as its head.
        kept: for ``ties``, in (0, 1].
        weight: what the merged changes are multiplied by.
    Returns:
        for each delta one for its own model: what is merged, the same in all of them, and its own parameters.
    Raises:
        ConfigError: an argument is out of range or missing.
        DeltaError: the deltas are of different models, or, for ``exact``, have different values for one entry.
    """
    if how not in get_args(How):
        raise ConfigError(f"how must be one of {', '.join(get_args(How))}, got {how!r}. "
                          + did_you_mean(str(how), get_args(How)))  # fmt: skip
    if not 0 < kept <= 1:
        raise ConfigError(f"kept must lie in (0, 1], got {kept}. Pass 0.2.")
    if not deltas:
        raise ConfigError("there are no deltas to merge. Pass at least one.")
    if base is None:
        raise ConfigError("nothing in deltas tells that they are all of one base model. Pass base=model.")
    if how == "exact" and weight != 1:
        raise ConfigError(f"how='exact' writes values as they are, got weight={weight}. Leave it out.")
    own = as_patterns(own)
    match_names(own, deltas[0].parts)  # a pattern that fits nothing is a mistake
    shared = _shared(deltas, own)
    for delta in deltas:
        delta.check_base(base, shared)
    originals = {n: p.detach() for n, p in named(base).items() if n in shared}
    least = [_threshold(delta, originals, kept) if how == "ties" else 0.0 for delta in deltas]
    merged: dict[str, tuple[Part, Tensor | None, str | None]] = {}
    for name in shared:
        part = reduce(Part.__or__, (delta.parts[name] for delta in deltas))
        values = None
        if not part.is_empty and how == "exact":
            values = _exact(name, part, deltas)
        elif not part.is_empty:
            changes = [
                _change(delta, name, originals[name], low) for delta, low in zip(deltas, least, strict=True)
            ]
            change = _elected(changes) if how == "ties" else torch.stack(changes).mean(0)
            original = originals[name].cpu().to(change.dtype)
            values = read((original + weight * change).to(originals[name].dtype), part)
        merged[name] = part, values, None if part.is_whole else frozen_hash(originals[name], part.indices())
    return [_complete(delta, merged) for delta in deltas]


def _shared(deltas: Sequence[Delta], own: Sequence[str]) -> list[str]:
    """Return the names that are merged, after a check that all deltas have them."""
    first = deltas[0]
    names = [name for name in first.parts if not matches(name, own)]
    for delta in deltas[1:]:
        others = [name for name in delta.parts if not matches(name, own)]
        differing = set(names) ^ set(others) or {
            n for n in names if first.parts[n].shape != delta.parts[n].shape
        }
        if differing:
            raise DeltaError(
                f"the deltas are for different models ({min(differing)!r} differs). Merge deltas of one base model, "
                "and pass own=(…) for heads."
            )
    return names


def _exact(name: str, part: Part, deltas: Sequence[Delta]) -> Tensor:
    """Return the values of one parameter that any delta has."""
    held = [(delta.parts[name], delta.values[name]) for delta in deltas if not delta.parts[name].is_empty]
    dense = torch.zeros(part.shape, dtype=held[0][1].dtype, device="cpu")
    done = Part.none(part.shape)
    for mine, values in held:
        if values.dtype != dense.dtype:
            raise DeltaError(
                f"{name!r} is {values.dtype} in one delta and {dense.dtype} in another. Use one dtype."
            )
        common = done & mine
        before = read(dense, common)
        write(dense, mine, values)
        if not common.is_empty and not torch.equal(_bits(read(dense, common)), _bits(before)):
            raise DeltaError(
                f"two deltas have different values for entries of {name!r}. Train disjoint children "
                "(select_child(…, avoid=child)), or pass how='mean' or 'ties'."
            )
        done = done | mine
    return read(dense, part)


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(-1).view(torch.uint8)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _changes(delta: Delta, name: str, original: Tensor) -> Tensor:
    """Return what a delta adds to the entries that it trained, flat, float32 or float64, on the CPU."""
    return _wide(delta.values[name].reshape(-1)) - _wide(read(original, delta.parts[name]).reshape(-1))


def _change(delta: Delta, name: str, original: Tensor, least: float) -> Tensor:
    """Return what a delta adds to a parameter, of its shape; what is smaller than ``least`` is left out."""
    change = torch.zeros(
        original.shape, dtype=torch.promote_types(original.dtype, torch.float32), device="cpu"
    )
    if not (part := delta.parts[name]).is_empty:
        write(change, part, _changes(delta, name, original))
    return change.masked_fill_(change.abs() < least, 0.0) if least else change


def _threshold(delta: Delta, originals: Mapping[str, Tensor], kept: float) -> float:
    """Return the smallest of the share ``kept`` of a delta's largest changes."""
    sizes = [_changes(delta, name, originals[name]).abs() for name in delta.values if name in originals]
    everything = torch.cat(sizes) if sizes else torch.zeros(0, device="cpu")
    count = max(round(kept * len(everything)), 1)
    return float(everything.topk(count).values[-1]) if len(everything) else 0.0


def _elected(changes: Sequence[Tensor]) -> Tensor:
    """Return the mean of the changes that have the sign of their sum."""
    sign = sum(changes, start=torch.zeros_like(changes[0])).sign()
    agreeing = [change * (change.sign() == sign) for change in changes]
    count = sum(((change != 0).float() for change in agreeing), start=torch.zeros_like(sign))
    return sum(agreeing, start=torch.zeros_like(sign)) / count.clamp(min=1)


def _complete(delta: Delta, merged: Mapping[str, tuple[Part, Tensor | None, str | None]]) -> Delta:
    """Return a delta with the merged entries in place of its own."""
    kept = Delta(
        parts={n: merged[n][0] if n in merged else part for n, part in delta.parts.items()},
        values={n: v for n, v in delta.values.items() if n not in merged},
        buffers=delta.buffers,
        hashes={n: h for n, h in delta.hashes.items() if n not in merged},
        base=delta.base,
    )
    for name, (_, values, digest) in merged.items():
        kept.values.update({} if values is None else {name: values})
        kept.hashes.update({} if digest is None else {name: digest})
    return kept
