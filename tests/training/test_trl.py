"""TRL's trainers train a child: by the factory, and mixed with ``ChildTrainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs trl")
from datasets import Dataset
from tests.tiny import WORDS, save_tiny_bert
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import childtuning as ct
from childtuning.training import ChildOptimizerFactory, ChildTrainer, ReferenceModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]  # TRL's own, of transformers' coming version
PLAIN: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


@pytest.fixture
def tokenizer(tmp_path: Path):
    found = AutoTokenizer.from_pretrained(save_tiny_bert(tmp_path / "tiny"))
    found.eos_token = "[SEP]"
    return found


def model(folder: Path) -> LlamaForCausalLM:
    """A tiny one, loaded from a folder: DPO loads its reference from there once more."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, pad_token_id=0, **sizes)).save_pretrained(folder / "llama")
    return LlamaForCausalLM.from_pretrained(folder / "llama")


def texts(number: int = 12) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (6,), generator=generator))
        for _ in range(number)
    ]


def sft(folder: Path, **more: Any) -> tuple[SFTConfig, Dataset]:
    return SFTConfig(output_dir=str(folder), **{"max_length": 16, **PLAIN, **more}), Dataset.from_dict(
        {"text": texts()}
    )


def dpo(folder: Path, **more: Any) -> tuple[DPOConfig, Dataset]:
    rows = {"prompt": texts(), "chosen": texts(13)[1:], "rejected": texts(14)[2:]}
    return DPOConfig(output_dir=str(folder), **{**PLAIN, **more}), Dataset.from_dict(rows)


def grpo(folder: Path, **more: Any) -> tuple[GRPOConfig, Dataset]:
    options = {**PLAIN, "num_generations": 4, "max_completion_length": 4, **more}
    return GRPOConfig(output_dir=str(folder), **options), Dataset.from_dict({"prompt": texts()})


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 3) for text in completions]


KINDS = {
    "sft": (SFTTrainer, sft, {}),
    "dpo": (DPOTrainer, dpo, {}),
    "grpo": (GRPOTrainer, grpo, {"reward_funcs": reward}),
}


def frozen_and_moved(net: LlamaForCausalLM, before: dict[str, torch.Tensor], child: ct.Child) -> None:
    parts = child.resolve({name: p.shape for name, p in net.named_parameters()})
    moved = 0
    for name, p in net.named_parameters():
        differs = p.detach() != before[name]
        assert not differs[~parts[name].mask()].any(), name
        moved += int(differs.sum())
    assert moved > 0


@pytest.mark.parametrize("granularity", ["element", "row"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_factory(kind: str, granularity: str, tokenizer, tmp_path: Path) -> None:
    trainer_class, make, options = KINDS[kind]
    ends = []
    for max_grad_norm in (None, 1e-3):
        net = model(tmp_path)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        child = ct.random_child(net, 0.1, granularity=granularity)
        arguments, data = make(tmp_path / "out", max_grad_norm=0.0)
        built = (
            ChildOptimizerFactory,
            {"child": child, "lr": 1e-2, "inner": torch.optim.SGD, "max_grad_norm": max_grad_norm},
        )
        trainer = trainer_class(
            net, args=arguments, train_dataset=data, processing_class=tokenizer, **options
        )
        trainer.optimizer_cls_and_kwargs = built  # SFTTrainer takes it as an argument too
        trainer.train()
        if kind != "grpo":  # a random model's rewards may all be alike, and its gradient 0
            frozen_and_moved(net, before, child)
        ends.append(sum(float((p.detach() - before[name]).norm()) for name, p in net.named_parameters()))
    if kind != "grpo":
        assert ends[1] < 0.5 * ends[0]  # max_grad_norm bites


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_with_child_trainer(kind: str, packing: bool, tokenizer, tmp_path: Path) -> None:
    trainer_class, make, options = KINDS[kind]
    if packing and kind != "sft":
        pytest.skip("only SFT packs")

    class Mixed(ChildTrainer, trainer_class):  # type: ignore[misc, valid-type]
        pass

    net = model(tmp_path)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    arguments, data = make(tmp_path / "out", **({"packing": True, "padding_free": False} if packing else {}))
    child = ct.ChildConfig(density=0.1, scores="random") if kind == "grpo" else ct.ChildConfig(density=0.1)
    trainer = Mixed(
        net, args=arguments, train_dataset=data, processing_class=tokenizer, child=child, **options
    )
    trainer.train()
    assert isinstance(trainer.child, ct.Child)
    if kind != "grpo":
        frozen_and_moved(net, before, trainer.child)
    assert trainer.delta().num_trained == trainer.child.num_trained


class ChildSFTTrainer(ChildTrainer, SFTTrainer):  # type: ignore[misc, valid-type]
    pass


def test_each_packed_sequence_is_an_example(tokenizer, tmp_path: Path) -> None:
    """12 texts lie in 4 rows; their scores are those of texts that are not packed."""
    found = []
    for packing in (False, True):
        arguments, data = sft(tmp_path / "out", packing=packing, max_length=32)
        trainer = ChildSFTTrainer(
            model(tmp_path), args=arguments, train_dataset=data, processing_class=tokenizer, child="child-d"
        )
        assert len(trainer.train_dataset) == (4 if packing else 12)
        batches = trainer._fisher_batches()
        found.append(ct.fisher_information(trainer.bare_model, batches, trainer._fisher_loss()))
        assert found[-1].num_examples == 12
    for name, plain in found[0].items():
        torch.testing.assert_close(found[1][name], plain, rtol=1e-4, atol=1e-6 * float(plain.max()))


@pytest.mark.parametrize("packing", [False, True])
def test_sft_of_a_llama_resumes_bitwise(packing: bool, tokenizer, tmp_path: Path) -> None:
    ends = []
    for resume in (False, True):
        arguments, data = sft(
            tmp_path / "out", packing=packing, max_length=32, max_steps=6, save_strategy="steps", save_steps=3
        )
        trainer = ChildSFTTrainer(
            model(tmp_path),
            args=arguments,
            train_dataset=data,
            processing_class=tokenizer,
            child=ct.ChildConfig(density=0.3, granularity="row"),
        )
        trainer.train(str(tmp_path / "out" / "checkpoint-3") if resume else None)
        ends.append([p.detach().clone() for p in trainer.bare_model.parameters()])
        assert trainer.state.global_step == 6
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("granularity", ["element", "row"])
def test_dpo_with_one_copy_is_dpo_with_two(granularity: str, tokenizer, tmp_path: Path) -> None:
    losses = []
    for shares in (False, True):
        net = model(tmp_path)
        child = ct.random_child(net, 0.3, granularity=granularity, always=("lm_head.*",))
        reference = ReferenceModel(net, child) if shares else None
        arguments, data = dpo(tmp_path / "out", max_steps=8, max_grad_norm=0.0)
        trainer = DPOTrainer(net, reference, args=arguments, train_dataset=data, processing_class=tokenizer)
        trainer.optimizer_cls_and_kwargs = (ChildOptimizerFactory, {"child": child, "lr": 1e-2})
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0][0] != losses[0][-1]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
