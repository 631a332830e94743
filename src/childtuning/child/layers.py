"""Find the layers of a network by its structure, without the names of architectures."""

from __future__ import annotations

from collections.abc import Iterable
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
        beside: names of lists of blocks of one length in one module; whether their blocks take turns (attention and
            feed-forward, say) or follow list by list cannot be told, and the layers are in the order of the lists.
    """

    before: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    after: tuple[str, ...]
    blocks: tuple[nn.Module, ...]
    beside: tuple[str, ...] = ()

    def depth(self) -> dict[str, int]:
        """Return the depth of each parameter name: 0 for ``before``, 1 … L for the layers, L + 1 for ``after``."""
        groups = (self.before, *self.layers, self.after)
        return {name: depth for depth, names in enumerate(groups) for name in names}


def find_layers(model: nn.Module) -> Layers:
    """Find the repeated blocks of a network: the elements of its lists of modules of one class.

    The stages of a CNN (lists within lists) are split into their blocks; experts and sublayers inside a block are
    not. A list of several classes counts where each is a layer of transformers (hybrids of attention and state space).
    In a network without such lists, each module with parameters of its own is a layer.

    Example:
        >>> from torch import nn
        >>> block = lambda: nn.ModuleDict({"fc": nn.Linear(2, 2)})
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([block(), block()]), nn.Linear(2, 1))
        >>> find_layers(net).layers
        (('1.0.fc.weight', '1.0.fc.bias'), ('1.1.fc.weight', '1.1.fc.bias'))
    """
    blocks = _blocks(model)
    hybrid = _blocks(model, of_one_class=False)
    inside = {id(module) for block in hybrid for module in list(block.modules())[1:]}
    if inside.issuperset(map(id, blocks)):  # what was found is part of these, if anything was
        blocks = hybrid
    blocks = blocks or [
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
    return Layers(
        tuple(before), tuple(map(tuple, layers)), tuple(after), tuple(blocks), _beside(model, blocks)
    )


def _blocks(module: nn.Module, *, of_one_class: bool = True) -> list[nn.Module]:
    """The blocks inside a module, outermost lists first."""
    found: list[nn.Module] = []
    for child in module.children():
        if _is_list_of_blocks(child, of_one_class=of_one_class):
            for element in child.children():
                found += _stage(element) or [element]
        else:
            found += _blocks(child, of_one_class=of_one_class)
    return found


def _stage(module: nn.Module) -> list[nn.Module]:
    """The blocks of a stage: a module with a list of blocks of one class as a direct child, or such a list itself.

    Lists inside these are sublayers, such as the convolutions of a residual block. So is a list among more than two
    other modules, where a stage has what comes before and after its blocks.
    """
    if isinstance(module, nn.ModuleList):
        return list(module.children()) if _is_list_of_blocks(module) else []
    lists = [
        child for child in module.children() if _is_list_of_blocks(child) and len(list(child.children())) > 1
    ]
    others = [child for child in module.children() if child not in lists and _has_parameters(child)]
    return [element for child in lists for element in child.children()] if len(others) <= 2 else []


def _is_list_of_blocks(module: nn.Module, *, of_one_class: bool = True) -> bool:
    elements = list(module.children())
    is_list = isinstance(module, (nn.ModuleList, nn.Sequential)) and bool(elements)
    if not (is_list and all(list(element.children()) and _has_parameters(element) for element in elements)):
        return False
    if len({type(element) for element in elements}) == 1:
        return True
    return not of_one_class and all(map(_is_declared, elements))


def _is_declared(module: nn.Module) -> bool:
    """Whether transformers says that a module is a layer."""
    return any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__)


def _beside(model: nn.Module, blocks: Iterable[nn.Module]) -> tuple[str, ...]:
    """The first lists of blocks of one length that lie in one module, outside the blocks."""
    inside = {id(module) for block in blocks for module in block.modules()}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):  # lists in a list come one after the other
            continue
        lists = [
            (name, len(child))
            for name, child in module.named_children()
            if isinstance(child, nn.ModuleList) and len(child) > 1 and _is_list_of_blocks(child)
        ]
        for _, size in lists:
            same = [name for name, length in lists if length == size]
            if len(same) > 1 and id(module) not in inside:
                return tuple(".".join(filter(None, (path, name))) for name in same)
    return ()


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
