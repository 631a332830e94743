"""adapter: small trained modules in every layer of a frozen network."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from childtuning.child.eligible import named
from childtuning.errors import ConfigError, ModelError
from childtuning.methods.checks import not_for
from childtuning.methods.registry import register
from childtuning.training import Method, Prepared, find_layers
from childtuning.training.bottleneck import (
    ACTIVATIONS,
    Bottleneck,
    Projections,
    find_projections,
    insert,
    is_linear,
)

_PLACEMENTS = ("houlsby", "pfeiffer")


@register
@dataclass(frozen=True)
class Adapter(Method):
    """h becomes h + up(activation(down(h))), with down [size, d] near zero and up [d, size] zero at the start.

    ``houlsby`` [Houlsby et al. 2019] puts one behind the attention and one behind the feed-forward of every layer,
    each before the residual sum; ``pfeiffer`` [Pfeiffer et al. 2021, arXiv 2005.00247] behind the feed-forward alone,
    with half the parameters; before the sum as well, where configurations in circulation put it behind sum and norm.
    The network is frozen; adapters, the new head and, as in the first paper, the layers'
    normalisations are trained. That paper starts ``up`` near zero; at zero, as here, training starts at exactly what
    the network computes. No gradient reaches ``down`` before ``up`` has moved, so that Fisher information ranks its
    entries last where a child is chosen among them (``child-d+adapter``).

    In a decoder layer with cross-attention, ``houlsby`` serves that one; the self-attention has no adapter.

    Args:
        size: of the bottleneck.
        placement: ``houlsby`` or ``pfeiffer``.
        activation: ``gelu``, ``relu``, ``silu`` or ``tanh``.
        norms: train the layers' normalisations; ``None``: with ``houlsby`` they are, with ``pfeiffer`` not.
    """

    size: int = 64
    placement: str = "houlsby"
    activation: str = "gelu"
    norms: bool | None = None

    name = "adapter"
    summary = "train small bottlenecks in every layer, and the head"
    source = "Houlsby et al. 2019, arXiv 1902.00751"
    trains = "bottlenecks in every layer, normalisations"
    memory = "2n state, n values"
    part = "modules"
    chooses = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"size of 'adapter' must be at least 1, got {self.size}.")
        for option, known in (("placement", _PLACEMENTS), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, option) not in known:
                raise ConfigError(
                    f"{option} of 'adapter' is one of {', '.join(known)}, got {getattr(self, option)!r}."
                )

    def prepare(self, prepared: Prepared) -> Prepared:
        """Insert the adapters and freeze the network.

        Raises:
            ModelError: a layer has no place for them, or the model has no such layers.
        """
        model = prepared.model
        if any(isinstance(module, Bottleneck) for module in model.modules()):
            raise not_for(self.name, model, "it has adapters already")
        places = [self._places(model, block) for block in find_layers(model).blocks if _has_linear(block)]
        if not places:
            raise not_for(self.name, model, "none of its layers has linear layers")
        trained: set[int] = set()
        for place in places:
            projections = [place.feed_forward]
            if self.placement == "houlsby":
                assert place.attention is not None
                projections.insert(0, place.attention)
            modules: list[nn.Module] = [
                insert(projection, self.size, self.activation) for projection in projections
            ]
            if self.norms is True or (self.norms is None and self.placement == "houlsby"):
                modules.extend(place.norms)
            trained |= {id(parameter) for module in modules for parameter in module.parameters()}
        plain = named(model)
        always = set(prepared.always)
        eligible = tuple(name for name, p in plain.items() if id(p) in trained and name not in always)
        for name, parameter in plain.items():
            if name not in always and id(parameter) not in trained:
                parameter.requires_grad_(False)
        return replace(prepared, eligible=eligible)

    def _places(self, model: nn.Module, block: nn.Module) -> Projections:
        found = find_projections(block)
        kind = type(block).__name__
        if found is None:
            raise not_for(self.name, model, f"{kind} does not end in a feed-forward's output projection")
        if found.attention is None and self.placement == "houlsby":
            fault = f"{kind} has no linear layer that can be told to be the attention's output projection"
            raise not_for(self.name, model, f"{fault}. Use placement=pfeiffer")
        return found

    def merge(self, model: nn.Module) -> nn.Module:
        """Refuse: a bottleneck is no change of weights."""
        raise ModelError(
            "what 'adapter' adds cannot be folded into the base model's weights: it is not linear. "
            "Use the run's folder."
        )


def _has_linear(block: nn.Module) -> bool:
    return any(is_linear(module) for module in block.modules())
