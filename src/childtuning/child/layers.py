"""Find the layers of a network by its structure, without the names of architectures."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from childtuning.child.eligible import named


@dataclass(frozen=True)
class Layers:
    """The parameters of a network by layer, from input to output.

    Attributes:
        before: names of the parameters before the first layer: embeddings, a stem. Includes embeddings in other
            places (relative positions).
        layers: for each layer, its parameter names; parameters between two layers belong to the later one.
        after: names of the parameters after the last layer: a final norm, a pooler, the head.
        blocks: the layers' modules, without those between layers.
    """

    before: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    after: tuple[str, ...]
    blocks: tuple[nn.Module, ...]

    def depth(self) -> dict[str, int]:
        """Return the depth of each parameter name: 0 for ``before``, 1 … L for the layers, L + 1 for ``after``."""
        groups = (self.before, *self.layers, self.after)
        return {name: depth for depth, names in enumerate(groups) for name in names}


def find_layers(model: nn.Module) -> Layers:
    """Find the repeated blocks of a network: the elements of its lists of modules of one class.

    The stages of a CNN (lists within lists) are split into their blocks; experts and sublayers inside a block are
    not. In a network without such lists, each module with parameters of its own is a layer.

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
    """The blocks of a stage: a module with a list of blocks of one class as a direct child.

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
