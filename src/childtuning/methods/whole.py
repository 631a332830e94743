"""Methods that train whole parameters, chosen by where they stand in the network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from childtuning.config import ChildConfig
from childtuning.errors import ConfigError, ModelError
from childtuning.patterns import canonical_names
from childtuning.training import Prepared


def check_whole(name: str, config: ChildConfig) -> None:
    """Refuse a density: nothing is chosen entry by entry.

    Raises:
        ConfigError: a density was given.
    """
    if config.density != 1.0:
        raise ConfigError(
            f"method {name!r} trains parameters whole, got density {config.density:g}. Leave it out."
        )


def train_only(prepared: Prepared, names: Iterable[str]) -> Prepared:
    """Return the prepared model with these parameters trained beside what is always trained.

    Raises:
        ModelError: that would be nothing.
    """
    wanted = set(names)
    plain = canonical_names(name for name, _ in prepared.model.named_parameters())
    eligible = tuple(name for name in plain if name in wanted and name not in prepared.always)
    if not eligible and not prepared.always:
        raise ModelError("nothing would be trained. Name parameters with always, or use another method.")
    return replace(prepared, eligible=eligible)
