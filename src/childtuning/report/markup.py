"""HTML and SVG elements as text; everything that is not an element is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

_VOID = {"meta", "link", "br", "input", "circle", "line", "path", "rect", "use"}

Child = Any  # an element, text, a number, None for nothing, or any number of these


class Markup(str):
    """Text that already is markup."""

    __slots__ = ()


def el(tag: str, /, *children: Child, **attributes: Any) -> Markup:
    """Return an element.

    Args:
        tag: its name.
        children: elements are kept as they are, anything else is escaped text, ``None`` is left out, and lists are
            flattened.
        attributes: ``None`` and ``False`` are left out, ``True`` gives an attribute without a value; ``class_`` becomes
            ``class``, and ``_`` in a name becomes ``-``.
    """
    words = [tag]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{html.escape(str(value))}"')
    opening = f"<{' '.join(words)}>"
    if tag in _VOID:
        return Markup(opening[:-1] + "/>")
    return Markup(f"{opening}{join(children)}</{tag}>")


def join(children: Iterable[Child]) -> Markup:
    """Return elements and texts, concatenated."""
    return Markup("".join(_texts(children)))


def raw_text(text: str) -> Markup:
    """Return the content of a style or script element, which HTML does not unescape.

    Raises:
        ValueError: the text would end its element.
    """
    if "</" in text or "<!--" in text:
        raise ValueError("text of a script or style must not hold '</' or '<!--'.")
    return Markup(text)


def _texts(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if isinstance(child, Markup):
            yield child
        elif isinstance(child, str):
            yield html.escape(child, quote=False)
        elif isinstance(child, Iterable):
            yield from _texts(child)
        elif child is not None:
            yield html.escape(str(child), quote=False)
