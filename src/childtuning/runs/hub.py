"""A finished run for others: in a folder, or on the Hugging Face hub, with a model card and a certificate.

What is published names no path of this machine and holds no example.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from childtuning.child.files import read_json
from childtuning.delta import Delta
from childtuning.errors import ChildTuningError, ConfigError, ModelError
from childtuning.runs.certify import certify
from childtuning.runs.config import RunConfig
from childtuning.runs.folder import CONFIG, DATA, LABELS, METHOD_FILES, METRICS, START, write_json, write_text
from childtuning.runs.inputs import is_model_folder
from childtuning.training.checkpoint_files import CHILD_FILE
from childtuning.training.export import check_empty
from childtuning.training.models import PACKAGED_NAME

_HUB = re.compile(r"hf:/{1,2}([^@]+)(?:@(.+))?")  # pathlib makes one slash of two
_PACKAGED = f"sentence-transformers/{PACKAGED_NAME}"
_OF_EXAMPLES = ("errors", "answers", "understood", "notes")
_TRAINER_FILES = (
    "config.json", "generation_config.json", "child.json", "tokenizer*", "vocab*", "merges.txt", "spiece.model",
    "sentencepiece*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip
_PIPELINES = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageClassification": "image-classification",
}


def publish(run: Any, folder: str | Path, *, base: str | None = None, name: str | None = None) -> Path:
    """Write what others need to use a run, and to check it, to a folder.

    Args:
        run: a ``FinishedRun``; its delta is written, not its base model.
        folder: new or empty.
        base: the base model's name on the hub; by default the one that the run was trained with.
        name: what the model card calls the run, and loads it by; by default OWNER and the run's name.
    Raises:
        ConfigError: the folder is not empty, or the base model is one of this machine and ``base`` is not given.
    """
    folder = Path(folder).expanduser()
    check_empty(folder)
    run.check_sound()
    base = _base_name(run, base)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _write(run, folder, base, name or f"hf://OWNER/{run.path.resolve().name}")
    except BaseException:
        shutil.rmtree(folder)
        raise
    return folder


def _write(run: Any, folder: Path, base: str, name: str) -> None:
    replace(run.delta, base={**run.delta.base, "name": base}).save(folder)
    if (run.path / CHILD_FILE).is_file():
        shutil.copyfile(run.path / CHILD_FILE, folder / CHILD_FILE)
    if (run.path / CONFIG).is_file():
        _write_run(run, folder, base)
    else:
        files = {path for pattern in _TRAINER_FILES for path in run.path.glob(pattern) if path.is_file()}
        for path in files:
            shutil.copyfile(path, folder / path.name)
    root = None
    try:
        made = certify(run, folder, base)
        made.save(folder / "certificate")
        root = made.root
    except ModelError as fault:
        run.tell(f"there is no certificate: {fault}")
    write_text(folder / "README.md", _card(run, name, base, root))


def push(
    run: Any,
    repo_id: str,
    *,
    base: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Publish a run on the hub; arguments as for ``FinishedRun.push_to_hub``."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import validate_repo_id

    with _told(repo_id):
        validate_repo_id(repo_id)
    _base_name(run, base)
    if token is None and get_token() is None:
        raise ConfigError("the hub needs a token to write, got none. Log in with `hf auth login`.")
    api = HfApi(token=token)
    with TemporaryDirectory() as place:
        publish(run, place, base=base, name=f"hf://{repo_id}")
        with _told(repo_id):
            api.create_repo(repo_id, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo_id,
                folder_path=place,
                revision=revision,
                commit_message=f"A child of {_base_name(run, base)}",
            )
    return str(getattr(done, "commit_url", "")) or repo_id


def local_folder(path: str | Path) -> Path:
    """Return a run's folder: itself, or this machine's copy of ``hf://OWNER/NAME`` or ``hf://OWNER/NAME@REVISION``.

    Raises:
        ConfigError: the hub has no such repository, or cannot be reached.
    """
    found = _HUB.fullmatch(str(path))
    if found is None:
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download

    with _told(found[1]):
        return Path(snapshot_download(found[1], revision=found[2]))


@contextmanager
def _told(repo_id: str) -> Iterator[None]:
    """Turn what the hub's library raises into one line."""
    try:
        yield
    except ChildTuningError:
        raise
    except Exception as fault:  # of the library, of its HTTP client, of the network
        if not type(fault).__module__.startswith(("huggingface_hub", "httpx", "httpcore", "requests")):
            raise
        reason = " ".join(str(fault).split())[:300]
        raise ConfigError(
            f"the hub does not give {repo_id!r} ({type(fault).__name__}: {reason}). Check the name, the token and the "
            "network."
        ) from None


def _base_name(run: Any, base: str | None) -> str:
    """Return the name that others load the base model by."""
    if base is not None:
        return base
    name = run.about["base_name"]
    if name in (None, PACKAGED_NAME):
        return _PACKAGED if name else ""
    if Path(name).expanduser().exists() or Path(name).is_absolute():
        raise ConfigError(
            f"the base model is the folder {str(name)!r}, which others do not have. "
            "Pass base (--base), its name on the hub."
        )
    return name


