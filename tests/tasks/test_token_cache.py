"""Tokens from the cache are the tokens that would be made; what is wrong with the cache is never an error."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import save_tiny_bert
from tests.tiny_kinds import save_tokenizer
from transformers import AutoTokenizer

from childtuning.errors import ConfigError, DataError
from childtuning.tasks import Examples, encode, find_kind, token_cache
from childtuning.tasks.instructions import Instructions, RunningText
from childtuning.tasks.sentences import Sentences
from childtuning.tasks.tokenizer_content import tokenizer_content

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
TEXTS = ["the cat sat", "", "  ", "a bird flew over the very very very good house", "ÄÖ 🐈 猫", "it"]
PAIRS = ["a dog", "the plot", "", "is not a film and not a book", "", "was nice"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, which keeps texts of any length."""
    monkeypatch.setenv("CHILDTUNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CHILDTUNING_CACHE_BYTES", raising=False)
    monkeypatch.setattr(token_cache, "MIN_CHARACTERS", 0)
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[token_cache.Tokens]]:
    """What has been read from files."""
    read: list[token_cache.Tokens] = []
    original = token_cache._read

    def note(path: Path, key: str) -> token_cache.Tokens | None:
        tokens = original(path, key)
        if tokens is not None:
            read.append(tokens)
        return tokens

    monkeypatch.setattr(token_cache, "_read", note)
    return read


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_tiny_bert(tmp_path_factory.mktemp("bert")))


def lm(tmp_path: Path) -> Any:
    save_tokenizer(tmp_path / "lm", bos=True, template=TEMPLATE)
    return AutoTokenizer.from_pretrained(tmp_path / "lm")


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def content(encoded: Any) -> list[Any]:
    """All there is in encoded examples, types and order of columns included."""
    rows = [encoded[index] for index in range(len(encoded))]
    types = [[(name, type(value), {type(v) for v in value} if isinstance(value, list) else None)
              for name, value in row.items()] for row in rows]  # fmt: skip
    return [rows, types, encoded.num_cut, encoded.lengths, getattr(encoded, "places", None)]


TAGS = [["O", "B-X", "O"], ["B-X"], ["O"] * 12]
WORDS = [["the", "cat", "sat"], ["ÄÖ"], ["very"] * 12]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS if text.isascii()]

SPLITS: dict[str, tuple[str, Any]] = {
    "texts": ("classification", Examples(TEXTS, None, ["x", "y"] * 3)),
    "pairs": ("classification", Examples(TEXTS, PAIRS, ["x", "y"] * 3)),
    "pairs of nothing": ("classification", Examples(TEXTS, [""] * 6, None)),
    "unlabelled": ("classification", Examples(TEXTS, None, None)),
    "numbers": ("regression", Examples(TEXTS, PAIRS, [0.5, -1.0, 2.0, 1e9, 0.0, 3.25])),
    "words": ("token-classification", Sentences(WORDS, TAGS)),
    "words without tags": ("token-classification", Sentences(WORDS)),
    "prompts": ("causal-lm", Instructions([*TEXTS])),
    "responses": ("causal-lm", Instructions([*TEXTS], ["it was", "a film", " ", *TEXTS[:3]])),
    "conversations": ("causal-lm", Instructions([*CHATS], ["it was", "a", "is", "not", "nice"])),
    "running text": ("causal-lm", RunningText(" ".join(TEXTS[:4] * 3))),
}


def encoded_as(name: str, tmp_path: Path, bert: Any) -> Any:
    kind, split = SPLITS[name]
    tokenizer = lm(tmp_path) if kind == "causal-lm" else bert
    label_names = {"classification": ("x", "y"), "token-classification": ("B-X", "O")}.get(kind, ())
    names = label_names if kind == "token-classification" or split.is_labelled else ()
    return find_kind(kind).encode(tokenizer, split, max_length=7, label_names=names)


@pytest.mark.parametrize("name", SPLITS)
def test_what_is_read_is_what_would_be_made(name, tmp_path, bert, folder, made, monkeypatch) -> None:
    cold = content(encoded_as(name, tmp_path, bert))
    assert not made and len(files(folder)) == (2 if name in ("responses", "conversations") else 1)
    warm = content(encoded_as(name, tmp_path, bert))
    assert len(made) == len(files(folder))
    monkeypatch.setenv("CHILDTUNING_CACHE_BYTES", "0")
    plain = content(encoded_as(name, tmp_path, bert))
    assert cold == warm == plain
    if name in ("texts", "pairs", "words", "responses"):
        assert plain[2] > 0


