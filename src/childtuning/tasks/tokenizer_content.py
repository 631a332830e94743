"""What a tokenizer is, as text: equal for tokenizers that make the same tokens of every text, wherever they lie."""

from __future__ import annotations

import json
import re
from typing import Any

# Where it came from, what is told of it, and what it does besides making tokens.
_NOT_DECIDING = {
    "_in_target_context_manager",
    "_processor_class",
    "_tokenizer",  # looked at on its own, as are the vocabulary and merges that it was made of
    "_merges",
    "_vocab",
    "deprecation_warnings",
    "files_loaded",
    "init_inputs",
    "init_kwargs",
    "name_or_path",
    "padding_side",
    "verbose",
}
# What the latest call left behind: each call sets both anew.
_OF_THE_LATEST_CALL = re.compile(
    r'(?<=^\{"version":"1\.0",)"truncation":(?:null|\{[^{}]*\}),"padding":(?:null|\{(?:[^{}]|\{[^{}]*\})*\}),'
)


def tokenizer_content(tokenizer: Any) -> str | None:
    """Return a tokenizer's content: its backend's own JSON, its class and its settings, but not its path.

    Returns:
        None for a tokenizer that this does not describe: one in Python, of another package's class, one that draws at
        random (BPE dropout), or one with settings that are no data.
    """
    if not getattr(tokenizer, "is_fast", False) or type(tokenizer).__module__.split(".")[0] != "transformers":
        return None
    backend = tokenizer.backend_tokenizer
    if any(getattr(backend.model, name, None) for name in ("dropout", "alpha")):
        return None
    settings = {
        name: value
        for name, value in vars(tokenizer).items()
        if name not in _NOT_DECIDING and not name.endswith("_file")
    }
    kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    try:
        inner = _OF_THE_LATEST_CALL.sub("", backend.to_str(), count=1)
        return json.dumps([kind, inner, settings], default=_as_data, sort_keys=True)
    except Exception:  # a part in Python: the backend says so by a bare Exception
        return None


def _as_data(value: Any) -> Any:
    from tokenizers import AddedToken

    if isinstance(value, AddedToken):
        return repr(value)  # its flags and its text
    raise TypeError(f"{type(value).__name__} is no data")
