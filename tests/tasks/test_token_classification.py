"""Words with tags: files, alignment to tokens, spans and metrics."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from tests.tasks.measured import measured

from childtuning.errors import ConfigError, DataError, ModelError
from childtuning.tasks import Source, infer_kind, task_from_files
from childtuning.tasks.kind import Columns, find_kind
from childtuning.tasks.sentences import Sentences, is_bio, looks_like_conll, read_conll
from childtuning.tasks.spans import span_counts, span_ratio, spans_of
from childtuning.tasks.token_classification import TokenClassification

KIND = TokenClassification()
CONLL = """-DOCSTART- -X- O O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
"""


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer that cuts words into letters, with one special token at each end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdef", *("##" + letter for letter in "abcdef")]
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(letters)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def test_labels_stand_at_the_first_token_of_a_word(pieces):
    split = Sentences([["ab", "c"], ["f"]], [["X", "Y"], ["Y"]])
    encoded = KIND.encode(pieces, split, max_length=16, label_names=("X", "Y"))
    assert encoded[0]["input_ids"] == [1, 4, 11, 6, 2]
    assert encoded[0]["labels"] == [-100, 0, -100, 1, -100]
    assert (encoded.places, encoded.num_cut) == ([[0, 1], [0]], 0)
    batch = KIND.collator(pieces, exact=True)([encoded[0], encoded[1]])
    assert batch["labels"].tolist() == [[-100, 0, -100, 1, -100], [-100, 1, -100, -100, -100]]


def test_words_behind_the_length_limit_are_counted_and_wrong(pieces):
    split = Sentences([["a", "bcd", "e", "f"]], [["O", "B-X", "O", "B-X"]])
    names = ("B-X", "O")
    encoded = KIND.encode(pieces, split, max_length=5, label_names=names)
    assert encoded[0]["input_ids"] == [1, 4, 5, 12, 2] and encoded.num_cut == 2
    outputs = [np.array([[1, 0.9], [0, 0.8]])]  # both right
    rows = KIND.predictions(outputs, encoded, split, names)
    assert rows[0]["prediction"] == ["O", "B-X", None, None]
    assert rows[0]["confidence"] == [0.9, 0.8, None, None]
    values = measured(KIND, ("span_f1", "span_recall", "accuracy"), outputs, encoded, split, names)
    assert values == pytest.approx({"span_f1": 2 / 3, "span_recall": 0.5, "accuracy": 0.5})


def test_unknown_tags_are_marked_too_and_diverged_models_measure_nan(pieces):
    encoded = KIND.encode(pieces, Sentences([["ab", "c"]]), max_length=16, label_names=("X",))
    assert encoded[0]["labels"] == [-100, 0, -100, 0, -100]
    split = Sentences([["a"]], [["X"]])
    values = measured(
        KIND,
        ("accuracy",),
        [np.array([[np.nan, 0.1]])],
        KIND.encode(pieces, split, max_length=9, label_names=("X",)),
        split,
        ("X",),
    )
    assert np.isnan(values["accuracy"])


def test_limits_of_the_tokenizer(pieces):
    with pytest.raises(ConfigError, match="above the 2 special tokens of a row, got 2"):
        KIND.encode(pieces, Sentences([["a"]]), max_length=2)
    with pytest.raises(ModelError, match="fast tokenizer"):
        KIND.encode(object(), Sentences([["a"]]), max_length=9)


def test_byte_level_tokenizers_get_their_prefix_space(tmp_path):
    """Such a tokenizer refuses words unless it is loaded with a space before each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, RobertaConfig, RobertaTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.decoder = decoders.ByteLevel()
    RobertaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    RobertaConfig().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, **KIND.processor_options)
    encoded = KIND.encode(tokenizer, Sentences([["ab", "c"]]), max_length=16)
    shown = tokenizer.convert_ids_to_tokens(encoded[0]["input_ids"])
    assert shown == ["<s>", "Ġ", "a", "b", "Ġ", "c", "</s>"] and encoded.places == [[0, 1]]


