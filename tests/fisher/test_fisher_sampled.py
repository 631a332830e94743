"""Labels drawn from the model's own prediction: from the right outputs, of the right kind, in any cut of the data."""

from __future__ import annotations

import pytest
import torch
from tests.fisher.test_fisher_models import MODELS, built
from torch.nn import functional as F

from childtuning.errors import ConfigError
from childtuning.fisher import fisher_information
from childtuning.fisher.losses import SampledLabels


@pytest.mark.parametrize("name", ["bert", "bert-regression", "bert-tokens", "gpt2-tied-lm"])
def test_sampled_labels_do_not_depend_on_how_batches_are_cut(name, make_case, agree):
    case = make_case(name)
    whole = case.batch(6)
    cuts = [{key: value[i : i + n] for key, value in whole.items()} for i, n in ((0, 1), (1, 2), (3, 3))]
    found = [fisher_information(case.model, b, labels="sampled", seed=5) for b in ([whole], cuts)]
    agree(found[0], found[1], case.rtol)
    other = fisher_information(case.model, [whole], labels="sampled", seed=6)
    assert any(not torch.allclose(other[key], found[0][key]) for key in other)


def test_sampled_classes_follow_the_prediction(make_case):
    case = make_case("bert")
    batch = {key: value[:1].repeat_interleave(3000, 0) for key, value in case.batch(1).items()}
    drawn = SampledLabels(case.model, 0)(batch)["labels"]
    wanted = case.model(**case.batch(1)).logits.softmax(-1)[0]
    assert drawn.dtype == torch.int64
    torch.testing.assert_close(drawn.bincount(minlength=3) / 3000, wanted.float().detach(), atol=0.03, rtol=0)


@pytest.mark.parametrize(("name", "offset"), [("llama-lm", 1), ("bert-tokens", 0)])
def test_sampled_positions_follow_the_output_that_predicts_them(name, offset, make_case):
    case = make_case(name)
    batch = case.batch(4)
    with torch.no_grad():
        case.model.get_submodule("lm_head" if offset else "classifier").weight.mul_(1e6)  # no chance left
        sure = case.model(**batch).logits.argmax(-1)
    drawn = SampledLabels(case.model, 0)(batch)["labels"]
    labelled = batch["labels"] != -100
    assert torch.equal(drawn[~labelled], batch["labels"][~labelled])
    labelled[:, :offset] = False
    assert torch.equal(drawn[labelled], sure.roll(offset, 1)[labelled])


LAST = {
    "t5": ["decoder.final_layer_norm.weight"],
    "bart": [
        "model.decoder.layers.0.final_layer_norm.weight",
        "model.decoder.layers.0.final_layer_norm.bias",
    ],
    "segformer": ["decode_head.classifier.weight", "decode_head.classifier.bias"],
}


@pytest.mark.parametrize("name", LAST)
def test_a_decoder_reads_the_labels_of_the_data_and_pixels_are_those_of_the_labels(name):
    model, batch = built(name), MODELS[name].batches()[0]
    with torch.no_grad():
        for path in LAST[name]:
            model.get_parameter(path).mul_(1e4)  # no chance left
        logits = model(**batch).logits
        if name == "segformer":
            logits = F.interpolate(logits, batch["labels"].shape[1:], mode="bilinear").movedim(1, -1)
    drawn = SampledLabels(model, 0)(batch)
    ignored = 255 if name == "segformer" else -100
    labelled = batch["labels"] != ignored
    assert 0 < labelled.sum() < labelled.numel()
    assert torch.equal(drawn["labels"], torch.where(labelled, logits.argmax(-1), batch["labels"]))
    assert torch.equal(model(**drawn).logits, model(**batch).logits)


def test_whole_numbers_of_a_regression_are_drawn_as_real_ones(make_case):
    case = make_case("bert-regression")
    batch = case.batch(5)
    real = SampledLabels(case.model, 0)(batch)["labels"]
    drawn = SampledLabels(case.model, 0)({**batch, "labels": torch.arange(5)})["labels"]
    assert drawn.is_floating_point() and torch.equal(drawn, real)


def test_heads_without_a_formula_are_refused(make_case):
    case = make_case("bert")
    batch = case.batch(3)
    with pytest.raises(ConfigError, match="no formula for BertForSequenceClassification"):
        SampledLabels(case.model, 0)({**batch, "labels": torch.zeros(3, 2)})
    model, batches = built("bart"), MODELS["bart"].batches()
    model.prepare_decoder_input_ids_from_labels = None
    with pytest.raises(ConfigError, match="Put decoder_input_ids into the batches"):
        fisher_information(model, batches, labels="sampled")
