"""Fixtures that several folders of tests share."""

from __future__ import annotations

import gc
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tests.tiny import WORDS, save_tiny_bert

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with the most slow tests first, so that no worker is left alone with one of them at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


_frozen = 0  # the number of modules when the garbage collector was last told to leave what there is alone


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Keep what imports have made from the garbage collector, which every ``Trainer.train()`` runs in full."""
    global _frozen
    if len(sys.modules) != _frozen:
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tiny random BERT."""
    return save_tiny_bert(tmp_path_factory.mktemp("tiny") / "bert")


@pytest.fixture(scope="session")
def sentiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl and dev.jsonl: sentences of tiny_bert's words, labelled good or bad."""
    folder = tmp_path_factory.mktemp("sentiment")
    rng = random.Random(0)
    for name, count in (("train", 96), ("dev", 24)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for index in range(count):
                words = [*rng.choices(WORDS, k=rng.randint(2, 12)), "great" if index % 2 else "awful"]
                rng.shuffle(words)
                row = {"text": " ".join(words), "label": "good" if index % 2 else "bad"}
                file.write(json.dumps(row) + "\n")
    return folder
