"""mixout: weights that jump back to the pretrained ones at random, in place of dropout."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from childtuning.child.eligible import canonical_name, matches
from childtuning.errors import ConfigError
from childtuning.methods.checks import not_for
from childtuning.methods.registry import register
from childtuning.training import Method, Prepared
from childtuning.training.mixed_linear import MixedLayers, mix, mixable

_begun: WeakKeyDictionary[nn.Module, MixedLayers] = WeakKeyDictionary()


@register
@dataclass(frozen=True)
class Mixout(Method):
    """While training, each use of a linear layer's weight W replaces a random share p of it by the pretrained W0.

    W' = [(1−B) W0 + B W − p W0] / (1−p) with B ~ Bernoulli(1−p) for each entry, so that W is its mean. [Lee et al.
    2020] Biases, embeddings, normalisations, weights that an embedding shares, and the new head, which has no
    pretrained value, are trained plainly. Dropout is zero meanwhile, attention's too, where it is a module or a
    number that a module holds; a rate that a forward pass reads from the configuration stays. What is saved and what
    predicts is W itself.

    Args:
        p: the share, in (0, 1). The paper finds 0.7 to 0.9 best for BERT-large.
    """

    p: float = 0.7

    name = "mixout"
    summary = "mix weights with pretrained ones at random while training, instead of dropout"
    source = "Lee et al. 2020, arXiv 1909.11299"
    trains = "what is trained beside it"
    memory = "a copy of the linear layers' weights"
    part = "start"
    acts_on_pretrained = True
    whole_gradients = True  # gradients of rows alone would come from layers that do not mix

    def __post_init__(self) -> None:
        if not 0 < self.p < 1:
            raise ConfigError(f"p of 'mixout' must be in (0, 1), got {self.p}. Pass a share: 0.7.")

    def prepare(self, prepared: Prepared) -> Prepared:
        """Make sure that there is something to mix.

        Raises:
            ModelError: the model has no linear layer but its head.
        """
        if not mixable(prepared.model, _names(prepared.model, prepared.always)):
            raise not_for(self.name, prepared.model, "it has no linear layer but the head")
        return prepared

    def begin(self, model: nn.Module, always: tuple[str, ...]) -> None:
        """Let the layers mix."""
        _begun[model] = mix(model, self.p, _names(model, always))

    def end(self, model: nn.Module) -> None:
        """Let the layers be what they were."""
        mixed = _begun.pop(model, None)
        if mixed is not None:
            mixed.remove()


def _names(model: nn.Module, patterns: tuple[str, ...]) -> set[str]:
    """The names of the model's own parameters that fit."""
    return {name for name, _ in model.named_parameters() if matches(canonical_name(name), patterns)}
