"""`Split`: the examples of one file or folder, of any kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Self

import numpy as np

from childtuning.errors import ConfigError


class Split(ABC):
    """Examples in order, with labels if known; each kind of example has a subclass."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of examples."""

    @property
    @abstractmethod
    def is_labelled(self) -> bool:
        """Whether every example has its target."""

    @abstractmethod
    def subset(self, indices: Iterable[int]) -> Self:
        """Return the examples at `indices`, in that order."""

    @abstractmethod
    def shown(self, index: int) -> str:
        """Return a short form of an example, for display."""

    @property
    def num_empty(self) -> int:
        """The number of examples without content; they are kept."""
        return 0

    @property
    def form(self) -> str:
        """What an example is, in the plural; a run takes examples of one form only."""
        return "examples"

    def classes(self) -> set[str]:
        """Return the class names that occur."""
        return set()

    def sample(self, limit: int | None, *, seed: int = 0) -> Self:
        """Return at most `limit` examples, drawn without replacement, in their original order.

        A pure function of (number of examples, limit, seed). For a given seed, the sample of a smaller limit
        is a subset of that of a larger one, so that low-resource curves only add examples.

        Args:
            limit: the maximum number of examples, at least 1; None keeps all.
            seed: any integer.
        Raises:
            ConfigError: when limit is below 1.
        """
        if limit is None:
            return self
        if limit < 1:
            raise ConfigError(
                f"a limit of examples must be at least 1, got {limit}. Leave it out to use every row."
            )
        if limit >= len(self):
            return self
        return self.subset(sorted(_order(len(self), seed)[:limit]))

    def hold_out(self, share: float, *, seed: int = 0) -> tuple[Self, Self]:
        """Split off a random share of the examples; return the rest and the share, both in their original order.

        Args:
            share: in (0, 1); each side gets at least one example.
            seed: any integer.
        Raises:
            ConfigError: when there are fewer than two examples.
        """
        if len(self) < 2:
            raise ConfigError(f"{len(self)} training examples cannot be split, got held_out={share}. Pass 0.")
        size = min(max(1, round(share * len(self))), len(self) - 1)
        order = _order(len(self), seed)
        return self.subset(sorted(order[:-size])), self.subset(sorted(order[-size:]))


def _order(size: int, seed: int) -> list[int]:
    # RandomState has a frozen stream; numpy's newer generators may change between releases.
    return np.random.RandomState(seed % 2**32).permutation(size).tolist()
