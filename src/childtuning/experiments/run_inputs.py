"""What a run starts from: its examples and its model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from childtuning.child.eligible import match_names
from childtuning.errors import ConfigError, ModelError
from childtuning.experiments.run_config import RunConfig
from childtuning.experiments.run_start import is_model_folder
from childtuning.methods import Combination
from childtuning.tasks import Kind, Split, Task, load_task, task_from_files
from childtuning.training import LoadedModel, Prepared, load_model


def read_run_task(config: RunConfig) -> tuple[Task, Split | None]:
    """Load the examples that a run trains on and is measured on, and those of training that it sets aside."""
    # What is set aside comes first, so that it is the same for every training size; docstrings draw from a pool.
    draw_first = config.task == "docstrings" or not config.held_out
    drawn: dict[str, Any] = {
        "kind": config.task_kind,
        "train_limit": config.train_limit if draw_first else None,
        "seed": config.data_seed,
    }
    if config.task is not None:
        task = load_task(config.task, data_dir=config.data_dir, **drawn)
    else:
        assert config.train is not None and config.eval is not None
        task = task_from_files(
            config.train,
            config.eval,
            text=config.text,
            text_pair=config.text_pair,
            label=config.label,
            label_type=config.label_type,  # type: ignore[arg-type]
            **drawn,
        )
    task = task.limit_evaluation(config.eval_limit, seed=config.data_seed)
    task, aside = task.hold_out(config.held_out, config.train_limit, seed=config.data_seed)
    return task, None if aside is None else aside.sample(config.eval_limit, seed=config.data_seed)


def load_run_model(config: RunConfig, kind: Kind, label_names: Sequence[str]) -> LoadedModel:
    """Load the base model with what the kind of task needs.

    Raises:
        ModelError: it is no model for this kind of task.
    """
    name = config.model
    if config.init_from is not None and is_model_folder(config.init_from):
        if name is not None:
            raise ConfigError(
                f"init_from {config.init_from!r} is a model folder, as is model {name!r}. Pass one of them."
            )
        name = config.init_from
    if name is None and not kind.takes_packaged:
        raise ModelError(
            f"{kind.name} needs a model of its own, got none. Pass --model FOLDER or a hub name."
        )
    loaded = load_model(
        name,
        auto_model=kind.auto_model,
        auto_processor=kind.auto_processor,
        options=kind.model_options(label_names),
        processor_options=kind.processor_options,
        default_processor=kind.default_processor,
        seed=config.seed,
    )
    if loaded.new_parameters and not kind.has_new_head:
        raise ModelError(
            f"model {loaded.name!r} is not pretrained for {kind.name}: its checkpoint lacks "
            f"{loaded.new_parameters[0]!r}. Pass a model that holds it."
        )
    return loaded


def prepare_run_model(config: RunConfig, methods: Combination, loaded: LoadedModel) -> Prepared:
    """Let the methods change the loaded model, under the run's seed.

    What the user names to be trained whole stands in the new head's place from here on.

    Raises:
        ModelError: a method does not apply to this model.
        ParameterError: a pattern matches no parameter.
    """
    import transformers

    always = loaded.new_parameters
    if config.always is not None:
        names = [name for name, _ in loaded.model.named_parameters()]
        matched = match_names(config.always, names)
        always = tuple(name for name in names if name in matched)
    transformers.set_seed(config.seed)
    return methods.prepare(loaded.model, always)