def test_conll_files(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text(CONLL)
    split = read_conll(Source(path), labelled=True)
    assert split.words == [["EU", "rejects"], ["Peter", "Blackburn"]]
    assert split.tags == [["B-ORG", "O"], ["B-PER", "I-PER"]]
    packed = tmp_path / "b.txt.gz"
    packed.write_bytes(gzip.compress(CONLL.encode()))
    assert read_conll(Source(packed), labelled=True) == split
    assert infer_kind(Source(packed), Columns()) is find_kind("token-classification")
    path.write_text("one O\ntwo\n")
    assert read_conll(Source(path), labelled=False).words == [["one", "two"]]
    with pytest.raises(DataError, match=r"a.conll line 2 must have a word and its tag, got only 'two'"):
        read_conll(Source(path), labelled=True)
    path.write_text("\n\n-DOCSTART- O\n")
    with pytest.raises(DataError, match="has no sentences"):
        read_conll(Source(path), labelled=True)


def test_what_is_no_word_a_line_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("Ada lives in London\nTom works at Google\n")
    with pytest.raises(DataError, match="has several words a line, and no tags. Write one word a line"):
        read_conll(Source(path), labelled=False)
    path.write_text("Ada NNP\nlives VBZ\n")
    source = Source(path)
    assert read_conll(source, labelled=False).words == [["Ada", "lives"]]
    assert "the word is in the first column" in " ".join(source.notes)
    rows = [[number, "The", "the", "DET", *"_____", "_"] for number in ("1", "2-3", "2", "2.1")]
    path.write_text("# sent_id = 1\n" + "".join("\t".join(row) + "\n" for row in rows))
    for labelled in (False, True):
        with pytest.raises(DataError, match="is CoNLL-U, with the word in the second of ten columns"):
            read_conll(Source(path), labelled=labelled)
    with pytest.raises(DataError, match="single texts, got a second one, 'dog'"):
        KIND.of_texts(["cat"], ["dog"], Columns())


def test_conll_spaces_inside_words_and_comments(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text(
        "# id 8f3a domain=en\n10\u00a0000 B-NUM\r\n#\tO\na\u2028b O\n\n# sent_id = 2\n# O\n", newline=""
    )
    assert looks_like_conll(path.read_text())
    source = Source(path)
    split = read_conll(source, labelled=True)
    assert split.words == [["10\u00a0000", "#", "a\u2028b"], ["#"]]
    assert split.tags == [["B-NUM", "O", "O"], ["O"]]
    assert source.notes == ["a.conll: 2 comments before sentences were left out"]


def test_running_text_is_no_conll():
    assert looks_like_conll(CONLL)
    assert not looks_like_conll("ROMEO:\nBut soft what light\n")
    assert not looks_like_conll("")


def test_tables_become_a_task(tmp_path):
    rows = [{"tokens": ["a", "b"], "tags": ["B-X", "O"]}, {"tokens": ["c"], "tags": ["O"]}]
    path = write(tmp_path / "a.jsonl", rows)
    task = task_from_files(path, path)
    assert (task.kind, task.label_names, task.metrics) == (
        "token-classification",
        ("B-X", "O"),
        ("span_f1", "accuracy"),
    )
    assert task.train.subset([1]).words == [["c"]]  # type: ignore[attr-defined]
    numbers = write(tmp_path / "n.jsonl", [{"w": ["a", "b"], "t": [0, 1]}])
    task = task_from_files(numbers, numbers, text="w", label="t")
    assert (task.label_names, task.metrics) == (("0", "1"), ("accuracy",))


def test_parquet_lists(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"tokens": [["a", "b"]], "tags": [["X", "Y"]]}), tmp_path / "a.parquet"
    )
    task = task_from_files(tmp_path / "a.parquet", tmp_path / "a.parquet")
    assert task.kind == "token-classification" and task.label_names == ("X", "Y")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["X"]}, "line 2 must have one tag per word, got 1 tags for 2 words"),
        ({"tokens": ["a"], "tags": "X"}, "line 2 must have a list in column 'tags', got str"),
        ({"tokens": [], "tags": []}, "line 2 has an empty list in column 'tokens'"),
        ({"tokens": ["a"], "tags": [""]}, "line 2 has an empty tag in column 'tags'"),
        ({"tokens": [["a"]], "tags": ["X"]}, "line 2 must have words in column 'tokens', got list"),
        ({"tags": ["X"]}, "line 2 must have a list in column 'tokens', got nothing"),
    ],
)
def test_bad_rows(tmp_path, row, message):
    path = write(tmp_path / "a.jsonl", [{"tokens": ["a", "b"], "tags": ["X", "Y"]}, row])
    with pytest.raises(DataError) as caught:
        task_from_files(path, path, strict=True)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_tags_that_training_lacks(tmp_path):
    train = write(tmp_path / "a.jsonl", [{"tokens": ["a", "b"], "tags": ["X", "Y"]}])
    dev = write(tmp_path / "b.jsonl", [{"tokens": ["a"], "tags": ["Z"]}])
    with pytest.raises(DataError, match="never saw in the dev split of 'files': 'Z'. Known: 'X', 'Y'"):
        task_from_files(train, dev)
    one = write(tmp_path / "c.jsonl", [{"tokens": ["a"], "tags": ["O"]}])
    with pytest.raises(DataError, match="at least two classes, got only 'O'"):
        task_from_files(one, one)
    with pytest.raises(DataError, match="no column 'labels'"):
        task_from_files(train, train, label="labels")


