"""Which layers are found in networks whose layers are no flat list of modules of one class."""

from __future__ import annotations

from collections import Counter

import pytest
import transformers as hf
from torch import nn

from childtuning.errors import ModelError
from childtuning.methods import Combination
from childtuning.training import find_layers

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 1}


def mobile_bert() -> nn.Module:
    sizes = {**SIZES, "embedding_size": 16, "intra_bottleneck_size": 8, "num_feedforward_networks": 4}
    return hf.MobileBertForSequenceClassification(hf.MobileBertConfig(**sizes))


def jamba() -> nn.Module:
    hybrid = {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    }
    small = {"num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_dt_rank": 4}
    return hf.JambaForSequenceClassification(
        hf.JambaConfig(**GROUPED, **hybrid, **small, use_mamba_kernels=False)
    )


def funnel() -> nn.Module:
    sizes = {
        "vocab_size": 40,
        "d_model": 16,
        "n_head": 2,
        "d_head": 8,
        "d_inner": 24,
        "num_decoder_layers": 1,
    }
    return hf.FunnelForSequenceClassification(hf.FunnelConfig(**sizes, block_sizes=[2, 2, 2]))


def segformer() -> nn.Module:
    sizes = {"depths": [2, 2], "hidden_sizes": [4, 8], "num_attention_heads": [1, 2], "sr_ratios": [2, 1]}
    more = {"num_encoder_blocks": 2, "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]}
    return hf.SegformerForImageClassification(hf.SegformerConfig(**sizes, **more))


@pytest.mark.parametrize(
    ("make_fn", "blocks"),
    [
        (mobile_bert, {"MobileBertLayer": 4}),
        (jamba, {"JambaMambaDecoderLayer": 2, "JambaAttentionDecoderLayer": 2}),
        (funnel, {"FunnelLayer": 6}),
        (segformer, {"SegformerLayer": 4}),
    ],
)
def test_layers_are_those_that_run_one_after_the_other(make_fn, blocks: dict[str, int]) -> None:
    model = make_fn()
    found = find_layers(model)
    assert Counter(type(block).__name__ for block in found.blocks) == blocks and not found.beside
    prepared = Combination.parse("last-k:1").prepare(model, ())
    last = {id(p) for p in found.blocks[-1].parameters()}
    trained = {id(p) for name, p in model.named_parameters() if name in (prepared.eligible or ())}
    assert trained >= last
    assert not trained & {id(p) for block in found.blocks[:-1] for p in block.parameters()}


@pytest.mark.parametrize("method", ["last-k:1", "freeze:1", "reinit:1", "adapter:4"])
def test_lists_beside_each_other_have_no_order(method: str) -> None:
    sizes = {"vocab_size": 40, "emb_dim": 16, "n_layers": 3, "n_heads": 2, "max_position_embeddings": 32}
    model = hf.XLMForSequenceClassification(hf.XLMConfig(**sizes))
    words = "'transformer.attentions' and 'transformer.ffns' are lists of layers beside each other"
    with pytest.raises(ModelError, match=words):
        Combination.parse(method).prepare(model, ())


def test_encoder_and_decoder_are_in_order() -> None:
    sizes = {"vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24}
    more = {"decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    found = find_layers(hf.BartForSequenceClassification(hf.BartConfig(**sizes, **more)))
    names = [type(block).__name__ for block in found.blocks]
    assert names == ["BartEncoderLayer"] * 2 + ["BartDecoderLayer"] * 2 and not found.beside


def test_an_adapter_does_not_stand_behind_experts() -> None:
    config = hf.MixtralConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1)
    model = hf.MixtralForSequenceClassification(config)
    with pytest.raises(ModelError, match="MixtralDecoderLayer has experts that are no linear layers"):
        Combination.parse("adapter:4,placement=pfeiffer").prepare(model, ())