def test_files_are_of_the_tokens_and_not_of_the_path(tmp_path, bert, folder, made) -> None:
    examples = Examples(TEXTS, None, None)
    encode(bert, examples, max_length=7)
    bert.save_pretrained(tmp_path / "elsewhere")
    encode(AutoTokenizer.from_pretrained(tmp_path / "elsewhere"), examples, max_length=7)
    assert len(made) == 1
    labelled = Examples([*TEXTS], None, ["x", "y"] * 3)
    assert encode(bert, labelled, max_length=7, label_ids={"x": 4, "y": 2})[1]["labels"] == 2
    assert len(made) == 2 and len(files(folder)) == 1


def other_tokenizers(folder: Path) -> Iterator[Any]:
    def changed(**settings: Any) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for name, value in settings.items():
            setattr(tokenizer, name, value)
        return tokenizer

    yield changed(truncation_side="left")
    yield changed(model_input_names=["input_ids", "token_type_ids"])
    yield changed(eos_token="[SEP]")
    more = changed()
    more.add_tokens(["猫"])
    yield more
    cased = changed()
    cased.backend_tokenizer.normalizer = None
    yield cased


def test_whatever_decides_the_tokens_makes_another_file(tmp_path, bert, folder, made, monkeypatch) -> None:
    bert.save_pretrained(tmp_path / "bert")
    encode(bert, Examples(TEXTS), max_length=7)
    encode(bert, Examples(TEXTS), max_length=8)
    encode(bert, Examples(TEXTS, TEXTS), max_length=8)
    encode(bert, Examples([*TEXTS[:-1], "it "]), max_length=8)
    encode(bert, Examples([*TEXTS[:-2], TEXTS[-2] + TEXTS[-1]]), max_length=8)
    count = 5
    for tokenizer in other_tokenizers(tmp_path / "bert"):
        encode(tokenizer, Examples(TEXTS), max_length=8)
        count += 1
    monkeypatch.setattr(token_cache, "version", lambda package: "99")
    encode(bert, Examples(TEXTS), max_length=8)
    assert not made and len(files(folder)) == count + 1


def test_calls_do_not_change_what_a_tokenizer_is(bert) -> None:
    before = tokenizer_content(bert)
    assert before is not None and '\\"truncation\\":' not in before
    bert(["the cat", "it"], truncation=True, max_length=5, padding=True)
    assert bert.backend_tokenizer.truncation is not None
    assert tokenizer_content(bert) == before


def test_tokenizers_that_cannot_be_told_apart_are_not_kept(tmp_path, folder) -> None:
    class Own(type(lm(tmp_path))):
        """A class of another package, whose code may change."""

    own = Own.from_pretrained(tmp_path / "lm")
    patched = lm(tmp_path)
    patched.extra = lambda text: text
    for tokenizer in (own, patched):
        find_kind("causal-lm").encode(tokenizer, Instructions([*TEXTS]), max_length=7)
    assert not files(folder)


