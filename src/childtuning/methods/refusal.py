"""How a method says that it does not apply to a model."""

from __future__ import annotations

from torch import nn

from childtuning.errors import ModelError


def not_for(method: str, model: nn.Module, why: BaseException | str) -> ModelError:
    """Return the error that says why a method does not apply to a model, in one line.

    Example:
        >>> from torch import nn
        >>> str(not_for("prefix", nn.Linear(1, 1), "it has no attention"))
        "method 'prefix' does not apply to Linear: it has no attention."
    """
    reason = (str(why).splitlines() or [""])[0].rstrip(".") or type(why).__name__
    return ModelError(f"method {method!r} does not apply to {type(model).__name__}: {reason}.")


def check_layers(method: str, asked: int, there: int) -> None:
    """Raise a ModelError if a method asks for more layers than the model has."""
    if asked > there:
        raise ModelError(f"{method}:{asked} asks for {asked} layers, the model has {there}. Ask for fewer.")
