"""Whole architectures, in float64 and float32: every score equals the float64 loop's; most come from one pass.

Each case is data: a name, a model, its batches, its loss, and by which way how many of its parameters go. Batches are
ragged and padded; the loop takes every example as it was given.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tests.fisher.conftest import COUNTS, SMALL, VOCAB, classes, text, token_labels
from tests.reference.fisher_loop import hugging_face_loss, per_example
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from childtuning.errors import DataError
from childtuning.fisher import fisher_information

B, T = 4, 9
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module", autouse=True)
def _open() -> Iterator[None]:
    """Open the fast room, whatever the environment says: these tests are about what it serves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CHILDTUNING_FAST", raising=False)
        yield


@dataclass
class Model:
    build: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None
    paths: dict[str, int] = field(default_factory=dict)  # how many parameters do not go through the engine
    single: dict[str, int] | None = None  # the same in float32, where it differs


def per_row(model: nn.Module, batch: Any) -> Tensor:
    """One loss an example."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def transformers_model(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, name)(getattr(transformers, config)(**options))

    return build


def texts(*, left: bool = False, **extra: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[], list[Any]]:
    """Two ragged batches with a class each, and what ``extra`` makes of them."""

    def make() -> list[Any]:
        found = []
        for seed in (0, 5):
            batch = text(B, seed=seed, left=left)
            more = {key: make_fn(batch) for key, make_fn in extra.items()}
            found.append({**batch, "labels": classes(B, seed=seed), **more})
        return found

    return make


def language(*, left: bool = False) -> Callable[[], list[Any]]:
    return texts(left=left, labels=lambda batch: token_labels(batch, VOCAB))


def translations() -> list[Any]:
    """Sources shorter than targets, both padded to one length and to two."""
    found = []
    for seed, length in ((0, T), (5, T + 4)):
        labels = torch.randint(3, VOCAB, (B, length), generator=torch.Generator().manual_seed(seed))
        labels[0, 5:] = -100
        short = text(B, seed=seed, longest=5)
        found.append({**short, "labels": labels})
    return found


def images(size: int, *, per_pixel: bool = False) -> Callable[[], list[Any]]:
    def make() -> list[Any]:
        draw = torch.Generator().manual_seed(3)
        found = []
        for seed in (0, 1):
            labels = classes(B, seed=seed)
            if per_pixel:
                labels = torch.randint(3, (B, size, size), generator=draw)
                labels[0, : size - 4 * (seed + 1)] = 255
            found.append(
                {"pixel_values": torch.randn(B, 3, size, size, generator=draw).double(), "labels": labels}
            )
        return found

    return make


def sequences(*shape: int, tokens: bool = False) -> Callable[[], list[Any]]:
    def make() -> list[Any]:
        draw = torch.Generator().manual_seed(2)
        return [
            (
                torch.randint(12, (B, *shape), generator=draw)
                if tokens
                else torch.randn(B, *shape, generator=draw, dtype=torch.float64),
                classes(B, seed=seed),
            )
            for seed in (0, 1)
        ]

    return make


class TimeMajor(nn.Module):
    """An embedding of [T, B] ids and a body that takes them in this layout, as torch's own do by default."""

    def __init__(self, body: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.words, self.body, self.out = nn.Embedding(12, 8), body(), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.body(self.words(ids.t()))
        return self.out((x[0] if isinstance(x, tuple) else x).mean(0))


class Recurrent(nn.Module):
    """Vectors [B, T, 8] in time; both biases of a gate have one gradient, which may be one tensor."""

    def __init__(self, body: nn.RNNBase) -> None:
        super().__init__()
        self.body, self.out = body, nn.Linear(body.hidden_size * (1 + body.bidirectional), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x)[0].mean(1))


