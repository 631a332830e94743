"""Terms of the loss on networks of every kind: what is perturbed, which predictions count, what stays behind."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.methods.trainers import method_trainer
from tests.reference import loss_terms as twin
from torch import Tensor, nn

from childtuning.errors import ModelError
from childtuning.methods.divergence import divergence
from childtuning.methods.perturbation import perturbed_logits
from childtuning.training import ChildTrainer, LossStep

Batch = dict[str, Tensor]
SMALL: dict[str, Any] = {"vocab_size": 30, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
TEXT = SMALL | {"intermediate_size": 8, "initializer_range": 0.5}
TERMS = "r3f:weight=2,eps=0.5+r-drop:4+smart:weight=3,step=0.3,noise_variance=0.1,epsilon=0.25"


def random_ids(*shape: int) -> Tensor:
    return torch.randint(1, 30, shape, generator=torch.Generator().manual_seed(0))


def labelled_tokens() -> Batch:
    labels = random_ids(3, 7)
    labels[0, :4] = labels[1, 5:] = labels[2, 0] = -100
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": random_ids(3, 7), "attention_mask": mask, "labels": labels}


def images() -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2, 1])}


def gpt2() -> Any:
    options: dict[str, Any] = {
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    }
    config = transformers.GPT2Config(vocab_size=30, initializer_range=0.5, **options)
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))


def tagger() -> Any:
    options = TEXT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 30}
    return transformers.BertForTokenClassification(transformers.BertConfig(**options))


def vit() -> Any:
    options = TEXT | {"image_size": 32, "patch_size": 16, "num_labels": 3, "hidden_dropout_prob": 0.0}
    del options["vocab_size"]
    return transformers.ViTForImageClassification(transformers.ViTConfig(**options))


def resnet() -> Any:
    options: dict[str, Any] = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "num_labels": 3}
    config = transformers.ResNetConfig(layer_type="basic", **options)
    return transformers.ResNetForImageClassification(config)


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Batch], Callable[..., Tensor] | None]] = {
    "gpt2": (gpt2, labelled_tokens, twin.per_next_token),
    "llama": (llama, labelled_tokens, twin.per_next_token),
    "tagger": (tagger, labelled_tokens, twin.per_tag),
    "vit": (vit, images, None),
    "resnet": (resnet, images, None),
}


def a_trainer(model: nn.Module, output: Path, method: str = TERMS, **options: Any) -> ChildTrainer:
    trainer = method_trainer(model, output, method, save_strategy="no", **options)
    trainer.bare_model.train()
    return trainer


def a_step(model: nn.Module, batch: Batch) -> LossStep:
    outputs = model(**batch)
    return LossStep(model, batch, outputs, torch.zeros(()), lambda *_: (torch.zeros(()), outputs))


@pytest.mark.parametrize("case", list(CASES))
def test_terms_and_gradients_are_the_twins(tmp_path: Path, case: str) -> None:
    make, batch_fn, per_token = CASES[case]
    torch.manual_seed(1)
    ours, batch = make().double().train(), batch_fn()
    theirs = copy.deepcopy(ours)
    apart: Any = partial(twin.per_example, pair=twin.both_ways)
    if per_token is not None:
        apart = partial(per_token, pair=twin.both_ways, labels=batch["labels"])
    trainer = a_trainer(ours, tmp_path)
    torch.manual_seed(2)
    loss = trainer.compute_loss(ours, dict(batch))
    loss.backward()
    torch.manual_seed(2)
    outputs = theirs(**batch)
    statistics = {name: buffer.clone() for name, buffer in theirs.named_buffers()}
    r3f = twin.r3f(theirs, batch, outputs.logits, apart, eps=0.5, noise="uniform")
    smart = twin.smart(theirs, batch, outputs.logits, apart, eta=0.3, sd=0.1, epsilon=0.25, order=math.inf)
    expected = outputs.loss + 2 * r3f + 3 * smart  # without dropout r-drop's two passes are one
    expected.backward()
    rounding = 1e-5 if case == "llama" else 1e-9  # its norms compute in float32 whatever they are given
    assert loss.item() == pytest.approx(expected.item(), rel=rounding)
    assert r3f.item() > 5e-4 and smart.item() > 5e-4
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=rounding, atol=rounding)
    for name, buffer in ours.named_buffers():  # those of one pass over the images as they are
        assert torch.equal(buffer, statistics[name]), name
    assert not any(module._forward_hooks for module in ours.modules())


def test_a_language_models_batches_count_by_their_tokens(tmp_path: Path) -> None:
    """Where the model divides by the tokens of all accumulated batches, so does the term."""
    torch.manual_seed(1)
    model, batch = gpt2().double().train(), labelled_tokens()
    method = "r3f:weight=1000000,eps=0.5"
    weighed = a_trainer(model, tmp_path, method)
    losses = []
    for num_items in (None, torch.tensor(40)):
        torch.manual_seed(2)
        losses.append(weighed.compute_loss(model, dict(batch), num_items_in_batch=num_items).item())
    counted = int((batch["labels"][:, 1:] != -100).sum())
    assert losses[1] == pytest.approx(losses[0] * counted / 40, rel=1e-10) and losses[0] > 1e3


def test_several_labels_at_a_time() -> None:
    config = transformers.BertConfig(**TEXT | {"num_labels": 3, "problem_type": "multi_label_classification"})
    model = transformers.BertForSequenceClassification(config).double().eval()
    step = a_step(model, {"input_ids": random_ids(2, 5), "labels": torch.ones(2, 3).double()})
    first, second = torch.randn(2, 2, 3, dtype=torch.float64)
    expected = torch.zeros((), dtype=torch.float64)
    for a, b in zip(first.flatten(), second.flatten(), strict=True):
        zero = torch.zeros((), dtype=torch.float64)
        expected = expected + twin.both_ways(torch.stack([zero, a]), torch.stack([zero, b])) / 2
    assert divergence(step, first, second).item() == pytest.approx(expected.item(), rel=1e-12)


def test_closed_forms() -> None:
    step = a_step(nn.Identity(), {"input": torch.zeros(1, 2)})
    even, odds = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    assert divergence(step, even, odds).item() == pytest.approx(0.25 * math.log(3.0))
    assert divergence(step, even, odds, share=0.5).item() == pytest.approx(0.125 * math.log(3.0))
    assert divergence(step, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0])).item() == 4.5
    with pytest.raises(ModelError, match=r"got logits of shape \[1, 2, 3, 4\]"):
        divergence(step, torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))


def test_small_differences_keep_their_digits() -> None:
    """In float32 the sum of the two KLs of predictions this near is rounding alone."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    second = first + 1e-5 * torch.randn(8, 3, generator=generator, dtype=torch.float64)
    first, second = first.float(), second.float()
    step = a_step(nn.Identity(), {"input": first})
    exact = twin.per_example(first.double(), second.double(), twin.both_ways)
    assert divergence(step, first, second).item() == pytest.approx(exact.item(), rel=0.02)


