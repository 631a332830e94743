"""Tiny random models and batches, in float64; each case is data: a name, a model, a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCAB, T = 29, 9
SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
COUNTS = {"vocab_size": VOCAB, "max_position_embeddings": 16, "pad_token_id": 0}


def text(
    size: int, *, seed: int = 0, left: bool = False, pairs: bool = False, longest: int = T
) -> dict[str, Tensor]:
    """Padded token ids of several lengths, with repeated tokens."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (size, 1), generator=draw)
    at = torch.arange(T)
    mask = (at >= T - lengths if left else at < lengths).long()
    batch = {"input_ids": torch.randint(1, VOCAB, (size, T), generator=draw) * mask, "attention_mask": mask}
    if pairs:
        batch["token_type_ids"] = (at > lengths // 2).long() * mask
    return batch


def classes(size: int, *, seed: int = 0, k: int = 3) -> Tensor:
    return torch.randint(k, (size,), generator=torch.Generator().manual_seed(seed + 1))


def token_labels(batch: dict[str, Tensor], k: int, *, seed: int = 0) -> Tensor:
    """A class a position, some of them −100, as are all at the padding; the second position always has one."""
    draw = torch.Generator().manual_seed(seed + 2)
    labels = torch.randint(k, batch["input_ids"].shape, generator=draw)
    dropped = torch.rand(labels.shape, generator=draw) < 0.3
    dropped[:, :2] = False
    return labels.masked_fill(dropped | (batch["attention_mask"] == 0), -100)


class ConvNet(nn.Module):
    """A small residual network: strides, groups, dilation, paddings, in-place activations, a projected shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.grouped = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.norm2 = nn.BatchNorm2d(8)
        self.shortcut = nn.Conv2d(4, 8, 1, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=8)
        self.group_norm = nn.GroupNorm(2, 8)
        self.mirror = nn.Conv2d(8, 4, (3, 2), padding=(1, 1), padding_mode="circular")
        self.along = nn.Conv1d(4, 4, 4, padding="same", padding_mode="replicate")
        self.norm3 = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)
        for buffer in self.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        y = self.norm2(self.grouped(x))
        y += self.shortcut(x)
        y = self.mirror(self.relu(self.group_norm(self.depthwise(self.relu(y)))))
        return self.head(self.norm3(self.along(y.flatten(2))).mean(2))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _bert(**options: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SMALL, **COUNTS, **{"num_labels": 3, **options}))


def _bert_tokens() -> nn.Module:
    from transformers import BertConfig, BertForTokenClassification

    return BertForTokenClassification(BertConfig(**SMALL, **COUNTS, num_labels=4))


def _bert_masked() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SMALL, **COUNTS))


def _gemma() -> nn.Module:
    from transformers import GemmaConfig, GemmaForSequenceClassification

    tokens = {"bos_token_id": 1, "eos_token_id": 1}
    config = GemmaConfig(**SMALL, **COUNTS, num_key_value_heads=1, head_dim=4, num_labels=3, **tokens)
    return GemmaForSequenceClassification(config)


def _albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(**SMALL, **COUNTS, embedding_size=4, num_labels=3)
    return AlbertForSequenceClassification(config)


def _distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(dim=8, n_layers=2, n_heads=2, hidden_dim=12, **COUNTS, num_labels=3)
    return DistilBertForSequenceClassification(config)


def _electra() -> nn.Module:
    from transformers import ElectraConfig, ElectraForSequenceClassification

    return ElectraForSequenceClassification(ElectraConfig(**SMALL, **COUNTS, embedding_size=4, num_labels=3))


def _multiple_choice() -> nn.Module:
    from transformers import BertConfig, BertForMultipleChoice

    return BertForMultipleChoice(BertConfig(**SMALL, **COUNTS))


def _gpt2(kind: str) -> nn.Module:
    import transformers

    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=8, n_layer=2, n_head=2, num_labels=3, **tokens
    )
    return getattr(transformers, kind)(config)


def _llama(kind: str) -> nn.Module:
    import transformers

    tokens = {"bos_token_id": 1, "eos_token_id": 1}
    config = transformers.LlamaConfig(**SMALL, **COUNTS, num_key_value_heads=1, num_labels=3, **tokens)
    return getattr(transformers, kind)(config)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3))


def _pixels(size: int) -> Tensor:
    return torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(4)).double()


def _choices(size: int) -> dict[str, Tensor]:
    flat = text(2 * size)
    return {**{key: value.view(size, 2, T) for key, value in flat.items()}, "labels": classes(size, k=2)}


def _labelled(batch: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    return {**batch, "labels": labels}


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "bert": (_bert, lambda n: _labelled(text(n, pairs=True), classes(n))),
    "bert-regression": (
        lambda: _bert(num_labels=1),
        lambda n: _labelled(text(n), torch.linspace(0, 1, n, dtype=torch.float64)),
    ),
    "bert-tokens": (_bert_tokens, lambda n: _labelled(batch := text(n), token_labels(batch, 4))),
    # Short enough that the padding of all examples is cut off.
    "bert-masked-lm": (
        _bert_masked,
        lambda n: _labelled(batch := text(n, longest=6), token_labels(batch, VOCAB)),
    ),
    "gemma": (_gemma, lambda n: _labelled(text(n), classes(n))),
    "bert-choices": (_multiple_choice, _choices),
    "albert": (_albert, lambda n: _labelled(text(n), classes(n))),
    "distilbert": (_distilbert, lambda n: _labelled(text(n), classes(n))),
    "electra": (_electra, lambda n: _labelled(text(n, pairs=True), classes(n))),
    "gpt2": (lambda: _gpt2("GPT2ForSequenceClassification"), lambda n: _labelled(text(n), classes(n))),
    "gpt2-tied-lm": (
        lambda: _gpt2("GPT2LMHeadModel"),
        lambda n: _labelled(batch := text(n), token_labels(batch, VOCAB)),
    ),
    "llama": (
        lambda: _llama("LlamaForSequenceClassification"),
        lambda n: _labelled(text(n, left=True), classes(n)),
    ),
    "llama-lm": (
        lambda: _llama("LlamaForCausalLM"),
        lambda n: _labelled(batch := text(n), token_labels(batch, VOCAB)),
    ),
    "vit": (_vit, lambda n: {"pixel_values": _pixels(n), "labels": classes(n)}),
    "convnet": (
        ConvNet,
        lambda n: (torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(3)).double(), classes(n)),
    ),
}


class Case:
    """A model in float64, with spread-out weights, and its batches."""

    def __init__(self, name: str) -> None:
        build, self.batch = CASES[name]
        torch.manual_seed(0)
        self.model = build().double().eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        # Some Hugging Face models compute norms or losses in float32 whatever the parameters are.
        self.rtol = 1e-6 if any(part in name for part in ("lm", "llama", "gemma")) else 1e-9
        self.loss_fn = cross_entropy if name == "convnet" else None
        self.keywords = {"loss_fn": self.loss_fn, "reduction": "mean"} if self.loss_fn else {}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["1", "0"], ids=["fast", "loop"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With fast paths, and without: then the definition serves everything."""
    monkeypatch.setenv("CHILDTUNING_FAST", request.param)
    return request.param == "1"


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture
def make_case() -> type[Case]:
    return Case


@pytest.fixture
def agree() -> Callable[..., None]:
    """Compare two sets of scores: relative to a parameter's largest, and to what cancels beside the largest of all."""

    def check(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 1e-9) -> None:
        assert list(found) == list(wanted)
        scale = max(float(score.abs().max()) for score in wanted.values())
        assert scale > 0
        for name, score in wanted.items():
            assert found[name].shape == score.shape
            worst = float((found[name].double() - score.double()).abs().max())
            assert worst <= rtol * float(score.max()) + 1e-3 * rtol * scale, name

    return check
