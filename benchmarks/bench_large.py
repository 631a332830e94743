"""The memory of training a Llama of 1.1 billion random weights, and what ``childtuning plan`` predicts of it.

A row child of 0.02 in float32 and in bf16, ten steps of 64 tokens, and the Fisher pass; two smaller pairs of model and
method beside them. Each is the peak of a process of its own, less what is resident after the imports. The model is made
in place, so that nothing but training is in the peak.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from environment import RETURNED
from record import Record
from shapes import LLAMAS, SHAPES
from timing import tell
from workers import call

_LLAMA = "llama-1.1b"
_SMALL = (("bert-base", "full", 1.0, "element"), ("minilm", "child-random", 0.1, "column"))
_WITHIN = 0.1


def run(record: Record, options: argparse.Namespace) -> None:
    """Measure and predict every pair."""
    shape, tokens = ("llama-tiny", 8) if options.quick else (_LLAMA, 64)
    for dtype, at_most in (("float32", 1.20), ("bfloat16", 1.30)):
        given = {
            "shape": shape,
            "method": "child-random",
            "density": 0.02,
            "granularity": "row",
            "dtype": dtype,
            "size": [1, tokens],
        }
        found = _measured(record, f"{shape}, {dtype}: row child 0.02", options, num_steps=10, **given)
        if found is None:
            continue
        weights = found["weight_bytes"]
        name = f"{shape}, {dtype}: peak of ten steps of {tokens} tokens, row child 0.02 ÷ weights"
        record.value(name, found["peak_bytes"] / weights, at_most=at_most, statistic="median")
        record.value(f"{name}, with Delta.capture", found["with_delta_bytes"] / weights, statistic="median")
    given = {"shape": shape, "method": "child-d", "density": 0.02, "granularity": "row", "dtype": "bfloat16"}
    found = _measured(record, f"{shape}, bfloat16: Fisher pass", options, size=[1, tokens], **given)
    if found is not None:
        name = f"{shape}, bfloat16: peak of the Fisher pass, float32 sums ÷ weights"
        record.value(name, found["peak_bytes"] / found["weight_bytes"], at_most=3.5, statistic="median")
    for shape, method, density, granularity in () if options.quick else _SMALL:
        given = {"shape": shape, "method": method, "density": density, "granularity": granularity}
        _measured(
            record,
            f"{shape}, float32: {method} {density:g}, {granularity}",
            options,
            dtype="float32",
            size=[16, 128],
            **given,
        )
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in record.facts.get("peaks", {}).values()]
    record.value(
        "largest error of the peaks that plan predicts",
        max(errors) if errors else None,
        at_most=_WITHIN,
        statistic="median",
    )


def _measured(
    record: Record, name: str, options: argparse.Namespace, num_steps: int = 3, **given: Any
) -> dict[str, Any] | None:
    """Measure a pair in a process of its own, and note what is predicted of it."""
    tell(f"  {name}")
    found = record.attempt(
        name,
        lambda: call("large-memory", options.threads, malloc=RETURNED, num_steps=num_steps, **given),
        ours=True,
    )
    if found is None:
        return None
    record.add_samples(name, [found["peak_bytes"]], "bytes")
    peaks = record.facts.setdefault("peaks", {})
    peaks[name] = {"predicted": _predicted(**given), "measured": found["peak_bytes"]}
    return found


def _predicted(shape: str, method: str, density: float, granularity: str, dtype: str, size: list[int]) -> int:
    """Ask ``plan``, which reads a configuration alone."""
    import childtuning as ct
    from childtuning.runs.plan import plan_memory

    config = ct.ChildConfig(density=density, granularity=granularity)  # type: ignore[arg-type]
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(_config(shape).to_dict()))
        (plan,) = plan_memory(
            folder,
            [method],
            None if method == "full" else config,
            task_kind=_kind(shape),
            batch_size=size[0],
            max_length=size[1],
            bf16=dtype == "bfloat16",
        )
    return plan.scoring if method == "child-d" else plan.peak


def _kind(shape: str) -> str:
    return "causal-lm" if shape.startswith("llama") else "classification"


def _config(shape: str) -> Any:
    from transformers import BertConfig, LlamaConfig

    return LlamaConfig(**LLAMAS[shape]) if shape.startswith("llama") else BertConfig(**SHAPES[shape])


def _model(shape: str, dtype: str) -> Any:
    import transformers

    torch.manual_seed(0)
    auto = "AutoModelForCausalLM" if shape.startswith("llama") else "AutoModelForSequenceClassification"
    return getattr(transformers, auto).from_config(_config(shape), dtype=getattr(torch, dtype))


def measure(
    shape: str, method: str, density: float, granularity: str, dtype: str, size: list[int], num_steps: int
) -> dict[str, Any]:
    """Train a few steps, or run the Fisher pass, in this process."""
    import peak

    from childtuning.child import random_child

    small = "llama-tiny" if shape.startswith("llama") else "tiny"
    _job(_model(small, dtype), "full", None, [2, 8])()  # the thread pools, and the libraries' own buffers
    before = peak.resident_bytes()
    model = _model(shape, dtype)
    child = None
    if method == "child-random":
        always = () if shape.startswith("llama") else ("classifier.*",)
        child = random_child(model, density, granularity=granularity, always=always)
    peak.start_peak()
    step = _job(model, method, child, size)
    for _ in range(1 if method == "child-d" else num_steps):
        step()
    found = {"peak_bytes": peak.peak_bytes() - before}
    if child is not None:
        import childtuning as ct

        delta = ct.Delta.capture(model, child)
        found["with_delta_bytes"] = peak.peak_bytes() - before
        del delta
    return {**found, "weight_bytes": sum(p.nbytes for p in model.parameters())}


def _job(model: Any, method: str, child: Any, size: list[int]) -> Callable[[], Any]:
    """Return one training step, or the Fisher pass."""
    import childtuning as ct

    ids = torch.randint(1, model.config.vocab_size, tuple(size), generator=torch.Generator().manual_seed(0))
    is_lm = model.config.model_type == "llama"
    labels = ids if is_lm else torch.zeros(size[0], dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if method == "child-d":
        return lambda: ct.fisher_information(model, [batch, batch])
    options: dict[str, Any] = {"lr": 2e-5, "weight_decay": 0.01}
    if child is None:
        optimizer = torch.optim.AdamW(model.train().parameters(), fused=True, **options)
    else:
        optimizer = ct.ChildOptimizer(
            model.train().named_parameters(),
            child,
            torch.optim.AdamW,
            release_gradients=True,
            model=model,
            **options,
        )

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
