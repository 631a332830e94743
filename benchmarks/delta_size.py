"""Size of a delta per trained entry, beside the entropy bound and beside PEFT's SHiRA, on all-MiniLM-L6-v2.

    python benchmarks/delta_size.py --output benchmarks/results/delta-size.json

Children are chosen by Fisher information on 64 docstrings of the standard library, and at random (stored as indices,
as if the seed were unknown). The bound is H(p)/p bits an index for entries chosen independently at the child's
density, and the values' own bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.utils.data import DataLoader

import childtuning as ct
from childtuning.tasks import PaddingCollator, encode, load_task
from childtuning.training import LoadedModel, load_classifier


def measure(loaded: LoadedModel, child: ct.Child, kind: str) -> dict[str, Any]:
    """Save a delta of the child and say where its bytes go."""
    with tempfile.TemporaryDirectory() as folder:
        delta = ct.Delta.capture(loaded.model, child)
        delta.save(folder)
        sizes = {name: (Path(folder) / name).stat().st_size for name in ("delta.safetensors", "delta.json")}
        with safe_open(f"{folder}/delta.safetensors", framework="pt") as file:
            names = [name for name in file.keys() if name.endswith("::index")]  # noqa: SIM118
            index_bytes = sum(file.get_tensor(name).numel() for name in names)
    p, n = child.density, delta.num_trained
    bound = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) / p
    return {
        "kind": kind,
        "density": p,
        "trained": n,
        "bytes_per_entry": sum(sizes.values()) / n,
        "index_bits_per_entry": 8 * index_bytes / child.num_trained,
        "entropy_bits_per_entry": bound,
        "index_ratio_to_bound": 8 * index_bytes / child.num_trained / bound,
        "bound_bytes_per_entry": 4 + bound / 8,
        **sizes,
    }


def shira(loaded: LoadedModel) -> dict[str, Any]:
    """Save a SHiRA adapter of every linear layer of the encoder."""
    from peft import ShiraConfig, get_peft_model

    model = get_peft_model(loaded.model, ShiraConfig(r=8, target_modules=["query", "key", "value", "dense"]))
    trained = sum(p.numel() for name, p in model.named_parameters() if "shira_weight" in name)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return {"kind": "PEFT SHiRA", "trained": trained, "bytes_per_entry": size / trained}


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/delta-size.json"))
    given = parser.parse_args()
    task = load_task("docstrings", train_limit=64)
    loaded = load_classifier(None, num_labels=task.num_labels, label_names=task.label_names)
    encoded = encode(loaded.tokenizer, task.train, max_length=64, label_ids=task.label_ids)
    batches = DataLoader(encoded, batch_size=16, collate_fn=PaddingCollator(loaded.tokenizer))
    fisher = ct.fisher_information(loaded.model, batches, always=loaded.new_parameters)
    torch.manual_seed(0)
    random = {name: torch.rand(score.shape) for name, score in fisher.items()}
    results = [
        measure(loaded, ct.select_child(scores, density, always=loaded.new_parameters), kind)
        for density in (0.1, 0.01)
        for kind, scores in (("Fisher", fisher), ("random", random))
    ]
    results.append(shira(loaded))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(results, indent=1) + "\n")
    for row in results:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
