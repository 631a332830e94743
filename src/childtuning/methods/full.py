"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from dataclasses import replace

from childtuning.config import ChildConfig
from childtuning.errors import ConfigError
from childtuning.methods.registry import register


@register
class Full:
    """Every parameter, by the inner optimizer as it is: the child is the network itself."""

    name = "full"
    summary = "train every parameter (vanilla fine-tuning)"
    source = "—"
    trains = "everything"
    density = 1.0

    def child(self, options: ChildConfig) -> ChildConfig:
        """Return the child that is everything."""
        if options.density != 1.0:
            raise ConfigError(
                f"method 'full' trains everything, got density {options.density:g}. Leave it out."
            )
        return replace(options, variant="task-driven", rescale=False)
