"""`Split`: the examples of one file or folder, of any kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Self

import numpy as np

from childtuning.errors import ConfigError, counted


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

    def strata(self) -> Sequence[str] | None:
        """Return the class of each example, by which draws are spread; None if they have none."""
        return None

    def contents(self) -> Sequence[Hashable] | None:
        """Return what each example is without its label; None if that is not compared."""
        return None

    def sample(self, limit: int | None, *, seed: int = 0) -> Self:
        """Return at most `limit` examples, drawn without replacement, in their original order.

        Classes keep their shares, and each keeps at least one example if the limit allows it. A pure function of
        (classes of the examples, limit, seed). For a given seed, the sample of a smaller limit is a subset of that
        of a larger one, so that low-resource curves only add examples.

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
        return self.subset(sorted(self._order(seed)[:limit]))

    def hold_out(self, share: float, *, seed: int = 0) -> tuple[Self, Self]:
        """Split off a random share of the examples; return the rest and the share, both in their original order.

        Classes keep their shares on both sides; the rest has every class, if it has room. Equal examples stay on one
        side: that of the rest if they would be more than a quarter of the share, unless too few others are there. At
        least half of the different ones stay in the rest, if the share is no larger.

        Args:
            share: in (0, 1); each side gets at least one example.
            seed: any integer.
        Raises:
            ConfigError: when there are fewer than two examples.
        """
        if len(self) < 2:
            raise ConfigError(
                f"{len(self)} training examples cannot be split, got a share of {share}. "
                f"Pass more examples, or --eval FILE."
            )
        size = min(max(1, round(share * len(self))), len(self) - 1)
        order = self._order(seed)
        classes = self.strata() or [""] * len(self)
        has_room = len(self) - size >= len({*classes})
        aside = (has_room and self._whole_groups(order, size, classes)) or self._whole_groups(order, size)
        aside = aside or {*order[-size:]}  # all are equal
        return self.subset(sorted({*order} - aside)), self.subset(sorted(aside))

    def _whole_groups(self, order: Sequence[int], size: int, classes: Sequence[str] = ()) -> set[int]:
        """Take groups of equal examples from the end of an order, up to a size; of each class one group stays.

        A group stands where its first example does, so that large ones are not drawn more often than others.
        """
        contents = self.contents() or range(len(self))
        equal: dict[Hashable, list[int]] = {}
        for row, content in enumerate(contents):
            equal.setdefault(content, []).append(row)
        firsts = [row for row in reversed(order) if row == equal[contents[row]][0]]
        half = max(
            1, len(firsts) // 2, round(size / len(self) * len(firsts))
        )  # else few stay beside a large group
        left, taken, num_taken = Counter(classes), set[int](), 0
        for largest in (max(1, size // 4), size, len(self) - 1):
            if largest > size:  # too few others: the smallest that there is
                firsts.sort(key=lambda row: len(equal[contents[row]]))
            for row in firsts:
                rows = equal[contents[row]]
                if row in taken or len(rows) > min(largest, max(size, largest) - len(taken)):
                    continue
                going = Counter(classes[one] for one in rows) if classes else Counter[str]()
                if all(left[name] > num for name, num in going.items()):
                    taken |= {*rows}
                    left -= going
                    num_taken += 1
                if len(taken) >= size or num_taken >= half:
                    return taken
            if taken and largest == size:
                return taken
        return taken

    def folds(self, num: int, *, seed: int = 0) -> list[list[int]]:
        """Return the numbers of the examples in ``num`` parts of about the same size.

        Classes keep their shares in every part, as far as they have enough examples. Equal examples are in one part.

        Args:
            num: at least 2.
            seed: any integer.
        Raises:
            ConfigError: when there are fewer distinct examples than parts.
        """
        contents = self.contents() or range(len(self))
        classes = self.strata()
        order = self._order(seed)
        if classes is not None:
            order.sort(key=classes.__getitem__)  # class by class, so that dealing out spreads each
        equal: dict[Hashable, list[int]] = {}
        for row in order:
            equal.setdefault(contents[row], []).append(row)
        if len(equal) < num:
            remedy = "Pass fewer --folds." if len(equal) > 1 else "Leave out --folds."
            raise ConfigError(
                f"{counted(len(equal), 'different example')} cannot be split into {num} folds. {remedy}"
            )
        folds: list[list[int]] = [[] for _ in range(num)]
        held = [Counter[str]() for _ in range(num)]
        for rows in equal.values():
            names = [classes[row] for row in rows] if classes is not None else []
            place = min(
                range(num), key=lambda fold: (sum(held[fold][name] for name in names), len(folds[fold]))
            )
            folds[place].extend(rows)
            held[place].update(names)
        return [sorted(fold) for fold in folds]

    def _order(self, seed: int) -> list[int]:
        """Return the order in which examples are drawn: every class's first, then all in proportion."""
        # RandomState has a frozen stream; numpy's newer generators may change between releases.
        order: list[int] = np.random.RandomState(seed % 2**32).permutation(len(self)).tolist()
        classes = self.strata()
        if classes is None:
            return order
        sizes = Counter(classes)
        ranks: Counter[str] = Counter()
        places: dict[int, tuple[bool, float]] = {}
        for row in order:
            rank = ranks[classes[row]]
            places[row] = (rank > 0, (rank + 0.5) / sizes[classes[row]])
            ranks[classes[row]] += 1
        return sorted(order, key=places.__getitem__)  # a stable sort: ties stay in random order
