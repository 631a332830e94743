"""Child-Tuning in a plain PyTorch training loop.

    python examples/plain_pytorch.py               task-driven (D): a fixed child, chosen by Fisher information
    python examples/plain_pytorch.py --task-free   task-free (F): a fresh random mask at every step

The task is to predict the topic of a docstring from Python's standard library. The model is the packaged MiniLM, or
any folder given with --model.
"""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

import childtuning as ct
from childtuning.tasks import LengthBucketBatches, PaddingCollator, encode, load_task
from childtuning.training import load_classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model folder or hub name; default: the packaged MiniLM")
    parser.add_argument("--task-free", action="store_true", help="F instead of D")
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--max-steps", type=int, help="default: three epochs")
    parser.add_argument("--output", type=Path, default=Path("runs/plain-pytorch"))
    options = parser.parse_args()

    # Data and model: nothing here is specific to Child-Tuning.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = load_task("docstrings")
    loaded = load_classifier(options.model, num_labels=task.num_labels, label_names=task.label_names)
    model = loaded.model.to(device)
    train = encode(loaded.tokenizer, task.train, max_length=64, label_ids=task.label_ids)
    dev = encode(loaded.tokenizer, task.dev, max_length=64, label_ids=task.label_ids)
    sampler = LengthBucketBatches(train.lengths, batch_size=16, seed=0)
    batches = DataLoader(train, batch_sampler=sampler, collate_fn=PaddingCollator(loaded.tokenizer))
    num_steps = options.max_steps or 3 * len(batches)

    # The child. The new head is always trained whole; the child is chosen from the pretrained parameters.
    head = loaded.new_parameters
    if options.task_free:
        child = ct.TaskFree(options.density, seed=0, always=head)
    else:
        fisher = ct.fisher_information(model, batches, always=head)
        child = ct.select_child(fisher, options.density, always=head)
    print(child)

    # The optimizer takes named parameters, the child, and any element-wise torch optimizer with its options.
    opt = ct.ChildOptimizer(model.named_parameters(), child, torch.optim.AdamW, lr=3e-4, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(opt, int(0.1 * num_steps), num_steps)
    print(f"optimizer state: {opt.num_state_bytes:,} bytes before the first step")

    model.train()
    step = 0
    for epoch in count():
        sampler.set_epoch(epoch)
        for batch in batches:
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            loss.backward()
            opt.clip_grad_norm_(
                1.0
            )  # instead of torch.nn.utils.clip_grad_norm_: takes the child into account
            opt.step()
            schedule.step()
            opt.zero_grad()
            step += 1
            if step == num_steps:
                break
        print(f"step {step}: loss {loss.item():.3f}")
        if step == num_steps:
            break

    # Evaluate.
    model.eval()
    num_right = 0
    with torch.inference_mode():
        for batch in DataLoader(dev, batch_size=32, collate_fn=PaddingCollator(loaded.tokenizer)):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            num_right += int((model(**batch).logits.argmax(1) == labels).sum())
    print(f"accuracy {num_right / len(dev):.3f} on {len(dev)} examples")

    # Save only what was trained; `ct.Delta.load(folder).apply_(model)` applies it to a base model.
    ct.Delta.capture(model, child, base=loaded.name).save(options.output)
    print(f"delta in {options.output}")


if __name__ == "__main__":
    main()
