"""What a fine-tuning method decides; the methods themselves are registered one layer up."""

from __future__ import annotations

from typing import Protocol

from childtuning.config import ChildConfig


class Method(Protocol):
    """One way to fine-tune: it says which child of the network is trained.

    Attributes:
        name: the word a user types.
        summary: one line for listings.
        source: the paper it comes from.
        trains: what is trained, in a few words.
        density: the density it has when the user names none.
    """

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def trains(self) -> str: ...

    @property
    def density(self) -> float: ...

    def child(self, options: ChildConfig) -> ChildConfig:
        """Return what is trained, given the user's options.

        Raises:
            ConfigError: an option that this method does not take.
        """
        ...