def test_half_precision_is_compared_in_single(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, batch = tagger().train(), labelled_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        step = a_step(model, batch)
        assert step.logits.dtype == torch.bfloat16
        other = step.logits + 1
        term = divergence(step, step.logits, other * 1.1)
        loss = a_trainer(model, tmp_path).compute_loss(model, dict(batch))
    assert term.dtype == torch.float32 and loss.dtype == torch.float32
    apart = partial(twin.per_tag, pair=twin.both_ways, labels=batch["labels"])
    assert term.item() == pytest.approx(apart(step.logits.float(), (other * 1.1).float()).item(), rel=1e-4)
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_checkpointed_activations_change_nothing(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, attention_dropout=0.2)).double()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        trainer = a_trainer(model, tmp_path)
        torch.manual_seed(2)
        trainer.compute_loss(model, {**labelled_tokens(), "use_cache": False}).backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
    assert model.is_activation_checkpointing
    for without, with_ in zip(*gradients, strict=True):
        torch.testing.assert_close(without, with_, rtol=1e-10, atol=1e-12)


class TestWhatIsPerturbed:
    @staticmethod
    def seen(model: nn.Module, batch: Batch) -> list[tuple[list[int], int]]:
        """Shape and example axis of each place where noise was asked for."""
        places = []

        def noise(x: Tensor, axis: int) -> Tensor:
            places.append((list(x.shape), axis))
            return torch.ones_like(x)

        step = a_step(model.eval(), batch)
        assert not torch.equal(perturbed_logits(step, noise), step.logits)
        assert torch.equal(step.forward(), step.logits)  # and nothing of it stays
        return places

    def test_an_encoder_decoder_with_tied_tables(self) -> None:
        options: dict[str, Any] = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
        options |= {"vocab_size": 30, "decoder_start_token_id": 0}
        config = transformers.T5Config(**options)
        model = transformers.T5ForConditionalGeneration(config)
        batch = {"input_ids": random_ids(2, 6), "labels": random_ids(2, 3)}
        assert self.seen(model, batch) == [([2, 6, 8], 0), ([2, 3, 8], 0)]
        encoder = transformers.T5EncoderModel(config)
        encoder.forward = lambda **inputs: {"logits": type(encoder).forward(encoder, **inputs)[0]}  # type: ignore[method-assign]
        assert self.seen(encoder, {"input_ids": random_ids(2, 6)}) == [([2, 6, 8], 0)]

    @pytest.mark.parametrize("length", [3, 5])
    def test_a_model_that_puts_examples_second(self, length: int) -> None:
        config = transformers.XLNetConfig(vocab_size=30, d_model=8, n_layer=1, n_head=2, d_inner=8)
        model = transformers.XLNetForSequenceClassification(config)
        assert self.seen(model, {"input_ids": random_ids(3, length)}) == [([length, 3, 8], 1)]

    def test_a_square_batch(self) -> None:
        assert self.seen(llama(), {"input_ids": random_ids(3, 3)}) == [([3, 3, 8], 0)]

    def test_embeddings_in_the_batch(self) -> None:
        assert self.seen(llama(), {"inputs_embeds": torch.randn(2, 4, 8)}) == [([2, 4, 8], 0)]

    def test_a_network_of_plain_torch(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.out = nn.Embedding(30, 4), nn.Linear(4, 2)

            def forward(
                self, x: Tensor, input_mask: Tensor | None = None, labels: Tensor | None = None
            ) -> Tensor:
                return self.out(x if x.is_floating_point() else self.embed(x).mean(1))

        net = Net()
        batch = {"x": torch.randn(3, 4), "input_mask": torch.ones(3), "labels": torch.zeros(3)}
        assert self.seen(net, batch) == [([3, 4], 0)]
        with pytest.raises(ModelError, match="got none. Give the model a method get_input_embeddings"):
            self.seen(net, {"x": random_ids(3, 4)})

    def test_a_model_that_does_not_call_its_embeddings(self) -> None:
        model = llama()
        model.get_input_embeddings = lambda: nn.Embedding(30, 8)
        with pytest.raises(ModelError, match="LlamaForCausalLM does not call its input embeddings"):
            self.seen(model, {"input_ids": random_ids(2, 4)})


@pytest.mark.parametrize("case", ["llama", "resnet"])
def test_nothing_is_left_after_an_error(case: str) -> None:
    make, batch_fn, _ = CASES[case]
    model, batch = make().double().train(), batch_fn()
    step = a_step(model, batch)

    def fail(x: Tensor, axis: int) -> Tensor:
        raise RuntimeError("no noise today")

    before = [(m, len(m._forward_hooks), getattr(m, "momentum", None)) for m in model.modules()]
    with pytest.raises(RuntimeError, match="no noise today"):
        perturbed_logits(step, fail)
    handle = list(model.modules())[-1].register_forward_pre_hook(lambda *_: fail(torch.zeros(()), 0))
    with pytest.raises(RuntimeError, match="no noise today"):
        perturbed_logits(step, lambda x, axis: torch.zeros_like(x))
    handle.remove()
    assert before == [(m, len(m._forward_hooks), getattr(m, "momentum", None)) for m in model.modules()]
