"""Where a parameter is, and what share of it was trained."""

from __future__ import annotations

import pytest
from tests.report import synthetic
from tests.report.parsed_page import Element, parse

from childtuning.compare.overlaps import Place, place_of, short_names
from childtuning.compare.records import Recorded
from childtuning.report import html_page


@pytest.mark.parametrize(
    ("name", "place"),
    [
        # BERT
        ("encoder.layer.11.attention.self.key.weight", Place("layer", "encoder.layer", 11, "attention.self.key")),
        ("bert.encoder.layer.0.output.dense.bias", Place("layer", "bert.encoder.layer", 0, "output.dense bias")),
        ("bert.embeddings.word_embeddings.weight", Place("embeddings", "", -1, "bert.embeddings.word_embeddings")),
        ("classifier.weight", Place("head", "", -1, "classifier")),
        # GPT-2
        ("transformer.h.3.attn.c_attn.weight", Place("layer", "transformer.h", 3, "attn.c_attn")),
        ("transformer.wte.weight", Place("embeddings", "", -1, "transformer.wte")),
        ("lm_head.weight", Place("head", "", -1, "lm_head")),
        ("transformer.ln_f.bias", Place("other", "", -1, "transformer.ln_f bias")),
        # Llama
        ("model.layers.7.self_attn.q_proj.weight", Place("layer", "model.layers", 7, "self_attn.q_proj")),
        ("model.embed_tokens.weight", Place("embeddings", "", -1, "model.embed_tokens")),
        ("model.norm.weight", Place("other", "", -1, "model.norm")),
        ("score.weight", Place("head", "", -1, "score")),
        # ViT
        ("vit.encoder.layer.2.layernorm_before.weight", Place("layer", "vit.encoder.layer", 2, "layernorm_before")),
        ("vit.embeddings.cls_token", Place("embeddings", "", -1, "cls_token")),
        # ResNet, of transformers and of torchvision
        (
            "resnet.encoder.stages.1.layers.0.layer.2.convolution.weight",
            Place("layer", "resnet.encoder.stages", 1, "layers.layer.convolution"),
        ),
        ("layer3.1.conv2.weight", Place("layer", "layer3", 1, "conv2")),
        ("fc.bias", Place("head", "", -1, "fc bias")),
        ("conv1.weight", Place("other", "", -1, "conv1")),
    ],
)  # fmt: skip
def test_the_name_tells_the_place(name: str, place: Place) -> None:
    assert place_of(name) == place


def test_short_names_tell_kinds_apart() -> None:
    kinds = ["attention.self.query", "attention.output.dense", "output.dense", "intermediate.dense"]
    assert short_names(kinds) == {
        "attention.self.query": "query",
        "attention.output.dense": "attention.output.dense",
        "output.dense": "output.dense",
        "intermediate.dense": "intermediate.dense",
    }
    assert short_names(["bert.pooler.dense", "classifier"], fewest=2) == {
        "bert.pooler.dense": "pooler.dense",
        "classifier": "classifier",
    }


def _maps(recorded: Recorded) -> list[list[list[str]]]:
    section: Element = parse(html_page(recorded)).one("section", id="places")
    return [table.table() for table in section.all("table")]


def test_shares_count_seeds_in_which_nothing_was_trained() -> None:
    """Parameters without a trained entry are left out of a record, but not out of the share."""
    name = "encoder.layer.{}.query.weight"
    whole = {name.format(layer): (100, 100) for layer in range(3)}
    runs = [
        synthetic.record(
            method="child-d", seed=0, parts={name.format(0): (10, 100), name.format(1): (60, 100)}
        ),
        synthetic.record(
            method="child-d", seed=1, parts={name.format(1): (20, 100), "classifier.weight": (4, 4)}
        ),
        synthetic.record(method="full", seed=0, parts=whole),
    ]
    layers, outside = _maps(Recorded(synthetic.comparison(["rte"], ["full", "child-d"], 2), runs))
    assert layers == [["layer", "0", "1", "2"], ["query", "5.0", "40", ""]]
    assert outside == [["outside the layers", "share"], ["classifier", "50"]]


def test_two_stacks_of_layers_stay_apart() -> None:
    parts = {
        "encoder.block.0.q.weight": (1, 4),
        "decoder.block.0.q.weight": (2, 4),
        "layer1.0.q.weight": (3, 4),
    }
    (layers,) = _maps(
        Recorded(
            synthetic.comparison(["rte"], ["child-d"], 1), [synthetic.record(method="child-d", parts=parts)]
        )
    )
    assert sorted(zip(layers[0][1:], layers[1][1:], strict=True)) == [
        ("decoder.block.0", "50"),
        ("encoder.block.0", "25"),
        ("layer1.0", "75"),
    ]


def test_methods_that_train_all_of_a_parameter_need_no_map(page) -> None:
    section = parse(page("glue")).one("section", id="places")
    titles = [figure.one("figcaption").text for figure in section.all("figure")]
    assert titles[:4] == ["child-don rte", "child-don mrpc", "child-don cola", "The whole child"]
    assert "full" in next(section.all("p", "lead")).text
