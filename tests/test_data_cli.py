"""`llama-edu data`: builds, checks, and tells mistakes in a sentence."""

import json

import pytest

from llama_edu.cli.data import data
from llama_edu.data import open_tokens
from llama_edu.errors import UserError
from llama_edu.tokenizer import BPETokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [{"body": f"line {i} of the river and its mills"} for i in range(300)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = BPETokenizer.train([row["body"] for row in rows], 300, special_tokens=["<|end_of_text|>"])
    tokenizer.save(folder / "tokenizer.model")
    for name in ("one", "two"):
        source, model = str(folder / "rows.jsonl"), folder / "tokenizer.model"
        data(source, tokenizer=model, out=folder / name, field="body", workers=0, shard_mb=0.004)
    return folder


def test_builds_and_says_what_there_is(place, capsys):
    source, model = str(place / "rows.jsonl"), place / "tokenizer.model"
    assert data(source, tokenizer=model, out=place / "one", field="body", workers=0, shard_mb=0.004) == 0
    said = capsys.readouterr().out
    tokens = open_tokens(place / "one")
    assert f"{tokens.n_tokens:,} tokens in 300 documents and {len(tokens.shards)} shards" in said
    assert data(check=place / "one") == 0
    assert "every byte is as it was written" in capsys.readouterr().out


def test_a_mixture_is_told_with_its_epochs(place, capsys):
    file = place / "mix.toml"
    file.write_text('[sources]\na = "one"\nb = "two"\n[weights]\na = 0.75\nb = 0.25\n')
    assert data(check=file, seq_len=16, tokens=16 * 640) == 0
    said = capsys.readouterr().out
    assert "640 sequences of 16" in said and "a: 480 sequences, 75.00 % of".replace(" %", "%") in said


def test_a_share_is_held_out_and_the_rest_is_for_training(place, capsys):
    source, model, out = str(place / "rows.jsonl"), place / "tokenizer.model", place / "divided"
    data(source, tokenizer=model, out=out, field="body", workers=0, held_out=0.1)
    train, val, whole = (open_tokens(part) for part in (out / "train", out / "val", place / "one"))
    assert train.n_documents + val.n_documents == 300 and 10 < val.n_documents < 60
    assert train.n_tokens + val.n_tokens == whole.n_tokens
    with pytest.raises(UserError, match=r"no document of .* falls into a share"):
        data(source, tokenizer=model, out=place / "none", field="body", held_out=1e-9)
    with pytest.raises(UserError, match="--held-out is 1;"):
        data(source, tokenizer=model, out=place / "none", field="body", held_out=1.0)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({}, "give one of --source SOURCE"),
        ({"source": "builtin", "check": "x"}, "give one of --source SOURCE"),
        ({"source": "builtin"}, "give --tokenizer"),
        ({"check": "nowhere"}, "there is no folder"),
        ({"check": "nowhere.toml"}, "cannot be read"),
    ],
)
def test_mistakes_are_told(place, arguments, words, monkeypatch):
    from pathlib import Path

    monkeypatch.chdir(place)
    if "check" in arguments:
        arguments = {**arguments, "check": Path(arguments["check"])}
    with pytest.raises(UserError, match=words):
        data(**arguments)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"tokens": float("nan")}, "--tokens is nan"), ({"tokens": -5}, "--tokens is -5")]
    + [({"seq_len": 0}, "--seq-len is 0")]
    + [({"shard_mb": float(x)}, f"--shard-mb is {x}") for x in ("nan", "inf", "0")],
)
def test_numbers_without_a_meaning_are_refused_at_once(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        data(check=tmp_path / "nowhere", **options)
