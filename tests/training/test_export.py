"""What serves is what was trained: base and delta, the exported model, and the base with the patch, to the last bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from childtuning import Child, Delta, random_child
from childtuning.delta.patch import Patch
from childtuning.errors import BaseMismatchError, CorruptFileError, ModelError
from childtuning.training.export import make_patch, write_model
from childtuning.training.on_disk import INDEX, Checkpoint

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LM = SMALL | {"vocab_size": 50, "num_key_value_heads": 1, "max_position_embeddings": 32}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}

# the base on disk; the class that is trained
MODELS: dict[str, tuple[Any, Any]] = {
    "bert": (lambda: tf.BertModel(tf.BertConfig(vocab_size=50, **SMALL)), tf.BertForSequenceClassification),
    "bert, masked": (lambda: tf.BertForMaskedLM(tf.BertConfig(vocab_size=50, **SMALL)), tf.BertForMaskedLM),
    "llama, tied": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(tie_word_embeddings=True, **LM)), tf.LlamaForCausalLM),
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(tie_word_embeddings=False, **LM)), tf.LlamaForCausalLM),
    "llama, head": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LM)), tf.LlamaForSequenceClassification),
    "mixtral": (lambda: tf.MixtralForCausalLM(tf.MixtralConfig(num_local_experts=3, **LM)), tf.MixtralForCausalLM),
    "t5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)), tf.T5ForConditionalGeneration),
    "vit": (lambda: tf.ViTModel(tf.ViTConfig(image_size=8, patch_size=4, **SMALL)), tf.ViTForImageClassification),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
             tf.GPT2LMHeadModel),
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def base_folder(kind: str, folder: Path, dtype: torch.dtype, **saved: Any) -> Path:
    tf.set_seed(0)
    MODELS[kind][0]().to(dtype).save_pretrained(folder, **saved)
    (folder / "vocab.txt").write_text("kept")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text("weights in another form")
    return folder


def load(kind: str, folder: Path) -> Any:
    tf.set_seed(1)  # of a new head
    return MODELS[kind][1].from_pretrained(folder).eval()


def skeleton(model: Any) -> Any:
    with torch.device("meta"):
        return type(model)(model.config)


def logits(model: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    if hasattr(model, "vit"):
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8, generator=draw).to(model.dtype)}
    else:
        inputs = {"input_ids": torch.randint(3, 50, (2, 6), generator=draw)}
        model.config.pad_token_id = model.config.pad_token_id or 0
    if hasattr(model, "decoder"):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.inference_mode():
        return model(**inputs).logits


def trained(model: Any, granularity: str = "element") -> Delta:
    """Move a child's entries, and what the checkpoint lacks: the head."""
    head = tuple(n for n, _ in model.named_parameters() if n.startswith(("classifier", "score")))
    child = random_child(model, 0.2, granularity=granularity, always=head)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        parts = child.resolve({n: p.shape for n, p in model.named_parameters()})
        for name, parameter in model.named_parameters():
            where = parts[name].indices()
            parameter.view(-1)[where] += torch.randn(len(where), generator=draw).to(parameter.dtype)
    return Delta.capture(model, child, base="a base")


def patched_by_hand(base: Path, patch: Path, output: Path) -> None:
    """A loader that knows only names, indices and values."""
    about, written = json.loads((patch / "patch.json").read_text()), load_file(patch / "patch.safetensors")
    shutil.copytree(base, output)
    index = output / INDEX
    files = sorted(output.glob("*.safetensors"))
    for file in files:
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name + ".indices" in written:
                tensor.view(-1)[written[name + ".indices"].long()] = written[name + ".values"]
            elif name + ".values" in written:
                tensor.copy_(written[name + ".values"])
        if file == files[-1]:
            new = [name for name, record in about["tensors"].items() if record.get("added")]
            tensors |= {name: written[name + ".values"] for name in new}
            if index.is_file():
                found = json.loads(index.read_text())
                found["weight_map"] |= dict.fromkeys(new, file.name)
                index.write_text(json.dumps(found))
        save_file(tensors, file, metadata={"format": "pt"})


