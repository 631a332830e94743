"""Child-Tuning in a Hugging Face Accelerate training loop.

    python examples/accelerate_loop.py                           task-driven (D)
    accelerate launch examples/accelerate_loop.py --task-free    task-free (F), with your Accelerate configuration

Two things differ from the plain loop. The model is moved to its device before the optimizer is built, because the
optimizer allocates its compact tensors there. And gradients are clipped by the ChildOptimizer itself.
"""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

import childtuning as ct
from childtuning.tasks import PaddingCollator, encode, load_task
from childtuning.training import load_classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model folder or hub name; default: the packaged MiniLM")
    parser.add_argument("--task-free", action="store_true", help="F instead of D")
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--max-steps", type=int, help="default: three epochs")
    parser.add_argument("--output", type=Path, default=Path("runs/accelerate"))
    options = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=2)
    task = load_task("docstrings")
    loaded = load_classifier(options.model, num_labels=task.num_labels, label_names=task.label_names)
    model = loaded.model.to(accelerator.device)
    collate = PaddingCollator(loaded.tokenizer)
    train = encode(loaded.tokenizer, task.train, max_length=64, label_ids=task.label_ids)
    dev = encode(loaded.tokenizer, task.dev, max_length=64, label_ids=task.label_ids)

    # Every process scores the whole training set before `prepare` splits it, so all have the same child.
    head = loaded.new_parameters
    if options.task_free:
        child = ct.TaskFree(options.density, seed=0, always=head)
    else:
        fisher = ct.fisher_information(
            model, DataLoader(train, batch_size=16, collate_fn=collate), always=head
        )
        child = ct.select_child(fisher, options.density, always=head)
    accelerator.print(child)

    child_opt = ct.ChildOptimizer(
        model.named_parameters(), child, torch.optim.AdamW, lr=3e-4, weight_decay=0.01
    )
    batches = DataLoader(train, batch_size=8, shuffle=True, collate_fn=collate)
    model, opt, batches = accelerator.prepare(model, child_opt, batches)
    num_steps = options.max_steps or 3 * len(batches) // accelerator.gradient_accumulation_steps
    schedule = get_linear_schedule_with_warmup(child_opt, int(0.1 * num_steps), num_steps)

    model.train()
    step = 0
    for _epoch in count():
        for batch in batches:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.unscale_gradients(opt)
                    child_opt.clip_grad_norm_(1.0)  # not accelerator.clip_grad_norm_, which ignores the child
                opt.step()
                if accelerator.sync_gradients:
                    schedule.step()
                    step += 1
                opt.zero_grad()
            if step == num_steps:
                break
        accelerator.print(f"step {step}: loss {loss.item():.3f}")
        if step == num_steps:
            break

    model = accelerator.unwrap_model(model).eval()
    num_right = 0
    with torch.inference_mode():
        for batch in DataLoader(dev, batch_size=32, collate_fn=collate):
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            num_right += int((model(**batch).logits.argmax(1) == labels).sum())
    accelerator.print(f"accuracy {num_right / len(dev):.3f} on {len(dev)} examples")

    if accelerator.is_main_process:
        ct.Delta.capture(model, child, base=loaded.name).save(options.output)
    accelerator.print(f"delta in {options.output}")


if __name__ == "__main__":
    main()
