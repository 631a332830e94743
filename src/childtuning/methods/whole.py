"""Methods that train whole parameters, chosen by where they stand in the network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from childtuning.child import ChildConfig
from childtuning.child.eligible import named
from childtuning.errors import ConfigError, ModelError
from childtuning.training import Method, Prepared


class WholeParameters(Method):
    """A method whose child consists of whole parameters: nothing is chosen entry by entry."""

    memory = "2n state"
    part = "child"

    def child(self, config: ChildConfig) -> ChildConfig:
        """Return the child that is whole.

        Raises:
            ConfigError: a density was given.
        """
        if config.density != 1.0:
            raise ConfigError(
                f"method {self.name!r} trains parameters whole, got density {config.density}. Leave it out."
            )
        return replace(config, variant="task-driven", rescale=False)


def output_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a network's output layer: its output embeddings, or the last module with parameters.

    Output embeddings that are tied to the input's are trained as both.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is None:
        owners = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
        output = owners[-1]
    inside = {id(parameter) for parameter in output.parameters()}
    return tuple(name for name, p in named(model).items() if id(p) in inside)


def train_only(prepared: Prepared, names: Iterable[str]) -> Prepared:
    """Return the prepared model with these parameters, as far as they are eligible, and what is always trained.

    Raises:
        ModelError: that would be nothing.
    """
    wanted = set(names)
    plain = named(prepared.model)
    if prepared.eligible is not None:
        wanted &= set(prepared.eligible)
    eligible = tuple(name for name in plain if name in wanted and name not in prepared.always)
    if not eligible and not prepared.always:
        raise ModelError("nothing would be trained. Name parameters with always, or use another method.")
    return replace(prepared, eligible=eligible)