class OneGradient(nn.Module):
    """Two matrices that are used as their sum alone, in a distance and in a Fourier transform."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        both = self.left + self.right
        return -torch.cdist(x, both).mean(1) + torch.fft.rfft(both).abs().sum(1) * x.mean((1, 2))[:, None]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Convolutions(nn.Module):
    """Grouped, depthwise and strided convolutions, an in-place ReLU, a class token and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, groups=2)
        self.depthwise, self.norm = nn.Conv2d(8, 8, 3, padding="same", groups=8), nn.BatchNorm2d(8)
        self.scale, self.token = nn.Parameter(torch.ones(8, 1, 1)), nn.Parameter(torch.randn(1, 1, 8))
        self.places, self.out = nn.Parameter(torch.randn(1, 10, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.stem(x), inplace=True)))
        # A convolution follows the norm: of other layouts of its gradient, torch 2.13 gets a batch of one wrong.
        x = self.scale * self.depthwise(self.norm(x)) + x
        x = torch.cat([self.token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + self.places
        return self.out(torch.tanh(x).square().mean(1))


class Normed(nn.Module):
    """A weight that a parametrization makes of two, and one that a Fourier-like product makes of three."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
        self.left, self.right = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 8))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner(x))
        x = x + x @ (self.left @ self.right)  # as a merged low-rank update
        return self.out(torch.tanh(F.linear(x, self.out.weight.t() @ self.out.weight))).mean(1)


MODELS: dict[str, Model] = {
    "mpnet": Model(
        transformers_model(
            "MPNetForSequenceClassification",
            "MPNetConfig",
            **SMALL,
            vocab_size=VOCAB,
            num_labels=3,
            max_position_embeddings=20,
            relative_attention_num_buckets=32,
        ),
        texts(),
    ),
    "t5": Model(
        transformers_model(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCAB,
            d_model=8,
            d_kv=4,
            d_ff=12,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            relative_attention_num_buckets=6,
            relative_attention_max_distance=8,
        ),
        translations,
    ),
    "bart": Model(
        transformers_model(
            "BartForConditionalGeneration",
            "BartConfig",
            vocab_size=VOCAB,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=12,
            decoder_ffn_dim=12,
            max_position_embeddings=32,
            decoder_start_token_id=2,
            pad_token_id=0,
            forced_eos_token_id=None,
            **TOKENS,
        ),
        translations,
    ),
    "segformer": Model(
        transformers_model(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[3, 3],
            strides=[2, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=8,
            num_labels=3,
        ),
        images(16, per_pixel=True),
    ),
    "layoutlm": Model(
        transformers_model(
            "LayoutLMForSequenceClassification",
            "LayoutLMConfig",
            **SMALL,
            **COUNTS,
            max_2d_position_embeddings=16,
            num_labels=3,
        ),
        texts(
            bbox=lambda batch: (batch["input_ids"][..., None] % torch.tensor([5, 6, 7, 8])).sort(-1).values
        ),
    ),
    "longformer": Model(
        transformers_model(
            "LongformerForSequenceClassification",
            "LongformerConfig",
            **SMALL,
            vocab_size=VOCAB,
            pad_token_id=0,
            max_position_embeddings=24,
            attention_window=4,
            num_labels=3,
        ),
        texts(),
    ),
    "modernbert": Model(
        transformers_model(
            "ModernBertForSequenceClassification",
            "ModernBertConfig",
            **SMALL,
            **COUNTS,
            num_labels=3,
            global_attn_every_n_layers=2,
            local_attention=4,
            cls_token_id=1,
            sep_token_id=2,
            **TOKENS,
        ),
        texts(),
    ),
    "albert": Model(
        transformers_model(
            "AlbertForSequenceClassification",
            "AlbertConfig",
            **SMALL,
            **COUNTS,
            embedding_size=4,
            num_labels=3,
        ),
        texts(),
    ),
    "mixtral": Model(
        transformers_model(
            "MixtralForCausalLM",
            "MixtralConfig",
            experts_implementation="eager",
            **SMALL,
            **COUNTS,
            num_key_value_heads=1,
            num_local_experts=3,
            num_experts_per_tok=2,
            **TOKENS,
        ),
        language(),
        paths={"loop": 4},  # experts take rows that values choose
    ),
    "mamba": Model(
        transformers_model(
            "MambaForCausalLM",
            "MambaConfig",
            vocab_size=VOCAB,
            hidden_size=8,
            state_size=4,
            num_hidden_layers=2,
            pad_token_id=0,
            **TOKENS,
        ),
        language(),
    ),
    "wav2vec2": Model(
        transformers_model(
            "Wav2Vec2ForSequenceClassification",
            "Wav2Vec2Config",
            **SMALL,
            conv_dim=(8, 8),
            conv_stride=(2, 2),
            conv_kernel=(3, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            num_labels=3,
            classifier_proj_size=8,
            mask_time_prob=0.0,
        ),
        lambda: [{"input_values": x, "labels": y} for x, y in sequences(64)()],
    ),
    "swin": Model(
        transformers_model(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[2, 1],
            num_heads=[2, 2],
            window_size=2,
            num_labels=3,
        ),
        images(16),
    ),
    "xlnet": Model(
        transformers_model(
            "XLNetForSequenceClassification",
            "XLNetConfig",
            vocab_size=VOCAB,
            d_model=8,
            n_layer=2,
            n_head=2,
            d_inner=12,
            num_labels=3,
        ),
        texts(left=True),
        paths={"vectorised": 10},  # its attention multiplies by einsum
    ),
    "deberta-v2": Model(
        transformers_model(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            **SMALL,
            **COUNTS,
            relative_attention=True,
            position_buckets=4,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            num_labels=3,
        ),
        texts(),
    ),
    "gpt2": Model(
        transformers_model(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=VOCAB,
            n_positions=16,
            n_embd=8,
            n_layer=2,
            n_head=2,
            **TOKENS,
        ),
        language(),
    ),
    "llama": Model(
        transformers_model(
            "LlamaForCausalLM", "LlamaConfig", **SMALL, **COUNTS, num_key_value_heads=1, **TOKENS
        ),
        language(left=True),
    ),
    "encoder-time-major": Model(lambda: TimeMajor(Encoder), sequences(6, tokens=True), per_row),
    "lstm-time-major": Model(
        lambda: TimeMajor(lambda: nn.LSTM(8, 8)),
        sequences(6, tokens=True),
        per_row,
        {"loop": 4},
        {"vectorised": 4},
    ),
    "gru-time-major": Model(
        lambda: TimeMajor(lambda: nn.GRU(8, 8)), sequences(6, tokens=True), per_row, {"loop": 4}
    ),
    "lstm": Model(
        lambda: Recurrent(nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)),
        sequences(5, 8),
        per_row,
        {"loop": 16},
        {"vectorised": 16},  # torch has a fused LSTM for float32
    ),
    "gru": Model(lambda: Recurrent(nn.GRU(8, 6, batch_first=True)), sequences(5, 8), per_row, {"loop": 4}),
    "one-gradient": Model(OneGradient, sequences(5, 8), per_row, {"vectorised": 2}),
    "convolutions": Model(Convolutions, sequences(3, 8, 8), per_row),
    "made-weights": Model(Normed, sequences(5, 6), per_row),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name].build().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error of a parameter over its largest score; scores that cancel to zero are left out."""
    top = max(float(score.max()) for score in wanted.values())
    return max(
        (float((found[name] - score).abs().max()) / max(float(score.max()), 1e-10 * top), name)
        for name, score in wanted.items()
    )


def _in(dtype: torch.dtype, batches: list[Any]) -> list[Any]:
    return tree_map_only(
        Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, batches
    )


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_float64_loop(name: str) -> None:
    case, model = MODELS[name], built(name)
    wanted = per_example(
        model, case.batches(), (lambda m, b: case.loss_fn(m, b).sum()) if case.loss_fn else hugging_face_loss
    )
    for dtype, most in ((torch.float64, 1e-4), (torch.float32, 1e-3)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Fisher information of", UserWarning)
            found = fisher_information(model.to(dtype), _in(dtype, case.batches()), case.loss_fn)
        error, where = worst(found, wanted)
        assert error <= most, (dtype, where)
        counts = Counter(path for path in found.paths.values() if path != "engine")
        assert counts == (case.paths if case.single is None or dtype == torch.float64 else case.single), dtype


def test_clip_is_refused() -> None:
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    texts = {**small, "vocab_size": VOCAB, "max_position_embeddings": 16, "pad_token_id": 0, **TOKENS}
    pictures = {**small, "image_size": 8, "patch_size": 4}
    model = transformers_model(
        "CLIPModel", "CLIPConfig", text_config=texts, vision_config=pictures, projection_dim=8
    )().eval()
    batch = {**text(B), "pixel_values": torch.randn(B, 3, 8, 8), "return_loss": True}
    with pytest.raises(DataError, match="mixes examples"):
        fisher_information(model, [batch])
