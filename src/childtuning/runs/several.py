"""Several finished runs of one base model, which is in memory once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from childtuning.delta import ChildSwitch
from childtuning.delta.files import bits
from childtuning.errors import ConfigError
from childtuning.runs.predict import FinishedRun


class RunsOfOneBase:
    """Finished runs that predict with one base model: a switch writes the values of one of them at a time into it.

    Heads and added modules are each run's own. A parameter that a run did not start from as the first run did (a layer
    that its method drew anew) is its own as well.

    Args:
        runs: by name.
    Raises:
        ConfigError: a run is of another base model than the first.
    """

    def __init__(self, runs: Mapping[str, FinishedRun]) -> None:
        self._runs = dict(runs)
        self._switch: ChildSwitch | None = None
        first, *others = self._runs
        hashes = {name: run.about.get("base_hash") for name, run in self._runs.items()}
        base = self._runs[first].base()
        known = _pretrained(base)
        self._add(first, self._runs[first].untuned(base))
        for name in others:
            loaded = self._runs[name].base()
            names = {id(parameter): n for n, parameter in _pretrained(loaded).items()}
            model = self._runs[name].untuned(loaded)
            num_shared = _share(model, names, known)
            common = known.keys() & {*names.values()}
            # A hash is of what the kind of task loads. A start may have moved every parameter.
            is_known = None not in (hashes[first], hashes[name]) and len(common) == len(known) == len(names)
            if hashes[first] != hashes[name] if is_known else 2 * num_shared < len(common) or not common:
                raise ConfigError(
                    f"the runs {first!r} and {name!r} have different base models. Predict with each alone."
                )
            self._add(name, model)

    def __iter__(self) -> Iterator[str]:
        return iter(self._runs)

    @contextmanager
    def using(self, name: str) -> Iterator[FinishedRun]:
        """Put a run's values into the base model for a block, in which the run predicts."""
        assert self._switch is not None
        with self._switch.using(name):
            yield self._runs[name]

    def _add(self, name: str, model: Any) -> None:
        run = self._runs[name]
        self._switch = self._switch or ChildSwitch(model)
        self._switch.add(name, run.delta, model=model)
        run.adopt(model.eval())


def _pretrained(loaded: Any) -> dict[str, nn.Parameter]:
    new = set(loaded.new_parameters)
    return {n: p for n, p in loaded.model.named_parameters() if n not in new}


def _share(model: nn.Module, names: Mapping[int, str], known: Mapping[str, nn.Parameter]) -> int:
    """Replace a model's parameters by known ones with the same bits; return how many.

    Args:
        model: it may have more modules than the base model.
        names: of the base model's parameters, by identity.
        known: parameters by these names.
    """
    same: dict[int, nn.Parameter] = {}
    for parameter in model.parameters():
        other = known.get(names.get(id(parameter), ""))
        if other is None or (other.shape, other.dtype) != (parameter.shape, parameter.dtype):
            continue
        if torch.equal(bits(other), bits(parameter)):
            same[id(parameter)] = other
    for module in model.modules():
        for own, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in same:
                module._parameters[own] = same[id(parameter)]
    return len(same)