def _write_run(run: Any, folder: Path, base: str) -> None:
    """Write a run's files without examples and without paths."""
    config = run.config
    bare: dict[str, str | None] = {
        field: Path(value).name
        for field in ("train", "eval")
        if isinstance(value := getattr(config, field), str)
    }
    if config.init_from is not None:
        bare["init_from"] = None if is_model_folder(config.init_from) else START
    model = None if run.about["base_name"] == PACKAGED_NAME else base
    told: RunConfig = replace(config, data_dir=None, report_to=None, model=model, **bare)  # type: ignore[arg-type]
    write_text(folder / CONFIG, told.to_toml())
    write_json(folder / LABELS, {**run.about, "base_name": base if model else PACKAGED_NAME})
    kept = {key: value for key, value in run.metrics.items() if key not in _OF_EXAMPLES}
    write_json(folder / METRICS, {**kept, "output": None})
    if (run.path / DATA).is_file():
        hashes = read_json(run.path / DATA)
        write_json(folder / DATA, {Path(path).name: digest for path, digest in hashes.items()})
    for inside in (run.kind.processor_folder, METHOD_FILES):
        if (run.path / inside).is_dir():
            shutil.copytree(run.path / inside, folder / inside, ignore=shutil.ignore_patterns("README.md"))
    adapter = folder / METHOD_FILES / "adapter_config.json"
    if adapter.is_file():
        write_json(adapter, {**read_json(adapter), "base_model_name_or_path": base})
    if (run.path / START).is_dir():
        start = Delta.load(run.path / START)
        replace(start, base={**start.base, "name": base}).save(folder / START)


def _card(run: Any, name: str, base: str, root: str | None) -> str:
    """Return the model card: how it was made, how good it is, how to load it and how to check it."""
    from huggingface_hub import EvalResult, ModelCardData

    metrics: Mapping[str, float] = run.metrics["metrics"]
    is_run = (run.path / CONFIG).is_file()
    data = run.config.task or Path(run.config.train or "").name if is_run else "data of one's own"
    measured = data
    if is_run and run.config.task is None:
        how = "held out" if run.config.folds is None else "in cross-validation"
        measured = Path(run.config.eval).name if run.config.eval else f"{data}, {how}"
    pipeline = _PIPELINES.get(run.kind.auto_model)
    title = name.removeprefix("hf://")
    results = [
        EvalResult(pipeline or run.kind.name, measured, measured, key, value)
        for key, value in metrics.items()
    ]
    about = ModelCardData(
        base_model=base or None,
        library_name="childtuning",
        pipeline_tag=pipeline,
        tags=["child-tuning", "sparse-fine-tuning"],
        model_name=title if results else None,
        eval_results=results or None,
    )
    delta = run.delta
    entries = sum(part.numel for part in delta.parts.values())
    lines = [
        "---",
        about.to_yaml(),
        "---",
        f"# {title}",
        "",
        f"A child of `{base}`: {delta.num_trained:,} of {entries:,} weights "
        f"({delta.num_trained / max(entries, 1):.2%}) were trained, with method `{run.method}`. All others are the "
        "base model's, bit for bit. This repository holds the trained values alone.",
        "",
        "```python",
        "import childtuning",
        "",
        f'run = childtuning.load("{name}")',
        'run.predict(["…"])' if pipeline != "image-classification" else 'run.predict("images/")',
        "```",
        "",
        "| measured on | metric | value | 95% interval |",
        "|---|---|---|---|",
    ]
    ends = run.metrics.get("interval")
    for index, (key, value) in enumerate(metrics.items()):
        interval = f"{ends[0]:.4f} to {ends[1]:.4f}" if index == 0 and ends else ""
        lines.append(
            f"| {run.metrics.get('eval_examples', '')} examples of {measured} | {key} | {value:.4f} | {interval} |"
        )
    if not metrics:
        del lines[-2:]
    if is_run:
        found = run.config
        facts = {
            "data": f"{data}, {run.metrics.get('train_examples', '?')} training examples",
            "classes": ", ".join(run.label_names[:20]) or "none",
            "method": f"{run.method}, density {run.metrics['density']:.4g}",
            "training": f"learning rate {found.learning_rate}, {found.epochs} epochs, batches of {found.batch_size}, "
            f"seed {found.seed}",
            "longest input": f"at most {found.max_length} tokens",
        }
        lines += ["", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())]
    if root is not None:
        lines += [
            "",
            f"`certificate/` says which weights may differ from the base model's; its root is `{root}`. To check an "
            "exported model:",
            "",
            "```bash",
            f"childtuning export {name} --output model",
            "childtuning verify certificate --base BASE_FOLDER --model model",
            "```",
        ]
    return "\n".join(lines) + "\n"
