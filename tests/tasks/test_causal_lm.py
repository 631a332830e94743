"""Prompts, responses and running text: rows, tokens, masks, losses, and what is refused."""

from __future__ import annotations

import gzip
import json
import math
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tests.tasks.measured import measured
from tests.tiny_kinds import save_tiny_lm, save_tokenizer, write_instructions

from childtuning.errors import ConfigError, DataError, ModelError
from childtuning.runs import RunConfig, load, train_run
from childtuning.tasks import Answers, Source, task_from_files
from childtuning.tasks.causal_lm import CausalLM
from childtuning.tasks.instructions import Instructions, RunningText, read_prompts

REAL = Path(os.environ.get("CHILDTUNING_DATA", Path(__file__).parents[3] / "shared" / "data"))
KIND = CausalLM()
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
CHAT = [{"role": "user", "content": "cat ?"}, {"role": "assistant", "content": "sat"}]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_virtual_tokens_are_not_scored(tmp_path: Path) -> None:
    train, dev = write_instructions(tmp_path)
    base = str(save_tiny_lm(tmp_path / "base"))
    config = RunConfig(train=str(train), eval=str(dev), model=base, method="prompt:3", epochs=1.0)
    result = train_run(config, tmp_path / "run")
    run = load(tmp_path / "run")
    task = task_from_files(train, dev)
    total, count = 0.0, 0
    for prompt, response in zip(task.dev.prompts, task.dev.responses, strict=True):
        encoded = KIND.encode(run.processor(), Instructions([prompt], [response]), max_length=64)[0]
        tokens, labels = torch.tensor([encoded["input_ids"]]), torch.tensor(encoded["labels"])
        with torch.no_grad():
            logits = (
                run.model().eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, 3:]
            )
        here = labels[1:] != -100
        loss = torch.nn.functional.cross_entropy(logits[:-1][here], labels[1:][here], reduction="sum")
        total, count = total + float(loss), count + int(here.sum())
    assert result.metrics["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def with_start(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("bos"), bos=True)


def words(tokenizer, row, name="input_ids"):
    return ["-" if token == -100 else tokenizer.convert_ids_to_tokens(token) for token in row[name]]


def test_the_prompt_is_masked_and_the_text_ends(tokenizer, with_start):
    split = Instructions(["nice cat ?"], ["sat on"])
    encoded = KIND.encode(tokenizer, split, max_length=16)
    assert words(tokenizer, encoded[0]) == ["nice", "cat", "?", "sat", "on", "</s>"]
    assert words(tokenizer, encoded[0], "labels") == ["-", "-", "-", "sat", "on", "</s>"]
    encoded = KIND.encode(with_start, split, max_length=16)
    assert words(with_start, encoded[0]) == ["<s>", "nice", "cat", "?", "sat", "on", "</s>"]
    assert words(with_start, encoded[0], "labels") == ["-", "-", "-", "-", "sat", "on", "</s>"]
    assert encoded.num_cut == 0


def test_long_rows_lose_the_left_of_the_prompt(with_start):
    split = Instructions(
        ["the very nice cat ?", "cat ?", "cat ?"], ["sat on", "sat on the mat in house", "sat"]
    )
    encoded = KIND.encode(with_start, split, max_length=6)
    assert words(with_start, encoded[0]) == ["<s>", "cat", "?", "sat", "on", "</s>"]
    assert words(with_start, encoded[1]) == ["<s>", "sat", "on", "the", "mat", "in"]
    assert words(with_start, encoded[2]) == ["<s>", "cat", "?", "sat", "</s>"]
    assert encoded.num_cut == 2
    with pytest.raises(ConfigError, match="max_length must be at least 3, got 2"):
        KIND.encode(with_start, split, max_length=2)


def test_long_prompts_alone_keep_the_token_that_begins_every_text(tmp_path, with_start):
    from transformers import AutoModelForCausalLM

    long = Instructions(["the very nice cat ?"])
    with_start.pad_token = with_start.eos_token
    encoded = KIND.encode(with_start, long, max_length=4)
    assert words(with_start, encoded[0]) == ["<s>", "nice", "cat", "?"]
    model = AutoModelForCausalLM.from_pretrained(save_tiny_lm(tmp_path, "llama")).eval()
    asked = []
    model.generate = lambda input_ids, **rest: asked.append(input_ids) or input_ids
    batch = KIND.collator(with_start, exact=True)([KIND.encode(with_start, long, max_length=16)[0]])
    KIND.answers(model, batch, with_start, Answers(max_new_tokens=60))
    assert words(with_start, {"input_ids": asked[0][0].tolist()}) == ["<s>", "nice", "cat", "?"]


def test_a_response_ends_although_the_end_is_written_within(tokenizer):
    split = Instructions(["cat ?", "cat ?"], ["sat </s> on", "sat </s>"])
    encoded = KIND.encode(tokenizer, split, max_length=16)
    assert words(tokenizer, encoded[0])[2:] == ["sat", "</s>", "on", "</s>"]
    assert words(tokenizer, encoded[1])[2:] == ["sat", "</s>"]


def test_a_template_that_refuses_a_role_is_one_line(tmp_path):
    refusing = save_tokenizer(tmp_path, template="{{ raise_exception('only users') }}")
    with pytest.raises(ModelError, match=r"refuses messages of user \(only users\)"):
        KIND.encode(refusing, Instructions([CHAT[:1]], ["sat"]), max_length=32)


def test_equal_prompts_stay_on_one_side():
    talk = [[{"role": "user", "content": f"cat {i % 5}"}] for i in range(20)]
    for prompts in (talk, [f"cat {i % 5}" for i in range(20)]):
        rest, aside = Instructions(prompts, ["sat"] * 20).hold_out(0.2)
        assert len(aside) == 4 and not {*rest.contents()} & {*aside.contents()}


def test_prompts_alone_are_what_rows_begin_with(with_start):
    whole = KIND.encode(with_start, Instructions(["nice cat ?"], ["sat"]), max_length=16)[0]
    alone = KIND.encode(with_start, Instructions(["nice cat ?"]), max_length=16)[0]
    assert whole["input_ids"][: len(alone["input_ids"])] == alone["input_ids"] and "labels" not in alone


def test_every_token_of_running_text_is_predicted_once(tokenizer, with_start):
    text = "the cat sat on the mat the dog ran in the house"
    encoded = KIND.encode(tokenizer, RunningText(text), max_length=5)
    blocks = [words(tokenizer, encoded[i]) for i in range(len(encoded))]
    assert [token for block in blocks for token in block[1:]] == text.split()[1:]
    assert all(row[-1] == follower[0] for row, follower in pairwise(blocks))
    assert all(encoded[i]["labels"] == encoded[i]["input_ids"] for i in range(len(encoded)))
    exact = KIND.encode(tokenizer, RunningText("cat sat on mat in"), max_length=3)
    assert exact.lengths == [3, 3]
    assert words(with_start, KIND.encode(with_start, RunningText("cat"), max_length=8)[0]) == ["<s>", "cat"]
    with pytest.raises(DataError, match="at least two tokens"):
        KIND.encode(tokenizer, RunningText("cat"), max_length=8)


def test_conversations_go_through_the_chat_template(tmp_path, tokenizer):
    chatty = save_tokenizer(tmp_path, template=TEMPLATE)
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": CHAT + CHAT}])
    task = task_from_files(path, path)
    assert task.kind == "causal-lm" and task.columns.text == "messages"
    encoded = KIND.encode(chatty, task.train, max_length=32)  # type: ignore[arg-type]
    assert words(chatty, encoded[0])[-6:] == ["cat", "?", "<unk>", ":", "sat", "</s>"]
    assert words(chatty, encoded[0], "labels")[-3:] == ["-", "sat", "</s>"]
    assert sum(label != -100 for label in encoded[1]["labels"]) == 2  # the last response alone
    asked = KIND.read(Source(path), task.columns, labelled=False)
    assert asked.prompts == task.train.prompts  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="no chat template"):
        KIND.encode(tokenizer, task.train, max_length=32)  # type: ignore[arg-type]


