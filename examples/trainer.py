"""Child-Tuning with the Hugging Face Trainer: `ChildTrainer` takes one extra argument.

python examples/trainer.py               task-driven (D)
python examples/trainer.py --task-free   task-free (F)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import EvalPrediction, TrainingArguments

import childtuning as ct
from childtuning.tasks import PaddingCollator, encode, load_task
from childtuning.training import ChildTrainer, load_classifier


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model folder or hub name; default: the packaged MiniLM")
    parser.add_argument("--task-free", action="store_true", help="F instead of D")
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--max-steps", type=int, default=-1, help="default: three epochs")
    parser.add_argument("--output", type=Path, default=Path("runs/trainer"))
    options = parser.parse_args()

    task = load_task("docstrings")
    loaded = load_classifier(options.model, num_labels=task.num_labels, label_names=task.label_names)
    trainer = ChildTrainer(
        loaded.model,
        TrainingArguments(
            output_dir=str(options.output),
            per_device_train_batch_size=16,
            num_train_epochs=3,
            max_steps=options.max_steps,
            learning_rate=3e-4,
            weight_decay=0.01,
            warmup_steps=0.1,  # below 1: a share of the steps
            save_strategy="epoch",  # `trainer.train(resume_from_checkpoint=True)` continues from it
            save_total_limit=1,
            logging_steps=10,
            report_to="none",
            dataloader_pin_memory=False,
        ),
        train_dataset=encode(loaded.tokenizer, task.train, max_length=64, label_ids=task.label_ids),
        eval_dataset=encode(loaded.tokenizer, task.dev, max_length=64, label_ids=task.label_ids),
        data_collator=PaddingCollator(loaded.tokenizer),
        processing_class=loaded.tokenizer,
        compute_metrics=accuracy,
        child=ct.ChildConfig(
            variant="task-free" if options.task_free else "task-driven", density=options.density
        ),
        base_name=loaded.name,
    )
    trainer.train()
    print(trainer.select())
    print(trainer.evaluate())
    trainer.save_model()  # the delta, the child, the model's configuration and the tokenizer
    print(f"delta in {options.output}")


if __name__ == "__main__":
    main()