def spans_by_hand(tags: list[str]) -> set[tuple[str, int, int]]:
    """The slow twin: every stretch of words, tried against the definition of a span."""
    found = set()
    for start in range(len(tags)):
        for end in range(start + 1, len(tags) + 1):
            kind = tags[start][2:]
            inside = kind and all(tag == f"I-{kind}" for tag in tags[start + 1 : end])
            begins = tags[start][:1] == "B" or start == 0 or tags[start - 1][2:] != kind
            ends = end == len(tags) or tags[end] != f"I-{kind}"
            if inside and begins and ends:
                found.add((kind, start, end))
    return found


def test_spans_against_their_definition():
    rng = np.random.default_rng(0)
    names = ["O", "B-A", "I-A", "B-B", "I-B"]
    for _ in range(300):
        tags = [names[i] for i in rng.integers(0, 5, rng.integers(1, 8))]
        assert spans_of(tags) == spans_by_hand(tags), tags
    assert spans_of(["I-A", "B-A", "I-A"]) == {("A", 0, 1), ("A", 1, 3)}  # IOB1's neighbours


def test_span_metrics_of_other_tags_are_refused(tmp_path):
    rows = [{"tokens": ["a", "b", "c"], "tags": tags} for tags in (["B-A", "E-A", "S-A"], ["O", "O", "S-A"])]
    task = task_from_files(write(tmp_path / "a.jsonl", rows * 8), write(tmp_path / "b.jsonl", rows))
    with pytest.raises(ConfigError, match=r"span_recall reads the tags O, B-… and I-…, got .*S-A"):
        task.measured_by("span_recall")
    assert task.measured_by("accuracy").metrics[0] == "accuracy"


def test_span_ratios_count_over_all_sentences():
    truth = [["B-A", "I-A", "O"], ["B-B", "O", "B-A"]]
    guess = [["B-A", "O", "O"], ["B-B", "O", "B-A"]]
    counts = span_counts(guess, truth)
    for name in ("span_f1", "span_precision", "span_recall"):
        assert span_ratio(name, counts.sum(0)) == pytest.approx(2 / 3)
        assert span_ratio(name, span_counts([["O"]], [["O"]])) == [0.0]
    assert is_bio(["O", "B-A", "I-A"]) and not is_bio(["O"]) and not is_bio(["NOUN", "O"])
