"""A large model on its way to production: exporting it, switching between children of it, and what they take.

A Llama of 1.1 billion random bf16 weights in shards of 500 MB, with children of 1 % of single entries. The export runs
in a process of its own, which holds neither the base model nor the tuned one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from environment import RETURNED
from peak import peak_bytes, resident_bytes, start_peak
from record import Record
from recorded_runs import folder_bytes
from shapes import LLAMAS
from timing import tell
from workers import call

from childtuning import Child, ChildSwitch, Delta, random_child

_DENSITIES = (0.01, 0.001)
_CHILDREN = 10
_KINDS = ("element", "row")


def run(record: Record, options: argparse.Namespace) -> None:
    """Make the model and its children, and measure what they take."""
    shape, repeats = ("llama-tiny", 2) if options.quick else ("llama-1.1b", options.repeats or 5)
    with TemporaryDirectory(dir=Path.cwd()) as place:
        folder = Path(place)
        tell(f"  {shape}: a base model and {_CHILDREN} children")
        facts = call("serving-files", options.threads, malloc=RETURNED, shape=shape, folder=str(folder))
        record.facts[shape] = facts
        tell(f"  {shape}: export")
        found = record.attempt(
            "export",
            lambda: call("serving-export", options.threads, malloc=RETURNED, folder=str(folder)),
            ours=True,
        )
        if found is not None:
            facts |= found
            allowed = 2 * facts["largest_shard_bytes"] + facts["delta_bytes"]["0.01"]
            record.value(
                f"{shape}: peak of an export ÷ (twice the largest shard + the delta)",
                found["export_peak_bytes"] / allowed,
                at_most=None if options.quick else 1.0,
                statistic="median",
            )
        tell(f"  {shape}: switches")
        switched = record.attempt(
            "switch",
            lambda: call(
                "serving-switch", options.threads, malloc=RETURNED, folder=str(folder), repeats=repeats
            ),
            ours=True,
        )
        if switched is None:
            return
        facts |= switched["facts"]
        record.add_samples(f"{shape}: loading the model", switched["load"], "s")
        for kind in _KINDS:
            name = f"{shape}: from one {kind} child of 1 % to another"
            record.add_samples(name, switched[kind], "s")
            record.ratio(
                f"{shape}: a switch of {kind} children ÷ loading the model",
                name,
                f"{shape}: loading the model",
                at_most=None if options.quick else 0.05,
            )
        record.value(
            f"{shape}: resident bytes of {_CHILDREN} children ÷ (entries · (2 + 4))",
            facts["children_bytes"] / (6 * facts["children_entries"]),
            at_most=None if options.quick else 1.25,
            statistic="median",
        )


def make_files(shape: str, folder: str) -> dict[str, Any]:
    """Write the base model, deltas of both densities with moved values, and a LoRA adapter; return their sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    place, config = Path(folder), LlamaConfig(**LLAMAS[shape])
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(default)
    model.save_pretrained(place / "base", max_shard_size="500MB")
    found: dict[str, Any] = {"delta_bytes": {}, "patch_bytes": {}}
    for density in _DENSITIES:
        delta = _moved(model, random_child(model, density, seed=0))
        delta.save(place / f"delta-{density:g}")
        found["delta_bytes"][f"{density:g}"] = folder_bytes(place / f"delta-{density:g}")
        found["patch_bytes"][f"{density:g}"] = _patch_bytes(delta, model, place)
    shards = [path.stat().st_size for path in (place / "base").glob("*.safetensors")]
    return found | {
        "model_bytes": sum(shards),
        "largest_shard_bytes": max(shards),
        "num_shards": len(shards),
        "parameters": sum(p.numel() for p in model.parameters()),
        "lora_16_bytes": _lora_bytes(model, place),
    }


def _moved(model: Any, child: Child) -> Delta:
    """Return a delta whose values are others than the model's, with stored positions."""
    delta = Delta.capture(model, Child(child.parts))
    for value in delta.values.values():
        value.add_(1.0)
    return delta


def _patch_bytes(delta: Delta, model: Any, place: Path) -> int:
    from childtuning.training import make_patch

    make_patch(delta, model, place / "base").save(place / "patch")
    return folder_bytes(place / "patch")


def _lora_bytes(model: Any, place: Path) -> int:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        model, LoraConfig(r=16, target_modules="all-linear"), autocast_adapter_dtype=False
    )
    adapted.save_pretrained(place / "lora")
    return folder_bytes(place / "lora")


def export(folder: str) -> dict[str, Any]:
    """Export the model with the larger delta; return the peak less what was resident before."""
    from transformers import AutoConfig, LlamaForCausalLM

    from childtuning.training import make_patch, write_model

    place = Path(folder)
    with torch.device("meta"):
        bare = LlamaForCausalLM(AutoConfig.from_pretrained(place / "base"))
    before = resident_bytes()
    start_peak()
    delta = Delta.load(place / "delta-0.01")
    write_model(make_patch(delta, bare, place / "base"), bare, place / "base", place / "exported")
    return {"export_peak_bytes": peak_bytes() - before}


def switch(folder: str, repeats: int) -> dict[str, Any]:
    """Time loading the model and switching between two children; count what ten children take."""
    from transformers import LlamaForCausalLM

    base = Path(folder) / "base"
    load: list[float] = []
    switched: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    model = None
    for _ in range(repeats):
        del model
        start = time.perf_counter()
        model = _in_memory(LlamaForCausalLM.from_pretrained(base))
        load.append(time.perf_counter() - start)
    assert model is not None
    before = resident_bytes()
    held = ChildSwitch(model)
    entries = 0
    for seed in range(_CHILDREN):
        delta = _moved(model, random_child(model, _DENSITIES[0], seed=seed))
        entries += delta.num_trained
        held.add(f"element {seed}", delta, check=False)
    del delta
    taken = resident_bytes() - before
    for seed in range(2):
        child = random_child(model, _DENSITIES[0], seed=seed, granularity="row")
        held.add(f"row {seed}", _moved(model, child), check=False)
    for i in range(2 * repeats):
        for kind in _KINDS:
            held.activate(f"{kind} {i % 2}")
            start = time.perf_counter()
            held.activate(f"{kind} {(i + 1) % 2}")
            switched[kind].append(time.perf_counter() - start)
    facts = {"children_bytes": taken, "children_entries": entries, "held_bytes": held.num_bytes}
    return {"load": load, **switched, "facts": facts}


def _in_memory(model: Any) -> Any:
    """Return a model whose weights are read: it is mapped from its files until then."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model
