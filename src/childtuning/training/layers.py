"""Where the layers of a network are, found by its structure: no name of an architecture is known here."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from childtuning.child.eligible import named


@dataclass(frozen=True)
class Layers:
    """A network from its input to its output.

    Attributes:
        before: names of the parameters in front of the first layer: embeddings, a stem; embeddings that stand
            elsewhere (relative positions) among them.
        layers: per layer, its blocks' parameter names; what stands between two layers belongs to the later one.
        after: names of the parameters behind the last layer: a final norm, a pooler, the head.
        blocks: the layers' modules, without what stands between them.
    """

    before: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    after: tuple[str, ...]
    blocks: tuple[nn.Module, ...]

    def depth(self) -> dict[str, int]:
        """Return by parameter name 0 for ``before``, 1 … L for the layers, and L + 1 for ``after``."""
        groups = (self.before, *self.layers, self.after)
        return {name: depth for depth, names in enumerate(groups) for name in names}


def find_layers(model: nn.Module) -> Layers:
    """Find the repeated blocks of a network: the elements of its lists of like modules.

    Stages of a CNN (lists within lists) are taken apart into their blocks; experts and sublayers inside a block are
    not. A network without such lists has one layer a module that holds parameters of its own.

    Example:
        >>> from torch import nn
        >>> block = lambda: nn.ModuleDict({"fc": nn.Linear(2, 2)})
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([block(), block()]), nn.Linear(2, 1))
        >>> find_layers(net).layers
        (('1.0.fc.weight', '1.0.fc.bias'), ('1.1.fc.weight', '1.1.fc.bias'))
    """
    blocks = _blocks(model) or [
        module for module in model.modules() if next(module.parameters(recurse=False), None) is not None
    ]
    plain = named(model)
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for parameter in block.parameters():
            owner.setdefault(id(parameter), index)
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)
    }
    before: list[str] = []
    layers: list[list[str]] = [[] for _ in blocks]
    after: list[str] = []
    seen = -1
    for name, parameter in plain.items():
        mine = owner.get(id(parameter))
        if mine is not None:
            layers[mine].append(name)
            seen = max(seen, mine)
        elif seen < 0 or id(parameter) in embeddings:
            before.append(name)
        elif seen + 1 < len(blocks):
            layers[seen + 1].append(name)
        else:
            after.append(name)
    return Layers(tuple(before), tuple(map(tuple, layers)), tuple(after), tuple(blocks))


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks inside a module, outermost lists first."""
    found: list[nn.Module] = []
    for child in module.children():
        if _is_list_of_blocks(child):
            for element in child.children():
                found += _stage(element) or [element]
        else:
            found += _blocks(child)
    return found


def _stage(module: nn.Module) -> list[nn.Module]:
    """The blocks of a stage: a module that itself holds a list of like blocks, right inside it.

    Lists inside these are sublayers, such as the convolutions of a residual block.
    """
    return [
        element
        for child in module.children()
        if _is_list_of_blocks(child) and len(list(child.children())) > 1
        for element in child.children()
    ]


def _is_list_of_blocks(module: nn.Module) -> bool:
    elements = list(module.children())
    return (
        isinstance(module, (nn.ModuleList, nn.Sequential))
        and bool(elements)
        and len({type(element) for element in elements}) == 1
        and all(list(element.children()) and any(True for _ in element.parameters()) for element in elements)
    )
