"""`llama-edu train`: text or tokens in, a file or options, resumable, a model and a report at the end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_edu.cli.main import run
from llama_edu.data import TokenFile, write_tokens
from llama_edu.errors import UserError
from llama_edu.tokenizer import BPETokenizer
from llama_edu.train import main as train_on_ranks

TEXT = "".join(
    f"In the year {1000 + i} the river rose {i % 7} feet and {i % 5} mills stood still.\n" for i in range(600)
)
SMALL = "--dim 16 --n-layers 2 --n-heads 2 --n-kv-heads 1 --seq-len 32 --batch-size 4 --steps 12 --no-mfu".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A text, its tokenizer, and its tokens."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "mills.txt").write_text(TEXT)
    tokenizer = BPETokenizer.train([TEXT], 300, special_tokens=("<|begin_of_text|>", "<|end_of_text|>"))
    tokenizer.save(folder / "tok.model")
    for name, part in (("train", TEXT[:-2000]), ("val", TEXT[-2000:])):
        write_tokens([part], tokenizer, folder / name)
    return folder


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple]:
    return [(entry["step"], entry["loss"], entry.get("val_loss")) for entry in lines(folder)]


def test_text_becomes_a_model_with_a_report(place, tmp_path, capsys):
    line = ["train", "--data", place / "mills.txt", "--tokenizer", place / "tok.model", "--out", tmp_path / "out"]
    line = [*map(str, line), *SMALL]
    assert run(line) == 0
    said = capsys.readouterr().out
    assert "the run reads 48 sequences of 32 tokens" in said and "log V = 5.70" in said
    assert "bits per byte; the model is in" in said
    out = tmp_path / "out"
    for name in ("model/config.json", "model/model.safetensors", "model/tokenizer.json", "run/report.html"):
        assert (out / name).stat().st_size > 0
    history = lines(out / "run")
    assert [entry["step"] for entry in history if "samples" in entry] == [3, 6, 9, 12]
    assert all(entry["samples"][0]["prompt"] == "The " and entry["samples"][0]["text"] for entry in history[2::3])
    before = losses(out / "run")
    assert run(line) == 0 and losses(out / "run") == before  # complete: nothing is done again
    with pytest.raises(UserError, match=r"lr 0\.001 "):
        run([*line, "--lr", "0.5"])


def test_a_file_and_options_say_the_same(place, tmp_path):
    file = tmp_path / "run.yaml"
    shape = "{dim: 16, n_layers: 2, n_heads: 2, n_kv_heads: 1, vocab_size: 300, max_seq_len: 64, tie_embeddings: true}"
    rest = "batch_size: 4\nseq_len: 32\nsteps: 12\nlr: 1e-3\nwarmup: 1\nmfu: false\neval_every: 5\n"
    data = f"train_data: {place / 'train'}\nval_data: {place / 'val'}\n"
    file.write_text(f"model: {shape}\n{data}out_dir: {tmp_path / 'file'}\n{rest}")
    assert run(["train", "--config", str(file)]) == 0
    assert (tmp_path / "file" / "model" / "model.safetensors").exists()
    assert not any("samples" in entry for entry in lines(tmp_path / "file"))  # no tokenizer, no text
    options = ["--data", str(place / "train"), "--val-data", str(place / "val"), "--out", str(tmp_path / "options")]
    options += ["--tokenizer", str(place / "tok.model"), "--eval-every", "5"]
    options += ["--sample-every", "4", "--sample-prompts", "In the", "The year"]
    assert run(["train", *options, *SMALL]) == 0
    assert losses(tmp_path / "file") == losses(tmp_path / "options" / "run")
    assert [len(entry["samples"]) for entry in lines(tmp_path / "options" / "run") if "samples" in entry] == [2, 2, 2]


def test_mixtures_come_from_a_file(place, tmp_path):
    tok = BPETokenizer.load(place / "tok.model")
    write_tokens(["other words " * 300], tok, tmp_path / "other")
    file = tmp_path / "run.yaml"
    file.write_text(f"train_data:\n  {place / 'train'}: 0.75\n  {tmp_path / 'other'}: 0.25\nout: {tmp_path / 'out'}\n")
    assert run(["train", "--config", str(file), *SMALL]) == 0
    assert len(lines(tmp_path / "out" / "run")) == 12


@pytest.mark.parametrize(
    "options, words",
    [
        ([], "--out is not given"),
        (["--out", "OUT"], "--data is not given"),
        (["--data", "PLACE/mills.txt", "--out", "OUT"], "--tokenizer is not given"),
        (
            ["--data", "PLACE/mills.txt", "--tokenizer", "PLACE/nope", "--out", "OUT"],
            "tokenize --train PLACE/mills.txt",
        ),
        (["--data", "PLACE/train", "--train-data", "PLACE/train", "--out", "OUT"], "choose one"),
        (["--data", "PLACE/train", "--out", "OUT", "--sample-every", "2", "--sample-prompts", "a"], "take a tokenizer"),
        (["--data", "PLACE/train", "--out", "OUT", "--sample-every", "2"], "without sample_prompts"),
        (["--data", "PLACE/train", "--out", "OUT", "--seq-len", "9999"], "less than the"),
        (["--data", "PLACE/train", "--out", "OUT", "--model.max-seq-len", "16"], "the model's max_seq_len is 16"),
        (["--data", "PLACE/train", "--out", "OUT", "--model.vocab-size", "30"], "the model's vocab_size is 30"),
        (["--data", "PLACE/train", "--out", "OUT", "--accumulate", "3"], "does not divide by accumulate 3"),
        (["--train-data", "{PLACE/train: 0.7, PLACE/val: 0.7}", "--out", "OUT"], "sum to 1.4, not to 1"),
        (["--train-data", "{PLACE/train: 0.7, PLACE/nope: 0.3}", "--out", "OUT"], "PLACE/nope"),
        (["--data", "PLACE/train", "--out", "OUT", "--lr", "1000"], "lower lr (now 1000.0)"),
        (["--data", "PLACE/train", "--out", "OUT", "--device", "gpu"], "device is 'gpu'"),
        (["--data", "PLACE/train", "--out", "OUT", "--device", "meta"], "device is 'meta', which cannot compute here"),
    ],
)
def test_mistakes_are_one_sentence(place, tmp_path, options, words):
    def put(text: str) -> str:
        return text.replace("PLACE", str(place)).replace("OUT", str(tmp_path / "out"))

    small = [word for word in SMALL if not (word == "--seq-len" and "--seq-len" in options)]
    if "--seq-len" in options:
        small.remove("32")
    with pytest.raises(UserError) as caught:
        run(["train", *map(put, options), *small])
    assert put(words) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("timeout", ["nan", "-1", "0", "1e30"])
def test_a_timeout_that_is_none_is_one_sentence(capsys, timeout):
    assert train_on_ranks(["--parallel.timeout", timeout]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"llama-edu: parallel.timeout is \S+; it must be from 1 to 1e8 seconds.*\n", said)


def test_tokens_of_another_tokenizer_are_refused(place, tmp_path):
    BPETokenizer.train([TEXT], 280, special_tokens=("<|begin_of_text|>", "<|end_of_text|>")).save(tmp_path / "other")
    line = [
        "train",
        "--data",
        str(place / "train"),
        "--tokenizer",
        str(tmp_path / "other"),
        "--out",
        str(tmp_path / "o"),
    ]
    with pytest.raises(UserError, match="another tokenizer than"):
        run([*line, *SMALL])


def test_a_corpus_of_one_token_is_refused(place, tmp_path):
    tok = BPETokenizer.load(place / "tok.model")
    one = write_tokens(["a"], tok, tmp_path / "one")
    assert isinstance(one, TokenFile)
    tiny = ["train", "--data", str(tmp_path / "one"), "--out", str(tmp_path / "out"), *SMALL]
    with pytest.raises(UserError, match="has 3 tokens"):
        run(tiny)


@pytest.mark.slow
def test_sigterm_exits_0_with_one_line_and_the_same_command_goes_on(place, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "llama_edu.cli.main", "train", "--data", str(place / "train"), "--out", str(out)]
    command += [*SMALL, "--steps=2000", "--eval-every", "0"]
    command.remove("--steps"), command.remove("12")
    env = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    deadline = time.monotonic() + 120
    metrics = out / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0 and said.startswith("interrupted after step") and said.count("\n") == 1, said
    done = len(lines(out / "run"))
    assert f"step_{done:08d}" in {path.name for path in (out / "run" / "checkpoints").iterdir()}
    assert not (out / "model").exists()
