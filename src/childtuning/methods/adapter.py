"""adapter: small trained modules in every layer of a frozen network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import dropwhile

from torch import nn
from torch.nn.modules.conv import _ConvNd

from childtuning.child.eligible import named
from childtuning.errors import ConfigError, ModelError
from childtuning.methods.checks import layers_of, not_for
from childtuning.methods.registry import register
from childtuning.methods.whole import with_head
from childtuning.training import Method, Prepared
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
    """Replace h by h + up(activation(down(h))), with down [size, d] near zero and up [d, size] zero at the start.

    ``houlsby`` [Houlsby et al. 2019] adds one adapter after the attention and one after the feed-forward of every
    layer, each before the residual sum. ``pfeiffer`` [Pfeiffer et al. 2021, arXiv 2005.00247] adds one after the
    feed-forward only, with half the parameters; it is also before the sum, whereas common configurations put it after
    sum and norm. The network is frozen; adapters, the new head and, as in the first paper, the layers' normalisations
    are trained. That paper initialises ``up`` near zero; here it is zero, so that the initial output is exactly the
    network's. No gradient reaches ``down`` before ``up`` has changed, so that Fisher information ranks its entries
    last if a child is chosen among them (``child-d+adapter``).

    In a decoder layer with cross-attention, ``houlsby`` adapts the cross-attention and not the self-attention.

    Args:
        size: the size of the bottleneck.
        placement: ``houlsby`` or ``pfeiffer``.
        activation: ``gelu``, ``relu``, ``silu`` or ``tanh``.
        norms: train the layers' normalisations; ``None``: yes for ``houlsby``, no for ``pfeiffer``.
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
    rate = 3.0
    chooses = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"size of 'adapter' must be at least 1, got {self.size}.")
        for option, known in (("placement", _PLACEMENTS), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, option) not in known:
                raise ConfigError(
                    f"{option} of 'adapter' must be one of {', '.join(known)}, got {getattr(self, option)!r}."
                )

    def prepare(self, prepared: Prepared) -> Prepared:
        """Insert the adapters and freeze the network.

        Raises:
            ModelError: when a layer cannot take them, or the model has no suitable layers.
        """
        model = prepared.model
        if any(isinstance(module, Bottleneck) for module in model.modules()):
            raise not_for(self.name, model, "it already has adapters")
        always = with_head(prepared)
        places = [
            self._places(model, block) for block in layers_of(self.name, model).blocks if _has_linear(block)
        ]
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
        eligible = tuple(name for name, p in plain.items() if id(p) in trained and name not in always)
        for name, parameter in plain.items():
            if name not in always and id(parameter) not in trained:
                parameter.requires_grad_(False)
        return replace(prepared, always=always, eligible=eligible)

    def _places(self, model: nn.Module, block: nn.Module) -> Projections:
        found = find_projections(block)
        kind = type(block).__name__
        behind = dropwhile(lambda module: not is_linear(module), block.modules())
        own = (p for m in behind if not isinstance(m, _ConvNd) for p in m.parameters(recurse=False))
        if any(p.dim() == 3 for p in own):
            raise not_for(
                self.name, model, f"{kind} has experts that are no linear layers. Use child-d or lora"
            )
        if found is None:
            raise not_for(self.name, model, f"{kind} does not end in a feed-forward's output projection")
        if found.attention is None and self.placement == "houlsby":
            fault = f"{kind} has no linear layer that is recognised as the attention's output projection"
            raise not_for(self.name, model, f"{fault}. Use placement=pfeiffer")
        return found

    def merge(self, model: nn.Module) -> nn.Module:
        """Refuse: a bottleneck is not a change of weights."""
        raise ModelError(
            "the modules of 'adapter' cannot be merged into the base model's weights: they are not linear. "
            "Use the run's folder."
        )


def _has_linear(block: nn.Module) -> bool:
    return any(is_linear(module) for module in block.modules())