def test_the_loss_is_over_all_response_tokens(tmp_path):
    """Rows of unequal length: the mean is over tokens, however they are cut into batches; padding changes nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_tiny_lm(tmp_path, "gpt2")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    tokenizer.pad_token = tokenizer.eos_token
    split = Instructions(
        ["nice cat ?", "the very bad dog ?", "bird ?"], ["sat", "ran in the house", "flew over"]
    )
    encoded = KIND.encode(tokenizer, split, max_length=32)
    collate = KIND.collator(tokenizer, exact=True)
    with torch.inference_mode():
        together = KIND.outputs(model, collate([encoded[i] for i in range(3)]))
        apart = [KIND.outputs(model, collate([encoded[i]]))[0] for i in range(3)]
    assert [count for _, count in together] == [2, 5, 3]
    assert [total for total, _ in together] == pytest.approx([total for total, _ in apart], rel=1e-5)
    total = 0.0
    with torch.inference_mode():
        for row in (encoded[i] for i in range(3)):  # the definition, token after token
            for position, token in enumerate(row["labels"]):
                if token != -100:
                    seen = torch.tensor([row["input_ids"][:position]])
                    total -= float(model.double()(seen).logits[0, -1].log_softmax(-1)[token])
    values = measured(KIND, ("loss", "perplexity"), together, encoded, split, ())
    assert values["loss"] == pytest.approx(total / 10, rel=1e-5)
    assert values["perplexity"] == pytest.approx(math.exp(total / 10), rel=1e-5)
    assert math.isnan(measured(KIND, ("loss",), [(math.nan, 1)], encoded, split, ())["loss"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompts_are_answered_the_same_alone_and_together(tmp_path, family):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_tiny_lm(tmp_path, family)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    tokenizer.pad_token = tokenizer.eos_token
    encoded = KIND.encode(tokenizer, Instructions(["cat ?", "the very nice bad dog ?", ""]), max_length=32)
    collate = KIND.collator(tokenizer, exact=True)
    options = Answers(max_new_tokens=6)
    together = KIND.answers(model, collate([encoded[i] for i in range(3)]), tokenizer, options)
    for index in range(3):
        assert KIND.answers(model, collate([encoded[index]]), tokenizer, options) == [together[index]]
        seen = torch.tensor([encoded[index]["input_ids"]])
        for _ in range(together[index]["num_tokens"]):  # greedy, by the definition
            best = model(seen).logits[:, -1].argmax(-1, keepdim=True)
            seen = torch.cat([seen, best], dim=1)
        own = seen[0, len(encoded[index]["input_ids"]) :].tolist()
        assert tokenizer.decode(own, skip_special_tokens=True) == together[index]["prediction"]
    with pytest.raises(ConfigError, match="64 positions, got 64"):
        KIND.answers(model, collate([encoded[0]]), tokenizer, Answers(max_new_tokens=64))


def test_files_are_told_apart(tmp_path):
    train, dev = write_instructions(tmp_path)
    task = task_from_files(train, dev)
    assert (task.kind, task.metrics, task.label_names) == ("causal-lm", ("loss", "perplexity"), ())
    own = write(tmp_path / "own.jsonl", [{"question": "cat ?", "answer": "sat"}])
    task = task_from_files(own, own, kind="causal-lm", text="question", label="answer")
    assert task.train.responses == ["sat"]  # type: ignore[attr-defined]
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(b"the cat sat\non the mat\n"))
    text = task_from_files(packed, packed)
    assert text.kind == "causal-lm" and text.train == RunningText("the cat sat\non the mat\n")
    with pytest.raises(ConfigError, match="limit counts rows"):
        task_from_files(packed, packed, train_limit=3)
    assert read_prompts(Source(packed)).prompts == ["the cat sat", "on the mat"]
    labelled = write(tmp_path / "c.jsonl", [{"prompt": "a", "response": "b", "label": x} for x in "xy"])
    assert task_from_files(labelled, labelled, text="prompt", label="label").kind == "classification"


ALPACA = {"instruction": "Translate to French.", "input": "cheese", "output": "fromage"}


@pytest.mark.parametrize(
    ("row", "prompt", "note"),
    [
        (
            ALPACA,
            "Translate to French.\n\ncheese\n",
            "prompts are in 'instruction' and 'input', responses in 'output'",
        ),
        ({**ALPACA, "input": ""}, "Translate to French.\n", "'instruction' and 'input'"),
        (
            {"instruction": "Say cheese.", "output": "fromage"},
            "Say cheese.\n",
            "in 'instruction', responses in 'output'",
        ),
        (
            {"Instruction": "Translate.", "Context": "cheese", "Response": "fromage"},
            "Translate.\n\ncheese\n",
            "prompts are in 'instruction' and 'context', responses in 'response'",
        ),
    ],
)
def test_instructions(tmp_path, row, prompt, note):
    path = write(tmp_path / "a.jsonl", [row])
    task = task_from_files(path, path)
    assert task.kind == "causal-lm" and task.train == Instructions([prompt], ["fromage"])
    assert len(task.notes) == 1 and note in task.notes[0]
    assert KIND.read(Source(path), task.columns, labelled=False) == Instructions([prompt])
    said, beside = (row.get(name or "") for name in (task.columns.text, task.columns.text_pair))
    typed = KIND.of_texts(
        [said or row["Instruction"]], None if not row.get("input") else [beside], task.columns
    )
    if "Context" not in row:  # whose columns are found whatever their case
        assert typed == Instructions([prompt])


def test_a_second_text_is_for_prompts_of_two(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}])
    columns = task_from_files(path, path).columns
    assert KIND.of_texts(["a"], None, columns) == Instructions(["a"])
    with pytest.raises(DataError, match="prompts of one text, got a second, 'c'"):
        KIND.of_texts(["a"], ["c"], columns)


def test_what_a_message_has_besides_is_told(tmp_path):
    said = [
        {"role": "user", "content": "How is it?", "name": ""},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "weather"}]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ]
    path = write(tmp_path / "a.jsonl", [{"messages": said}])
    assert any(
        "messages have tool_calls, which the model does not see" in n
        for n in task_from_files(path, path).notes
    )


def test_conversations_of_sharegpt(tmp_path):
    said = [("system", "Be brief."), ("human", "Who sat?"), ("gpt", "The cat.")]
    row = {"conversations": [{"from": role, "value": text} for role, text in said]}
    path = write(tmp_path / "a.jsonl", [row])
    task = task_from_files(path, path)
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who sat?"}]
    assert task.train == Instructions([prompt], ["The cat."])
    assert task.notes == ("a.jsonl: conversations are in column 'conversations' (--text names another)",)


def test_the_end_of_a_text_is_set_aside(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat\non the mat\n" * 10)
    task = task_from_files(tmp_path / "a.txt")
    assert task.train.text + task.dev.text == "the cat sat\non the mat\n" * 10  # type: ignore[attr-defined]
    assert 40 <= len(task.dev.text) <= 56  # type: ignore[attr-defined]
    assert task.notes == (
        "a.txt: a .txt file is read as running text; examples with labels need csv, tsv or jsonl",
        "a.txt: no --eval, so the last 20% of the text is set aside for evaluation",
    )
    (tmp_path / "a.txt").write_text("cat\n")
    with pytest.raises(DataError, match="one word cannot be split"):
        task_from_files(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": " "}],
            "line 2 has an empty response",
        ),
        ([{"prompt": "a", "response": ["b"]}], "line 1 must have text in column 'response', got list"),
        ([{"messages": CHAT[:1]}], "line 1 must end with a non-empty message of the assistant"),
        ([{"messages": CHAT}, {"messages": []}], "line 2 must have a list of messages"),
        (
            [{"messages": [{"role": "user"}]}],
            "line 1 must have messages in column 'messages', got dict without",
        ),
    ],
)
def test_bad_rows(tmp_path, rows, message):
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        task_from_files(path, path, strict=True)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    class Endless:
        eos_token_id = bos_token_id = None

        def __call__(self, text, **_):
            return tokenizer(text, add_special_tokens=False)

    with pytest.raises(ModelError, match="no end-of-text token"):
        KIND.encode(Endless(), Instructions(["cat"], ["sat"]), max_length=8)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real data: set CHILDTUNING_DATA to a folder of tasks")
def test_real_text(tokenizer):
    path = REAL / "tinyshakespeare" / "input.txt.gz"
    task = task_from_files(path, path)
    assert task.kind == "causal-lm" and len(task.train.text) == 1_115_394  # type: ignore[attr-defined]
