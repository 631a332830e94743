"""Which methods go together: one rule for each kind of part, and the pairs that need one of their own."""

from __future__ import annotations

from childtuning.training import Method

_ANCHORED = "both pull the weights towards the pretrained ones"
_PAIRS: dict[frozenset[str], str] = {
    frozenset({"l2-sp", "recadam"}): _ANCHORED,
    frozenset({"l2-sp", "mixout"}): _ANCHORED,
    frozenset({"recadam", "mixout"}): _ANCHORED,
    frozenset(
        {"child-dynamic", "l2-sp"}
    ): "entries that join the child late have no pretrained value on record",
    frozenset(
        {"child-dynamic", "recadam"}
    ): "entries that join the child late have no pretrained value on record",
    frozenset({"child-dynamic", "sam"}): "gradients at the displaced weights are no statistics of the task",
    frozenset({"child-pruned", "mixout"}): "mixout brings back the weights that were pruned",
    frozenset({"bitfit", "mixout"}): "only biases are trained, and mixout mixes weights",
    frozenset({"head", "mixout"}): "only the head is trained, and mixout mixes pretrained weights",
    frozenset({"head", "llrd"}): "there is one layer to train, so that no rate decays over layers",
}


def refusal(first: type[Method], second: type[Method]) -> str | None:
    """Return why two methods cannot be used together, or ``None`` if they can.

    Whatever is not refused composes: terms of the loss add up, and what starts, chooses and updates is independent.
    """
    if first.name == second.name:
        return "it stands twice"
    if first.part == second.part and first.part in ("child", "modules"):
        what = (
            "which parameters are trained" if first.part == "child" else "what is added to a frozen network"
        )
        return f"each says {what}"
    by_part = {first.part: first, second.part: second}
    modules = by_part.get("modules")
    if modules is not None:
        other = second if modules is first else first
        if other.acts_on_pretrained:
            return f"{other.name!r} acts on the pretrained weights, which {modules.name!r} freezes"
    return _PAIRS.get(frozenset({first.name, second.name}))
