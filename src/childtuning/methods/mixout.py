"""mixout: randomly replace weights by the pretrained ones in training, in place of dropout."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from childtuning.child.eligible import canonical_name, matches
from childtuning.errors import ConfigError
from childtuning.methods.checks import not_for
from childtuning.methods.registry import register
from childtuning.training import ChildTraining, Method, Prepared
from childtuning.training.mixed_linear import MixedLayers, mix, mixable

_mixed: WeakKeyDictionary[nn.Module, WeakKeyDictionary[ChildTraining, MixedLayers]] = WeakKeyDictionary()


@register
@dataclass(frozen=True)
class Mixout(Method):
    """In training, replace a random share p of a linear layer's weight W by the pretrained W0 in each call.

    W' = [(1−B) W0 + B W − p W0] / (1−p) with B ~ Bernoulli(1−p) for each entry, so that its mean is W. [Lee et al.
    2020] Biases, embeddings, normalisations, weights shared with an embedding, and the new head, which has no
    pretrained value, are trained as usual. Dropout is set to zero in training, including attention dropout, if it is a
    module or a float attribute of a module; a rate that a forward pass reads from the configuration is not changed.
    Saved weights and predictions use W itself. A trainer that is called again, to resume say, keeps the W0 that it
    began with.

    Args:
        p: the share, in (0, 1). The paper finds 0.7 to 0.9 best for BERT-large.
    """

    p: float = 0.7

    name = "mixout"
    summary = "randomly mix weights with pretrained ones in training, instead of dropout"
    source = "Lee et al. 2020, arXiv 1909.11299"
    trains = "as set by the other methods"
    memory = "a copy of the linear layers' weights"
    part = "start"
    acts_on_pretrained = True
    whole_gradients = True  # layers that compute gradients for rows only do not mix

    def __post_init__(self) -> None:
        if not 0 < self.p < 1:
            raise ConfigError(f"p of 'mixout' must be in (0, 1), got {self.p}. Pass a share: 0.7.")

    def prepare(self, prepared: Prepared) -> Prepared:
        """Check that there is a layer to mix.

        Raises:
            ModelError: when the model has no linear layer except its head.
        """
        if not mixable(prepared.model, _names(prepared.model, prepared.always)):
            raise not_for(self.name, prepared.model, "it has no linear layer except the head")
        return prepared

    def begin(self, trainer: ChildTraining) -> None:
        """Start mixing, with the W0 that this trainer began with."""
        model, own = trainer.bare_model, _mixed.setdefault(trainer.bare_model, WeakKeyDictionary())
        before = own[trainer].start if trainer in own else {}
        own[trainer] = mix(model, self.p, _names(model, trainer.always), before)

    def end(self, model: nn.Module) -> None:
        """Restore the layers."""
        for mixed in _mixed.get(model, {}).values():
            mixed.remove()


def _names(model: nn.Module, patterns: tuple[str, ...]) -> set[str]:
    """The names of the model's parameters that match the patterns."""
    return {name for name, _ in model.named_parameters() if matches(canonical_name(name), patterns)}