@pytest.mark.parametrize("where", [0, 8, 200, -30, -1])
def test_a_damaged_file_is_made_anew(where, bert, folder, made) -> None:
    wanted = content(encode(bert, Examples(TEXTS, PAIRS), max_length=7))
    (path,) = files(folder)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[where] ^= 0x11
    for bytes_there in (damaged, whole[: len(whole) // 2], b""):
        path.write_bytes(bytes_there)
        assert content(encode(bert, Examples(TEXTS, PAIRS), max_length=7)) == wanted
        assert not made and path.read_bytes() != bytes_there and path.stat().st_size == len(whole)
    encode(bert, Examples(TEXTS, PAIRS), max_length=7)
    assert len(made) == 1


def test_a_file_of_something_else_is_made_anew(bert, folder, made) -> None:
    from safetensors.numpy import save_file

    encode(bert, Examples(PAIRS), max_length=7)
    (other,) = files(folder)
    wanted = content(encode(bert, Examples(TEXTS), max_length=7))
    (path,) = [path for path in files(folder) if path != other]
    path.write_bytes(other.read_bytes())  # whole, and of other texts
    assert content(encode(bert, Examples(TEXTS), max_length=7)) == wanted
    save_file({}, path, metadata={"columns": json.dumps("ab"), "digest": "0"})
    assert content(encode(bert, Examples(TEXTS), max_length=7)) == wanted
    assert not made


def test_where_nothing_can_be_written_nothing_is_kept(bert, folder, monkeypatch) -> None:
    folder.parent.write_text("a file in the folder's place")
    assert encode(bert, Examples(TEXTS), max_length=7).num_cut > 0
    folder.parent.unlink()

    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache.os, "replace", full)
    assert encode(bert, Examples(TEXTS), max_length=7).num_cut > 0
    assert files(folder) == []
    monkeypatch.setattr(token_cache.Path, "home", full_home)
    monkeypatch.delenv("CHILDTUNING_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert encode(bert, Examples(TEXTS), max_length=7).num_cut > 0


def full_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_faults_of_the_texts_are_told_as_ever(bert, folder) -> None:
    with pytest.raises(ConfigError, match="max_length must be above"):
        encode(bert, Examples(TEXTS), max_length=2)
    with pytest.raises(DataError, match="no ids are known"):
        encode(bert, Examples(TEXTS, None, ["x"] * 6), max_length=7)
    assert not files(folder)


def test_small_inputs_are_not_kept(bert, folder, monkeypatch) -> None:
    monkeypatch.setattr(token_cache, "MIN_CHARACTERS", 1000)
    encode(bert, Examples(["a cat"] * 90), max_length=7)
    assert not files(folder)
    encode(bert, Examples(["a cat"] * 120), max_length=7)
    assert len(files(folder)) == 1


def test_the_folder_stays_within_its_bytes_and_keeps_what_is_used(bert, folder, monkeypatch) -> None:
    rows = [[f"{'cat ' * 50}{number} {row}" for row in range(40)] for number in range(4)]
    encode(bert, Examples(rows[0]), max_length=40)
    (first,) = files(folder)
    size = first.stat().st_size
    (folder / "notes.txt").write_text("of the user's")
    left = folder / "left-over.partial"
    left.write_bytes(b"0" * size)
    os.utime(left, ns=(0, 0))
    monkeypatch.setenv("CHILDTUNING_CACHE_BYTES", str(3 * size + 99))
    for number in (1, 2):
        time.sleep(0.01)
        encode(bert, Examples(rows[number]), max_length=40)
    assert not left.exists() and first.exists()
    encode(bert, Examples(rows[0]), max_length=40)  # used now
    encode(bert, Examples(rows[3]), max_length=40)
    kept = [path for path in files(folder) if path.suffix == ".safetensors"]
    assert first in kept and len(kept) == 3
    assert sum(path.stat().st_size for path in kept) <= 3 * size + 99
    assert (folder / "notes.txt").exists()
    monkeypatch.setenv("CHILDTUNING_CACHE_BYTES", str(size // 2))
    encode(bert, Examples(rows[1]), max_length=39)  # larger than all there may be
    assert len([path for path in files(folder) if path.suffix == ".safetensors"]) == 3


@pytest.mark.parametrize("wrong", ["2GB", "-1", "1.5", "٣"])
def test_the_limit_must_be_a_number_of_bytes(wrong, bert, folder, monkeypatch) -> None:
    monkeypatch.setenv("CHILDTUNING_CACHE_BYTES", wrong)
    with pytest.raises(ConfigError, match="CHILDTUNING_CACHE_BYTES must be a whole number of bytes"):
        encode(bert, Examples(TEXTS), max_length=7)


def test_where_the_folder_is(tmp_path, bert, folder, monkeypatch) -> None:
    monkeypatch.delenv("CHILDTUNING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    encode(bert, Examples(TEXTS), max_length=7)
    assert len(files(tmp_path / "xdg" / "childtuning" / "tokens")) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    encode(bert, Examples(TEXTS), max_length=7)
    (path,) = files(tmp_path / "home" / ".cache" / "childtuning" / "tokens")
    assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0


def _write_at_once(folder: str, key: str, gate: Any, failed: Any) -> None:
    try:
        tokens = token_cache.Tokens({"input_ids": [[1, 2, 300]] * 20_000}, 3)
        for _ in range(5):
            gate.wait()
            token_cache._write(Path(folder) / f"{key}.safetensors", key, tokens, 10**9)
            if token_cache._read(Path(folder) / f"{key}.safetensors", key) != tokens:
                failed.value += 1
    except BaseException:
        failed.value += 100
        raise


@pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)  # what forks is small
def test_two_processes_write_the_same_file_at_once(tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    gate, failed = context.Barrier(2), context.Value("i", 0)
    arguments = (str(tmp_path / "tokens"), "0" * 64, gate, failed)
    writers = [context.Process(target=_write_at_once, args=arguments) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0] and failed.value == 0
    assert [path.name for path in files(tmp_path / "tokens")] == ["0" * 64 + ".safetensors"]
