"""The command line: help is quick, mistakes are one sentence and exit code 2, nothing written is harmed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from llama_edu.cli.main import VERBS, run
from llama_edu.errors import UserError
from llama_edu.tokenizer import BPETokenizer

SMALL = ["--vocab-size", "300", "--dim", "32", "--n-layers", "2", "--n-heads", "4", "--n-kv-heads", "2"]
SMALL += ["--seq-len", "32", "--batch-size", "4", "--steps", "20"]
TEXT = "".join(
    f"In the year {1000 + i} the river rose {i % 7} feet and {i % 5} of the {i} mills stood still.\n"
    for i in range(400)
)


def llama_edu(*args, cwd=None, **kwargs) -> subprocess.CompletedProcess:
    """The command as a user runs it."""
    command = [sys.executable, "-m", "llama_edu.cli.main", *map(str, args)]
    env = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", **kwargs.pop("env", {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=env, **kwargs)


def one_sentence(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("llama-edu: "), done.stderr
    return lines[0]


def test_help_names_every_verb_and_imports_no_torch():
    code = "import sys; from llama_edu.cli.main import run; run(['--help']); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(verb in out for verb in VERBS) and out.strip().endswith("False")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_its_options(verb, capsys):
    with pytest.raises(SystemExit) as left:
        run([verb, "--help"])
    assert left.value.code == 0
    assert f"llama-edu {verb}" in capsys.readouterr().out


def test_an_unknown_verb_is_answered_with_the_choice():
    with pytest.raises(UserError, match="no verb 'tuor'; the verbs are tour"):
        run(["tuor"])


@pytest.mark.slow
def test_lab_serves_the_lessons():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_edu.cli.main", "lab", "--port", str(port), "--no-browser"]
    env = {**os.environ, "JUPYTER_TOKEN": "test"}
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                address = f"http://127.0.0.1:{port}/api/contents?token=test"
                listed = json.load(urllib.request.urlopen(address, timeout=10))
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, server.communicate()
                time.sleep(0.2)
        assert "00_llama_family.ipynb" in {entry["name"] for entry in listed["content"]}
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "mills.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    out = tmp_path_factory.mktemp("tour") / "out"
    done = llama_edu("tour", "--data", corpus, "--out", out, *SMALL)
    assert done.returncode == 0, done.stderr
    return out, done


def weights(done: subprocess.CompletedProcess) -> str:
    return done.stdout.split("weights sha256 ")[1].split()[0]


@pytest.mark.slow
def test_tour_ends_with_everything_it_promises(finished):
    out, done = finished
    assert "bits per byte" in done.stdout and "says the same" in done.stdout
    for name in (
        "report.html",
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "run/metrics.jsonl",
    ):
        assert (out / name).stat().st_size > 0
    page = (out / "report.html").read_text()
    assert page.count("<img ") == page.count('alt="') == 3
    assert "http://" not in page and "https://" not in page and "<script" not in page


@pytest.mark.slow
def test_transformers_reads_the_tours_model_and_writes_the_same(finished):
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from llama_edu import Transformer, generate

    folder = finished[0] / "model"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ours = Transformer.from_pretrained(folder)
    ids = tokenizer.encode("In the year 1203 the river", add_special_tokens=False)
    with torch.no_grad():
        torch.testing.assert_close(ours(torch.tensor([ids])), theirs(torch.tensor([ids])).logits, atol=1e-5, rtol=1e-5)
    answer = theirs.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate(ours, [ids], max_new_tokens=20) == [answer[0, len(ids) :].tolist()]


@pytest.mark.slow
def test_generate_speaks_with_the_tours_model(finished):
    args = ("generate", "--model", finished[0] / "model", "--max-new-tokens", "12", "--temperature", "0")
    one = llama_edu(*args, "--prompt", "In the year")
    two = llama_edu(*args, input="In the year")
    assert one.returncode == 0, one.stderr
    assert one.stdout.strip() and one.stdout == two.stdout


@pytest.mark.slow
def test_a_second_run_repeats_no_step(finished, corpus):
    out, first = finished
    before = (out / "run" / "metrics.jsonl").stat().st_mtime_ns, (out / "tokenizer.model").stat().st_mtime_ns
    again = llama_edu("tour", "--data", corpus, "--out", out, *SMALL)
    assert again.returncode == 0 and weights(again) == weights(first)
    assert [line for line in (out / "run" / "metrics.jsonl").read_text().splitlines()][-1].startswith('{"step": 20')
    assert (out / "tokenizer.model").stat().st_mtime_ns == before[1]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_an_interrupted_tour_goes_on_and_ends_with_the_same_weights(finished, corpus, tmp_path, how):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "llama_edu.cli.main", "tour", "--data", str(corpus), "--out", str(out), *SMALL]
    env = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    metrics = out / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=120)
    assert "Traceback" not in stderr
    again = llama_edu("tour", "--data", corpus, "--out", out, *SMALL)
    assert again.returncode == 0, again.stderr
    assert weights(again) == weights(finished[1])
    steps = [line.split(",")[0] for line in metrics.read_text().splitlines()]
    assert steps == [f'{{"step": {i}' for i in range(1, 21)]


@pytest.mark.slow
def test_another_tours_folder_is_refused_and_left_alone(finished, corpus):
    out, _ = finished
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    sentence = one_sentence(llama_edu("tour", "--data", corpus, "--out", out, *SMALL, "--seed", "7"))
    assert "seed 0 (now 7)" in sentence
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


BAD_INPUT = {
    "no such file": (lambda d: d / "absent.txt", [], "no file, folder or match"),
    "empty corpus": (lambda d: write(d / "empty.txt", b" \n"), [], "the corpus is empty"),
    "undecodable bytes": (lambda d: write(d / "latin.txt", b"caf\xe9 " * 999), [], "byte 0xe9 at offset 3"),
    "shorter than one batch": (lambda d: write(d / "s.txt", b"word and word\n" * 30), [], "of one batch of 4"),
    "impossible model": (lambda d: write(d / "t.txt", TEXT.encode()), ["--n-kv-heads", "3"], "n_kv_heads 3"),
    "vocabulary too small": (lambda d: write(d / "t.txt", TEXT.encode()), ["--vocab-size", "100"], "100"),
}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence(tmp_path, case):
    make, options, words = BAD_INPUT[case]
    done = llama_edu("tour", "--data", make(tmp_path), "--out", tmp_path / "out", *SMALL, *options)
    assert words in one_sentence(done)


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_one_sentence(corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    sentence = one_sentence(llama_edu("tour", "--data", corpus, "--out", tmp_path / "file" / "out", *SMALL))
    assert str(tmp_path / "file") in sentence


@pytest.mark.slow
def test_a_folder_of_somebody_elses_is_left_alone(corpus, tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    sentence = one_sentence(llama_edu("tour", "--data", corpus, "--out", tmp_path, *SMALL))
    assert "is not empty and holds no tour" in sentence
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [20_000, 200_000], ids=["in the tokens", "in a checkpoint"])
def test_a_full_disk_is_one_sentence_and_the_tour_goes_on_later(finished, corpus, tmp_path, limit):
    """A limit on the size of a file stands in for a full disk: writing fails in the middle of it."""
    out = tmp_path / "out"
    code = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
    code += "sys.argv = ['llama-edu', *sys.argv[1:]]; from llama_edu.cli.main import main; main()"
    env = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "tour", "--data", str(corpus), "--out", str(out), *SMALL]
    one_sentence(subprocess.run(command, capture_output=True, text=True, timeout=300, env=env))
    again = llama_edu("tour", "--data", corpus, "--out", out, *SMALL)
    assert again.returncode == 0, again.stderr
    assert weights(again) == weights(finished[1])


@pytest.mark.slow
def test_a_tour_of_shakespeare(data_dir, tmp_path):
    file = data_dir / "tinyshakespeare.txt"
    if not file.exists():
        pytest.skip(f"{file} is absent")
    options = ["--vocab-size", "1024", "--dim", "64", "--n-layers", "2", "--n-heads", "4", "--steps", "100"]
    done = llama_edu(
        "tour", "--data", file, "--out", tmp_path / "out", *options, "--seq-len", "64", "--batch-size", "16"
    )
    assert done.returncode == 0, done.stderr
    scores = {name: float(bits) for bits, name in re.findall(r"^  (\d\.\d{3})  (.+)$", done.stdout, re.M)}
    assert scores["this model"] < scores["unigram model over the same tokens"]


def test_no_tokenizer_is_written_over_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"a model's")
    for options, words in (
        ([], "tokenizer.model exists already: name another file"),
        (["--out", "none/t.model"], "there is no folder none"),
        (["--out", "t.model", "--text", "a"], "cuts no text"),
    ):
        with pytest.raises(UserError, match=words):
            run(["tokenize", "--train", "builtin", "--vocab-size", "300", *options])
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("tokenizer.model", b"a model's")]


def test_a_tour_that_cannot_be_claims_no_folder(tmp_path):
    text = tmp_path / "t.txt"
    text.write_text(TEXT)
    with pytest.raises(UserError, match="vocab_size is 100"):
        run(["tour", "--data", str(text), "--out", str(tmp_path / "out"), "--vocab-size", "100"])
    assert not (tmp_path / "out").exists()


def test_input_that_is_no_text_is_one_sentence(tmp_path):
    BPETokenizer.train([TEXT], 300).save(tmp_path / "t.model")
    command = [sys.executable, "-m", "llama_edu.cli.main", "tokenize", "--model", str(tmp_path / "t.model")]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, input=b"caf\xe9", capture_output=True, env=env, timeout=300)
    assert done.returncode == 2 and b"byte 0xe9" in done.stderr and b"Traceback" not in done.stderr