def test_a_tied_weight_that_is_stored_twice_is_written_twice(tmp_path: Path) -> None:
    base = base_folder("llama, tied", tmp_path / "base", torch.float32)
    tensors = load_file(base / "model.safetensors")
    twice = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | twice, base / "model.safetensors", metadata={"format": "pt"})
    model = load("llama, tied", base)
    whole = random_child(model, 1.0)
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1.0)
    make_patch(Delta.capture(model, whole), skeleton(model), base).save(tmp_path / "patch")
    written = load_file(tmp_path / "patch" / "patch.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(written[f"{name}.values"].view(model.lm_head.weight.shape), model.lm_head.weight)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_all_ways_give_the_same_bits(kind: str, dtype: str, sharded: bool, tmp_path: Path) -> None:
    base = base_folder(
        kind, tmp_path / "base", DTYPES[dtype], **({"max_shard_size": "4KB"} if sharded else {})
    )
    assert Checkpoint(base).is_sharded is sharded
    model = load(kind, base)
    delta = trained(model)
    wanted = logits(model)
    again = load(kind, base)
    delta.apply_(again)
    assert torch.equal(logits(again), wanted)

    patch = make_patch(delta, skeleton(model), base)
    patch.save(tmp_path / "patch")
    read = Patch.load(tmp_path / "patch")
    for (name, where, what, shape), (name2, where2, what2, shape2) in zip(patch, read, strict=True):
        assert (name, shape) == (name2, shape2) and where.dtype == torch.int32
        assert torch.equal(where, where2) and torch.equal(what, what2)
    write_model(read, skeleton(model), base, tmp_path / "model")
    exported = load(kind, tmp_path / "model")
    assert torch.equal(logits(exported), wanted)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, exported.get_parameter(name)), name
    assert (tmp_path / "model" / "vocab.txt").read_text() == "kept" and not (
        tmp_path / "model" / "onnx"
    ).exists()
    assert Checkpoint(tmp_path / "model").is_sharded is sharded

    patched_by_hand(base, tmp_path / "patch", tmp_path / "by hand")
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "by hand")
    assert torch.equal(logits(load(kind, tmp_path / "by hand")), wanted)


@pytest.mark.parametrize("kind", ["bert", "mixtral"])
def test_another_base_is_refused_and_nothing_is_left(kind: str, tmp_path: Path) -> None:
    base = base_folder(kind, tmp_path / "base", torch.float32)
    model = load(kind, base)
    delta = trained(model, "row")
    patch = make_patch(delta, skeleton(model), base)
    other = Checkpoint(base).tensors
    held = {own for own, *_ in patch}
    name = next(n for n in other if n in held and n.endswith(("key.weight", "experts.1.w2.weight")))
    changed = load_file(base / "model.safetensors")
    written = next(where.tolist() for own, where, *_ in patch if own == name)
    frozen = next(i for i in range(changed[name].numel()) if i not in written)
    changed[name].view(-1)[frozen] += 1
    save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match="another base model"):
        write_model(patch, skeleton(model), base, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    if kind == "mixtral":
        with pytest.raises(BaseMismatchError, match="another base model"):
            make_patch(delta, skeleton(model), base)


def test_what_a_patch_cannot_hold_is_told(tmp_path: Path) -> None:
    base = base_folder("bert", tmp_path / "base", torch.float32)
    model = load("bert", base)
    child = Child.from_masks({"bert.pooler.dense.bias": torch.ones(16, dtype=torch.bool)})
    with pytest.raises(ModelError, match="neither in .* nor trained whole"):
        make_patch(Delta.capture(model, child), skeleton(model), base)
    half = load("bert", base).half()
    everything = Child.whole({n: p.shape for n, p in half.named_parameters()})
    with pytest.raises(ModelError, match="float16 in the delta"):
        make_patch(Delta.capture(half, everything), skeleton(model), base)
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="only safetensors"):
        make_patch(trained(model), skeleton(model), base)


@pytest.mark.parametrize("named", ["../model.safetensors", "/etc/passwd", "none.safetensors", 3])
def test_an_index_names_files_of_its_folder_alone(named: Any, tmp_path: Path) -> None:
    base_folder("bert", tmp_path / "base", torch.float32)
    shutil.move(tmp_path / "base" / "model.safetensors", tmp_path)
    (tmp_path / "base" / INDEX).write_text(json.dumps({"weight_map": {"x": named}}))
    with pytest.raises(CorruptFileError, match="no file there|cannot be read"):
        _ = Checkpoint(tmp_path / "base").tensors


class VllmStyle:
    """The contract of vLLM's loader of checkpoint patches, as its source states it (sparse_nccl_engine.py, 0.33).

    ``SparseWeightPatch(name, indices, values, full_shape)``: names and shapes of the checkpoint, int32 indices of one
    axis that are unique and inside the shape, as many values; NaN is reserved for what does not change.
    """

    @staticmethod
    def check(name: str, indices: torch.Tensor, values: torch.Tensor, full_shape: tuple[int, ...]) -> None:
        assert isinstance(name, str) and name
        assert indices.dtype == torch.int32 and indices.dim() == values.dim() == 1
        assert len(indices) == len(values) == len(indices.unique())
        assert int(indices.min()) >= 0 and int(indices.max()) < torch.Size(full_shape).numel()
        assert not values.isnan().any()


def test_patches_meet_vllms_contract(tmp_path: Path) -> None:
    base = base_folder("mixtral", tmp_path / "base", torch.bfloat16)
    model = load("mixtral", base)
    patch = make_patch(trained(model), skeleton(model), base)
    stored = Checkpoint(base).tensors
    for name, indices, values, shape in patch:
        VllmStyle.check(name, indices, values, shape)
        assert stored[name].shape == shape and stored[name].dtype == values.dtype


def test_weights_that_a_configuration_names_are_not_passed_over(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": "other.safetensors"}))
    with pytest.raises(ModelError, match=r"names 'other.safetensors' as its weights"):
        Checkpoint(tmp_path)
